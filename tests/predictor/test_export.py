from __future__ import annotations

import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from featcache import Backbone, ImageSet, Preprocessing, extract, train
from featcache.cli.main import main
from featcache.errors import MissingExtra, OutputError, PredictorError
from featcache.finetuning.settings import SuffixSettings
from featcache.heads.base import FittedHead
from featcache.heads.calibration import Calibration
from featcache.heads.steps import Matrix, Power, Relu, Scale, Step, Unit
from featcache.predictor.export import METADATA, _Served, export_model
from featcache.predictor.predictor import Predictor
from featcache.store.store import FeatureStore

PREPARE = Preprocessing(resize=36, crop=32, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
LAYERED = ["linear", "svm", "ridge", "mlp"]


def small() -> Backbone:
    """Return a network whose classifier is most of it, with an in-place layer behind the tap."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.ReLU(inplace=True),
            nn.Linear(16, 20_000),
        ).eval()
    return Backbone(network, preprocessing=PREPARE, name="small", layers=["3:output:mean", "5"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def store(flower_folder: Path, folder: Path) -> FeatureStore:
    images = ImageSet.from_folder(flower_folder)
    return extract(images, small(), folder / "a.h5", workers=0, progress=False)


@pytest.fixture(scope="module")
def predictor(store: FeatureStore) -> Predictor:
    found = train(store, head="linear", cv=3)
    tilted = Calibration(found.calibration.temperature, (0.4, 0.0, -0.4))
    return replace(found, calibration=tilted)


@pytest.fixture(scope="module")
def pixels(flower_folder: Path) -> np.ndarray:
    """Return all images as the model takes them: uint8 (n, c, h, w)."""
    files = sorted(flower_folder.glob("*/*.jpg"))
    return np.stack([PREPARE(file.read_bytes()) for file in files])


# --- as a torch module -------------------------------------------------------------------------


def test_logits_are_there_to_train_the_head_further(
    predictor: Predictor, store: FeatureStore, pixels: np.ndarray
) -> None:
    network = predictor.attach(small()).to_torch(probabilities=False)
    images = PREPARE.normalize(torch.from_numpy(pixels))
    logits = network(images)
    np.testing.assert_allclose(
        logits.softmax(1).detach().numpy(), predictor.predict_proba_of(store), atol=1e-5
    )
    truth = torch.tensor([predictor.classes.index(label) for label in store.labels])
    before = nn.functional.cross_entropy(logits, truth)
    before.backward()
    trainable = [p for p in network.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in network.head.parameters()}
    with torch.no_grad():
        for parameter in trainable:
            assert parameter.grad is not None
            parameter -= 0.01 * parameter.grad
    assert nn.functional.cross_entropy(network(images), truth) < before


def matrix(out: int, width: int) -> Matrix:
    rng = np.random.default_rng(out)
    return Matrix(rng.normal(size=(out, width)), rng.normal(size=out))


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(
    "treatment",
    [
        [Scale(np.arange(8.0), np.arange(1.0, 9.0))],
        [Scale(np.arange(8.0), np.arange(1.0, 9.0)), matrix(8, 8)],
        [Unit()],
        [Power(), Scale(np.zeros(8), np.arange(1.0, 9.0))],
        [Power(0.3), Unit()],
        [matrix(7, 8), Relu(), matrix(8, 7)],
        [],
    ],
    ids=lambda steps: "-".join(step.kind for step in steps),
)
def test_every_step_of_layers_is_a_layer(treatment: list[Step], n_classes: int) -> None:
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(90, 8)) * rng.uniform(0.1, 30, 8)).astype(np.float32)
    X[3] = 0
    steps = [
        *treatment,
        Matrix.of_scores(*matrix(n_classes if n_classes > 2 else 1, 8).arrays().values()),
    ]
    layers = nn.Sequential(*(step.module() for step in steps))
    with torch.inference_mode():
        found = layers(torch.from_numpy(X)).numpy()
    expected = FittedHead(steps, np.arange(n_classes)).logits(X)
    assert found.shape == expected.shape == (90, n_classes)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_networks_that_prepare_images_differently_are_refused(
    store: FeatureStore, flower_folder: Path, folder: Path
) -> None:
    other = Backbone("squeezenet1_1", weights=None, image_size=48)
    images = ImageSet.from_folder(flower_folder)
    second = extract(images, other, folder / "b.h5", workers=0, progress=False)
    predictor = train(FeatureStore.join([store, second]), cv=3)
    with pytest.raises(PredictorError, match="prepare images differently"):
        predictor.attach([small(), other]).to_torch()


# --- as a file ---------------------------------------------------------------------------------


def test_pt2_gives_the_predictors_probabilities(
    predictor: Predictor, store: FeatureStore, pixels: np.ndarray, tmp_path: Path
) -> None:
    target = tmp_path / "model.pt2"
    export_model(predictor.attach(small()), target)
    extra = {METADATA: ""}
    module = torch.export.load(target, extra_files=extra).module()
    for images in (pixels, pixels[:1]):
        found = module(torch.from_numpy(images)).detach().numpy()
        np.testing.assert_allclose(
            found, predictor.predict_proba_of(store)[: len(images)], atol=1e-5
        )
    metadata = json.loads(extra[METADATA])
    logs = np.log(predictor.predict_proba_of(store)) - metadata["calibration"]["bias"]
    labels = predictor.predict_features(store.matrix())
    assert np.array(predictor.classes)[logs.argmax(axis=1)].tolist() == labels.tolist()
    assert metadata["label"].startswith("argmax of log(probabilities) - calibration.bias")
    assert metadata["classes"] == ["daisy", "rose", "tulip"]
    assert Preprocessing.from_dict(metadata["preprocessing"]) == PREPARE
    assert target.stat().st_size < 200_000  # the 20,000 outputs behind the tap are left out


def test_onnx_gives_the_predictors_probabilities(
    predictor: Predictor, store: FeatureStore, pixels: np.ndarray, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'featcache[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'featcache[export]'")
    target = tmp_path / "model.onnx"
    export_model(predictor.attach(small()), target)
    session = runtime.InferenceSession(target, providers=["CPUExecutionProvider"])
    assert [one.name for one in session.get_inputs()] == ["images"]
    assert [one.name for one in session.get_outputs()] == ["probabilities"]
    for images in (pixels, pixels[:1]):
        (found,) = session.run(None, {"images": images})
        np.testing.assert_allclose(
            found, predictor.predict_proba_of(store)[: len(images)], atol=1e-5
        )
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["featcache"])
    assert metadata["classes"] == ["daisy", "rose", "tulip"]
    assert [one.name for one in tmp_path.iterdir()] == ["model.onnx"]

    export_model(predictor.attach(small()), target)  # its own kind is replaced
    target.write_bytes(b"\x08\x07mine")
    with pytest.raises(OutputError, match="is not a model that featcache exported"):
        export_model(predictor.attach(small()), target)
    assert target.read_bytes() == b"\x08\x07mine"


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_a_model_that_differs_from_the_predictor_is_not_written(
    predictor: Predictor, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'featcache[export]'")
    target = tmp_path / f"model{ending}"
    predictor.attach(small())
    forward = _Served.forward
    for wrong in (
        lambda self, images: 1 - forward(self, images),
        lambda self, images: forward(self, images) * np.nan,
    ):
        monkeypatch.setattr(_Served, "forward", wrong)
        with pytest.raises(PredictorError, match=f"the {ending} file gives other values"):
            export_model(predictor, target)
    monkeypatch.setattr(_Served, "forward", forward)
    monkeypatch.setattr("featcache.heads.steps.nn.Linear.forward", lambda self, x: x[:, :3] * 2)
    with pytest.raises(PredictorError, match="the grafted network gives other values"):
        export_model(predictor, target)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".pt2", ".onnx"])
def test_the_rest_of_a_network_is_exported_with_what_comes_before(
    flower_folder: Path, tmp_path: Path, ending: str
) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'featcache[export]'")
    backbone = Backbone("tests.small:own", layers=["body:input:map"])
    images = ImageSet.from_folder(flower_folder)
    store = extract(images, backbone, tmp_path / "maps.h5", workers=0, progress=False)
    suffix = SuffixSettings(epochs=4, batch_size=8, lr=0.02, validation=0)
    predictor = train(store, head="suffix", cv=2, suffix=suffix, backbone=backbone)
    predictor.save(tmp_path / "p.featcache")
    target = tmp_path / f"model{ending}"
    command = ["export-model", str(tmp_path / "p.featcache"), "-o", str(target)]
    result = CliRunner().invoke(main, [*command, "--backbone", "tests.small:own"])
    assert result.exit_code == 0, result.stderr + repr(result.exception)
    expected = predictor.predict_proba(store.matrix())
    assert (expected.argmax(axis=1) == np.searchsorted(predictor.classes, store.labels)).all()
    # As they are decoded, the channels of a pixel lie side by side.
    decoded = np.stack([backbone.preprocessing(images.read(i)) for i in range(len(images))])
    assert not decoded.flags.c_contiguous
    for pixels in (decoded, np.ascontiguousarray(decoded), decoded[:1]):
        if ending == ".pt2":
            module = torch.export.load(target).module()
            found = module(torch.from_numpy(pixels)).detach().numpy()
        else:
            session = runtime.InferenceSession(target, providers=["CPUExecutionProvider"])
            (found,) = session.run(None, {"images": pixels})
        np.testing.assert_allclose(found, expected[: len(pixels)], atol=1e-5)


@pytest.mark.parametrize("name", ["model", "model.pth", "model.ONNX"])
def test_other_endings_are_refused(predictor: Predictor, tmp_path: Path, name: str) -> None:
    with pytest.raises(PredictorError, match=r"to \.onnx or \.pt2"):
        export_model(predictor.attach(small()), tmp_path / name)


def test_a_checkpoint_is_not_replaced(predictor: Predictor, tmp_path: Path) -> None:
    target = tmp_path / "mine.pt2"
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("data.pkl", b"precious")
    content = target.read_bytes()
    with pytest.raises(OutputError, match="is not a model that featcache exported"):
        export_model(predictor.attach(small()), target)
    assert target.read_bytes() == content


def test_without_onnx_the_message_says_what_to_type(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name == "onnxscript" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.delitem(sys.modules, "onnxscript", raising=False)
    with pytest.raises(MissingExtra, match=r"pip install 'featcache\[export\]'"):
        export_model(predictor.attach(small()), tmp_path / "model.onnx")
