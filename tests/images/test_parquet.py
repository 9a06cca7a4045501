"""Parquet files with images in their rows, as Hugging Face exports data sets."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import DecodeError, ImageSetError
from featcache.images import parquet
from featcache.images.image_set import ImageSet
from featcache.store.store import FeatureStore
from tests.cli.test_cli import featcache, succeed
from tests.images.test_images import png, table
from tests.images.test_layout import labelled

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

OWN = ("--backbone", "tests.small:own", "--layer", "pool")
NAMES = ["ant", "bee"]


def rows(
    path: Path,
    labels: list[Any],
    paths: list[str | None] | None = None,
    *,
    names: list[str] | None = NAMES,
    start: int = 0,
    **columns: list[Any],
) -> Path:
    """Write a file with the images `start`, `start` + 1, ..., two rows in a group."""
    paths = paths or [None] * len(labels)
    images = [{"bytes": png(start + k), "path": name} for k, name in enumerate(paths)]
    feature = {"_type": "ClassLabel", "names": names} if names else {"_type": "Value"}
    told = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": feature}}})
    made = pa.table({"image": images, "label": labels} | columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = made.replace_schema_metadata({"huggingface": told})
    pq.write_table(made, path, row_group_size=2)
    return path


def test_images_labels_and_splits(tmp_path: Path) -> None:
    data = tmp_path / "flags" / "data"
    rows(data / "train-00000-of-00002.parquet", [0, 1, 0], ["z.png", "a.png", "m.png"])
    rows(data / "train-00001-of-00002.parquet", [1, None, -1], start=3)
    rows(data / "test-00000-of-00001.parquet", [1], start=6, id=[7])
    for named in (tmp_path / "flags", f"{data}/*.parquet", sorted(data.iterdir())):
        images = ImageSet.open(named)
        assert images.ids.tolist() == [
            "test-00000-of-00001.parquet/00000000",
            "train-00000-of-00002.parquet/00000000/z.png",
            "train-00000-of-00002.parquet/00000001/a.png",
            "train-00000-of-00002.parquet/00000002/m.png",
            *(f"train-00001-of-00002.parquet/{k:08d}" for k in range(3)),
        ]
        assert images.labels.tolist() == ["bee", "ant", "bee", "ant", "bee", "", ""]
        assert images.splits.tolist() == ["test", *["train"] * 6]
        assert [images.read(k) for k in range(7)] == [png(k) for k in (6, 0, 1, 2, 3, 4, 5)]
        assert images.notes[0] == f"2 without a label (first: {images.ids[5]})"
        assert images.notes[1] == "columns that are not used: id"
        again = ImageSet.open(**images.opened_with)
        assert again.ids.tolist() == images.ids.tolist()
        sent = pickle.loads(pickle.dumps(images.select([4, 1])))
        assert [sent.read(k) for k in range(2)] == [png(3), png(0)]


def test_folders_of_splits_braces_and_labels_of_text(tmp_path: Path) -> None:
    rows(tmp_path / "train" / "0.parquet", ["x", "y"], names=None)
    rows(tmp_path / "test" / "0.parquet", ["x"], names=None, start=2)
    images = ImageSet.open(f"{tmp_path}/{{train,test}}/0.parquet")
    assert images.ids[0] == "test/0.parquet/00000000"
    assert (images.labels.tolist(), images.splits.tolist()) == (
        ["x", "x", "y"],
        ["test", "train", "train"],
    )
    one = ImageSet.open(tmp_path / "train" / "0.parquet")
    assert one.ids.tolist() == ["0.parquet/00000000", "0.parquet/00000001"]
    assert one.splits is None


def test_a_table_labels_rows_by_the_paths_that_they_name(tmp_path: Path) -> None:
    path = rows(tmp_path / "d.parquet", [0, 1], ["a.png", "b.png"])
    images = ImageSet.open(path, labels_csv=table(tmp_path, "id,label\na.png,x\nb,y\n"))
    assert list(labelled(images).values()) == ["x", "y"]


def test_columns_of_bytes_alone_and_of_other_names(tmp_path: Path) -> None:
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"picture": [png(1), None], "label": [3, 4]}), path)
    images = ImageSet.open(path)
    assert images.labels.tolist() == ["3", "4"] and images.read(0) == png(1)
    with pytest.raises(DecodeError, match="the row holds no bytes"):
        images.read(1)


def test_only_one_group_of_rows_is_read_for_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageSet.open(rows(tmp_path / "d.parquet", [0] * 8))
    opened: list[str] = []
    right = parquet._opened
    monkeypatch.setattr(parquet, "_opened", lambda path: opened.append(path) or right(path))
    assert [images.read(k) for k in range(8)] == [png(k) for k in range(8)]
    assert len(opened) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_extract(tmp_path: Path, workers: int) -> None:
    path, store = tmp_path / "d.parquet", tmp_path / "f.h5"
    asked = ("extract", path, "-o", store, *OWN, "--workers", workers, "--json")
    rows(path, [0, 1, 0, 1, 0])
    assert json.loads(succeed(*asked))["computed"] == 5
    assert json.loads(succeed(*asked))["skipped"]
    folder = tmp_path / "files"
    folder.mkdir()
    for k in range(5):
        (folder / f"{k}.png").write_bytes(png(k))
    succeed("extract", folder, "-o", tmp_path / "g.h5", *OWN)
    found, wanted = (FeatureStore.open(name).load()[0] for name in (store, tmp_path / "g.h5"))
    np.testing.assert_array_equal(found, wanted)
    before = path.stat().st_mtime_ns
    rows(path, [0, 1, 0, 1, 0], start=1)
    os.utime(path, ns=(before, before))
    told = json.loads(succeed(*asked))
    assert (told["computed"], told["copied"]) == (1, 4)


def test_what_is_no_such_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ImageSetError, match=r"d\.parquet: cannot be read: ArrowInvalid"):
        ImageSet.open(path)
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), path)
    with pytest.raises(ImageSetError, match=r"expected a column of images.* got text, n"):
        ImageSet.open(path)
    with pytest.raises(ImageSetError, match="row 0 of group 0 has the target 2"):
        ImageSet.open(rows(path, [2]))
    images = ImageSet.open(rows(path, [0]))
    rows(path, [0, 1])
    with pytest.raises(DecodeError, match="has changed since its images were listed"):
        images.read(0)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    done = featcache("extract", path, "-o", tmp_path / "f.h5", *OWN)
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1 and "pip install 'featcache[parquet]'" in done.stderr
