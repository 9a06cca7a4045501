"""From images to a store: features, reuse, views, failures, labels, summary, several devices."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.errors import ExtractionError, FingerprintMismatch, TooManyFailures
from featcache.extraction.extract import extract
from featcache.extraction.features import batches_of, canary_features
from featcache.images.image_set import ImageSet
from featcache.networks import families as networks
from featcache.networks.backbone import Backbone
from featcache.pixels.canary import images as canary_images
from featcache.pixels.preprocessing import Preprocessing
from featcache.pixels.views import Augmentation
from featcache.store.store import FeatureStore
from tests.small import SIDE, TAP, backbone, folder, network, photograph, plainest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "images", 22)


def run(root: Path, **options: Any) -> FeatureStore:
    options.setdefault("layers", ("pool",))
    taken = options.pop("backbone", None) or backbone(layers=options.pop("layers"))
    options.pop("layers", None)
    path = options.pop("path", root.parent / "features.h5")
    return extract(ImageSet.from_folder(root), taken, path, device="cpu", **options)


# --- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_features_are_those_of_the_plainest_loop(root: Path, workers: int) -> None:
    store = run(root, workers=workers, batch_size=4)
    X, y = store.load(TAP)
    expected = plainest(ImageSet.from_folder(root), network(), "pool")
    np.testing.assert_allclose(X, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    assert list(store.ids) == list(ImageSet.from_folder(root).ids)
    assert list(y) == [name.split("/")[0] for name in store.ids]
    assert store.verify().ok
    assert not list(root.parent.glob("*.partial*"))


def test_several_taps_come_from_one_pass(root: Path) -> None:
    store = run(root, layers=("relu#1:map", "pool", "head:input"))
    assert {tap: info.shape for tap, info in store.taps.items()} == {
        "relu#1:output:map": (8, 15, 15),
        TAP: (16,),
        "head:input:flatten": (16,),
    }
    np.testing.assert_array_equal(store.load(TAP)[0], store.load("head:input:flatten")[0])


def test_precision_and_store_dtype_are_in_the_fingerprint(root: Path) -> None:
    full = run(root)
    half = run(root, path=root.parent / "half.h5", precision="bfloat16", store_dtype="float16")
    assert (half.fingerprint.precision, half.fingerprint.store_dtype) == ("bfloat16", "float16")
    difference = np.abs(half.load(TAP)[0] - full.load(TAP)[0]).max() / full.load(TAP)[0].max()
    assert 0 < difference < 0.01


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"layers": ("body",)}])
def test_other_features_do_not_replace_those_that_are_there(
    root: Path, options: dict[str, Any]
) -> None:
    before = run(root).load(TAP)[0].copy()
    with pytest.raises(FingerprintMismatch, match=r"precision|taps"):
        run(root, **options)
    np.testing.assert_array_equal(run(root).load(TAP)[0], before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store_dtype": "float64"}, "store_dtype"),
        ({"on_error": "ignore"}, "on_error"),
        ({"max_failures": 1.5}, "max_failures"),
        ({"workers": -1}, "workers is at least 0, not -1"),
        ({"parts": -1}, "parts is at least 1, not -1"),
    ],
)
def test_impossible_arguments_are_refused(root: Path, options: Any, message: str) -> None:
    with pytest.raises(ExtractionError, match=message):
        run(root, **options)
    assert not list(root.parent.glob("*.h5*"))


def test_arrays_and_folders_give_the_same_features(root: Path, tmp_path: Path) -> None:
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted(root.rglob("*.jpg"))])
    names = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*.jpg"))]
    images = ImageSet.from_arrays(pixels, ids=names)
    store = extract(images, backbone(), tmp_path / "arrays.h5", device="cpu")
    np.testing.assert_array_equal(store.load(TAP)[0], run(root).load(TAP)[0])


def test_the_generator_yields_rows_in_order_with_failures(root: Path) -> None:
    (root / "ant" / "0006.jpg").write_bytes(b"no image")
    images = ImageSet.from_folder(root)
    chunks = list(batches_of(images, backbone(), device="cpu", batch_size=4))
    failed = [row for chunk in chunks for row in chunk.failures]
    rows = np.concatenate([chunk.rows[chunk.done] for chunk in chunks])
    assert [images.ids[row] for row in failed] == ["ant/0006.jpg"]
    assert sorted([*rows.tolist(), *failed]) == list(range(22))
    assert (np.diff(rows) > 0).all()
    assert all(len(c.features[TAP]) == c.done.sum() for c in chunks)
    assert all(len(c.entries) == len(c.rows) for c in chunks)
    some = list(batches_of(images, backbone(), rows=np.array([2, 9]), device="cpu"))
    assert np.concatenate([chunk.rows for chunk in some]).tolist() == [2, 9]


def test_no_rows_give_no_chunks(root: Path) -> None:
    images = ImageSet.from_folder(root)
    assert list(batches_of(images, backbone(), rows=np.array([], np.int64), device="cpu")) == []


@pytest.mark.parametrize("views", [1, 2])
def test_a_few_images_wait_for_no_black_ones(tmp_path: Path, views: int) -> None:
    images = ImageSet.open(folder(tmp_path, 40))
    drawn = Augmentation(views=views) if views > 1 else None
    batches: list[int] = []

    def computed(rows: list[int]) -> np.ndarray:
        one = backbone()
        one.module.body.register_forward_pre_hook(lambda *_: batches.append(1))
        batches.clear()
        chunks = batches_of(
            images, one, rows=np.array(rows), device="cpu", batch_size=4, augmentation=drawn
        )
        return np.concatenate([chunk.features[TAP] for chunk in chunks])

    every = computed(list(range(40)))
    ready = len(batches) - 40 * views // 4
    assert computed([6]).tobytes() == every[[6]].tobytes()
    assert len(batches) == ready + 1
    assert computed([5, 30, 31]).tobytes() == every[[5, 30, 31]].tobytes()
    assert len(batches) == ready + -(-3 * views // 4)


# --- views ----------------------------------------------------------------------------------------


def test_views_are_an_axis_and_the_same_in_every_run(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"augmentation": Augmentation(views=3, random_state=5)}
    store = run(root, batch_size=4, **options)
    X, _ = store.load(TAP)
    assert X.shape == (22, 3, 16)
    assert store.views == 3
    assert (X[:, 0] != X[:, 1]).any(axis=1).all()
    again = run(root, path=tmp_path / "again.h5", batch_size=4, workers=0, **options)
    np.testing.assert_array_equal(again.load(TAP)[0], X)
    seeded = run(root, path=tmp_path / "b.h5", batch_size=4, augmentation=Augmentation(views=3))
    assert (seeded.load(TAP)[0] != X).any()


def test_views_of_a_renamed_image_are_computed_anew(root: Path) -> None:
    run(root, augmentation=Augmentation(views=2))
    (root / "ant" / "0000.jpg").rename(root / "ant" / "renamed.jpg")
    summary = run(root, augmentation=Augmentation(views=2)).extraction
    assert (summary.computed, summary.copied) == (1, 21)


# --- reuse ----------------------------------------------------------------------------------------


def taken() -> Backbone:
    return Backbone("squeezenet1_1", weights=None, image_size=64)


def test_a_second_run_over_an_unchanged_folder_loads_no_weights(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(root, backbone=taken())
    monkeypatch.setattr(networks.Torchvision, "load", _forbidden)
    inode = (root.parent / "features.h5").stat().st_ino
    second = run(root, backbone=taken())
    assert second.extraction.skipped
    assert "nothing to do" in str(second.extraction)
    assert (root.parent / "features.h5").stat().st_ino == inode
    np.testing.assert_array_equal(first.load()[0], second.load()[0])


def test_touched_deleted_and_renamed_images_load_no_weights_either(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(root, backbone=taken())
    of = dict(zip(before.ids, before.load()[0].copy(), strict=True))
    monkeypatch.setattr(networks.Torchvision, "load", _forbidden)
    os.utime(root / "ant" / "0000.jpg", (1, 1))
    (root / "ant" / "0002.jpg").unlink()
    (root / "bee" / "0001.jpg").rename(root / "ant" / "moved.jpg")
    store = run(root, backbone=taken())
    assert (store.extraction.computed, store.extraction.copied) == (0, 21)
    assert store.extraction.removed == 1  # the renamed one is still there
    assert "1 image is no longer there: its features" in str(store.extraction)
    assert "ant/0002.jpg" not in store.ids
    for name, row in zip(store.ids, store.load()[0], strict=True):
        np.testing.assert_array_equal(row, of[name.replace("ant/moved", "bee/0001")])
    assert store.labels[list(store.ids).index("ant/moved.jpg")] == "ant"
    assert run(root, backbone=taken()).extraction.skipped


def _forbidden(*_: object) -> None:
    raise AssertionError("weights were loaded")


def test_only_new_and_changed_images_are_computed(root: Path) -> None:
    before = run(root)
    photograph(root / "ant" / "0000.jpg", 901)
    photograph(root / "bee" / "new.jpg", 902)
    store = run(root)
    summary = store.extraction
    assert (summary.computed, summary.copied, summary.removed) == (2, 21, 0)
    fresh = run(root, path=root.parent / "fresh.h5")
    np.testing.assert_array_equal(store.load(TAP)[0], fresh.load(TAP)[0])
    assert store.ids.tolist() == fresh.ids.tolist() != before.ids.tolist()


def test_a_changed_image_of_the_same_size_and_time_is_not_noticed_but_by_another_time(
    root: Path,
) -> None:
    path = root / "ant" / "0000.jpg"
    content = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    content[0].save(path, "bmp")
    run(root)
    stamp = path.stat().st_mtime_ns
    content[1].save(path, "bmp")
    os.utime(path, ns=(stamp, stamp - 10**9))  # an older time counts as well: clocks differ
    assert run(root).extraction.computed == 1


def test_relabelling_costs_no_forward_pass(root: Path) -> None:
    table = root.parent / "labels.csv"
    names = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*.jpg"))]

    def go(label: Callable[[int], str]) -> FeatureStore:
        rows = "\n".join(f"{name},{label(i)}" for i, name in enumerate(names))
        table.write_text(f"id,label\n{rows}\n")
        images = ImageSet.from_csv(table, root)
        return extract(images, backbone(), root.parent / "f.h5", device="cpu")

    first = go(lambda i: "odd" if i % 2 else "even")
    second = go(lambda i: "low" if i < 5 else "high")
    assert second.extraction.skipped
    assert second.extraction.relabelled
    assert second.classes == ["high", "low"]
    np.testing.assert_array_equal(first.load()[0], second.load()[0])
    assert FeatureStore.open(root.parent / "f.h5").verify().ok


def test_arrays_are_compared_by_content(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)

    def go() -> FeatureStore:
        return extract(ImageSet.from_arrays(pixels), backbone(), tmp_path / "a.h5", device="cpu")

    go()
    assert go().extraction.skipped
    pixels[4] //= 2
    assert go().extraction.computed == 1


def test_a_store_that_was_asked_for_in_other_words_is_recognised(root: Path) -> None:
    run(root, layers=("pool",))
    summary = run(root, layers=("pool:output:flatten",)).extraction
    assert (summary.computed, summary.copied) == (0, 22)


# --- failures -------------------------------------------------------------------------------------


def test_failures_are_recorded_and_left_out(root: Path) -> None:
    (root / "ant" / "0000.jpg").write_bytes(b"")
    (root / "bee" / "0001.jpg").write_bytes((root / "bee" / "0003.jpg").read_bytes()[:300])
    store = run(root, max_failures=0.1)
    assert len(store) == 20
    assert store.extraction.failed == 2
    assert {f.id: f.stage for f in store.failures} == {
        "ant/0000.jpg": "decode",
        "bee/0001.jpg": "decode",
    }
    assert "empty" in store.failures[0].reason
    assert run(root, max_failures=0.1).extraction.skipped


def test_too_many_failures_end_the_run_and_keep_the_good_rows(root: Path) -> None:
    for name in ("0000", "0002"):
        (root / "ant" / f"{name}.jpg").write_bytes(b"no image")
    with pytest.raises(TooManyFailures, match=r"2 of 22 .*ant/0000.jpg"):
        run(root, max_failures=0.01)
    photograph(root / "ant" / "0000.jpg", 0)
    photograph(root / "ant" / "0002.jpg", 2)
    summary = run(root).extraction
    assert (summary.computed, summary.copied, summary.failed) == (2, 20, 0)


def test_too_many_failures_can_be_accepted_afterwards(root: Path) -> None:
    (root / "ant" / "0000.jpg").write_bytes(b"no image")
    with pytest.raises(TooManyFailures):
        run(root, max_failures=0.01)
    store = run(root, max_failures=0.05)
    assert (store.extraction.computed, store.extraction.copied, len(store)) == (0, 21, 21)


def test_failed_images_are_tried_again_when_asked_or_changed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "ant" / "0000.jpg").write_bytes(b"no image")
    run(root, max_failures=0.1)
    photograph(root / "bee" / "new.jpg", 77)  # a reason to make the next file
    assert run(root, max_failures=0.1).extraction.to_dict()["computed"] == 1
    tried: list[int] = []
    original = Preprocessing.__call__

    def counting(self: Preprocessing, raw: Any, **options: Any) -> Any:
        tried.append(len(raw))
        return original(self, raw, **options)

    monkeypatch.setattr(Preprocessing, "__call__", counting)
    run(root, max_failures=0.1, retry_failed=True, workers=0)
    assert len(b"no image") in tried


def test_the_first_failure_can_end_the_run(root: Path) -> None:
    (root / "ant" / "0008.jpg").write_bytes(b"no image")
    with pytest.raises(ExtractionError, match=r"ant/0008\.jpg failed \(decode: .*--on-error"):
        run(root, on_error="fail", batch_size=4)
    photograph(root / "ant" / "0008.jpg", 8)
    assert run(root, on_error="fail").extraction.copied >= 4


def test_features_that_are_not_finite_are_failures(root: Path) -> None:
    class Hot(type(network())):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return super().forward(x * 1e6)

    store = run(root, backbone=backbone(Hot), path=root.parent / "full.h5")
    assert len(store) == 22
    with pytest.raises(TooManyFailures, match="float32"):
        run(root, backbone=backbone(Hot), store_dtype="float16")


# --- what is recorded -----------------------------------------------------------------------------


def test_the_summary_says_what_was_done_and_what_limits_the_speed(root: Path) -> None:
    store = run(root, workers=1)
    summary = store.extraction
    assert summary.bottleneck in ("decode", "forward", "write")
    assert set(summary.seconds) >= {"total", "loop", "decode", "forward", "write"}
    assert summary.images_per_second > 0
    text = str(summary)
    assert "22 images: 22 computed, 0 reused, 0 failed" in text
    assert "limits the speed" in text
    total, loop = (summary.seconds[name] for name in ("total", "loop"))
    assert f"failed, in {total:.1f} s\n" in text
    assert f"first image to the last {loop:.1f} s ({22 / loop:.1f} images/s): forward pass" in text
    recorded = FeatureStore.open(root.parent / "features.h5").meta["run"]
    assert recorded["computed"] == 22
    assert json.loads(json.dumps(summary.to_dict()))["settings"] == store.meta["settings"]


def test_a_run_in_less_than_float32_says_what_rounding_costs(root: Path, tmp_path: Path) -> None:
    full, half = run(root), run(root, path=tmp_path / "half.h5", precision="bfloat16")
    assert full.extraction is not None and half.extraction is not None
    assert full.extraction.rounding is None and "float32 ones" not in str(full.extraction)
    images = [image for _, image in canary_images()]
    plain = canary_features(backbone(), images, device="cpu")[TAP]
    rounded = canary_features(backbone(), images, device="cpu", precision="bfloat16")[TAP]
    distance = np.linalg.norm(rounded - plain, axis=1) / np.linalg.norm(plain, axis=1)
    assert half.extraction.rounding == pytest.approx(np.median(distance), rel=0.2)
    assert 0 < half.extraction.rounding < 0.01
    said = f"{half.extraction.rounding:.1%} from their float32 ones"
    assert said in str(half.extraction)


def test_what_decides_bits_is_recorded(root: Path) -> None:
    store = run(root, batch_size=5)
    assert store.meta["settings"]["batch_size"] == 5
    assert store.meta["versions"]["torch"]
    assert store.meta["request"]["taps"] == ["pool"]


def test_canaries_are_stored_with_their_features(root: Path) -> None:
    canaries = run(root).canaries
    assert canaries is not None
    assert canaries.names == [name for name, _ in canary_images()]
    found = canary_features(backbone(), canaries.images, device="cpu")
    np.testing.assert_allclose(found[TAP], canaries.features[TAP], rtol=1e-5)


def test_features_of_a_machine_that_decodes_otherwise_are_not_mixed_in(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(root)
    photograph(root / "bee" / "new.jpg", 77)
    original = Preprocessing.__call__
    monkeypatch.setattr(Preprocessing, "__call__", lambda *args, **kw: original(*args, **kw) // 2)
    with pytest.raises(FingerprintMismatch, match="test images"):
        run(root)


def test_many_channels_work_without_the_canaries_that_have_fewer(tmp_path: Path) -> None:
    from torch import nn

    class Five(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(5, 6, 3)
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x: Any) -> Any:
            return self.pool(self.stem(x)).flatten(1)

    preprocessing = Preprocessing(
        resize=SIDE, crop=SIDE, channels=5, mean=(0.5,) * 5, std=(0.2,) * 5
    )
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 5), dtype=np.uint8)
    taken = Backbone(Five(), preprocessing=preprocessing, layers=["pool"])
    store = extract(ImageSet.from_arrays(pixels), taken, tmp_path / "five.h5", device="cpu")
    assert store.load()[0].shape == (6, 6)


def test_progress_goes_to_standard_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(root, progress=True)
    captured = capsys.readouterr()
    assert "22/22" in captured.err
    assert "img/s" in captured.err
    assert captured.out == ""
    shutil.rmtree(root / "ant")
    run(root, progress=False, path=root.parent / "b.h5")
    assert capsys.readouterr().err == ""


# --- several devices ------------------------------------------------------------------------------


def test_two_processes_fill_one_file_with_the_same_bits(root: Path) -> None:
    (root / "bee" / "0021.jpg").write_bytes(b"no image")
    images = ImageSet.from_folder(root)
    taken = Backbone("squeezenet1_1", weights=None, image_size=64)
    one = extract(
        images, taken, root.parent / "one.h5", device="cpu", batch_size=4, max_failures=0.1
    )
    two = extract(
        images,
        taken,
        root.parent / "two.h5",
        device=["cpu", "cpu"],
        batch_size=4,
        workers=0,
        max_failures=0.1,
    )
    np.testing.assert_array_equal(one.load()[0], two.load()[0])
    assert (two.extraction.computed, two.extraction.failed) == (21, 1)
    assert two.verify().ok
    assert two.extraction.seconds["forward"] > 0
