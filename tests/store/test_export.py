"""Exports: what other programs read is what the store holds."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from featcache.errors import MissingExtra, OutputError, StoreError
from featcache.store.export import export_store
from featcache.store.store import FeatureStore
from tests import stores
from tests.stores import MAPS, POOL


@pytest.fixture(params=[(1, "float32"), (1, "float16"), (3, "float32")], ids=str)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureStore:
    views, dtype = request.param
    imgs = stores.images(12)
    imgs.splits = ["train"] * 8 + ["test"] * 4
    f = stores.fingerprint(taps=(POOL, MAPS), views=views, store_dtype=dtype)
    return stores.store(tmp_path / "a.h5", imgs, f, failed=[3])


def test_npz(store: FeatureStore, tmp_path: Path) -> None:
    path = export_store(store, tmp_path / "a.npz")
    with np.load(path) as arrays:
        assert set(arrays) == {"ids", "labels", "splits", "fingerprints", POOL, MAPS}
        assert arrays["ids"].tolist() == store.ids.tolist()
        assert arrays["labels"].tolist() == store.labels.tolist()
        assert json.loads(str(arrays["fingerprints"])) == [json.loads(store.fingerprint.to_json())]
        for tap in store.taps:
            X, _ = store.load(tap, dtype=None)
            assert arrays[tap].dtype == X.dtype
            np.testing.assert_array_equal(arrays[tap], X)


def test_npy(store: FeatureStore, tmp_path: Path) -> None:
    path = export_store(store, tmp_path / "a.npy")
    X = np.load(path, mmap_mode="r")
    np.testing.assert_array_equal(X, store.matrix())
    assert X.dtype == np.float32


def test_csv_reads_back_as_the_same_float32(store: FeatureStore, tmp_path: Path) -> None:
    path = export_store(store, tmp_path / "a.csv")
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    known = ["id", "label", "split"] + (["view"] if store.views > 1 else [])
    assert header[: len(known)] == known
    assert header[len(known) :][:2] == [f"{POOL}[0]", f"{POOL}[1]"]
    assert header[-1] == f"{MAPS}[17]"
    values = np.array([row[len(known) :] for row in rows]).astype(np.float32)
    np.testing.assert_array_equal(values, store.matrix().reshape(-1, 26))
    assert [row[0] for row in rows] == np.repeat(store.ids, store.views).tolist()
    if store.views > 1:
        assert [row[3] for row in rows[:4]] == ["0", "1", "2", "0"]


def test_parquet(store: FeatureStore, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'featcache[parquet]'")
    path = export_store(store, tmp_path / "a.parquet")
    table = parquet.read_table(path)
    assert table.column_names == ["id", "label", "split", POOL, MAPS]
    assert table["id"].to_pylist() == store.ids.tolist()
    for tap in store.taps:
        X, _ = store.load(tap)
        got = np.array(table[tap].to_pylist(), np.float32)
        np.testing.assert_array_equal(got.reshape(X.shape), X)
    stored = json.loads(table.schema.metadata[b"featcache"])
    assert stored == [json.loads(store.fingerprint.to_json())]


def test_selections_and_joins_are_exported_too(tmp_path: Path) -> None:
    a = stores.store(tmp_path / "a.h5")
    b = stores.store(tmp_path / "b.h5", f=stores.fingerprint(backbone="vgg16"))
    joined = FeatureStore.join([a, b]).select([7, 2])
    with np.load(export_store(joined, tmp_path / "a.npz")) as arrays:
        assert arrays["ids"].tolist() == [a.ids[7], a.ids[2]]
        np.testing.assert_array_equal(arrays[f"vgg16/{POOL}"], b.load()[0][[7, 2]])
    np.testing.assert_array_equal(
        np.load(export_store(joined, tmp_path / "a.npy")), joined.matrix()
    )


def test_the_same_store_gives_the_same_bytes(store: FeatureStore, tmp_path: Path) -> None:
    for suffix in (".npz", ".npy", ".csv"):
        first = export_store(store, tmp_path / f"a{suffix}").read_bytes()
        assert export_store(store, tmp_path / f"a{suffix}").read_bytes() == first


def test_unknown_kinds_and_foreign_files_are_refused(tmp_path: Path) -> None:
    store = stores.store(tmp_path / "a.h5")
    with pytest.raises(StoreError, match=r"\.npz, \.npy, \.parquet, \.csv"):
        export_store(store, tmp_path / "a.xlsx")
    for suffix in (".npz", ".npy", ".parquet", ".csv"):
        path = tmp_path / f"precious{suffix}"
        path.write_text("my notes")
        with pytest.raises(OutputError, match="not a"):
            export_store(store, path)
        assert path.read_text() == "my notes"
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(OutputError, match="folder"):
        export_store(store, tmp_path / "folder.npy")


def test_a_failed_export_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores.store(tmp_path / "a.h5")
    before = export_store(store.select([1]), tmp_path / "a.npz").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"a\.npz cannot be written: No space left"):
        export_store(store, tmp_path / "a.npz")
    assert (tmp_path / "a.npz").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "a.npz"]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores.store(tmp_path / "a.h5")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"pip install 'featcache\[parquet\]'"):
        export_store(store, tmp_path / "a.parquet")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5"]


def test_a_table_of_pandas(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas", reason="pip install 'featcache[pandas]'")
    table = store.to_pandas()
    assert table.index.name == "id"
    assert table.index.tolist() == np.repeat(store.ids, store.views).tolist()
    assert table["label"].tolist() == np.repeat(store.labels, store.views).tolist()
    known = ["label", "split"] + (["view"] if store.views > 1 else [])
    features = table.drop(columns=known)
    assert list(table.columns[:3]) == [*known, features.columns[0]][:3]
    assert features.columns[0] == f"{POOL}[0]" and features.columns[-1] == f"{MAPS}[17]"
    np.testing.assert_array_equal(features.to_numpy(), store.matrix().reshape(len(table), -1))
    some = store.select([4, 2]).to_pandas(MAPS)
    assert some.index.tolist()[:: store.views] == store.ids[[4, 2]].tolist()
    assert some.shape[1] == len(known) + 18
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"featcache\[pandas\]"):
        store.to_pandas()
