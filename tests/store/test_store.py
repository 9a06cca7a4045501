"""Filling a store through kills and failures, and reading it in every way."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import SVC

from featcache.errors import (
    CorruptStore,
    DiskFull,
    FeatcacheError,
    FingerprintMismatch,
    IncompleteStore,
    MissingFeatures,
    StoreError,
    StoreLocked,
    TooManyFailures,
    TrainingError,
)
from featcache.store import checksums, disk
from featcache.store.export import export_store
from featcache.store.file import StoreFile
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter, relabel, restamp
from tests import stores
from tests.stores import MAPS, POOL, Images


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.h5"


def beside(path: Path) -> list[str]:
    """Return what lies in the store's folder."""
    return sorted(p.name for p in path.parent.iterdir())


def flip(path: Path, name: str, position: int) -> None:
    """Flip a bit of a dataset on the disk."""
    at = StoreFile(str(path)).datasets[name].offset + position
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_path_is_opened_with_open() -> None:
    for path in ("x.h5", Path("x.h5"), ["x.h5"]):
        with pytest.raises(StoreError, match=r"Type: FeatureStore.open\("):
            FeatureStore(path)  # type: ignore[arg-type]


# --- filling ------------------------------------------------------------------------------------


def test_features_come_back_bit_for_bit(path: Path) -> None:
    f = stores.fingerprint(taps=(POOL, MAPS))
    imgs = stores.images(12)
    store = stores.store(path, imgs, f)
    expected = stores.features(imgs.ids, f)
    for tap in f.taps:
        X, y = store.load(tap)
        np.testing.assert_array_equal(X, expected[tap])
        assert y.tolist() == imgs.labels
    assert store.ids.tolist() == imgs.ids
    assert store.classes == ["a", "b", "c"]
    assert store.fingerprint == f
    assert store.sizes.tolist() == list(range(100, 112))
    assert store.stamps.tolist() == list(range(12))
    np.testing.assert_array_equal(store.sha256, stores.sha256(imgs.ids))
    assert beside(path) == ["a.h5"]


def test_rows_may_come_in_any_order(path: Path) -> None:
    imgs = stores.images(12)
    with stores.writer(path, imgs) as writer:
        for rows in ([11, 3, 4, 5], [0], [10, 9, 8, 1, 2], [7, 6]):
            stores.fill(writer, imgs, np.array(rows))
        store = writer.finish()
    np.testing.assert_array_equal(
        store.load()[0], stores.features(imgs.ids, store.fingerprint)[POOL]
    )


def test_a_run_goes_on_where_it_stopped(path: Path) -> None:
    imgs = stores.images(12)
    with stores.writer(path, imgs) as writer:
        writer.set_meta("settings", {"batch_size": 16})
        stores.fill(writer, imgs, np.arange(5))
        writer.commit()
    with stores.writer(path, imgs) as writer:
        assert writer.pending.tolist() == list(range(5, 12))
        assert writer.meta["settings"] == {"batch_size": 16}
        entries = writer.entries(range(6))
        assert entries["size"].tolist() == [100, 101, 102, 103, 104, 0]
        assert entries["stamp"][:5].tolist() == [0, 1, 2, 3, 4]
        stores.fill(writer, imgs, writer.pending)
        writer.finish()


def test_torn_entries_count_as_pending(path: Path) -> None:
    imgs = stores.images(8)
    with stores.writer(path, imgs) as writer:
        writer.fail(0, "decode", "no")
        stores.fill(writer, imgs, np.arange(1, 8))
    with h5py.File(f"{path}.partial") as file:
        offset, size = file["rows"].id.get_offset(), file["rows"].dtype.itemsize
    data = bytearray(Path(f"{path}.partial").read_bytes())
    for row, byte in ((0, 40), (2, 33), (3, size - 13), (5, size - 9), (6, 0)):
        data[offset + row * size + byte] ^= 4  # check of a failure, size, status, check, sha256
    Path(f"{path}.partial").write_bytes(data)
    with stores.writer(path, imgs) as writer:
        assert writer.pending.tolist() == [0, 2, 3, 5, 6]


def tear_metadata(path: Path, imgs: stores.Images) -> None:
    """Leave a partial file as a kill does that comes while /meta/run is written."""
    with stores.writer(path, imgs) as writer:
        writer.set_meta("run", {"text": "x" * 9000})
    data = Path(f"{path}.partial").read_bytes()
    end = data.index(b"x" * 9000) + 5000
    Path(f"{path}.partial").write_bytes(data[:end] + bytes(5000) + data[end + 5000 :])


def test_torn_metadata_counts_as_not_written(path: Path) -> None:
    imgs = stores.images(8)
    tear_metadata(path, imgs)
    with stores.writer(path, imgs) as writer:
        assert writer.meta["run"] is None
        stores.fill(writer, imgs, writer.pending)
        writer.set_meta("run", {"computed": 8})
        assert writer.finish().meta["run"] == {"computed": 8}


def test_a_kill_while_a_renamed_store_is_mended_costs_no_row(path: Path) -> None:
    imgs = stores.images(8)
    stores.store(path, imgs)
    path.rename(f"{path}.partial")
    tear_metadata(path, imgs)
    with stores.writer(path, imgs) as writer:
        assert len(writer.pending) == 0
        assert writer.finish().verify().ok


def test_rows_can_be_asked_for_again(path: Path) -> None:
    imgs = stores.images(5)
    with stores.writer(path, imgs) as writer:
        stores.fill(writer, imgs, np.arange(5))
        writer.mark_pending([1, 3])
        assert writer.pending.tolist() == [1, 3]
        with pytest.raises(IncompleteStore, match="2 of 5"):
            writer.finish()
        stores.fill(writer, imgs, writer.pending)
        assert writer.finish().verify().ok


def test_an_unfinished_store_says_how_to_resume(path: Path) -> None:
    command = "featcache extract flowers -o a.h5 --backbone resnet18"
    imgs = stores.images(12)
    with stores.writer(path, imgs, meta={"command": command}) as writer:
        stores.fill(writer, imgs, np.arange(5))
    with pytest.raises(IncompleteStore, match="5 of 12 images") as error:
        FeatureStore.open(path)
    assert f"{path}.partial" in str(error.value)
    assert command in str(error.value)
    Path(f"{path}.partial").rename(path)
    with pytest.raises(IncompleteStore, match="never finished"):
        FeatureStore.open(path)


def test_what_is_written_must_fit(path: Path) -> None:
    imgs = stores.images(5)
    sha = stores.sha256(imgs.ids)
    good = stores.features(imgs.ids, stores.fingerprint())
    with stores.writer(path, imgs) as writer:
        with pytest.raises(StoreError, match="shape"):
            writer.write([0, 1], good, sha256=sha[:2])
        for row in (-1, 5):
            with pytest.raises(StoreError, match="0 to 4"):
                writer.write([row], {POOL: good[POOL][:1]}, sha256=sha[:1])
        with pytest.raises(StoreError, match="no place"):
            writer.set_meta("opinion", 1)
        with pytest.raises(StoreError, match="4096 bytes"):
            writer.set_meta("settings", "x" * 5000)
        writer.write([], {POOL: good[POOL][:0]}, sha256=sha[:0])
        assert len(writer.pending) == 5


@pytest.mark.parametrize("ids", [["a\0b"], ["\udcff"]], ids=["NUL", "surrogate"])
def test_ids_that_cannot_be_stored(path: Path, ids: list[str]) -> None:
    with pytest.raises(StoreError, match="ids"):
        FeatureWriter.begin(
            path, {"ids": np.array(ids, object)}, {POOL: (8,)}, fingerprint=stores.fingerprint()
        )
    assert beside(path) == []


def test_no_images_is_refused(path: Path) -> None:
    with pytest.raises(StoreError, match=f"no images to make {path}"):
        stores.writer(path, Images([]))


@pytest.mark.parametrize("source", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("writeable", [True, False])
def test_float16_rounds_to_nearest(path: Path, source: type, writeable: bool) -> None:
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((4, 3000)) * 10.0 ** rng.integers(-7, 4, (4, 3000))).astype(
        source
    )
    values.flags.writeable = writeable
    f = stores.fingerprint(store_dtype="float16")
    imgs = stores.images(4)
    with stores.writer(path, imgs, f, {POOL: (3000,)}) as writer:
        writer.write(np.arange(4), {POOL: values}, sha256=stores.sha256(imgs.ids))
        store = writer.finish()
    stored, _ = store.load(dtype=None)
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, values.astype(np.float16))
    loaded, _ = store.load()
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, values.astype(np.float16).astype(np.float32))


def test_a_disk_that_refuses_in_the_middle_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imgs = stores.images(8)

    def refuse(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with stores.writer(path, imgs) as writer:
        stores.fill(writer, imgs, np.arange(4))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", refuse)
            with pytest.raises(StoreError, match=r"Input/output error"):
                stores.fill(writer, imgs, np.arange(4, 8))
            with pytest.raises(StoreError, match=r"Input/output error"):
                writer.fail(5, "decode", "no")
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(StoreError, match=r"kept in .*a\.h5\.partial"):
                writer.commit()
    with stores.writer(path, imgs) as writer:
        assert writer.pending.tolist() == [4, 5, 6, 7]


# --- columns of text ----------------------------------------------------------------------------


def test_further_columns_of_text_are_kept(path: Path) -> None:
    tables = stores.images(6).tables
    tables["camera"] = np.array(["", "é", "b", "c" * 40, "d", "e"], np.dtypes.StringDType())
    f = stores.fingerprint()
    with FeatureWriter.begin(path, tables, stores.shapes(f), fingerprint=f) as writer:
        writer.fail(4, "decode", "no")
        stores.fill(writer, stores.images(6), writer.pending)
        store = writer.finish(max_failures=1)
    with h5py.File(path) as file:
        assert file["camera"].asstr()[:].tolist() == ["", "é", "b", "c" * 40, "e"]
    tables["camera"][5] = "new"
    assert relabel(store, tables).verify().ok
    with h5py.File(path) as file:
        assert file["camera"].asstr()[4] == "new"


@pytest.mark.parametrize("name", ["rows", "features", "digest", "a/b", ".", ""])
def test_columns_need_a_name_of_their_own(path: Path, name: str) -> None:
    tables = {**stores.images(6).tables, name: stores.images(6).tables["labels"]}
    with pytest.raises(StoreError, match="Rename it"):
        FeatureWriter.begin(path, tables, {POOL: (8,)}, fingerprint=stores.fingerprint())
    assert beside(path) == []


def test_columns_are_of_one_length(path: Path) -> None:
    tables = {**stores.images(6).tables, "labels": stores.images(5).tables["labels"]}
    with pytest.raises(StoreError, match=r"one length.*'labels': 5"):
        FeatureWriter.begin(path, tables, {POOL: (8,)}, fingerprint=stores.fingerprint())


def test_scikit_learn_fits_what_a_store_loads(path: Path) -> None:
    store = stores.store(path, stores.images(30))
    X, y = store.load()
    assert SVC().fit(X, y).classes_.tolist() == store.classes
    for text in (y, store.ids, store.labels):
        assert text.dtype.kind == "U"


# --- failures -----------------------------------------------------------------------------------


def test_failed_rows_are_left_out_and_kept_on_record(path: Path) -> None:
    imgs = stores.images(12)
    with stores.writer(path, imgs) as writer:
        writer.fail(0, "read", "gone")
        writer.fail(5, "decode", "not an image: é", size=7, stamp=8)
        writer.fail(11, "decode", "x" * 5000)
        stores.fill(writer, imgs, writer.pending)
        store = writer.finish(max_failures=0.25)
    good = [name for i, name in enumerate(imgs.ids) if i not in (0, 5, 11)]
    assert store.ids.tolist() == good
    X, _ = store.load()
    assert isinstance(X, np.memmap)  # one contiguous block
    np.testing.assert_array_equal(X, stores.features(good, store.fingerprint)[POOL])
    assert [(x.id, x.stage) for x in store.failures] == [
        (imgs.ids[0], "read"),
        (imgs.ids[5], "decode"),
        (imgs.ids[11], "decode"),
    ]
    assert store.failures[1].reason == "not an image: é"
    assert (store.failures[1].size, store.failures[1].stamp) == (7, 8)
    assert 900 < len(store.failures[2].reason) <= 1000
    assert store.verify().ok
    assert store.canaries is not None
    assert beside(path) == ["a.h5"]


def test_too_many_failures_keep_all_good_rows(path: Path) -> None:
    imgs = stores.images(12)
    with stores.writer(path, imgs) as writer:
        for row in (1, 2):
            writer.fail(row, "decode", "not an image")
        stores.fill(writer, imgs, writer.pending)
        with pytest.raises(TooManyFailures, match=r"2 of 12 .*16\.7%.*not an image") as error:
            writer.finish(max_failures=0.1)
    assert "--max-failures" in str(error.value)
    assert not path.exists()
    with stores.writer(path, imgs) as writer:
        assert len(writer.pending) == 0
        assert [failure.reason for failure in writer.failures] == ["not an image"] * 2
        assert len(writer.finish(max_failures=0.2)) == 10


def test_a_store_of_failures_only_is_refused(path: Path) -> None:
    with stores.writer(path, stores.images(2)) as writer:
        for row in (0, 1):
            writer.fail(row, "decode", "no")
        with pytest.raises(TooManyFailures):
            writer.finish(max_failures=1)


def test_failed_rows_are_tried_again_on_request(path: Path) -> None:
    imgs = stores.images(12)
    with stores.writer(path, imgs) as writer:
        writer.fail(3, "decode", "no")
        stores.fill(writer, imgs, writer.pending)
    with stores.writer(path, imgs) as writer:
        assert writer.pending.tolist() == []
    with stores.writer(path, imgs, retry_failed=True) as writer:
        assert writer.pending.tolist() == [3]
        stores.fill(writer, imgs, writer.pending)
        store = writer.finish()
    assert len(store) == 12
    assert store.failures == []


def test_features_that_are_not_finite_are_failures(path: Path) -> None:
    imgs = stores.images(4)
    values = np.ones((4, 8), np.float32)
    values[1, 3], values[2, 0] = np.nan, 1e6
    f = stores.fingerprint(store_dtype="float16")
    with stores.writer(path, imgs, f) as writer:
        refused = writer.write(np.arange(4), {POOL: values}, sha256=stores.sha256(imgs.ids))
        assert refused.tolist() == [1, 2]
        store = writer.finish(max_failures=0.5)
    assert [failure.stage for failure in store.failures] == ["forward"] * 2
    assert "float32" not in store.failures[0].reason
    assert "--store-dtype float32" in store.failures[1].reason
    assert store.verify().ok


def test_the_precision_is_named_where_the_forward_pass_overflows(path: Path) -> None:
    imgs = stores.images(4)
    values = np.ones((4, 8), np.float32)
    values[2, 0] = np.inf
    with stores.writer(path, imgs, stores.fingerprint(precision="float16")) as writer:
        writer.write(np.arange(4), {POOL: values}, sha256=stores.sha256(imgs.ids))
        (failure,) = writer.failures
    assert "float16 forward pass: use --precision bfloat16" in failure.reason


def test_reasons_lie_in_the_file_until_it_is_finished(path: Path) -> None:
    imgs = stores.images(6)
    with stores.writer(path, imgs) as writer:
        writer.fail(1, "decode", "an earlier reason")
        writer.fail(1, "decode", "ünreadable")
        assert beside(path) == ["a.h5.partial", "a.h5.partial.lock"]
    with h5py.File(f"{path}.partial") as file:  # still plain HDF5
        assert file["rows"]["status"].tolist() == [0, 2, 0, 0, 0, 0]
    quiet = stores.store(path.with_name("b.h5"), imgs)
    with stores.writer(path, imgs, retry_failed=True) as writer:
        assert writer.failures == []
        stores.fill(writer, imgs, writer.pending)
        writer.finish()
    assert path.read_bytes() == Path(quiet.paths[0]).read_bytes()


def test_a_reason_may_be_any_text(path: Path) -> None:
    imgs = stores.images(3)
    with stores.writer(path, imgs) as writer:
        writer.fail(1, "decode", "a\0b \udcff\n{")
        stores.fill(writer, imgs, writer.pending)
        assert writer.finish(max_failures=1).failures[0].reason == "a\\0b \\udcff\n{"


def test_every_image_may_have_failed_but_one(path: Path) -> None:
    imgs = stores.images(200)
    with stores.writer(path, imgs) as writer:
        for row in range(1, 200):
            writer.fail(row, "decode", "x" * 2000)
        stores.fill(writer, imgs, writer.pending)
        store = writer.finish(max_failures=1)
    assert (len(store), len(store.failures)) == (1, 199)
    assert store.verify().ok


def test_an_image_whose_reason_was_torn_is_tried_again(path: Path) -> None:
    imgs = stores.images(6)
    with stores.writer(path, imgs) as writer:
        writer.fail(1, "decode", "first")
        writer.fail(2, "decode", "second")
    partial = Path(f"{path}.partial")  # reasons are the end of the file
    partial.write_bytes(partial.read_bytes()[:-20])
    with stores.writer(path, imgs) as writer:
        assert 2 in writer.pending and 1 not in writer.pending
        writer.fail(2, "decode", "again")
        writer.fail(4, "decode", "third")
        assert [failure.reason for failure in writer.failures] == ["first", "again", "third"]


def test_no_room_to_leave_failures_out_loses_nothing(
    path: Path, full_disk: Callable[..., AbstractContextManager[None]]
) -> None:
    imgs = stores.images(12)
    with stores.writer(path, imgs) as writer:
        writer.fail(3, "decode", "no")
        stores.fill(writer, imgs, writer.pending)
        with full_disk(), pytest.raises(DiskFull, match="All features are kept"):
            writer.finish(max_failures=1)
    with stores.writer(path, imgs) as writer:
        assert len(writer.finish(max_failures=1)) == 11


# --- who may write ------------------------------------------------------------------------------


def test_a_second_writer_hears_who_is_first(path: Path) -> None:
    imgs = stores.images(4)
    with stores.writer(path, imgs):
        with pytest.raises(StoreLocked, match=rf"process {os.getpid()} on \S+ \(since 20") as error:
            stores.writer(path, imgs)
        assert str(path) in str(error.value)
    with stores.writer(path, imgs):
        pass


def test_a_dead_writer_holds_nothing(path: Path) -> None:
    with stores.Child(
        f"""
        writer = stores.writer({str(path)!r}, stores.images(4))
        print("ready", flush=True)
        time.sleep(60)
        """
    ) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(StoreLocked, match=f"process {process.pid}"):
            stores.writer(path, stores.images(4))
        process.kill()
        process.wait()
    with stores.writer(path, stores.images(4)) as writer:
        assert len(writer.pending) == 4


def test_a_lock_that_its_holder_removed_meanwhile_is_taken_anew(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last holder removes the file after we opened it and before we lock it."""
    flock, calls = disk.fcntl.flock, []

    def slow(descriptor: int, kind: int) -> None:
        if not calls:
            Path(f"{path}.partial.lock").unlink()
        if kind & disk.fcntl.LOCK_EX:
            calls.append(kind)
        flock(descriptor, kind)

    monkeypatch.setattr(disk.fcntl, "flock", slow)
    with stores.writer(path, stores.images(4)), pytest.raises(StoreLocked):
        stores.writer(path, stores.images(4))
    assert len(calls) == 3


HOLD = """
import h5py
file = h5py.File({!r}, "a")
{}
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["a.h5", "a.h5.partial"])
def test_a_file_that_a_program_has_open_says_which(path: Path, name: str) -> None:
    imgs = stores.images(4)
    stores.store(path, imgs)
    path.rename(path.with_name(name))
    with stores.Child(HOLD.format(str(path.with_name(name)), "")) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(StoreLocked, match=f"{name} is open .* process {process.pid}\\. Close"):
            stores.writer(path, imgs)
    with stores.writer(path, imgs) as writer:  # it was killed, and had changed nothing
        for earlier in writer.earlier_stores:
            writer.copy_rows(earlier, np.arange(4), np.arange(4))
        assert writer.finish().verify().ok
    with h5py.File(path, "a"), pytest.raises(StoreLocked, match="in this process"):
        FeatureStore.open(path)
    assert FeatureStore.open(path).verify().ok


def test_what_a_killed_program_changed_is_said_and_mended(path: Path) -> None:
    imgs = stores.images(4)
    stores.store(path, imgs)
    with stores.Child(HOLD.format(str(path), "file['labels'][1] = 'c'; file.flush()")) as process:
        assert process.stdout.readline() == "ready\n"
    with pytest.raises(CorruptStore, match=rf"mv {path} {path}\.partial, then run") as error:
        FeatureStore.open(path)
    assert "delete" not in str(error.value)
    path.rename(f"{path}.partial")  # as it says
    with stores.writer(path, imgs) as writer:
        [earlier] = writer.earlier_stores
        writer.copy_rows(earlier, np.arange(4), np.arange(4))
        assert writer.finish().labels.tolist() == imgs.labels


def test_other_features_are_never_replaced(path: Path) -> None:
    imgs = stores.images(4)
    stores.store(path, imgs)
    before = path.read_bytes()
    other = stores.fingerprint(preprocessing={"resize": 232})
    with pytest.raises(FingerprintMismatch, match=r"preprocessing\.resize: 256 .*232") as error:
        stores.writer(path, imgs, other)
    assert "-o" in str(error.value)
    assert path.read_bytes() == before
    assert beside(path) == ["a.h5"]


def test_other_partial_features_are_never_replaced(path: Path) -> None:
    imgs = stores.images(4)
    with stores.writer(path, imgs) as writer:
        stores.fill(writer, imgs, writer.pending[:1])
    with pytest.raises(FingerprintMismatch, match=r"a\.h5\.partial"):
        stores.writer(path, imgs, stores.fingerprint(backbone="vgg16"))
    with pytest.raises(FingerprintMismatch):
        stores.writer(path, imgs, stores.fingerprint(views=2))


def test_folders_are_made_and_links_followed(tmp_path: Path) -> None:
    link = tmp_path / "link.h5"
    link.symlink_to(tmp_path / "deep" / "er" / "a.h5")
    stores.store(link)
    assert link.is_symlink()
    assert len(FeatureStore.open(link)) == 12
    assert beside(tmp_path / "deep" / "er" / "a.h5") == ["a.h5"]


# --- growing ------------------------------------------------------------------------------------


def test_unchanged_rows_are_copied_bit_for_bit(path: Path) -> None:
    f = stores.fingerprint(taps=(POOL, MAPS))
    old = stores.store(path, stores.images(12), f, failed=[2])
    more = stores.images(12, start=6)  # six images fewer, six more
    with stores.writer(path, more, f) as writer:
        [source] = writer.earlier_stores
        common, new_rows, old_rows = np.intersect1d(more.ids, source.ids, return_indices=True)
        copied = writer.copy_rows(source, old_rows, new_rows, stamp=np.full(6, 9))
        assert len(common) == len(copied) == 6
        assert writer.pending.tolist() == list(range(6, 12))
        stores.fill(writer, more, writer.pending)
        store = writer.finish()
    assert store.ids.tolist() == more.ids
    for tap in f.taps:
        np.testing.assert_array_equal(store.load(tap)[0], stores.features(more.ids, f)[tap])
    assert store.stamps[:6].tolist() == [9] * 6
    assert store.sizes[:6].tolist() == old.sizes[5:].tolist()
    assert store.verify().ok
    assert len(old.load(POOL)[0]) == 11  # the replaced file stays readable to those who had it


def test_stores_that_rows_are_copied_from_are_closed_with_the_writer(path: Path) -> None:
    stores.store(path)
    with stores.writer(path, stores.images(14)) as writer:
        [source] = writer.earlier_stores
        assert source.verify().ok
    with pytest.raises(OSError, match="Bad file descriptor"):
        source.verify()


def test_damaged_rows_are_not_copied(path: Path) -> None:
    imgs = stores.images(12)
    stores.store(path, imgs)
    position = path.read_bytes().index(
        stores.features(imgs.ids[4:5], stores.fingerprint())[POOL].tobytes()
    )
    data = bytearray(path.read_bytes())
    data[position + 3] ^= 64
    path.write_bytes(data)
    with stores.writer(path, imgs) as writer:
        [source] = writer.earlier_stores
        writer.copy_rows(source, np.arange(12), np.arange(12))
        assert writer.pending.tolist() == [4]


def test_rows_of_a_partial_file_of_other_images_are_not_lost(path: Path) -> None:
    few = stores.images(6)
    with stores.writer(path, few) as writer:
        stores.fill(writer, few, np.array([0, 1, 4]))
    more = stores.images(9)
    for _ in range(2):  # stopped in between, it still knows
        with stores.writer(path, more) as writer:
            [source] = writer.earlier_stores
            assert source.ids.tolist() == [few.ids[0], few.ids[1], few.ids[4]]
    with stores.writer(path, more) as writer:
        [source] = writer.earlier_stores
        writer.copy_rows(source, [0, 1, 2], [0, 1, 4])
        assert writer.pending.tolist() == [2, 3, 5, 6, 7, 8]
        stores.fill(writer, more, writer.pending)
        assert writer.finish().verify().ok
    assert beside(path) == ["a.h5"]


def test_changed_labels_keep_the_rows_of_a_partial_file(path: Path) -> None:
    imgs = stores.images(6)
    with stores.writer(path, imgs) as writer:
        stores.fill(writer, imgs, np.arange(6))
    relabelled = Images(imgs.ids, ["new"] * 6)
    with stores.writer(path, relabelled) as writer:
        [source] = writer.earlier_stores
        writer.copy_rows(source, np.arange(6), np.arange(6))
        assert writer.finish().classes == ["new"]


def test_only_the_same_features_are_copied(tmp_path: Path) -> None:
    other = stores.store(tmp_path / "other.h5", f=stores.fingerprint(precision="bfloat16"))
    writer = stores.writer(tmp_path / "a.h5", stores.images())
    with writer, pytest.raises(FingerprintMismatch):
        writer.copy_rows(other, [0], [0])


def test_relabelling_rewrites_labels_only(path: Path) -> None:
    f = stores.fingerprint(taps=(POOL, MAPS))
    store = stores.store(path, f=f, failed=[3])
    imgs = stores.images(14)
    imgs.labels = [f"a longer label {i % 4}" for i in range(14)]
    imgs.groups = [str(i) for i in range(14)]
    again = relabel(store, imgs.tables)
    keep = [i for i in range(12) if i != 3]
    assert again.labels.tolist() == [imgs.labels[i] for i in keep]
    assert again.groups.tolist() == [imgs.groups[i] for i in keep]
    assert again.classes == again.meta["classes"] == [f"a longer label {i}" for i in range(4)]
    for tap in f.taps:
        np.testing.assert_array_equal(again.load(tap)[0], store.load(tap)[0])
    assert again.failures == store.failures
    assert again.canaries == store.canaries
    assert again.verify().ok
    assert beside(path) == ["a.h5"]
    with pytest.raises(MissingFeatures, match="first: a/0000"):
        relabel(again, stores.images(5, start=20).tables)


@pytest.mark.parametrize("now", [28, 24], ids=["grown", "relabelled"])
def test_what_another_process_wrote_meanwhile_is_not_relabelled(path: Path, now: int) -> None:
    store, theirs = stores.store(path, stores.images(24)), stores.images(now)
    theirs.labels = ["new"] * now
    with stores.writer(path, theirs) as writer:
        [earlier] = writer.earlier_stores
        writer.copy_rows(earlier, np.arange(24), np.arange(24))
        stores.fill(writer, theirs, writer.pending)
        writer.finish()
    mine = Images(stores.images(28).ids, ["old"] * 28).tables
    with pytest.raises(StoreError, match=rf"{path} was written by another process.*same command"):
        relabel(store, mine)
    assert FeatureStore.open(path).labels.tolist() == ["new"] * now
    assert relabel(FeatureStore.open(path), mine).classes == ["old"]
    assert beside(path) == ["a.h5"]


@pytest.mark.parametrize("how", ["grow", "remove", "relabel"])
def test_room_for_the_file_that_takes_the_place_is_asked_for_first(
    path: Path, full_disk: Callable[..., AbstractContextManager[None]], how: str
) -> None:
    store = stores.store(path, stores.images(12), stores.fingerprint(), failed=[3])
    whole, other = path.read_bytes(), stores.images(16 if how == "grow" else 8)
    with full_disk(), pytest.raises(DiskFull, match=r"needs [0-9.]+ MB and [0-9,.]+ MB") as error:
        if how == "relabel":
            relabel(store, stores.images(12).tables)
        else:
            stores.writer(path, other)
    assert f"{path} is as it was" in str(error.value) and "float16" not in str(error.value)
    assert path.read_bytes() == whole
    assert beside(path) == ["a.h5"]


def test_what_a_user_adds_is_named_and_never_dropped(path: Path) -> None:
    imgs = stores.images(12)
    before = stores.store(path, imgs)
    with h5py.File(path, "a") as file:
        file["pca"] = np.arange(24.0).reshape(12, 2)
        file["species"] = np.array(imgs.labels, "S1")  # looks like a column of ours
        file.create_dataset("mine/names", data=imgs.ids, chunks=(4,), compression="gzip")
        file["features/pca"] = np.ones(3)
    store = FeatureStore.open(path)
    np.testing.assert_array_equal(store.load(POOL)[0], before.load(POOL)[0])
    report = store.verify()
    assert report.ok and report.notes == [
        f"{path} also holds what featcache did not write, and does not check: features/pca, mine, "
        "pca, species."
    ]
    assert "12 rows, all intact" in str(report) and report.notes[0] in str(report)
    whole = path.read_bytes()
    with pytest.raises(StoreError, match="features/pca, mine, pca, species") as error:
        stores.writer(path, stores.images(14))
    with pytest.raises(StoreError, match="features/pca, mine, pca, species"):
        relabel(store, imgs.tables)
    assert path.read_bytes() == whole
    assert beside(path) == ["a.h5"]
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(str(error.value).split("type: ")[1], shell=True, check=True, env=here)
    with h5py.File(f"{path}.own.h5") as file:
        assert file["pca"].shape == (12, 2) and file["features/pca"].shape == (3,)
        assert list(file["mine/names"].asstr()) == imgs.ids
    assert FeatureStore.open(path).verify().notes == []
    assert relabel(store, imgs.tables).verify().ok


def test_what_a_user_adds_meanwhile_is_not_dropped_either(path: Path) -> None:
    stores.store(path, stores.images(4))
    more = stores.images(6)
    with stores.writer(path, more) as writer:
        stores.fill(writer, more, writer.pending)
        with h5py.File(path, "a") as file:
            file["pca"] = np.ones(4)
        with pytest.raises(StoreError, match="pca"):
            writer.finish()
    assert beside(path) == ["a.h5", "a.h5.partial"]


@pytest.mark.parametrize("name", ["labels", "ids", "meta/run", "canaries/images/0"])
def test_damaged_tables_get_no_new_digest_and_are_written_again(path: Path, name: str) -> None:
    imgs = stores.images(12)
    canaries = stores.store(path, imgs).canaries
    place = StoreFile(str(path)).datasets[name].offset + 1
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(CorruptStore, match=rf"mv {path} {path}\.partial, then run the same"):
        relabel(FeatureStore.open(path), imgs.tables)
    assert path.read_bytes() == damaged
    assert not FeatureStore.open(path).verify().ok
    if name in ("labels", "ids"):  # 0xff is in no UTF-8
        with pytest.raises(CorruptStore, match="do not match their digest"):
            getattr(FeatureStore.open(path), name)
    path.rename(f"{path}.partial")
    with stores.writer(path, imgs) as writer:
        for earlier in writer.earlier_stores:
            rows = np.array([imgs.ids.index(name) for name in earlier.ids.tolist()])
            writer.copy_rows(earlier, np.arange(len(rows)), rows)
        assert len(writer.pending) == (name == "ids")
        stores.fill(writer, imgs, writer.pending)
        again = writer.finish()
    assert again.verify().ok and again.canaries == canaries
    assert again.labels.tolist() == imgs.labels


@pytest.mark.parametrize("read", ["load", "matrix", "blocks", "select", "export", "pickle"])
@pytest.mark.parametrize("tap", [POOL, MAPS])
def test_damaged_rows_are_named_where_they_are_read(
    path: Path, tmp_path: Path, read: str, tap: str
) -> None:
    f, imgs = stores.fingerprint(taps=(POOL, MAPS)), stores.images(40)
    stores.store(path, imgs, f)
    flip(path, f"features/{tap}", 9 * (32 if tap == POOL else 72) + 3)
    reader: Callable[[FeatureStore], object] = {
        "load": lambda store: store.load(tap),
        "matrix": lambda store: store.matrix(dtype="float64"),
        "blocks": lambda store: list(store.blocks(rows=7)),
        "select": lambda store: store.select([12, 30, 9, 4]).load(tap),
        "export": lambda store: export_store(store, tmp_path / "x.npz"),
        "pickle": lambda store: pickle.loads(pickle.dumps(store)).load(tap),
    }[read]
    with pytest.raises(CorruptStore, match=rf"{tap} of {imgs.ids[9]} are not what") as error:
        reader(FeatureStore.open(path))
    assert f"mv {path} {path}.partial, then run the same `featcache extract`" in str(error.value)
    assert f"featcache verify {path}" in str(error.value)
    assert beside(path) == ["a.h5"]
    other = MAPS if tap == POOL else POOL
    FeatureStore.open(path).load(other)
    FeatureStore.open(path).select([3, 8, 10]).load(tap)  # those are right


def test_nothing_advised_destroys_what_another_run_has_begun(path: Path) -> None:
    imgs, more = stores.images(12), stores.images(14)
    stores.store(path, imgs)
    with stores.writer(path, more) as writer:
        stores.fill(writer, more, np.array([12]))
    flip(path, f"features/{POOL}", 3)
    with pytest.raises(CorruptStore, match="again: run the same `featcache extract` command"):
        FeatureStore.open(path).load()
    flip(path, "labels", 0)
    report = FeatureStore.open(path).verify()
    assert len(report.problems) == 2 and "mv " not in str(report)
    with stores.writer(path, more) as writer:  # as they say
        [earlier] = writer.earlier_stores
        writer.copy_rows(earlier, np.arange(12), np.arange(12))
        assert writer.pending.tolist() == [0, 13]
        stores.fill(writer, more, writer.pending)
        assert writer.finish().verify().ok


@pytest.mark.parametrize("table", ["labels", "failures/reason", "meta/run", "canaries/names"])
def test_damaged_tables_are_not_read(path: Path, table: str) -> None:
    stores.store(path, stores.images(12), failed=[3])
    flip(path, table, 0)
    read: dict[str, Callable[[FeatureStore], object]] = {
        "labels": lambda store: store.labels,
        "load": lambda store: store.load(),
        "failures": lambda store: store.failures,
        "meta": lambda store: store.meta,
        "canaries": lambda store: store.canaries,
        "digest": lambda store: store.digest,
        "join": lambda store: FeatureStore.join([store, store]),
        "open": lambda store: FeatureStore.open([path, path]),
    }
    for name, reader in read.items():
        store = FeatureStore.open(path)
        with pytest.raises(CorruptStore, match="do not match their digest"):
            print(name, reader(store))


def test_a_file_that_is_overwritten_while_it_is_open_is_not_read_on(path: Path) -> None:
    other = stores.store(path.with_name("b.h5"), stores.images(12, start=3))
    store = stores.store(path)
    assert len(list(store.blocks(rows=4))) == 3
    path.write_bytes(Path(other.paths[0]).read_bytes())  # as cp does
    for read in (store.load, store.matrix, lambda: list(store.blocks()), lambda: store.failures):
        with pytest.raises(StoreError, match=r"was overwritten while it was open.*mv is safe"):
            read()
    assert FeatureStore.open(path).ids.tolist() == other.ids.tolist()


def test_features_that_change_in_an_open_file_are_noticed_and_stamps_may(path: Path) -> None:
    imgs = stores.images(12)
    store = stores.store(path, imgs)
    store.load()
    restamp(store, np.arange(12), np.arange(12) + 7)
    np.testing.assert_array_equal(
        store.load()[0], stores.features(imgs.ids, store.fingerprint)[POOL]
    )
    flip(path, f"features/{POOL}", 3 * 32)
    with pytest.raises(CorruptStore, match=imgs.ids[3]):
        store.load()


def test_each_row_is_compared_with_its_checksum_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imgs = stores.images(12)
    stores.store(path, imgs)
    compared: list[int] = []
    row_checksums = checksums.row_checksums

    def counted(features: np.ndarray, seeds: list[int]) -> list[int]:
        compared.append(len(features))
        return row_checksums(features, seeds)

    monkeypatch.setattr(checksums, "row_checksums", counted)
    store = FeatureStore.open(path)
    for part in (store.select([1, 4, 4]), store.select([4, 5]), store, store.select([2, 1])):
        part.load(dtype="float64")
    store.load()
    list(store.blocks(rows=3))
    assert sum(compared) == 3 + 1 + 9


# --- test images --------------------------------------------------------------------------------


def test_canaries_travel_with_the_store(path: Path) -> None:
    f = stores.fingerprint(taps=(POOL, MAPS), views=3)
    values = {POOL: np.ones((2, 8), np.float32), MAPS: np.zeros((2, 2, 3, 3), np.float32)}
    imgs = stores.images(4)
    with stores.writer(path, imgs, f) as writer:
        assert writer.canaries.features == {}
        assert (
            list(zip(writer.canaries.names, writer.canaries.images, strict=True)) == stores.CANARIES
        )
        writer.set_canaries(values)
        writer.fail(0, "decode", "no")
        stores.fill(writer, imgs, writer.pending)
        store = writer.finish(max_failures=1)
    for tap in f.taps:
        np.testing.assert_array_equal(store.canaries.features[tap], values[tap])
    with FeatureWriter.begin(
        path.with_name("b.h5"), imgs.tables, {POOL: (8,)}, fingerprint=stores.fingerprint()
    ) as w:
        assert w.canaries is None


# --- reading ------------------------------------------------------------------------------------


def test_float32_is_mapped_and_the_file_is_safe(path: Path) -> None:
    store = stores.store(path)
    before = path.read_bytes()
    X, _ = store.load()
    assert isinstance(X, np.memmap)
    X += 1  # copy on write
    assert path.read_bytes() == before
    part, _ = store.select(np.arange(3, 9)).load()
    assert isinstance(part, np.memmap)
    np.testing.assert_array_equal(part + 1, X[3:9])


def test_a_replaced_file_is_still_the_one_that_was_opened(path: Path) -> None:
    store = stores.store(path)
    expected = store.load()[0].copy()
    other = stores.store(path.with_name("b.h5"), stores.images(30, start=50))
    Path(other.paths[0]).rename(path)
    np.testing.assert_array_equal(store.load()[0], expected)
    assert store.ids.tolist() == stores.images(12).ids
    with pytest.raises(StoreError, match="replaced"):
        pickle.loads(pickle.dumps(store))


def test_stores_travel_to_other_processes(path: Path) -> None:
    store = stores.store(path).select([5, 2, 7])
    again = pickle.loads(pickle.dumps(store))
    assert again.ids.tolist() == store.ids.tolist()
    np.testing.assert_array_equal(again.load()[0], store.load()[0])


def test_taps_are_found_by_beginning_and_near_names_given(path: Path) -> None:
    f = stores.fingerprint(taps=(POOL, MAPS, "layer4:output:mean"))
    imgs = stores.images(3)
    shapes = {POOL: (4,), MAPS: (2, 3, 3), "layer4:output:mean": (2,)}
    with stores.writer(path, imgs, f, shapes) as writer:
        values = {tap: np.zeros((3, *shape), np.float32) for tap, shape in shapes.items()}
        writer.write([0, 1, 2], values, sha256=stores.sha256(imgs.ids))
        store = writer.finish()
    assert store.load("avgpool")[0].shape == (3, 4)
    assert store.load("layer4:output:map")[0].shape == (3, 2, 3, 3)
    for wrong, hint in (("layer4", MAPS), ("avgpol", POOL)):
        with pytest.raises(MissingFeatures, match=hint) as error:
            store.load(wrong)
        assert "featcache extract" in str(error.value)
    with pytest.raises(MissingFeatures, match="several taps"):
        store.load()
    assert store.taps[MAPS].width == 18
    assert store.matrix().shape == (3, 24)
    assert store.matrix(["layer4:output:mean", "avgpool"]).shape == (3, 6)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_matrix_and_blocks_agree_with_the_arrays(path: Path, views: int, dtype: str) -> None:
    f = stores.fingerprint(taps=(POOL, MAPS), views=views, store_dtype=dtype)
    imgs = stores.images(25)
    store = stores.store(path, imgs, f)
    head = (25, views) if views > 1 else (25,)
    values = stores.features(imgs.ids, f)
    expected = np.concatenate([values[tap].astype(dtype).reshape(*head, -1) for tap in f.taps], -1)
    assert store.views == views
    np.testing.assert_array_equal(store.matrix(), expected.astype(np.float32))
    np.testing.assert_array_equal(store.matrix(MAPS), expected[..., 8:].astype(np.float32))
    assert store.matrix(MAPS, dtype="float64").dtype == np.float64
    for out in (None, np.empty((7, *head[1:], 26), np.float32)):
        got = np.full(expected.shape, np.nan, np.float32)
        for part, block in store.blocks(rows=7, out=out):
            assert block.dtype == np.float32
            got[part] = block
        np.testing.assert_array_equal(got, expected.astype(np.float32))
    assert len(list(store.blocks())) == 1
    assert store.taps[POOL].shape == ((views, 8) if views > 1 else (8,))
    assert store.width() == 26


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, np.ndarray]:
    """Return two files as one store, wide enough that rows lie far apart, and its features."""
    folder = tmp_path_factory.mktemp("big")
    f = stores.fingerprint(store_dtype="float16")
    parts, arrays = [], []
    for k, n in enumerate((30, 50)):
        imgs = stores.images(n, start=100 * k)
        with stores.writer(folder / f"{k}.h5", imgs, f, {POOL: (20_000,)}) as w:
            values = stores.features(imgs.ids, f, d=20_000)[POOL].astype(np.float16)
            w.write(np.arange(n), {POOL: values}, sha256=stores.sha256(imgs.ids))
            parts.append(w.finish().paths[0])
            arrays.append(values)
    return FeatureStore.open(parts), np.concatenate(arrays).astype(np.float32)


@settings(max_examples=60)
@given(rows=st.lists(st.integers(-80, 79), max_size=60), step=st.integers(1, 20))
def test_any_selection_reads_the_right_rows(
    big: tuple[FeatureStore, np.ndarray], rows: list[int], step: int
) -> None:
    store, expected = big
    chosen = store.select(rows)
    index = np.array(rows, int)
    assert chosen.ids.tolist() == store.ids[index].tolist()
    np.testing.assert_array_equal(chosen.load()[0], expected[index])
    blocks = [block for _, block in chosen.blocks(rows=step)]
    np.testing.assert_array_equal(np.concatenate(blocks or [expected[:0]]), expected[index])


@given(st.data())
@settings(max_examples=20)
def test_selections_of_selections(
    big: tuple[FeatureStore, np.ndarray], data: st.DataObject
) -> None:
    store, expected = big
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=80, max_size=80)))
    first = store.select(mask)
    rows = data.draw(st.permutations(range(len(first))))
    np.testing.assert_array_equal(first.select(rows).matrix(), expected[mask][list(rows)])
    assert first.select(rows).rows.tolist() == np.flatnonzero(mask)[list(rows)].tolist()


def test_rows_that_are_not_there(path: Path) -> None:
    store = stores.store(path)
    for wrong in ([12], [-13], [True, False]):
        with pytest.raises(IndexError):
            store.select(np.array(wrong))


def test_rows_are_integers_or_a_mask_of_whatever_type(path: Path) -> None:
    store, mask = stores.store(path), np.arange(12) % 3 == 0
    for same in (mask, mask.astype(object), mask.tolist(), np.flatnonzero(mask)):
        assert store.select(same).ids.tolist() == store.ids[mask].tolist()
    assert len(store.select([])) == len(store.select(np.zeros(12, object) == 1)) == 0
    some = [True, 0] * 6
    for wrong in ([-13], [1.0, 2.7], ["1", "2"], np.array(some, object), [None] * 12, mask[None]):
        with pytest.raises(IndexError, match="integers from -12 to 11, or a mask of 12"):
            store.select(wrong)


def test_reading_blocks_takes_the_memory_of_one(big: tuple[FeatureStore, np.ndarray]) -> None:
    store, _ = big
    next(store.blocks(rows=5))  # imports what converts types
    tracemalloc.start()
    try:
        for _ in store.blocks(rows=5):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20  # the store is 6.4 MB as float32


# --- several files ------------------------------------------------------------------------------


def test_files_of_different_images_are_one_store(tmp_path: Path) -> None:
    a = stores.store(tmp_path / "a.h5", stores.images(5), failed=[1])
    b = stores.store(tmp_path / "b.h5", stores.images(5, start=5))
    store = FeatureStore.open([tmp_path / "a.h5", tmp_path / "b.h5"])
    assert store.ids.tolist() == [*a.ids, *b.ids]
    np.testing.assert_array_equal(
        store.load()[0], stores.features(store.ids.tolist(), store.fingerprint)[POOL]
    )
    assert len(store.failures) == 1
    assert store.verify().rows == 9
    assert store.paths == [str(tmp_path / "a.h5"), str(tmp_path / "b.h5")]
    again = relabel(store, Images(stores.images(10).ids, ["x"] * 10).tables)
    assert again.classes == ["x"]


def test_files_that_share_images_or_differ_in_features_are_refused(tmp_path: Path) -> None:
    stores.store(tmp_path / "a.h5", stores.images(5))
    stores.store(tmp_path / "b.h5", stores.images(5, start=4))
    with pytest.raises(StoreError, match=r"1 image .*first: b/0004"):
        FeatureStore.open([tmp_path / "a.h5", tmp_path / "b.h5"])
    stores.store(
        tmp_path / "c.h5",
        stores.images(5, start=9),
        stores.fingerprint(weights="x.pth", state_sha256="cd" * 32),
    )
    with pytest.raises(FingerprintMismatch, match=r"weights: 'none'"):
        FeatureStore.open([tmp_path / "a.h5", tmp_path / "c.h5"])
    with pytest.raises(StoreError, match="No feature file"):
        FeatureStore.open([])


def test_stores_of_the_same_images_are_joined_by_id(tmp_path: Path) -> None:
    imgs = stores.images(12)
    a = stores.store(tmp_path / "a.h5", imgs)
    mixed = Images(imgs.ids[::-1], imgs.labels[::-1])
    f = stores.fingerprint(backbone="vgg16", store_dtype="float16")
    b = stores.store(tmp_path / "b.h5", mixed, f)
    store = FeatureStore.join([a.select(np.arange(11, -1, -2)), b.select(np.arange(0, 12, 2))])
    assert list(store.taps) == [f"resnet18/{POOL}", f"vgg16/{POOL}"]
    assert store.ids.tolist() == imgs.ids[11::-2]
    values = stores.features(store.ids.tolist(), f)[POOL]
    np.testing.assert_array_equal(store.matrix()[:, :8], values)
    np.testing.assert_array_equal(store.matrix()[:, 8:], values.astype(np.float16))
    np.testing.assert_array_equal(store.load("vgg16/avgpool")[0], values.astype(np.float16))
    part = store.select([4, 0])
    np.testing.assert_array_equal(part.matrix(), store.matrix()[[4, 0]])
    assert store.fingerprints == (a.fingerprint, f)
    with pytest.raises(StoreError, match="several"):
        _ = store.fingerprint
    assert store.verify().rows == 24
    assert "vgg16" in store.to_text()
    assert [p.fingerprint for p in part.parts] == [a.fingerprint, f]
    for p in part.parts:
        assert p.ids.tolist() == part.ids.tolist()
        np.testing.assert_array_equal(
            p.matrix()[:, :2], values[[4, 0], :2].astype(p.taps[POOL].dtype)
        )
    assert [p.digest for p in store.parts] == [a.digest, b.digest]
    assert FeatureStore.join([a]).ids.tolist() == a.ids.tolist()


def test_joins_name_stores_apart_whatever_their_order(tmp_path: Path) -> None:
    a = stores.store(tmp_path / "a.h5")
    b = stores.store(tmp_path / "b.h5", f=stores.fingerprint(preprocessing={"resize": 512}))
    names = set(FeatureStore.join([a, b]).taps)
    assert names == set(FeatureStore.join([b, a]).taps)
    assert names == {f"resnet18@{x.fingerprint.digest[:8]}/{POOL}" for x in (a, b)}
    with pytest.raises(StoreError, match="twice"):
        FeatureStore.join([a, FeatureStore.open(tmp_path / "a.h5")])


def test_joins_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    vgg = stores.fingerprint(backbone="vgg16")
    a = stores.store(tmp_path / "a.h5", stores.images(12))
    b = stores.store(tmp_path / "b.h5", stores.images(12), vgg, failed=[2, 3])
    for pair in ([a, b], [b, a]):
        with pytest.raises(MissingFeatures, match=r"2 of 12 .*a\.h5.* .*b\.h5.*a/0003-é\.jpg"):
            FeatureStore.join(pair)
    imgs = stores.images(12)
    c = stores.store(tmp_path / "c.h5", Images(imgs.ids, ["z", *imgs.labels[1:]]), vgg)
    with pytest.raises(StoreError, match=r"labelled differently .*'a', 'z'"):
        FeatureStore.join([a, c])
    with stores.writer(tmp_path / "d.h5", imgs, vgg) as writer:
        values = stores.features(imgs.ids, vgg)
        writer.write(np.arange(12), values, sha256=stores.sha256(["other", *imgs.ids[1:]]))
        d = writer.finish()
    with pytest.raises(StoreError, match="1 image changed"):
        FeatureStore.join([a, d])
    few = stores.store(tmp_path / "e.h5", f=stores.fingerprint(backbone="vgg16", views=2))
    with pytest.raises(StoreError, match="views"):
        _ = FeatureStore.join([a, few]).views
    with pytest.raises(StoreError, match="No store"):
        FeatureStore.join([])


# --- what it holds ------------------------------------------------------------------------------


def test_unlabelled_images(path: Path) -> None:
    store = stores.store(path, Images(stores.images(4).ids))
    assert store.labels.tolist() == [""] * 4
    assert store.classes == []
    assert store.groups is None
    assert store.splits is None
    with pytest.raises(TrainingError, match="label"):
        store.split()


def test_split_is_stratified_disjoint_and_seeded(path: Path) -> None:
    imgs = stores.images(60)
    imgs.groups = [str(i // 6) for i in range(60)]
    store = stores.store(path, imgs)
    fit, test = store.split(0.25, random_state=1)
    assert sorted([*fit.ids, *test.ids]) == sorted(imgs.ids)
    assert (fit.rows[1:] > fit.rows[:-1]).all()
    counts = np.unique(test.labels, return_counts=True)[1]
    assert counts.tolist() == [5, 5, 5]
    assert store.split(0.25, random_state=1)[1].ids.tolist() == test.ids.tolist()
    fit, test = store.split(0.2, group=True)
    assert not set(fit.groups) & set(test.groups)
    with pytest.raises(TrainingError, match="--split-column"):
        store.split(None)
    with pytest.raises(TrainingError, match=r"Extract with --group-column \(nothing"):
        stores.store(path.with_name("b.h5")).split(group=True)


def test_a_split_column_decides(path: Path) -> None:
    imgs = stores.images(12)
    imgs.splits = ["train"] * 6 + ["val"] * 2 + ["test"] * 4
    fit, test = stores.store(path, imgs).split(None)
    assert test.ids.tolist() == imgs.ids[8:]
    assert fit.ids.tolist() == imgs.ids[:8]


def test_what_was_asked_for_is_kept(path: Path) -> None:
    request = {"source": "torchvision", "backbone": "resnet18", "taps": ["avgpool"]}
    with stores.writer(path, stores.images(3), meta={"request": request}) as writer:
        stores.fill(writer, stores.images(3), writer.pending)
        writer.set_meta("run", {"computed": 3})
        store = writer.finish()
    assert store.meta["request"] == request
    assert store.meta["run"] == {"computed": 3}
    assert "request" not in stores.store(path.with_name("b.h5")).meta


def test_description_for_people_and_programs(path: Path) -> None:
    store = stores.store(path, failed=[3])
    facts = json.loads(json.dumps(store.describe()))
    assert facts["images"] == 11
    assert facts["classes"] == {"a": 3, "b": 4, "c": 4}
    assert facts["taps"] == {POOL: {"shape": [8], "dtype": "float32", "views": 1}}
    assert facts["failures"][0]["reason"] == "not an image"
    assert facts["bytes"] == path.stat().st_size
    for text in ("11 images", "a 3", POOL, "resnet18", "not an image"):
        assert text in store.to_text()
    assert "11 images" in repr(store)
    assert store.verify().to_dict() == {
        "ok": True,
        "rows": 11,
        "bad_rows": [],
        "problems": [],
        "notes": [],
    }


@pytest.mark.parametrize("seed", range(3))
def test_garbage_in_a_partial_file_is_an_error_not_a_crash(path: Path, seed: int) -> None:
    stores.writer(path, stores.images(4)).close()
    partial = Path(f"{path}.partial")
    rng = np.random.default_rng(seed)
    partial.write_bytes(rng.bytes(5000))
    with pytest.raises(CorruptStore):
        stores.writer(path, stores.images(4))
    with pytest.raises(FeatcacheError, match="partial"):
        FeatureStore.open(path)
    partial.write_bytes(b"")  # holds nothing: made anew
    with stores.writer(path, stores.images(4)) as writer:
        assert len(writer.pending) == 4
