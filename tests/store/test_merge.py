"""Parts become one store: the same bytes as of one process, whatever happens on the way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from featcache.errors import (
    DiskFull,
    FingerprintMismatch,
    IncompleteStore,
    StoreError,
    StoreLocked,
    TooManyFailures,
)
from featcache.store import checksums, disk, format
from featcache.store.disk import WriteLock
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter, merge
from tests import stores
from tests.stores import MAPS, POOL, Images

N = 31
BAD = (3, 4, 17, 30)
FINGERPRINT = stores.fingerprint(taps=(POOL, MAPS), store_dtype="float16")


def images(n: int = N) -> Images:
    imgs = stores.images(n)
    imgs.groups = [f"group of {i}" for i in range(n)]
    return imgs


def fill(writer: FeatureWriter, imgs: Images, bad: tuple[int, ...] = ()) -> None:
    for row in bad:
        writer.fail(row, "decode", f"not an image: {imgs.ids[row]}")
    writer.set_canaries({POOL: np.ones((2, 8)), MAPS: np.zeros((2, 2, 3, 3))})
    rows = writer.pending
    ids = [imgs.ids[row] for row in rows]
    numbers = np.array([int(name[2:6]) for name in ids])
    values = stores.features(ids, FINGERPRINT)
    writer.write(rows, values, sha256=stores.sha256(ids), size=numbers + 100, stamp=numbers)


def whole(path: Path, imgs: Images, bad: tuple[int, ...] = BAD) -> FeatureStore:
    """Return the store that one process makes."""
    with stores.writer(path, imgs, FINGERPRINT) as writer:
        fill(writer, imgs, bad)
        return writer.finish(max_failures=1)


def in_parts(folder: Path, imgs: Images, rows: list[np.ndarray]) -> list[Path]:
    """Write parts with these rows."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{k}.h5" for k in range(len(rows))]
    for path, mine in zip(paths, rows, strict=True):
        names = {key: table[mine].tolist() for key, table in imgs.tables.items()}
        some = Images(names["ids"], names.get("labels"), names.get("groups"))
        with stores.writer(path, some, FINGERPRINT) as writer:
            fill(writer, some, tuple(np.flatnonzero(np.isin(mine, BAD)).tolist()))
            writer.finish_part()
    return paths


def parts(folder: Path, imgs: Images) -> list[Path]:
    return in_parts(folder, imgs, np.array_split(np.arange(len(imgs)), 4))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "merged" / "a.h5"


@pytest.fixture
def expected(tmp_path: Path) -> bytes:
    whole(tmp_path / "whole.h5", images())
    return (tmp_path / "whole.h5").read_bytes()


def nothing_else(path: Path, folder: Path) -> bool:
    return [p.name for p in path.parent.iterdir()] == [path.name] and not list(folder.iterdir())


@pytest.mark.parametrize("order", ["runs", "interleaved", "any"])
def test_merged_parts_are_the_file_of_one_process(
    tmp_path: Path, path: Path, expected: bytes, order: str
) -> None:
    rows = np.arange(N) if order != "any" else np.random.default_rng(0).permutation(N)
    cut = np.array_split(rows, 4) if order != "interleaved" else [rows[k::4] for k in range(4)]
    given = in_parts(tmp_path / "parts", images(), cut)
    store = merge(path, images().tables, given, max_failures=0.5)
    assert path.read_bytes() == expected
    assert [f.id for f in store.failures] == [images().ids[row] for row in BAD]
    assert store.failures[0].reason == f"not an image: {images().ids[3]}"
    assert store.verify().ok
    assert nothing_else(path, tmp_path / "parts")


def test_a_part_is_not_a_store(tmp_path: Path) -> None:
    part = parts(tmp_path / "parts", images())[0]
    with pytest.raises(IncompleteStore):
        FeatureStore.open(part)


def test_a_part_of_failures_only(tmp_path: Path, path: Path, expected: bytes) -> None:
    rows = [np.array(BAD), np.setdiff1d(np.arange(N), BAD)]
    merge(path, images().tables, in_parts(tmp_path / "parts", images(), rows), max_failures=0.5)
    assert path.read_bytes() == expected


def test_what_the_run_came_to_is_kept(tmp_path: Path, path: Path) -> None:
    given = parts(tmp_path / "parts", images())
    store = merge(path, images().tables, given, run={"computed": 27}, max_failures=1)
    assert store.meta["run"] == {"computed": 27}
    assert store.canaries is not None
    assert store.canaries.features[POOL].shape == (2, 8)


WIDE = {POOL: (50_000,)}


def wide_parts(folder: Path, imgs: Images) -> list[Path]:
    """Write parts of 8 rows of 200 KB each."""
    given = []
    for k, rows in enumerate(np.array_split(np.arange(len(imgs)), len(imgs) // 8)):
        some = Images([imgs.ids[row] for row in rows])
        with stores.writer(folder / f"{k}.h5", some, None, WIDE, canaries=()) as writer:
            values = stores.features(some.ids, stores.fingerprint(), d=50_000)
            writer.write(np.arange(8), values, sha256=stores.sha256(some.ids))
            writer.finish_part()
        given.append(folder / f"{k}.h5")
    return given


def test_the_disk_holds_one_part_more_than_the_store(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imgs = stores.images(64)
    given = wide_parts(tmp_path, imgs)
    fsync, used = disk.fsync, []

    def measured(descriptor: int) -> None:
        fsync(descriptor)
        files = [*path.parent.iterdir(), *tmp_path.glob("*.h5")]
        used.append(sum(file.stat().st_blocks * 512 for file in files))

    monkeypatch.setattr(disk, "fsync", measured)
    merge(path, Images(imgs.ids).tables, given)
    assert len(used) > 8
    # A part is an eighth of the features, and the tables of all parts are small.
    assert max(used) < path.stat().st_size * (1 + 1 / 8) + 1_500_000


# --- what goes wrong ------------------------------------------------------------------------------


def test_an_image_that_is_in_no_part_is_said(tmp_path: Path, path: Path, expected: bytes) -> None:
    given = parts(tmp_path / "parts", images())
    hidden = given[2].rename(tmp_path / "hidden")
    with pytest.raises(IncompleteStore, match=r"8 of 31 images .*in no finished part"):
        merge(path, images().tables, given, max_failures=1)
    hidden.rename(given[2])
    merge(path, images().tables, given, max_failures=1)
    assert path.read_bytes() == expected


def test_too_many_failures_keep_the_parts(tmp_path: Path, path: Path, expected: bytes) -> None:
    given = parts(tmp_path / "parts", images())
    with pytest.raises(TooManyFailures, match="4 of 31"):
        merge(path, images().tables, given, max_failures=0.1)
    assert all(part.exists() for part in given)
    merge(path, images().tables, given, max_failures=4 / 31)
    assert path.read_bytes() == expected


def test_a_damaged_row_is_refused_and_its_part_kept(
    tmp_path: Path, path: Path, expected: bytes
) -> None:
    given = parts(tmp_path / "parts", images())
    good = given[2].read_bytes()
    values = stores.features(images().ids[20:21], FINGERPRINT)[POOL].astype(np.float16)
    position = good.index(values.tobytes())
    given[2].write_bytes(good[:position] + b"\xff" + good[position + 1 :])
    for _ in range(2):
        with pytest.raises(StoreError, match="1 row of") as error:
            merge(path, images().tables, given, max_failures=1)
        assert images().ids[20] in str(error.value)
        assert str(given[2]) in str(error.value)
        assert [part.exists() for part in given] == [False, False, True, True]
    given[2].write_bytes(good)
    merge(path, images().tables, given, max_failures=1)
    assert path.read_bytes() == expected


def test_parts_of_other_features_are_refused(tmp_path: Path, path: Path) -> None:
    given = parts(tmp_path / "parts", images())
    stores.store(tmp_path / "parts" / "other.h5")
    with pytest.raises(FingerprintMismatch, match="other"):
        merge(path, images().tables, [*given, tmp_path / "parts" / "other.h5"])
    assert all(part.exists() for part in given)


def test_a_part_that_is_being_written_is_waited_for(
    tmp_path: Path, path: Path, expected: bytes
) -> None:
    given = parts(tmp_path / "parts", images())
    lock = WriteLock(str(given[1]))
    with pytest.raises(StoreLocked, match=str(given[1])):
        merge(path, images().tables, given, max_failures=1)
    lock.release()
    code = f"""
    from featcache.store.disk import WriteLock
    lock = WriteLock({str(given[1])!r})
    print(flush=True)
    time.sleep(1)
    """
    with stores.Child(code) as process:
        process.stdout.readline()
        merge(path, images().tables, given, max_failures=1, wait=60)
    assert path.read_bytes() == expected


def test_a_disk_that_fills_loses_nothing(
    tmp_path: Path,
    path: Path,
    expected: bytes,
    full_disk: Callable[..., AbstractContextManager[None]],
) -> None:
    given = parts(tmp_path / "parts", images())
    refused = 0
    for full_at in range(1, 100):
        with full_disk(full_at):
            try:
                merge(path, images().tables, given, max_failures=1)
            except DiskFull as error:
                assert "kept" in str(error)
                refused += 1
                continue
        break
    assert refused > 10
    assert path.read_bytes() == expected
    assert nothing_else(path, tmp_path / "parts")


STOPS = [
    (format, "_write_layout"),
    (disk, "reserve"),
    (disk, "fsync"),
    (disk, "rename"),
    (disk, "pwrite_all"),
    (checksums, "row_checksums"),
    (Path, "unlink"),
]


@pytest.mark.parametrize(("module", "name"), STOPS, ids=[name for _, name in STOPS])
def test_stopped_at_every_step_merging_goes_on(
    tmp_path: Path,
    path: Path,
    expected: bytes,
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
) -> None:
    """Stop at the first call of a step, then at the second one of the next attempt, and so on."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power cuts here; it is slow
    given = parts(tmp_path / "parts", images())
    for stop_at in range(1, 200):
        try:
            with stores.stopped_at(stop_at, module, name, monkeypatch):
                merge(path, images().tables, given, max_failures=1)
        except stores.Stop:
            if not path.exists():
                continue
        break
    assert stop_at > 1
    assert path.read_bytes() == expected
    assert not list((tmp_path / "parts").glob("*.h5"))


def killed_merges_equal_a_quiet_one(folder: Path, kills: int, seed: int) -> None:
    """Kill merges at random moments, each several times; in the end the bytes are the same."""
    imgs = images(400)
    whole(folder / "whole.h5", imgs)
    expected = (folder / "whole.h5").read_bytes()
    rng = np.random.default_rng(seed)
    killed = 0
    for round_ in range(kills):
        path = folder / "merged" / f"{round_}.h5"
        given = in_parts(folder / "parts", imgs, np.array_split(np.arange(400), 8))
        code = f"""
        from featcache.store import writer
        from tests.store.test_merge import images
        move = writer.FeatureWriter._move_part
        def slowly(self, *args):
            time.sleep(0.01)
            move(self, *args)
        writer.FeatureWriter._move_part = slowly
        print(flush=True)
        writer.merge({str(path)!r}, images(400).tables, {list(map(str, given))!r}, max_failures=1)
        """
        while not path.exists():
            with stores.Child(code) as process:
                process.stdout.readline()
                time.sleep(rng.uniform(0, 0.3))
                os.kill(process.pid, signal.SIGKILL)
                killed += process.wait() != 0
        assert path.read_bytes() == expected
        assert not list((folder / "parts").glob("*.h5"))
        path.unlink()
    assert killed >= kills


def test_killed_while_merging_nothing_is_lost(tmp_path: Path) -> None:
    killed_merges_equal_a_quiet_one(tmp_path, kills=2, seed=0)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(1, 4))
def test_killed_many_times_while_merging_nothing_is_lost(tmp_path: Path, seed: int) -> None:
    killed_merges_equal_a_quiet_one(tmp_path, kills=10, seed=seed)


# --- parts from what is there ---------------------------------------------------------------------


def test_parts_take_rows_from_the_store_that_is_there(tmp_path: Path, path: Path) -> None:
    few = images(20)
    whole(path, few, bad=(3, 4, 17))
    some = Images(images().ids[10:], images().labels[10:], images().groups[10:])
    part = tmp_path / "part.h5"
    with stores.writer(part, some, FINGERPRINT, earlier=[path]) as writer:
        [store] = writer.earlier_stores
        _, ours, theirs = np.intersect1d(some.ids, store.ids, return_indices=True)
        assert len(writer.copy_rows(store, theirs, ours)) == 9
        assert len(writer.pending) == 12
        assert [failure.id for failure in store.failures] == [few.ids[row] for row in (3, 4, 17)]


def test_one_process_may_go_on_where_a_merge_stopped(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imgs = Images(stores.images(32).ids)
    given = wide_parts(tmp_path, imgs)
    whole = given[1].read_bytes()
    given[1].write_bytes(b"torn")
    with pytest.raises(StoreError):
        merge(path, imgs.tables, given)
    assert given[0].exists()  # nothing is begun before all parts are there
    given[1].write_bytes(whole)
    commit, commits = FeatureWriter.commit, []

    def stopping(self: FeatureWriter) -> None:
        commit(self)
        commits.append(1)
        if len(commits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(FeatureWriter, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        merge(path, imgs.tables, given)
    monkeypatch.undo()
    status = Path(f"{path}.partial").stat()
    assert status.st_blocks * 512 < status.st_size
    with stores.writer(path, imgs, None, WIDE, earlier=given) as writer:
        assert writer.pending.tolist() == list(range(16, 32))
        status = Path(f"{path}.partial").stat()
        assert status.st_blocks * 512 >= status.st_size  # now with room for all
        earlier = [store.ids.tolist() for store in writer.earlier_stores]
        assert earlier == [imgs.ids[8:16], imgs.ids[16:24], imgs.ids[24:]]
        for first, store in zip((16, 24), writer.earlier_stores[1:], strict=True):
            writer.copy_rows(store, np.arange(8), np.arange(first, first + 8))
        assert writer.finish().verify().ok
