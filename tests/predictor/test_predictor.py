from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from featcache import Augmentation, Backbone, ImageSet, Preprocessing, extract, train
from featcache.errors import FingerprintMismatch, ImageSetError, OutputError, PredictorError
from featcache.heads.calibration import Calibration
from featcache.predictor.file import CanaryRows
from featcache.predictor.predictions import Prediction, write_predictions
from featcache.predictor.predictor import Predictor
from featcache.store.store import FeatureStore
from tests.predictor_files import Arrays, parts_of, rewritten

PREPARE = Preprocessing(resize=36, crop=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def network(seed: int = 0) -> nn.Module:
    """Return a small network, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 5),
        ).eval()


def own(seed: int = 0, **options: Any) -> Backbone:
    return Backbone(network(seed), preprocessing=PREPARE, name=f"small{seed}", **options)


def public(**options: Any) -> Backbone:
    """Return a network that has a public name: its weights are drawn from a fixed seed."""
    return Backbone("squeezenet1_1", weights=None, image_size=48, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("predictor")


@pytest.fixture(scope="module")
def images(flower_folder: Path) -> ImageSet:
    return ImageSet.from_folder(flower_folder)


@pytest.fixture(scope="module")
def store(images: ImageSet, folder: Path) -> FeatureStore:
    return extract(images, own(), folder / "own.h5", workers=0, progress=False)


@pytest.fixture(scope="module")
def named_store(images: ImageSet, folder: Path) -> FeatureStore:
    return extract(images, public(), folder / "public.h5", workers=0, progress=False)


@pytest.fixture(scope="module")
def predictor(store: FeatureStore) -> Predictor:
    return train(store, head="svm", cv=3)


@pytest.fixture(scope="module")
def named(named_store: FeatureStore, folder: Path) -> Path:
    """Return the file of a predictor whose network has a public name."""
    path = folder / "named.featcache"
    train(named_store, cv=3).save(path)
    return path


def proba_of(predictions: list[Prediction], classes: tuple[str, ...]) -> np.ndarray:
    return np.array([[dict(one.top)[name] for name in classes] for one in predictions])


# --- prediction --------------------------------------------------------------------------------


def test_a_predictor_goes_from_a_folder_to_labels(
    predictor: Predictor, store: FeatureStore, flower_folder: Path
) -> None:
    found = predictor.attach(own()).predict(flower_folder, top_k=3, workers=0)
    assert [one.id for one in found] == store.ids.tolist()
    # The one path from image to features: what was stored is what is predicted from.
    np.testing.assert_allclose(
        proba_of(found, predictor.classes), predictor.predict_proba_of(store), atol=1e-6
    )
    assert np.mean([one.label == one.id.split("/")[0] for one in found]) > 0.9
    for one in found:
        assert one.top[0] == (one.label, one.probability)
        assert [p for _, p in one.top] == sorted((p for _, p in one.top), reverse=True)
        assert math.isclose(sum(p for _, p in one.top), 1.0, abs_tol=1e-9)


def test_the_label_is_that_of_the_decision_and_comes_first(
    predictor: Predictor, store: FeatureStore, flower_folder: Path, tmp_path: Path
) -> None:
    tilted = replace(predictor, calibration=Calibration(2.0, (0.0, -9.0, 9.0)))
    tilted.save(tmp_path / "p.featcache")
    back = Predictor.load(tmp_path / "p.featcache")
    assert back.calibration == tilted.calibration
    found = back.attach(own()).predict(flower_folder, top_k=3, workers=0)
    labels = [one.label for one in found]
    assert labels == predictor.predict_features(store.matrix()).tolist()
    assert labels == back.predict_features(store.matrix()).tolist()
    proba = back.predict_proba_of(store)
    assert (proba.argmax(axis=1) == 2).all() and set(labels) == {"daisy", "rose", "tulip"}
    np.testing.assert_allclose(proba_of(found, back.classes), proba, atol=1e-6)
    for one in found:
        rest = [p for _, p in one.top[1:]]
        assert one.top[0] == (one.label, one.probability) and rest == sorted(rest, reverse=True)


def test_features_and_images_give_the_same_labels(
    predictor: Predictor, store: FeatureStore, flower_folder: Path
) -> None:
    X, _ = store.load()
    found = predictor.attach(own()).predict(flower_folder, workers=0)
    assert predictor.predict_features(X).tolist() == [one.label for one in found]


def test_files_come_in_the_order_given(predictor: Predictor, flower_folder: Path) -> None:
    files = [flower_folder / name for name in ("tulip/0003.jpg", "daisy/0001.jpg", "rose/0002.jpg")]
    found = predictor.attach(own()).predict([*files, files[0]], workers=0)
    assert [one.id for one in found] == [str(file) for file in (*files, files[0])]
    (single,) = predictor.attach(own()).predict(str(files[0]), workers=0)
    assert single.label == found[0].label
    assert single.probability == pytest.approx(found[0].probability, abs=1e-6)


def test_files_and_folders_can_be_mixed(predictor: Predictor, flower_folder: Path) -> None:
    given = [flower_folder / "rose/0001.jpg", flower_folder / "tulip"]
    found = predictor.attach(own()).predict(given, workers=0)
    assert [one.id for one in found[:2]] == [str(given[0]), str(given[1] / "0000.jpg")]
    assert len(found) == 13


def test_each_image_of_a_list_has_its_prediction_in_order(
    predictor: Predictor, flower_folder: Path
) -> None:
    rose, tulip = (str(flower_folder / name) for name in ("rose/0001.jpg", "tulip/0002.jpg"))
    given = [tulip, rose, tulip, tulip, f"{flower_folder}/./rose/0001.jpg", rose]
    found = predictor.attach(own()).predict(given, workers=0)
    assert [one.id for one in found] == [tulip, rose, tulip, tulip, rose, rose]
    assert len({round(one.probability, 4) for one in found}) == 2
    pictures = [Image.open(name) for name in given]
    assert [one.label for one in predictor.predict(pictures)] == [one.label for one in found]


def test_of_several_sources_the_ids_are_the_paths_as_they_were_given(
    predictor: Predictor, flower_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    picture = flower_folder / "rose/0001.jpg"
    for name in ("a/x.jpg", "b/x.jpg", "b/deep/x.jpg", "c/x.jpg", "d/x.jpg"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, name)
    for folder in "cd":
        with tarfile.open(f"{folder}/t.tar", "w") as tar:
            tar.add(f"{folder}/x.jpg", "x.jpg")
    given = ["a", "b/", "c/t.tar", "d/t.tar", "[cd]/*.jpg", "./a"]
    found = predictor.attach(own()).predict(given, workers=0)
    ids = ["a/x.jpg", "b/deep/x.jpg", "b/x.jpg", "c/t.tar/x.jpg", "d/t.tar/x.jpg"]
    assert [one.id for one in found] == [*ids, "c/x.jpg", "d/x.jpg"]
    assert not any(one.error for one in found)
    assert [one.id for one in predictor.predict(["a"], workers=0)] == ["x.jpg"]


def test_images_that_cannot_be_read_are_reported(
    predictor: Predictor, flower_folder: Path, tmp_path: Path
) -> None:
    good = (flower_folder / "rose/0001.jpg").read_bytes()
    for name, content in {"a.jpg": good, "b.jpg": b"", "c.jpg": good[:200], "d.jpg": good}.items():
        (tmp_path / name).write_bytes(content)
    found = predictor.attach(own()).predict(tmp_path, workers=0)
    assert [one.id for one in found] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert [bool(one.error) for one in found] == [False, True, True, False]
    assert found[1].label == ""
    assert math.isnan(found[1].probability)
    assert found[1].error.startswith(("decode: ", "read: "))
    assert found[0].probability == found[3].probability
    assert "error=" in repr(found[1])


def test_a_folder_of_nothing_readable_is_reported_too(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no")
    (one,) = predictor.attach(own()).predict(tmp_path, workers=0)
    assert one.error


def test_arrays_and_pictures_in_memory(predictor: Predictor, flower_folder: Path) -> None:
    with Image.open(flower_folder / "rose/0001.jpg") as picture:
        picture.load()
    (expected,) = predictor.attach(own()).predict(flower_folder / "rose/0001.jpg", workers=0)
    pixels = np.stack([np.asarray(picture)] * 2)
    for given in (pixels, [picture, picture], picture):
        found = predictor.attach(own()).predict(given, workers=0)
        assert {one.label for one in found} == {expected.label}
        assert found[0].probability == pytest.approx(expected.probability, abs=1e-6)


def test_arrays_of_any_size_are_images(predictor: Predictor, flower_folder: Path) -> None:
    predictor.attach(own())
    with Image.open(flower_folder / "rose/0001.jpg") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    (expected,) = predictor.predict(picture.filename, workers=0)
    found = predictor.predict(
        [pixels, pixels[:20], pixels[..., 0], Image.new("L", (9, 9))], workers=0
    )
    assert [one.id for one in found] == [f"{number:08d}" for number in range(4)]
    assert found[0].probability == pytest.approx(expected.probability, abs=1e-6)
    assert len(predictor.predict(pixels, workers=0)) == 1  # no set of narrow grey images
    for wrong in (
        [pixels.astype(np.float32)], [pixels, flower_folder], [flower_folder, pixels],
        [pixels[None]], [None], 5, [torch.zeros(3, 8, 8)],
    ):  # fmt: skip
        with pytest.raises(ImageSetError, match=r"Expected paths, or .* uint8 \(h, w, 3\)"):
            predictor.predict(wrong, workers=0)
    with pytest.raises(ImageSetError, match="rose' in a list that holds other things too"):
        predictor.predict([pixels, flower_folder / "rose"], workers=0)


def test_streaming_reads_no_further_than_it_must(predictor: Predictor) -> None:
    read = []

    class Pictures:
        def __len__(self) -> int:
            return 3000

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            read.append(index)
            return Image.new("RGB", (40, 40), (index % 256, 9, 9)), 0

    pictures = ImageSet.from_dataset(Pictures())  # reads all of them, for their labels
    read.clear()
    stream = predictor.attach(own()).stream(pictures, workers=0)
    first = next(stream)
    del stream
    assert first.label in predictor.classes
    assert len(read) < 1000


def test_views_are_made_and_averaged_at_prediction(
    images: ImageSet, folder: Path, flower_folder: Path
) -> None:
    views = extract(
        images,
        own(),
        folder / "views.h5",
        augmentation=Augmentation(views=3),
        workers=0,
        progress=False,
    )
    predictor = train(views, cv=3)
    found = predictor.attach(own()).predict(flower_folder, top_k=3, workers=0)
    np.testing.assert_allclose(
        proba_of(found, predictor.classes), predictor.predict_proba_of(views), atol=1e-6
    )


def test_features_are_rounded_as_they_were_stored(
    images: ImageSet, folder: Path, flower_folder: Path
) -> None:
    half = extract(
        images, own(), folder / "half.h5", store_dtype="float16", workers=0, progress=False
    )
    predictor = train(half, cv=3)
    found = predictor.attach(own()).predict(flower_folder, top_k=3, workers=0, batch_size=16)
    np.testing.assert_array_equal(
        proba_of(found, predictor.classes), predictor.predict_proba_of(half)
    )


def test_two_networks_predict_together(
    images: ImageSet,
    store: FeatureStore,
    named_store: FeatureStore,
    folder: Path,
    flower_folder: Path,
) -> None:
    both = FeatureStore.join([named_store, store])
    predictor = train(both, cv=3)
    path = folder / "both.featcache"
    predictor.save(path)
    loaded = Predictor.load(path)
    (flower_folder / "zz.jpg").write_bytes(b"not an image")
    try:
        # The network with a public name builds itself, the other one is given.
        found = loaded.attach(own()).predict(flower_folder, top_k=3, workers=0, batch_size=5)
    finally:
        (flower_folder / "zz.jpg").unlink()
    assert found[-1].error
    np.testing.assert_allclose(
        proba_of(found[:-1], predictor.classes), predictor.predict_proba_of(both), atol=1e-5
    )


@pytest.mark.parametrize("shape", [(3, 7), (16,), (2, 2, 7)])
def test_features_of_another_width_are_refused(
    predictor: Predictor, shape: tuple[int, ...]
) -> None:
    with pytest.raises(PredictorError, match=r"Expected features \(n, 16\)"):
        predictor.predict_proba(np.zeros(shape, np.float32))


def test_no_images_and_no_classes_are_refused(predictor: Predictor, flower_folder: Path) -> None:
    with pytest.raises(ImageSetError, match="list is empty"):
        predictor.attach(own()).predict([])
    with pytest.raises(PredictorError, match="top_k counts classes from 1"):
        predictor.attach(own()).predict(flower_folder, top_k=0)


def test_what_is_wrong_is_said_before_the_first_image(
    predictor: Predictor, flower_folder: Path
) -> None:
    with pytest.raises(ImageSetError, match="nowhere"):
        predictor.attach(own()).stream(flower_folder / "nowhere")
    with pytest.raises(FingerprintMismatch):
        predictor.attach(own(seed=1)).stream(flower_folder)


# --- which network -----------------------------------------------------------------------------


def test_a_public_network_is_built_by_name(
    named: Path, named_store: FeatureStore, flower_folder: Path
) -> None:
    loaded = Predictor.load(named)
    found = loaded.predict(flower_folder, top_k=3, workers=0)
    np.testing.assert_allclose(
        proba_of(found, loaded.classes), loaded.predict_proba_of(named_store), atol=1e-5
    )


def test_a_module_must_be_given_again(
    predictor: Predictor, flower_folder: Path, folder: Path
) -> None:
    predictor.save(folder / "own.featcache")
    loaded = Predictor.load(folder / "own.featcache")
    with pytest.raises(PredictorError, match=r"small0, was given as a module.*preprocessing="):
        loaded.predict(flower_folder)
    assert loaded.attach(own()).predict(flower_folder, workers=0)
    # Once given, it is remembered.
    assert loaded.predict(flower_folder, workers=0)


def test_another_network_is_refused_field_by_field(
    predictor: Predictor, flower_folder: Path
) -> None:
    with pytest.raises(FingerprintMismatch) as error:
        predictor.attach(own(seed=1)).predict(flower_folder)
    assert "backbone: 'small0' (features), 'small1' (network)" in str(error.value)
    assert "state_sha256" in str(error.value)
    other = Backbone(network(), preprocessing=Preprocessing(resize=40, crop=32), name="small0")
    with pytest.raises(FingerprintMismatch, match=r"preprocessing\.resize: 36 .* 40"):
        predictor.attach(other).predict(flower_folder)


def test_a_checkpoint_in_the_file_is_not_opened(
    images: ImageSet, folder: Path, flower_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "weights.pth"
    torch.save(public().module.state_dict(), path)
    backbone = Backbone("squeezenet1_1", weights=path, image_size=48)
    store = extract(images, backbone, folder / "checkpoint.h5", workers=0, progress=False)
    train(store, cv=3).save(folder / "checkpoint.featcache")
    loaded = Predictor.load(folder / "checkpoint.featcache")
    monkeypatch.chdir(folder)  # a file of that name is even there
    with pytest.raises(PredictorError, match=r"weights\.pth.*--weights FILE"):
        loaded.predict(flower_folder)
    loaded.attach(weights=path)
    assert loaded.predict(flower_folder, workers=0)
    # The same weights are the same network, wherever they come from; others are not.
    assert loaded.attach(public()).predict(flower_folder, workers=0)
    state = public().module.state_dict()
    torch.save({name: value + 1 for name, value in state.items()}, folder / "others.pth")
    others = Backbone("squeezenet1_1", weights=folder / "others.pth", image_size=48)
    with pytest.raises(FingerprintMismatch, match=r"weights: 'weights\.pth'.*'others\.pth'"):
        loaded.attach(others).predict(flower_folder)


def test_a_callable_in_the_file_is_not_imported(
    images: ImageSet, folder: Path, flower_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mynets.py").write_text(
        "from tests.predictor.test_predictor import PREPARE, network\n"
        "def small():\n    return network(), PREPARE\n"
    )
    monkeypatch.syspath_prepend(folder)
    backbone = Backbone("mynets:small")
    store = extract(images, backbone, folder / "callable.h5", workers=0, progress=False)
    train(store, cv=3).save(folder / "callable.featcache")
    loaded = Predictor.load(folder / "callable.featcache")
    with pytest.raises(PredictorError, match=r"mynets:small.*not imported.*--backbone"):
        loaded.predict(flower_folder)
    loaded.attach("mynets:small")
    assert loaded.predict(flower_folder, workers=0)


def test_a_path_posing_as_a_public_name_is_not_opened(
    named: Path, tmp_path: Path, flower_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(public().module.state_dict(), "evil.pth")

    def pose(values: dict[str, Any]) -> None:
        values["fingerprints"][0]["weights"] = "evil.pth"

    loaded = Predictor.load(edited(named, tmp_path, pose))
    with pytest.raises(PredictorError, match="What a file names is not opened"):
        loaded.predict(flower_folder)

    def unknown(values: dict[str, Any]) -> None:
        values["fingerprints"][0]["backbone"] = "../evil"

    loaded = Predictor.load(edited(named, tmp_path, unknown))
    with pytest.raises(PredictorError, match="What a file names is not opened"):
        loaded.predict(flower_folder)


# --- canaries ----------------------------------------------------------------------------------


def with_canaries(predictor: Predictor, x: np.ndarray, path: Path) -> Predictor:
    """Return the predictor as if these had been the canaries' features at training."""
    kept = predictor.canaries
    predictor.save(path)
    other = Predictor.load(path)
    other.canaries = CanaryRows(x, kept.logits, kept.names, kept.images)
    return other


def test_the_first_prediction_checks_the_canaries(
    predictor: Predictor, flower_folder: Path, tmp_path: Path
) -> None:
    x = predictor.canaries.x
    assert len(predictor.canaries.images) == len(x) == 6
    drifted = x.copy()
    drifted[3] += 0.05 * np.abs(x).max()
    near = with_canaries(predictor, drifted, tmp_path / "a")
    with pytest.warns(UserWarning, match="'cmyk' gives features that differ.*may differ slightly"):
        found = near.attach(own()).predict(flower_folder, workers=0)
    assert len(found) == 36
    assert near.predict(flower_folder, workers=0) == found  # once is enough

    far = with_canaries(predictor, x[::-1] + 1.0, tmp_path / "b")
    with pytest.raises(PredictorError, match="would be meaningless"):
        far.attach(own()).predict(flower_folder, workers=0)


def test_a_head_that_computes_something_else_is_refused(named: Path, tmp_path: Path) -> None:
    def change(text: dict[str, Any], arrays: Arrays) -> None:
        arrays["canary_logits"] = arrays["canary_logits"] * np.float32(1.01)

    with pytest.raises(PredictorError, match=r"no longer computes .* trained with .*scikit-learn"):
        Predictor.load(rewritten(named, tmp_path / "x", change))


def test_stores_without_canary_images_keep_some_rows(store: FeatureStore, folder: Path) -> None:
    from tests.labelled import clusters, make_store

    labels = ["ant", "bee"] * 20
    plain = make_store(folder / "plain.h5", clusters(labels), labels)
    made = train(plain, cv=3)
    assert made.canaries.images == ()
    assert made.canaries.x.shape == (8, 12)
    made.save(folder / "plain.featcache")
    assert (
        Predictor.load(folder / "plain.featcache").canaries.x.tolist() == made.canaries.x.tolist()
    )


# --- the file ----------------------------------------------------------------------------------


def edited(path: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Return a copy of a predictor whose text was changed in place by `change`."""
    return rewritten(path, tmp_path / "changed.featcache", lambda text, _: change(text))


def test_everything_comes_back(predictor: Predictor, store: FeatureStore, tmp_path: Path) -> None:
    path = tmp_path / "p.featcache"
    predictor.save(path)
    back = Predictor.load(path)
    for name in ("head", "params", "classes", "calibration", "columns", "fingerprints", "versions"):
        assert getattr(back, name) == getattr(predictor, name), name
    assert back.metrics == json.loads(json.dumps(predictor.metrics))
    assert back.leaderboard == predictor.leaderboard
    assert back.leaderboard is not None
    np.testing.assert_array_equal(back.train_sha256, store.sha256)
    np.testing.assert_array_equal(back.predict_proba_of(store), predictor.predict_proba_of(store))
    assert back.canaries.images == predictor.canaries.images
    _, arrays = parts_of(path)
    assert {name.split(".")[0].rstrip("0123456789") for name in arrays} == {
        "step", "train_sha", "train_groups", "canary_x", "canary_logits", "canary_image_",
        "label_scores", "typical", "typical_sample", "typical_distances",
    }  # fmt: skip
    assert repr(back) == repr(predictor)


def test_a_predictor_replaces_a_predictor_and_nothing_else(
    predictor: Predictor, tmp_path: Path
) -> None:
    path = tmp_path / "p.featcache"
    predictor.save(path)
    predictor.save(path)
    assert [one.name for one in tmp_path.iterdir()] == ["p.featcache"]

    other = tmp_path / "photos.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("manifest.json", "{}")
    content = other.read_bytes()
    for target, message in (
        (other, "is not a featcache predictor"),
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "p", "no folder"),
    ):
        with pytest.raises(OutputError, match=message):
            predictor.save(target)
    assert other.read_bytes() == content
    (tmp_path / "empty").touch()
    predictor.save(tmp_path / "empty")


def test_a_link_keeps_pointing_at_the_file(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    predictor.save(link)
    assert link.is_symlink()
    assert Predictor.load(tmp_path / "real").head == "svm"


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(PredictorError, match=r"featcache train STORE\.h5 -o .*none\.featcache"):
        Predictor.load(tmp_path / "none.featcache")


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x05\x06" + bytes(18), b"\x89HDF\r\n\x1a\n" + bytes(100)]
)
def test_files_that_are_no_predictors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(PredictorError, match=str(tmp_path / "x")):
        Predictor.load(tmp_path / "x")


MANIFEST_EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a later version": lambda m: m.update(format_version=5),
    "no version": lambda m: m.pop("format_version"),
    "classes are numbers": lambda m: m.update(classes=[1, 2, 3]),
    "classes are a text": lambda m: m.update(classes="abc"),
    "one class twice": lambda m: m.update(classes=["rose"] * 3),
    "classes in another order": lambda m: m["classes"].reverse(),
    "a class too few": lambda m: m["classes"].pop(),
    "temperature zero": lambda m: m["calibration"].update(temperature=0),
    "temperature negative": lambda m: m["calibration"].update(temperature=-1.5),
    "temperature not a number": lambda m: m["calibration"].update(temperature=float("nan")),
    "temperature a text": lambda m: m["calibration"].update(temperature="1"),
    "bias of other classes": lambda m: m["calibration"]["bias"].append(0.0),
    "bias without an end": lambda m: m["calibration"].update(bias=[1e308, -1e308]),
    "temperature missing": lambda m: m["calibration"].pop("temperature"),
    "no columns": lambda m: m.update(columns=[]),
    "a wider column": lambda m: m["columns"][0].update(width=10**9),
    "a column of no source": lambda m: m["columns"][0].update(source=4),
    "a negative source": lambda m: m["columns"][0].update(source=-1),
    "a column of another tap": lambda m: m["columns"][0].update(tap="x"),
    "a column that is none": lambda m: m.update(columns=[7]),
    "no fingerprint": lambda m: m.update(fingerprints=[]),
    "a fingerprint that is none": lambda m: m.update(fingerprints=["x"]),
    "an augmentation unknown": lambda m: m["fingerprints"][0].update(augmentation={"blur": 1}),
    "an augmentation of text": lambda m: m["fingerprints"][0].update(augmentation={"flip": "a"}),
    "a fingerprint with views 0": lambda m: m["fingerprints"][0].update(augmentation={"views": 0}),
    "a fingerprint of no source": lambda m: m["fingerprints"][0].update(source="web"),
    "taps that are numbers": lambda m: m["fingerprints"][0].update(taps=[3]),
    "preprocessing a list": lambda m: m["fingerprints"][0].update(preprocessing=[1]),
    "a later fingerprint": lambda m: m["fingerprints"][0].update(format_version=9),
    "canaries that are not there": lambda m: m.update(canaries=["x"] * 9),
    "metrics a list": lambda m: m.update(metrics=[]),
    "a leaderboard that is none": lambda m: m.update(leaderboard={"rows": 3}),
    "a leaderboard without rows": lambda m: m["leaderboard"].update(rows=[]),
    "images counted in words": lambda m: m["leaderboard"].update(n_fit="x"),
    "another note": lambda m: m["leaderboard"].update(left_out=[1]),
    "a row that is none": lambda m: m["leaderboard"].update(rows=[3]),
    "two names of a head": lambda m: m["leaderboard"]["rows"][0].update(head=["svm", "knn"]),
    "parameters in a list": lambda m: m["leaderboard"]["rows"][0].update(params=[["C", 1]]),
    "a score that is none": lambda m: m["leaderboard"]["rows"][0].update(cv_accuracy=float("nan")),
    "half an interval": lambda m: m["leaderboard"]["rows"][0].update(cv_macro_f1_interval=[0.5]),
    "half a held-out score": lambda m: m["leaderboard"]["rows"][0].update(accuracy=0.5),
    "a request in words": lambda m: m.update(request="x"),
    "a version that is no whole number": lambda m: m.update(format_version=2.0),
    "a temperature that leaves no scores": lambda m: m["calibration"].update(temperature=1e-320),
    "a column with more": lambda m: m["columns"][0].update(more=1),
    "a source that is true": lambda m: m["columns"][0].update(source=True),
    "a fingerprint without taps": lambda m: m["fingerprints"][0].update(taps=[]),
    "views in words": lambda m: m["fingerprints"][0].update(augmentation={"views": "x"}),
    "preprocessing of nothing": lambda m: m["fingerprints"][0].update(preprocessing={}),
    "preprocessing in words": lambda m: m["fingerprints"][0].update(preprocessing={"crop": "x"}),
    "a step of two kinds": lambda m: m["steps"][0].update(kind=["matrix", "unit"]),
    "the rest of no network": lambda m: m.update(steps=[{"kind": "suffix"}]),
    "more": lambda m: m.update(more=1),
    "nothing": lambda m: m.clear(),
    "no steps": lambda m: m.update(steps=[]),
    "a step of no kind": lambda m: m["steps"].append({"kind": "pickle"}),
    "a step without a kind": lambda m: m["steps"].append({}),
    "a step of no arrays": lambda m: m["steps"].append({"kind": "matrix"}),
    "a step with a setting": lambda m: m["steps"][-1].update(weight=3),
}


@pytest.mark.parametrize("what", MANIFEST_EDITS)
def test_hostile_manifests(named: Path, tmp_path: Path, what: str) -> None:
    target = edited(named, tmp_path, MANIFEST_EDITS[what])
    with pytest.raises(PredictorError, match=str(target)) as error:
        Predictor.load(target)
    # A sentence of featcache's own, not Python's.
    assert re.search(r": (Its?|The|There|One|Step \d|[a-z]+ of the step) ", str(error.value))


@pytest.mark.parametrize(
    "huge",
    [{"augmentation": {"views": 10**9}}, {"preprocessing": Preprocessing(crop=10**9).to_dict()}],
)
def test_pixels_of_no_possible_size_are_refused_before_any_are_made(
    named: Path, tmp_path: Path, flower_folder: Path, huge: dict[str, Any]
) -> None:
    target = edited(named, tmp_path, lambda m: m["fingerprints"][0].update(huge))
    with pytest.raises(PredictorError, match=r"damaged: .* views of 3 x \d+ x \d+ .* values"):
        Predictor.load(target).predict(flower_folder)


# --- files of predictions ----------------------------------------------------------------------

FOUND = [
    Prediction("a, b.jpg", "rose", 0.75, (("rose", 0.75), ("tulip", 0.25)), typicality=0.5),
    Prediction.failed("é.jpg", "decode: not an image"),
]


def test_predictions_as_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "p.csv"
    assert write_predictions(FOUND, target, top_k=2) == 2
    assert target.read_text(encoding="utf-8") == (
        "id,label,probability,label_2,probability_2,typicality,error\n"
        '"a, b.jpg",rose,0.750000,tulip,0.250000,0.500000,\n'
        "é.jpg,,,,,,decode: not an image\n"
    )
    write_predictions(FOUND, Path("-"))
    lines = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert lines[0] == ["id", "label", "probability", "typicality", "error"]
    assert lines[1] == ["a, b.jpg", "rose", "0.750000", "0.500000", ""]


def test_predictions_as_json(tmp_path: Path) -> None:
    target = tmp_path / "p.json"
    write_predictions(iter(FOUND), target, file_format="json", top_k=2)
    one, other = json.loads(target.read_text(encoding="utf-8"))
    assert one["top"][1] == {"label": "tulip", "probability": 0.25}
    assert other == {
        "id": "é.jpg",
        "label": "",
        "probability": None,
        "top": [],
        "typicality": None,
        "error": FOUND[1].error,
    }
    steering = Prediction("a\x9b1m.jpg", "ca\u0301t\u202e", 0.5)
    write_predictions([steering], target, file_format="json")
    assert not set("\x9b\u202e") & set(target.read_text(encoding="utf-8"))
    assert json.loads(target.read_text(encoding="utf-8"))[0]["label"] == steering.label
    write_predictions([], target, file_format="json")
    assert json.loads(target.read_text()) == []


def test_predictions_replace_predictions_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "p.csv"
    write_predictions(FOUND, target)
    write_predictions(FOUND, target, file_format="json")
    write_predictions(FOUND, target)
    other = tmp_path / "labels.csv"
    other.write_text("id,label\n")
    with pytest.raises(OutputError, match="not a file of predictions"):
        write_predictions(FOUND, other)
    assert other.read_text() == "id,label\n"


@pytest.mark.parametrize(
    "row",
    [
        "bee/0001.jpg,ant,0.500000,,a note of mine",
        "bee/0001.jpg,ant,,,checked by hand 3 May",
        "bee/0001.jpg,ant,,,",
        "bee/0001.jpg,ant,0.500000,high,",
        "bee/0001.jpg,,,0.500000,not an image",
        "bee/0001.jpg,,0.500000,,",
        "bee/0001.jpg,,,,",
        '{"id": "a", "label": "ant", "probability": 0.5, "top": [], '
        '"typicality": null, "error": "a note of mine"}',
        '{"id": "a", "label": "ant", "probability": null, "top": [], '
        '"typicality": null, "error": ""}',
        '{"id": "a", "label": "", "probability": null, "top": [], "typicality": null, "error": ""}',
    ],
)
def test_predictions_into_which_a_user_wrote_are_left(tmp_path: Path, row: str) -> None:
    target = tmp_path / "p.csv"
    text = f"[\n {row}\n]\n" if row[0] == "{" else f"id,label,probability,typicality,error\n{row}\n"
    target.write_text(text)
    with pytest.raises(OutputError, match="not a file of predictions"):
        write_predictions(FOUND, target)
    assert target.read_text() == text


def test_an_error_on_the_way_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "p.csv"
    write_predictions(FOUND, target)
    content = target.read_text()

    def broken() -> Any:
        yield FOUND[0]
        raise PredictorError("stop")

    with pytest.raises(PredictorError, match="stop"):
        write_predictions(broken(), target)
    assert target.read_text() == content
    assert [one.name for one in tmp_path.iterdir()] == ["p.csv"]
