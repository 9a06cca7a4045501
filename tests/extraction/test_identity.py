"""Features are those of the network that was named, and of the image alone, or there are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featcache.errors import ExtractionError, FingerprintMismatch
from featcache.extraction.extract import extract
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Runtime
from featcache.pixels import canary
from featcache.pixels.preprocessing import Preprocessing
from featcache.store.store import FeatureStore
from tests.small import SIDE, TAP, Network, backbone, folder, photograph


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    return ImageSet.open(folder(tmp_path_factory.mktemp("identity") / "images", 12))


class Tanh(Network):
    """The same weights, other code."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.stem(x)))
        x = self.relu(self.norm2(self.body(x)))
        return self.head(torch.flatten(self.pool(x), 1))


class Scaled(Network):
    """A buffer that is in no state_dict."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(self.factor), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


class Twice(Scaled):
    factor = 2.0


@pytest.mark.parametrize(("first", "second"), [(Network, Tanh), (Scaled, Twice)])
@pytest.mark.parametrize("grown", [False, True], ids=["the same images", "fewer images"])
def test_other_code_with_the_same_weights_is_another_network(
    images: ImageSet, tmp_path: Path, first: type, second: type, grown: bool
) -> None:
    path, name = tmp_path / "a.h5", "same"
    preprocessing = Preprocessing(resize=SIDE, crop=SIDE)
    networks = [backbone(kind) for kind in (first, second)]
    networks = [
        Backbone(n.module, preprocessing=preprocessing, layers=["pool"], name=name)
        for n in networks
    ]
    before = extract(images, networks[0], path, device="cpu").load()[0]
    # the same code is the same network
    fewer = images.select(np.arange(10)) if grown else images
    with pytest.raises(FingerprintMismatch, match="the code of the network is another"):
        extract(fewer, networks[1], path, device="cpu")
    np.testing.assert_array_equal(FeatureStore.open(path).load()[0], before)
    again = extract(fewer, networks[0], path, device="cpu")
    assert again.extraction.computed == 0
    # a run that computed nothing keeps what shows that the network is another
    with pytest.raises(FingerprintMismatch, match="the code of the network is another"):
        extract(images, networks[1], path, device="cpu")
    assert FeatureStore.open(path).meta["settings"]["batch_size"]


@pytest.mark.parametrize("other_encoder", [False, True])
def test_a_store_does_not_grow_with_another_decoder(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_encoder: bool
) -> None:
    path = tmp_path / "a.h5"
    extract(images.select(np.arange(8)), backbone(), path, device="cpu")
    extract(images.select(np.arange(9)), backbone(), path, device="cpu")
    if other_encoder:
        drawn = canary.images()[::-1]
        monkeypatch.setattr(canary, "images", lambda: drawn)
    right = Preprocessing.__call__
    monkeypatch.setattr(Preprocessing, "__call__", lambda *args, **more: 255 - right(*args, **more))
    with pytest.raises(FingerprintMismatch, match="decodes"):
        extract(images, backbone(), path, device="cpu")


class Outputs(nn.Module):
    """A convolution whose output is normalised, and used once more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.pool(self.norm(x) + 0.2 * x.abs())


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_wrong_copy_is_refused_in_half_precision_as_well(precision: str) -> None:
    network = backbone(Outputs)
    assert not Runtime(network, device="cpu", precision=precision).settings.folded


PRECISIONS = (
    "torch.backends.fp32_precision",
    "torch.backends.cudnn.fp32_precision",
    "torch.backends.mkldnn.matmul.fp32_precision",
)


@pytest.fixture
def restored() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    for name in PRECISIONS:
        exec(f"{name} = 'none'")
    torch.backends.cudnn.allow_tf32 = before[1]
    # as before the program set anything
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.usefixtures("restored")
def test_the_programs_own_precision_is_put_aside_and_restored(name: str) -> None:
    network, pixels = backbone(), np.full((1, 3, SIDE, SIDE), 77, np.uint8)
    expected = Runtime(network, device="cpu")(pixels)[TAP]
    exec(f"{name} = 'tf32'" if "mkldnn" not in name else f"{name} = 'bf16'")
    before = eval(name)
    np.testing.assert_array_equal(Runtime(network, device="cpu")(pixels)[TAP], expected)
    assert eval(name) == before


def test_eighty_long_names_of_layers_fit_the_file(images: ImageSet, tmp_path: Path) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for k in range(80):
                self.add_module(f"a_layer_with_a_very_long_name_{k:04d}", nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.children():
                x = layer(x)
            return x

    names = [f"a_layer_with_a_very_long_name_{k:04d}:mean" for k in range(80)]
    network = backbone(Deep, layers=names)
    store = extract(images, network, tmp_path / "a.h5", device="cpu")
    assert len(store.taps) == 80 and FeatureStore.open(tmp_path / "a.h5").verify().ok


# --- a function of the image ----------------------------------------------------------------------


class Dropout(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.2, training=True))


class BatchStatistics(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - x.mean(dim=0)) / (1 + x.std(dim=0, correction=0)))


VARYING = [(Dropout, "two runs"), (BatchStatistics, "beside other images")]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "why"), VARYING)
def test_features_that_are_no_function_of_the_image_are_refused(
    images: ImageSet, tmp_path: Path, kind: type[nn.Module], why: str, precision: str
) -> None:
    options = {"device": "cpu", "precision": precision}
    for count in (1, 12):
        chosen = images.select(np.arange(count))
        with pytest.raises(ExtractionError, match=rf"no function of the image: .*{why}") as error:
            extract(chosen, backbone(kind), tmp_path / "a.h5", **options)
        assert "accept_varying=True" in str(error.value)
    store = extract(images, backbone(kind), tmp_path / "b.h5", accept_varying=True, **options)
    assert store.fingerprint.varying
    assert not extract(images, backbone(), tmp_path / "c.h5", **options).fingerprint.varying
    more = ImageSet.from_files([photograph(tmp_path / "more.jpg", 99)])
    again = {"accept_varying": True, "allow_removal": True}
    extract(more, backbone(kind), tmp_path / "b.h5", **again, **options)


class Large(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 1e8)


def test_features_that_overflow_in_half_precision_are_said_before_the_first(
    images: ImageSet, tmp_path: Path
) -> None:
    path, options = tmp_path / "a.h5", {"device": "cpu"}
    with pytest.raises(ExtractionError, match=r"finite in float32\. Type --precision bf"):
        extract(images, backbone(Large), path, precision="float16", **options)
    extract(images, backbone(Large), path, precision="bfloat16", **options)


def test_weights_that_are_not_finite_are_blamed_not_the_images(
    images: ImageSet, tmp_path: Path
) -> None:
    network = backbone()
    with torch.no_grad():
        network.module.body.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ExtractionError, match=r"weights are not finite \(first: body.weight\)"):
        extract(images, network, tmp_path / "a.h5", device="cpu")
