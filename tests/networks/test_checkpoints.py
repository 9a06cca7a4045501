"""Weights from a file: the right ones, and all that the tap needs, or none."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from featcache.errors import WeightsError
from featcache.extraction.extract import extract
from featcache.fingerprint import state_sha256
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.checkpoints import read_checkpoint
from featcache.pixels.preprocessing import Preprocessing
from featcache.store.store import FeatureStore
from tests.cli.test_cli import fail, succeed
from tests.small import SIDE, folder, network

State = dict[str, Tensor]


def state(seed: int = 1) -> State:
    return dict(network(seed=seed).state_dict())


def prefixed(prefix: str, values: State) -> State:
    return {prefix + name: value for name, value in values.items()}


def load(path: Path, content: Any, **options: Any) -> Backbone:
    """Return the small network with the weights of a checkpoint with this content."""
    torch.save(content, path)
    preprocessing = Preprocessing(resize=SIDE, crop=SIDE)
    options = {"layers": ["pool"], "weights": path, **options}
    return Backbone(network(), preprocessing=preprocessing, **options)


def digest(backbone: Backbone) -> str:
    return backbone.fingerprint().state_sha256


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("checkpoints") / "images", 12)


PREFIXES = ["_orig_mod.", "net.", "network.", "encoder.", "module.encoder_q.", "a.b.c.d."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("nested", [(), ("weights",), ("checkpoint", "ema")])
def test_any_prefix_and_any_dictionary_is_found(
    prefix: str, nested: tuple[str, ...], tmp_path: Path
) -> None:
    content: Any = prefixed(prefix, state())
    for name in nested:
        content = {name: content, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
    backbone = load(tmp_path / "w.pth", content)
    assert digest(backbone) == state_sha256(state())
    report: Any = backbone.fingerprint().checkpoint
    assert not (report["missing"] or report["unexpected"] or report["mismatched"])


def test_two_keys_that_become_one_are_refused(tmp_path: Path) -> None:
    content = {**prefixed("model.", state(1)), "stem.weight": state(2)["stem.weight"]}
    with pytest.raises(WeightsError, match=r"model\.stem\.weight and stem\.weight.*--weights-key"):
        _ = load(tmp_path / "w.pth", content).module
    chosen = load(tmp_path / "w.pth", content, weights_key="model")
    assert digest(chosen) == state_sha256(state(1))


def test_of_several_sets_of_weights_one_must_be_named(tmp_path: Path) -> None:
    dino = {
        "student": prefixed("module.backbone.", state(1)),
        "teacher": prefixed("backbone.", state(2)),
        "epoch": 100,
    }
    moco = {
        "state_dict": OrderedDict(
            **prefixed("module.encoder_q.", state(1)),
            **prefixed("module.encoder_k.", state(2)),
            **{"module.queue": torch.zeros(4, 8)},
        )
    }
    for content, names, key in (
        (dino, r"student/module\.backbone, teacher/backbone", "teacher"),
        (moco, r"module\.encoder_k, state_dict/module\.encoder_q", "state_dict/module.encoder_k"),
        (moco, r"module\.encoder_k, state_dict/module\.encoder_q", "module.encoder_k"),
    ):
        with pytest.raises(WeightsError, match=rf"{names}\. Choose one with --weights-key"):
            _ = load(tmp_path / "w.pth", content).module
        assert digest(load(tmp_path / "w.pth", content, weights_key=key)) == state_sha256(state(2))
        with pytest.raises(WeightsError, match=rf"under 'ema'\. Those that fit: .*{names}"):
            _ = load(tmp_path / "w.pth", content, weights_key="ema").module


def test_the_set_that_is_named_is_used_again_by_a_predictor(images: Path, tmp_path: Path) -> None:
    file, store = tmp_path / "dino.pth", tmp_path / "a.h5"
    torch.save({"student": state(1), "teacher": state(2)}, file)
    own = ("--backbone", "tests.small:own", "--weights", file)
    asked = ("extract", images, "-o", store, *own, "--layer", "pool")
    assert "--weights-key student" in fail(*asked)
    succeed(*asked, "--weights-key", "teacher")
    assert FeatureStore.open(store).fingerprint.state_sha256 == state_sha256(state(2))
    succeed("train", store, "-o", tmp_path / "p", "--head", "ridge", "--cv", "2")
    assert "ant" in succeed("predict", tmp_path / "p", images / "ant", *own)


def test_what_training_scripts_keep_beside_the_weights_is_read(tmp_path: Path) -> None:
    beside = {
        "args": argparse.Namespace(lr=0.1, arch="resnet50"),
        "best": np.float64(0.9),
        "seen": np.int64(3),
        "flag": np.bool_(True),
    }
    assert digest(load(tmp_path / "w.pth", {"model": state(), **beside})) == state_sha256(state())


def test_other_objects_are_named(tmp_path: Path) -> None:
    content = {"model": state(), "where": Path("runs")}
    with pytest.raises(WeightsError, match=r"besides weights \(pathlib.*Path\)") as caught:
        _ = load(tmp_path / "w.pth", content).module
    assert "\x1b" not in str(caught.value) and str(caught.value).endswith("as .safetensors.")


def test_files_that_are_no_checkpoint_say_what_they_are(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch finds its own format outdated
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pth")
    (tmp_path / "junk.pth").write_bytes(b"jklmnop hello there")
    (tmp_path / "empty.pth").touch()
    for name, said in (
        ("script", r"is TorchScript.*torch\.save\(network\.state_dict\(\), FILE\)"),
        ("junk", r"junk\.pth is damaged or no PyTorch checkpoint\.$"),
        ("empty", r"empty\.pth is damaged or no PyTorch checkpoint\.$"),
    ):
        with pytest.raises(WeightsError, match=said):
            read_checkpoint(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.parametrize("aux", [True, False])
def test_auxiliary_heads_are_found_behind_a_prefix(name: str, aux: bool, tmp_path: Path) -> None:
    given = get_model(name, weights=None, init_weights=False).state_dict()
    kept = {key: value for key, value in given.items() if aux or not key.lower().startswith("aux")}
    torch.save({"state_dict": prefixed("module.", kept)}, tmp_path / "w.pth")
    backbone = Backbone(name, weights=tmp_path / "w.pth")
    assert digest(backbone) == state_sha256(kept)


# --- a file that fits in part ---------------------------------------------------------------------


@pytest.mark.parametrize("head", ["other classes", "missing", "deeper"])
def test_what_lies_behind_the_tap_may_be_missing_and_is_counted(
    head: str, images: Path, tmp_path: Path
) -> None:
    values = state()
    weight = values.pop("head.weight"), values.pop("head.bias")
    if head == "other classes":
        values |= {"head.weight": torch.zeros(7, 16), "head.bias": torch.zeros(7)}
    elif head == "deeper":
        values |= {"head.0.weight": weight[0], "projector.weight": weight[0]}
    torch.save(values, tmp_path / "w.pth")
    own = ("--backbone", "tests.small:own", "--weights", tmp_path / "w.pth")
    said = succeed("extract", images, "-o", tmp_path / "a.h5", *own, "--layer", "pool")
    line = "7 of 9 parameters of tests.small:own were loaded from w.pth"
    assert line in said
    assert "random" not in said
    # the output of the whole network is another matter
    with pytest.raises(WeightsError, match=r"--partial"):
        _ = Backbone("tests.small:own", weights=tmp_path / "w.pth", layers=[":output"]).module


def test_a_file_that_fits_is_counted_too(images: Path, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.pth")
    own = ("--backbone", "tests.small:own", "--weights", tmp_path / "w.pth", "--layer", "pool")
    asked = ("extract", images, "-o", tmp_path / "a.h5", *own)
    line = "9 of 9 parameters of tests.small:own were loaded from w.pth"
    assert succeed(*asked).splitlines()[-1] == line
    assert json.loads(succeed(*asked, "--json"))["notes"] == [line]
    assert line in succeed("info", tmp_path / "a.h5")


def test_layers_are_listed_of_a_network_that_the_file_fits(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    asked = ("layers", "tests.small:own", "--weights", file)
    file.write_text("id,label\n")
    assert "w.pth is damaged" in fail(*asked)
    torch.save({"another.weight": torch.zeros(3)}, file)
    assert "shares no parameter with the network" in fail(*asked)
    values = state()
    del values["body.weight"]
    torch.save({"student": values, "teacher": values}, file)
    assert "--weights-key" in fail(*asked)
    assert "--partial" in fail(*asked, "--weights-key", "teacher")
    found = succeed(*asked, "--weights-key", "teacher", "--partial")
    assert found == succeed("layers", "tests.small:own")


@pytest.mark.parametrize("lost", ["body.weight", "norm2.weight", "norm2.running_mean"])
def test_layers_before_the_tap_are_never_left_at_random_in_silence(
    lost: str, images: Path, tmp_path: Path
) -> None:
    values = state()
    del values[lost]
    torch.save(values, tmp_path / "w.pth")
    own = ("--backbone", "tests.small:own", "--weights", tmp_path / "w.pth", "--layer", "pool")
    asked = ("extract", images, "-o", tmp_path / "a.h5", *own)
    said = fail(*asked)
    assert f"At random would be, before the tap: {lost}" in said
    assert "--partial" in said
    warning = f"w.pth leaves layers of tests.small:own before the tap at random: {lost}"
    assert warning in succeed(*asked, "--partial")
    assert warning in succeed("info", tmp_path / "a.h5")
    ridge = ("--head", "ridge", "--cv", "2")
    assert warning in succeed("train", tmp_path / "a.h5", "-o", tmp_path / "p", *ridge)
    # before an earlier tap nothing is missing
    stem = Backbone("tests.small:own", weights=tmp_path / "w.pth", layers=["stem"])
    assert stem.fingerprint().warnings == []


def test_a_file_with_more_layers_before_the_tap_is_another_network(tmp_path: Path) -> None:
    content = {**state(), "body.gate.weight": torch.zeros(2)}
    with pytest.raises(WeightsError, match=r"lack, of the file: body\.gate\.weight"):
        _ = load(tmp_path / "w.pth", content).module
    assert digest(load(tmp_path / "w.pth", content, partial=True)) == state_sha256(state())


class Functional(nn.Module):
    """Parameters that no layer's own forward uses; the last ones are used behind the tap."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale[:, None, None]
        x = nn.functional.conv2d(x, self.first.weight, self.first.bias)
        return nn.functional.linear(self.pool(x).flatten(1), self.second.weight, self.second.bias)


@pytest.mark.parametrize("lost", ["scale", "first.weight", "second.weight"])
def test_what_the_tap_needs_is_known_where_no_layer_uses_its_parameters(
    lost: str, tmp_path: Path
) -> None:
    values = Functional().state_dict()
    del values[lost]
    torch.save(values, tmp_path / "w.pth")
    preprocessing = Preprocessing(resize=SIDE, crop=SIDE)
    given = {"preprocessing": preprocessing, "layers": ["pool"], "weights": tmp_path / "w.pth"}
    if lost == "second.weight":
        assert Backbone(Functional(), **given).fingerprint().warnings == []
        return
    with pytest.raises(WeightsError, match=f"before the tap: {lost}"):
        _ = Backbone(Functional(), **given).module


# --- the same file under another name -------------------------------------------------------------


def test_a_checkpoint_is_known_by_its_bytes_and_read_only_if_it_may_have_changed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), tmp_path / "first.pth")
    shown, path = ImageSet.open(images), tmp_path / "a.h5"

    def run(name: str) -> Any:
        network = Backbone("squeezenet1_1", weights=tmp_path / name, image_size=SIDE)
        return extract(shown, network, path, device="cpu").extraction

    read: list[str] = []
    real = hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, *a: read.append(file.name) or real(file, *a)
    )
    assert run("first.pth").computed == 12
    assert len(read) == 1
    assert run("first.pth").skipped
    (tmp_path / "first.pth").rename(tmp_path / "renamed.pth")
    assert run("renamed.pth").skipped
    assert len(read) == 1  # size, inode and time are the same
    shutil.copy(tmp_path / "renamed.pth", tmp_path / "copy.pth")
    assert run("copy.pth").skipped
    assert len(read) == 2
    assert FeatureStore.open(path).fingerprint.weights == "first.pth"
    # other bytes of the same size, with the time put back, in another file
    before = (tmp_path / "copy.pth").stat()
    torch.manual_seed(2)
    torch.save(get_model("squeezenet1_1", weights=None).state_dict(), tmp_path / "other.pth")
    (tmp_path / "other.pth").replace(tmp_path / "copy.pth")
    os.utime(tmp_path / "copy.pth", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(Exception, match=r"state_sha256:"):
        run("copy.pth")
