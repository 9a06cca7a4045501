"""A fault that passes is no image's own; few broken images, and rows that would go, are said."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from featcache.errors import ExtractionError, TooManyFailures
from featcache.extraction.extract import extract
from featcache.images.image_set import ImageSet
from featcache.store.store import FeatureStore
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


def test_renamed_images_are_not_gone(root: Path) -> None:
    run(root)
    (root / "ant").rename(root / "wasp")
    (root / "bee").rename(root / "hornet")
    assert run(root).extraction.removed == 0
