"""Networks as people have them: what is done to them later, other types, what cannot be read."""

from __future__ import annotations

import re
import sys
import time
import types
import urllib.error
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from featcache.errors import BackboneError, TapError, WeightsError
from featcache.extraction.extract import extract
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.pixels.preprocessing import Preprocessing
from featcache.store.store import FeatureStore
from tests.cli.test_cli import fail, succeed
from tests.small import SIDE, TAP, folder, network, put_into_hub_cache

PREPROCESSING = Preprocessing(resize=SIDE, crop=SIDE)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("given") / "images", 12)


def given(module: nn.Module, *layers: str) -> Backbone:
    return Backbone(module, preprocessing=PREPROCESSING, layers=layers or None)


def test_the_module_of_a_callable_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    own = network().train()
    place = types.ModuleType("networks_of_a_user")
    place.build = lambda: (own, PREPROCESSING)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "networks_of_a_user", place)
    backbone = Backbone("networks_of_a_user:build", layers=["pool"])
    before = backbone.fingerprint()
    assert own.training
    assert all(p.requires_grad for p in own.parameters())
    with torch.no_grad():
        own.stem.weight.add_(1)
    assert backbone.fingerprint() == before
    assert Backbone("networks_of_a_user:build", layers=["pool"]).fingerprint() != before


def test_an_untrained_network_is_called_so(images: Path, tmp_path: Path) -> None:
    drawn = ("--backbone", "squeezenet1_1", "--weights", "none", "--image-size", SIDE)
    asked = ("extract", images, "-o", tmp_path / "a.h5", *drawn)
    line = "The weights of squeezenet1_1 are drawn at random"
    assert line in succeed(*asked)
    assert line in succeed(*asked)  # nothing to do
    assert line in succeed("info", tmp_path / "a.h5")
    ridge = ("--head", "ridge", "--cv", "2")
    assert line in succeed("train", tmp_path / "a.h5", "-o", tmp_path / "p", *ridge)
    own = ("--backbone", "tests.small:own", "--layer", "pool")
    assert "random" not in succeed("extract", images, "-o", tmp_path / "b.h5", *own)
    assert "random" not in succeed("info", tmp_path / "b.h5")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_networks_of_other_types_are_computed_in_float32(
    dtype: torch.dtype, images: Path, tmp_path: Path
) -> None:
    shown = ImageSet.open(images)
    rounded = network().to(dtype)
    store = extract(shown, given(rounded, "pool"), tmp_path / "a.h5", device="cpu")
    plain = extract(shown, given(network().to(dtype).float(), "pool"), tmp_path / "b.h5")
    np.testing.assert_array_equal(store.load()[0], plain.load()[0])
    assert next(rounded.parameters()).dtype is dtype


@pytest.fixture
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"), torch.inference_mode():
        yield
    torch.set_default_dtype(torch.float32)


class Making(nn.Module):
    """It makes tensors while it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x * torch.linspace(0, 1, SIDE)).flatten(1)


@pytest.mark.parametrize("kind", ["squeezenet1_1", "module"])
def test_a_program_with_other_defaults_gets_the_same_features(
    kind: str, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    torch.manual_seed(0)
    module = Making()

    def features(path: Path) -> tuple[np.ndarray, str]:
        if kind == "module":
            backbone = given(module, "stem")
        else:
            backbone = Backbone(kind, weights=None, image_size=SIDE)
        store = extract(ImageSet.open(images), backbone, path, device="cpu")
        return store.load()[0], store.fingerprint.state_sha256

    X, state = features(tmp_path / "a.h5")
    request.getfixturevalue("other_defaults")
    Y, same = features(tmp_path / "b.h5")
    np.testing.assert_array_equal(X, Y)
    assert state == same
    assert torch.get_default_dtype() is torch.float64
    assert torch.get_default_device().type == "meta"
    assert torch.is_inference_mode_enabled()


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.LazyLinear(5))


def weight_normed() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 1))
    layer(torch.zeros(1, 3, 4, 4))
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (scripted, "is TorchScript, whose layers cannot be read"),
        (lazy, r"without a shape: 2\.weight, 2\.bias\. Run it once"),
        (weight_normed, r"remove_weight_norm on them"),
    ],
)
def test_networks_that_cannot_be_used_are_refused_in_one_line(
    make: Callable[[], nn.Module], hint: str
) -> None:
    with pytest.raises(BackboneError, match=hint) as caught:
        given(make())
    assert len(str(caught.value).splitlines()) == 1


def test_parametrized_weight_norm_is_copied() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))
    assert given(nn.Sequential(layer, nn.ReLU()), "1").shapes == {"1:output:mean": (4,)}


# --- which axis holds the channels ----------------------------------------------------------------


class Positions(nn.Module):
    """Maps as channels of positions, in several ways, then as tokens."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 5)
        self.how, self.out, self.flat = how, nn.Identity(), nn.Flatten(2)
        self.norm, self.mix = nn.BatchNorm1d(7), nn.Linear(784, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (b, 7, 28, 28)
        if self.how == "layer":
            x = self.norm(self.flat(x))
        elif self.how == "reshape":
            x = x.reshape(len(x), 7, -1)
        elif self.how == "mixed":
            x = self.mix(x.flatten(2))
        elif self.how == "tokens":
            x = x.flatten(2).transpose(1, 2)
        elif self.how == "lost":
            x = torch.stack([x[:, k].flatten(1) for k in range(7)], 1)
        return self.out(x)


@pytest.mark.parametrize("how", ["layer", "reshape", "mixed", "tokens"])
@pytest.mark.parametrize("reduce", ["", ":mean", ":max"])
def test_channels_of_positions_are_reduced_over_the_positions(how: str, reduce: str) -> None:
    backbone = given(Positions(how), f"out{reduce}")
    assert list(backbone.shapes.values()) == [(7,)]
    x = torch.rand(2, 3, SIDE, SIDE)
    whole, (point,) = backbone.module(x), backbone.points
    axis = 1 if how == "tokens" else 2
    expected = whole.amax(axis) if reduce == ":max" else whole.mean(axis)
    torch.testing.assert_close(point.reduce(whole), expected)


def test_where_the_axis_cannot_be_told_the_user_is_asked() -> None:
    for reduce in ("", ":mean", ":max"):
        with pytest.raises(TapError, match=r"cannot be told\. Write out:output:flatten or"):
            _ = given(Positions("lost"), f"out{reduce}").taps
    assert given(Positions("lost"), "out:map").shapes == {"out:output:map": (7, 784)}
    for reduce in ("cls", "patches"):
        with pytest.raises(TapError, match="7 channels of 784 positions, not tokens"):
            _ = given(Positions("layer"), f"out:{reduce}").taps


# --- one tap, many spellings ----------------------------------------------------------------------


@pytest.mark.parametrize("typed", ["body:mean", "body", "body:output", "body#1", "body#1:mean"])
@pytest.mark.parametrize("again", ["body:mean", "body#1:output:mean", "Network/body:mean"])
def test_every_entrance_understands_every_spelling(
    typed: str, again: str, images: Path, tmp_path: Path
) -> None:
    shown, path = ImageSet.open(images), tmp_path / "a.h5"
    extract(shown, given(network(), typed), path, device="cpu")
    store = FeatureStore.open(path)
    assert store.resolve(typed) == ["body:output:mean"]
    other = extract(shown, given(nn.Sequential(nn.Conv2d(3, 4, 3)), "0"), tmp_path / "b.h5")
    joined = FeatureStore.join([store, other])
    assert joined.resolve([again, "0:mean"]) == [
        "Network/body:output:mean",
        "Sequential/0:output:mean",
    ]
    if not again.startswith("Network"):
        asked = ("train", path, "-o", tmp_path / "p", "--head", "ridge", "--cv", "2")
        succeed(*asked, "--layer", again)


def test_a_spelling_means_what_it_meant_when_it_was_extracted(images: Path, tmp_path: Path) -> None:
    layers = ("pool:mean", "body", "body:max", "head:input", "head")
    extract(ImageSet.open(images), given(network(), *layers), tmp_path / "a.h5", device="cpu")
    store = FeatureStore.open(tmp_path / "a.h5")
    full = [TAP, "body:output:mean", "body:output:max", "head:input:flatten", "head:output:flatten"]
    assert store.resolve(layers) == full
    assert store.resolve(["head:flatten", "pool"]) == [full[4], TAP]
    said = fail(
        "train", tmp_path / "a.h5", "-o", tmp_path / "p", "--cv", "2", "--layer", "stem:mean"
    )
    assert "holds no features 'stem:mean'" in said


# --- weights without a network --------------------------------------------------------------------


def test_timm_without_a_network_looks_into_its_cache_and_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")

    def wait(seconds: float) -> None:
        raise AssertionError("it waits to try again")

    monkeypatch.setattr(time, "sleep", wait)
    with pytest.raises(
        WeightsError, match=r"not in the cache, and \S+:9 cannot be reached"
    ) as caught:
        _ = Backbone("timm/test_vit").module
    assert len(str(caught.value).splitlines()) == 1
    assert constants.HF_HUB_OFFLINE is False
    state = timm.create_model("test_vit").state_dict()
    put_into_hub_cache(tmp_path, "test_vit.r160_in1k", state)
    module = Backbone("timm/test_vit").module
    assert torch.equal(module.state_dict()["head.bias"], state["head.bias"])


def test_torchvision_without_a_network_does_not_speak_of_a_damaged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(WeightsError, match=r"Without a network, put the file into") as caught:
        _ = Backbone("squeezenet1_1").module
    assert "damaged" not in str(caught.value)
    file = tmp_path / "checkpoints" / Path(get_model_weights("squeezenet1_1")["DEFAULT"].url).name
    file.write_bytes(b"half of it")
    with pytest.raises(WeightsError, match=rf"{re.escape(str(file))} is damaged: delete it"):
        _ = Backbone("squeezenet1_1").module
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), file)
    _ = Backbone("squeezenet1_1").module
