"""What goes wrong around an extraction: workers, files, folders, clocks, hostile images."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from featcache.errors import DecodeError, ExtractionError, StoreError, TooManyFailures
from featcache.extraction import decoding
from featcache.extraction.decoding import Batch, Decoder, Loader, make_tasks
from featcache.extraction.extract import extract
from featcache.images.image_set import ImageSet
from featcache.pixels.preprocessing import Preprocessing
from featcache.store.format import DONE
from featcache.store.store import FeatureStore
from tests.small import TAP, backbone, folder, network, photograph, plainest

N = 24


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "images", N)


def run(root: Path, **options: Any) -> FeatureStore:
    options = {"batch_size": 4, "device": "cpu", "max_failures": 0.2, **options}
    path = options.pop("path", root.parent / "features.h5")
    return extract(ImageSet.from_folder(root), backbone(), path, **options)


# --- workers --------------------------------------------------------------------------------------


class Deadly(Decoder):
    """Some images kill the process that decodes them; every time, or the first time only."""

    always: tuple[int, ...] = ()
    once: tuple[int, ...] = ()
    marks: Path

    def decode(self, batch: Batch, k: int, raw: Any) -> None:
        row = int(batch.rows[k])
        mark = self.marks / str(row)
        if row in self.always or (row in self.once and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().decode(batch, k, raw)


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Deadly]:
    class Configured(Deadly):
        marks = tmp_path

    monkeypatch.setattr("featcache.extraction.stream.Decoder", Configured)
    return Configured


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_kills_its_worker_is_found_and_recorded(
    root: Path, deadly: type[Deadly], workers: int
) -> None:
    deadly.always = (5, 6, 17)
    store = run(root, workers=workers)
    names = list(ImageSet.from_folder(root).ids)
    assert [f.id for f in store.failures] == [names[row] for row in deadly.always]
    assert all("killed by SIGKILL" in f.reason for f in store.failures)
    expected = np.delete(plainest(ImageSet.from_folder(root), network(), "pool"), deadly.always, 0)
    np.testing.assert_allclose(store.load(TAP)[0], expected, atol=1e-5 * expected.max())


def test_a_worker_that_is_killed_once_costs_no_image(root: Path, deadly: type[Deadly]) -> None:
    deadly.once = (3, 14)
    store = run(root, workers=2)
    assert store.failures == []
    assert len(store) == N


def test_after_a_loss_fewer_workers_go_on(root: Path, deadly: type[Deadly]) -> None:
    deadly.once = (3,)
    images = ImageSet.from_folder(root)
    loader = Loader(deadly(images, Preprocessing(resize=32, crop=32)), workers=4)
    rows = [batch.rows for batch in loader.batches(make_tasks(np.arange(N), 4))]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(N))
    assert loader.workers == 2


def test_a_mistake_in_the_decoder_is_not_taken_for_a_lost_worker(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(self: Decoder, batch: Batch, k: int, raw: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Decoder, "decode", mistaken)
    for workers in (0, 1):
        with pytest.raises(ZeroDivisionError, match="a bug"):
            run(root, workers=workers)


def test_losing_a_worker_never_disturbs_the_caller(root: Path, deadly: type[Deadly]) -> None:
    deadly.once = (4,)
    images = ImageSet.from_folder(root)
    loader = Loader(deadly(images, Preprocessing(resize=32, crop=32)), workers=1)
    batches = loader.batches(make_tasks(np.arange(N), 4))
    first = next(batches)
    while not (deadly.marks / "4").exists():  # the worker dies while the caller is at work
        sum(range(1000))
    assert first.rows.tolist() == [0, 1, 2, 3]
    assert sum(len(batch.rows) for batch in batches) == N - 4


def test_workers_that_cannot_start_are_not_blamed_on_the_images(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "_start_worker", lambda *_: os._exit(1))
    with pytest.raises(ExtractionError, match=r"as soon as they are started.*--workers 0"):
        run(root, workers=2)
    assert run(root, workers=0).failures == []


# --- files ----------------------------------------------------------------------------------------


def test_bad_files_of_every_kind_are_recorded_with_their_reason(root: Path) -> None:
    good = (root / "ant" / "0000.jpg").read_bytes()
    bad = {
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"just some text", "not an image"),
        "half.jpg": (good[: len(good) // 2], "truncated"),
        "page.png": (b"<!DOCTYPE html><html></html>", "HTML"),
    }
    for name, (content, _) in bad.items():
        (root / "ant" / name).write_bytes(content)
    (root / "ant" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    images = ImageSet.from_folder(root)
    store = run(root)
    reasons = {Path(f.id).name: f.reason for f in store.failures}
    assert len(store) + len(store.failures) == len(images)
    for name, (_, reason) in bad.items():
        assert reason in reasons[name], (name, reasons[name])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_recorded(root: Path) -> None:
    (root / "ant" / "0000.jpg").chmod(0)
    (failure,) = run(root).failures
    assert (failure.stage, failure.reason) == ("read", "Permission denied")


def test_decompression_bombs_are_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # the photographs have 1,440 pixels
    with pytest.raises(TooManyFailures, match="bomb"):
        run(root, workers=0)


def test_a_file_that_changes_while_it_is_read_is_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageSet.from_folder(root)
    read, readings = ImageSet.read, []

    def racing(self: ImageSet, row: int) -> Any:
        raw = read(self, row)
        readings.append(row)
        if row == 3 and readings.count(3) == 1:
            photograph(root / images.ids[3], 555)
        return raw

    monkeypatch.setattr(ImageSet, "read", racing)
    store = run(root, workers=0)
    monkeypatch.undo()
    np.testing.assert_array_equal(store.load(TAP)[0], run(root, path=root / "b.h5").load(TAP)[0])


def test_a_file_that_never_stands_still_is_recorded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, stat, times = ImageSet.from_folder(root), ImageSet.stat, iter(range(1000))

    def restless(self: ImageSet, row: int) -> tuple[int, int]:
        return (10, next(times)) if row == 3 else stat(self, row)

    monkeypatch.setattr(ImageSet, "stat", restless)
    decoder = Decoder(images, Preprocessing(resize=32, crop=32))
    (batch,) = Loader(decoder, workers=0).batches(make_tasks(np.arange(6), 6))
    assert [(row, error.stage) for row, error in batch.failures.items()] == [(3, "read")]
    assert "changed" in batch.failures[3].reason
    assert batch.rows[batch.entries["status"] == DONE].tolist() == [0, 1, 2, 4, 5]


def test_an_image_replaced_during_the_run_is_computed_once_more(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.networks.forward import Runtime

    forward, calls = Runtime._forward, []

    def replacing(self: Runtime, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 7:  # the canaries' batches come first
            photograph(root / "ant" / "0000.jpg", 999)
            (root / "ant" / "0002.jpg").unlink()
        return forward(self, batch)

    monkeypatch.setattr(Runtime, "_forward", replacing)
    store = run(root, workers=0)
    monkeypatch.undo()
    assert "ant/0002.jpg" in store.ids  # gone after it was read
    second = run(root)
    assert (second.extraction.computed, second.extraction.copied) == (0, N - 1)
    fresh = run(root, path=root.parent / "fresh.h5")
    np.testing.assert_array_equal(second.load(TAP)[0], fresh.load(TAP)[0])


def test_clocks_that_are_wrong_do_no_harm(root: Path) -> None:
    for path, year in ((root / "ant" / "0000.jpg", 2200), (root / "ant" / "0002.jpg", 1971)):
        seconds = (year - 1970) * 31_556_952
        os.utime(path, (seconds, seconds))
    run(root)
    assert run(root).extraction.skipped
    photograph(root / "ant" / "0000.jpg", 31)
    os.utime(root / "ant" / "0000.jpg", (0, 0))
    assert run(root).extraction.computed == 1


# --- places ---------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to_is_said_before_any_work(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.networks.forward import Runtime

    monkeypatch.setattr(Runtime, "_prepare", lambda self: pytest.fail("work was begun"))
    place = root.parent / "place"
    place.mkdir()
    if os.geteuid() != 0:
        place.chmod(0o500)
        with pytest.raises(StoreError, match="place"):
            run(root, path=place / "f.h5")
    with pytest.raises(StoreError, match="proc"):  # where not even root may write
        run(root, path=Path("/proc/features.h5"))


def test_a_folder_in_the_place_of_the_file_is_said(root: Path) -> None:
    with pytest.raises(StoreError, match="folder"):
        run(root, path=root)


def test_a_file_of_another_kind_is_not_replaced(root: Path) -> None:
    path = root.parent / "notes.h5"
    path.write_text("my notes")
    with pytest.raises(StoreError, match=r"notes\.h5"):
        run(root, path=path)
    assert path.read_text() == "my notes"


def test_a_disk_that_is_full_is_found_before_any_work(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    full_disk: Callable[..., AbstractContextManager[None]],
) -> None:
    from featcache.errors import DiskFull
    from featcache.networks.forward import Runtime

    monkeypatch.setattr(Runtime, "_prepare", lambda self: pytest.fail("work was begun"))
    with full_disk(), pytest.raises(DiskFull):
        run(root)
    assert not [p for p in root.parent.glob("features.h5*") if p.stat().st_size]


# --- Pillow's collection --------------------------------------------------------------------------


@pytest.mark.campaign
def test_pillows_own_images_never_end_a_run(tmp_path: Path) -> None:
    """The 1,080 files with which Pillow tests itself: rows and failures are the files."""
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "pillow"]
    version = f"pillow=={PIL.__version__}"
    subprocess.run([*download, version, "-d", str(tmp_path)], check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    files = [path for path in sorted(tmp_path.rglob("Tests/images/**/*")) if path.is_file()]
    images = ImageSet.from_files(files)
    # Without a depth, a 32-bit image that does not look like one of 8 bits ends a run.
    deep = backbone()
    deep.preprocessing = dataclasses.replace(deep.preprocessing, bit_depth=16)
    for workers in (0, 2):
        path = tmp_path / f"pillow{workers}.h5"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store = extract(images, deep, path, device="cpu", workers=workers, max_failures=0.5)
        assert len(store) + len(store.failures) == len(images) > 1000
        assert all(f.stage in ("read", "decode") and f.reason for f in store.failures)
        assert store.verify().ok
        print(f"{len(images)} files: {len(store)} rows, {len(store.failures)} failures")


def test_an_error_of_reading_names_its_stage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ImageSet.read

    def failing(self: ImageSet, row: int) -> Any:
        if row == 2:
            raise DecodeError("read", "Input/output error")
        return read(self, row)

    monkeypatch.setattr(ImageSet, "read", failing)
    (failure,) = run(root).failures
    assert (failure.stage, failure.reason) == ("read", "Input/output error")
