"""3 x 3 convolutions by F(4 x 4, 3 x 3): the same numbers, and used only where they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featcache.networks import winograd
from featcache.networks.forward import Runtime, Settings
from featcache.networks.winograd import WinogradConv2d, suits
from tests.small import SIDE, backbone


def maps(n: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, channels, height, width, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(8, 8), (9, 14), (3, 5), (4, 31), (1, 1)])
@pytest.mark.parametrize("padding", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_the_direct_convolution_does(
    size: tuple[int, int], padding: int, bias: bool
) -> None:
    torch.manual_seed(1)
    direct = nn.Conv2d(12, 20, 3, padding=padding, bias=bias)
    x = maps(2, 12, *size)
    with torch.inference_mode():
        found = WinogradConv2d(direct)(x)
        expected = direct.double()(x.double())
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def test_without_padding_the_result_is_smaller() -> None:
    direct = nn.Conv2d(4, 4, 3)
    x = maps(1, 4, 7, 6)
    with torch.inference_mode():
        torch.testing.assert_close(WinogradConv2d(direct)(x), direct(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 5, padding=2),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, dtype=torch.bfloat16),
        nn.Linear(4, 4),
    ],
)
def test_other_layers_are_left_alone(layer: nn.Module) -> None:
    assert suits(nn.Conv2d(4, 4, 3, padding=1))
    assert not suits(layer)


class Wide(nn.Module):
    """Two wide convolutions behind a narrow one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 256, 1, stride=2)
        self.first = nn.Conv2d(256, 256, 3, padding=1)
        self.second = nn.Conv2d(256, 256, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.stem(x)).relu())
        return torch.flatten(self.pool(x.relu()), 1)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_is_faster", lambda *_: True)


@pytest.mark.usefixtures("fast")
def test_large_convolutions_are_computed_so_and_the_choice_is_recorded() -> None:
    taken = backbone(Wide)
    runtime = Runtime(taken, device="cpu", batch_size=4, count=300)
    assert runtime.settings.winograd == ("first", "second")
    assert Settings.from_dict(runtime.settings.to_dict()) == runtime.settings
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, SIDE, SIDE), dtype=np.uint8)
    (found,) = runtime(pixels).values()
    plain = Runtime(taken, device="cpu", batch_size=4)
    assert plain.settings.winograd == ()
    (expected,) = plain(pixels).values()
    assert 0 < np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    again = Runtime(taken, device="cpu", settings=runtime.settings)
    np.testing.assert_array_equal(next(iter(again(pixels).values())), found)


@pytest.mark.usefixtures("fast")
def test_where_features_would_differ_too_much_it_is_not_used() -> None:
    taken = backbone(Wide, layers=["second:map"])  # nothing averages the rounding away
    assert Runtime(taken, device="cpu", batch_size=4, count=300).settings.winograd == ()


@pytest.mark.usefixtures("fast")
def test_it_is_for_float32_and_long_runs() -> None:
    taken = backbone(Wide)
    for options in ({"precision": "bfloat16", "count": 300}, {"count": 200}, {}):
        runtime = Runtime(taken, device="cpu", batch_size=4, **options)
        assert runtime.settings.winograd == ()


def test_whether_it_is_faster_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_SHARE", 1e9)
    assert winograd._is_faster(8, 8, (1, 1), 14, 14)
    monkeypatch.setattr(winograd, "_SHARE", 0.0)
    assert not winograd._is_faster(8, 8, (1, 1), 14, 14)
