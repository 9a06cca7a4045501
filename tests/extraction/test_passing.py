"""A fault that passes is no image's own; few broken images, and rows that would go, are said."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.errors import ExtractionError, StoreError, TooManyFailures
from featcache.extraction.extract import extract
from featcache.images import sources
from featcache.images.image_set import ImageSet
from featcache.store import disk
from featcache.store.store import FeatureStore
from tests.images.test_images import shard
from tests.small import backbone, folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "images", 24)


def run(root: Path, **options: Any) -> FeatureStore:
    options = {"batch_size": 4, "workers": 0, "device": "cpu", **options}
    return extract(ImageSet.from_folder(root), backbone(), root.parent / "f.h5", **options)


def faulty(monkeypatch: pytest.MonkeyPatch, number: int, names: str = "0002.jpg") -> None:
    """Let opening the images whose paths end so fail with an error of the system."""
    opened = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if isinstance(path, bytes) and path.endswith(names.encode()):
            raise OSError(number, os.strerror(number))
        return opened(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_fault_that_passes_is_tried_again_by_the_next_run(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        faulty(patch, number)
        store = run(root, max_failures=0.1)
    assert [(f.id, f.stage) for f in store.failures] == [("ant/0002.jpg", "system")]
    assert "could not be read now" in store.failures[0].reason
    store = run(root)
    assert (store.extraction.computed, store.extraction.copied, len(store)) == (1, 23, 24)
    assert run(root).extraction.skipped


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_a_system_without_room_ends_the_run_and_blames_no_image(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        faulty(patch, number, "0014.jpg")
        with pytest.raises(ExtractionError, match="No image is to blame"):
            run(root)
    store = run(root)
    assert len(store) == 24
    assert not store.failures


def test_a_disk_that_fails_altogether_ends_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(monkeypatch, errno.EIO, ".jpg")
    with pytest.raises(ExtractionError, match="20 images in a row"):
        run(root)


@pytest.mark.parametrize("how", ["swapped", "overwritten"])
def test_another_picture_of_the_same_size_and_time_is_seen(root: Path, how: str) -> None:
    one, two = root / "ant" / "0000.bmp", root / "ant" / "0001.bmp"
    for path, colour in ((one, "red"), (two, "blue")):
        Image.new("RGB", (8, 8), colour).save(path)
        os.utime(path, ns=(10**18, 10**18))
    store = run(root)
    first = store.sha256[store.ids == "ant/0000.bmp"].copy()
    other = store.sha256[store.ids == "ant/0001.bmp"].copy()
    if how == "swapped":
        one.rename(root / "aside")
        two.rename(one)
        (root / "aside").rename(two)
    else:
        one.write_bytes(two.read_bytes())
        os.utime(one, ns=(10**18, 10**18))
    store = run(root)
    assert not store.extraction.skipped
    now = store.sha256[store.ids == "ant/0000.bmp"]
    assert (now == other).all() and not (now == first).all()


def bitmap(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "BMP")
    return file.getvalue()


def test_another_picture_in_a_tar_of_the_same_size_and_time_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"

    def run(*colours: str) -> FeatureStore:
        """Write the shard anew, with its time put back, and extract it."""
        if colours:
            shard(path, {f"{k}.bmp": bitmap(colour) for k, colour in enumerate(colours)})
            os.utime(path, ns=(10**18, 10**18))
        images = ImageSet.from_tar(path)
        return extract(images, backbone(), tmp_path / "f.h5", workers=0, device="cpu")

    assert run("red", "blue", "green").extraction.computed == 3
    assert run().extraction.skipped
    summary = run("red", "white", "green").extraction
    assert (summary.computed, summary.copied) == (1, 2)
    path.chmod(0o600)
    assert run().extraction.skipped


def test_files_that_were_only_touched_cost_no_new_file(root: Path) -> None:
    run(root)
    path = root.parent / "f.h5"
    before, old = path.stat().st_ino, FeatureStore.open(path).digest
    for image in root.rglob("*.jpg"):
        image.chmod(0o600)
        os.utime(image)
    store = run(root)
    assert store.extraction.skipped
    assert path.stat().st_ino == before
    again = FeatureStore.open(path)
    images = ImageSet.from_folder(root)
    assert again.stamps.tolist() == [images.stat(row)[1] for row in range(24)]
    assert again.verify().ok
    assert again.digest == old


def test_rehash_reads_what_nothing_tells_of(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "stamp", lambda status: 1)
    path = root / "ant" / "0000.bmp"
    Image.new("RGB", (8, 8), "red").save(path)
    run(root)
    Image.new("RGB", (8, 8), "blue").save(path)
    assert run(root).extraction.skipped
    summary = run(root, rehash=True).extraction
    assert (summary.computed, summary.copied) == (1, 24)


def test_some_broken_images_end_no_run_and_half_of_them_do(root: Path) -> None:
    paths = sorted(root.rglob("*.jpg"))
    for path in paths[:5]:
        path.write_bytes(b"no image")
    assert len(run(root).failures) == 5
    paths[5].write_bytes(b"no image")
    with pytest.raises(TooManyFailures, match="6 of 24"):
        run(root)


def test_rows_of_another_folder_are_not_removed_unasked(root: Path) -> None:
    run(root)
    paths = sorted(root.rglob("*.jpg"))
    for path in paths[:13]:
        path.unlink()
    with pytest.raises(ExtractionError, match=r"13 of 24 rows .*--allow-removal"):
        run(root)
    assert len(FeatureStore.open(root.parent / "f.h5")) == 24
    assert run(root, allow_removal=True).extraction.removed == 13


@pytest.mark.parametrize("change", ["touched", "relabelled", "removed", "in parts", "begun"])
def test_a_run_that_looked_before_another_one_wrote_does_not_undo_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The first run is stopped between its look at the file and its lock, and a second runs."""
    ants = [name for name in ImageSet.from_folder(root).ids.tolist() if name.startswith("ant")]
    few = ImageSet.from_folder(root).select(np.arange(12))
    options: dict[str, Any] = {"batch_size": 4, "workers": 0, "device": "cpu"}
    path = root.parent / "f.h5"
    if change != "begun":
        extract(few, backbone(), path, **options)
    if change == "touched":
        os.utime(root / ants[0], ns=(1, 1))
    if change == "relabelled":
        few = few.with_tables({"labels": np.array(["new"] * 12)})
    if change in ("removed", "in parts"):
        few = few.select(np.arange(8))
    locked = disk.WriteLock.__init__

    def after_another(lock: disk.WriteLock, *args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(disk.WriteLock, "__init__", locked)
        run(root)
        locked(lock, *args, **kwargs)

    monkeypatch.setattr(disk.WriteLock, "__init__", after_another)
    parts = {"parts": 2} if change == "in parts" else {}
    if change == "touched":  # nothing but a stamp was to be written: none is
        extract(few, backbone(), path, **options)
    else:
        with pytest.raises(StoreError, match="was written by another process meanwhile"):
            extract(few, backbone(), path, **options, **parts)
    assert len(FeatureStore.open(path)) == 24
    assert FeatureStore.open(path).verify().ok
    assert [p.name for p in root.parent.iterdir() if p.name.startswith("f.h5")] == ["f.h5"]
    assert run(root).extraction.skipped


def test_renamed_images_are_not_gone(root: Path) -> None:
    run(root)
    (root / "ant").rename(root / "wasp")
    (root / "bee").rename(root / "hornet")
    assert run(root).extraction.removed == 0
