"""Links, pipes and what killed processes left at the names that a store uses; rights and room."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from featcache.errors import DiskFull, MissingStore, StoreError
from featcache.extraction.extract import extract
from featcache.images.image_set import ImageSet
from featcache.store import file as file_module
from featcache.store.store import FeatureStore
from featcache.store.writer import relabel
from featcache.system import files
from tests import stores
from tests.small import backbone, folder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.h5"


def beside(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p.name.startswith(path.name))


def grown(path: Path, failed: list[int] = []) -> FeatureStore:  # noqa: B006
    return stores.store(path, stores.images(14), failed=failed)


WAYS: dict[str, Callable[[Path], object]] = {
    "grow": grown,
    "leave out": lambda path: grown(path, failed=[3]),
    "relabel": lambda path: relabel(FeatureStore.open(path), stores.images(12).tables),
}
NAMES = [".partial", ".partial.lock", ".partial.old"]


# --- links and pipes ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_links_at_the_names_that_are_written_are_not_followed(
    path: Path, tmp_path: Path, name: str, way: str
) -> None:
    stores.store(path)
    whole = path.read_bytes()
    victim, link = tmp_path / "victim", Path(f"{path}{name}")
    victim.write_bytes(whole)  # what looks like ours most of all
    link.symlink_to(victim)
    try:
        WAYS[way](path)
    except StoreError as error:
        assert f"{link} is a symbolic link" in str(error) and "Move it away" in str(error)
        assert path.read_bytes() == whole
        link.unlink()  # as it says
        WAYS[way](path)
    assert victim.read_bytes() == whole
    assert FeatureStore.open(path).verify().ok
    assert beside(path) in (["a.h5"], ["a.h5", f"a.h5{name}"])


@pytest.mark.parametrize("name", ["", *NAMES, ".partial.plan"])
def test_pipes_are_not_waited_for(path: Path, tmp_path: Path, name: str) -> None:
    if name:
        stores.store(path)
    pipe = Path(f"{path}{name}")
    os.mkfifo(pipe)
    root = folder(tmp_path / "images", 4)
    try:
        extract(ImageSet.from_folder(root), backbone(), path, device="cpu", allow_removal=True)
    except StoreError as error:
        assert "Move it away" in str(error) or "other features" in str(error)
    if not name:
        with pytest.raises(StoreError, match=f"{path} is a pipe or a device"):
            FeatureStore.open(path)
    if pipe.exists():
        assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_device_is_no_store_and_is_not_replaced() -> None:
    with pytest.raises(StoreError, match="/dev/null is a pipe or a device"):
        FeatureStore.open("/dev/null")
    with pytest.raises(StoreError, match="/dev/null is a pipe or a device"):
        stores.store(Path("/dev/null"))
    assert not Path("/dev/null.partial").exists()


@pytest.mark.parametrize("content", [b"my notes\n", b'{"mine": 1}', b"\x00\x01"])
def test_a_lock_file_that_is_not_ours_is_left_as_it_is(path: Path, content: bytes) -> None:
    lock = Path(f"{path}.partial.lock")
    lock.write_bytes(content)
    with pytest.raises(StoreError, match=f"{lock} is not what featcache makes .* Move it away"):
        stores.store(path)
    assert lock.read_bytes() == content


@pytest.mark.parametrize("content", [b"", bytes(90), b'{"pi', b'{"pid": 1, "ho', b'{"pid": 1}'])
def test_a_lock_file_of_a_dead_process_is_taken_over_whatever_is_left_of_it(
    path: Path, content: bytes
) -> None:
    Path(f"{path}.partial.lock").write_bytes(content)
    assert stores.store(path).verify().ok
    assert beside(path) == ["a.h5"]


@pytest.mark.parametrize("name", [".partial.old", ".partial.new"])
@pytest.mark.parametrize("content", ["text", "other store", "set aside by hand"])
def test_what_a_user_keeps_beside_a_store_is_left_as_it_is(
    path: Path, name: str, content: str
) -> None:
    theirs, few = Path(f"{path}{name}"), stores.images(6)
    theirs.write_text("my notes\n")
    if content == "other store":
        theirs.unlink()
        stores.store(theirs, f=stores.fingerprint(weights="others"))
    elif content == "set aside by hand":
        with stores.writer(path, stores.images(5, start=20)) as writer:
            stores.fill(writer, stores.images(5, start=20), np.arange(3))
        Path(f"{path}.partial").rename(theirs)
    kept = theirs.read_bytes()
    with stores.writer(path, few) as writer:
        stores.fill(writer, few, np.arange(3))
    if name == ".partial.old":  # other images came, and rows are to be set aside there
        with pytest.raises(StoreError, match=rf"{theirs} is not what featcache .* Move it away"):
            stores.store(path)
        with stores.writer(path, few) as writer:  # they go on
            assert len(writer.pending) == 3
            stores.fill(writer, few, writer.pending)
            writer.finish()
    grown(path)
    grown(path, failed=[3])
    relabel(FeatureStore.open(path), stores.images(14).tables)
    assert theirs.read_bytes() == kept
    assert beside(path) == ["a.h5", f"a.h5{name}"]


# --- what is left after a kill --------------------------------------------------------------------


def test_a_run_that_has_nothing_to_do_removes_what_killed_ones_left(tmp_path: Path) -> None:
    root, path = folder(tmp_path / "images", 8), tmp_path / "f.h5"
    images = ImageSet.from_folder(root)
    extract(images, backbone(), path, device="cpu", workers=0)
    Path(f"{path}.partial.lock").write_bytes(b'{"pid": 1')
    for target in ("f.h5", "f.h5.partial", "f.h5.part-0001.partial", "f.h5.partial.plan"):
        path.with_name(f".{target}.{'0f' * 8}.tmp").write_bytes(path.read_bytes()[:9000])
    Path(f"{path}.partial.plan").write_text('{"merging": true}')
    Path(f"{path}.part-0001.partial.lock").touch()
    Path(f"{path}.old-part-0001").write_bytes(b"")
    assert extract(images, backbone(), path, device="cpu", workers=0).extraction.skipped
    assert {one.name for one in tmp_path.iterdir()} == {"f.h5", "images"}


@pytest.mark.parametrize("rest", [["a.h5.part-0001"], ["a.h5.part-0002.partial"], []])
def test_parts_of_another_job_are_no_leftovers(tmp_path: Path, rest: list[str]) -> None:
    root, path = folder(tmp_path / "images", 8), tmp_path / "a.h5"
    images = ImageSet.from_folder(root)
    extract(images, backbone(), path, device="cpu", workers=0)
    merging = "true" if rest else "false"
    Path(f"{path}.partial.plan").write_text(f'{{"merging": {merging}}}')
    for name in rest:
        path.with_name(name).write_bytes(b"rows")
    assert extract(images, backbone(), path, device="cpu", workers=0).extraction.skipped
    assert beside(path) == ["a.h5", *sorted([*rest, "a.h5.partial.plan"])]


def test_nothing_but_the_lock_is_left_between_the_last_rename_and_the_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, more = stores.images(6), stores.images(9)
    with stores.writer(path, few) as writer:
        stores.fill(writer, few, np.arange(3))

    class Killed(BaseException):
        pass

    def killed(source: object, target: object) -> None:
        rename(source, target)
        if str(target) == str(path):
            raise Killed

    rename = files.rename
    with stores.writer(path, more) as writer:
        [earlier] = writer.earlier_stores
        writer.copy_rows(earlier, np.arange(3), np.arange(3))
        stores.fill(writer, more, writer.pending)
        monkeypatch.setattr(files, "rename", killed)
        with pytest.raises(Killed):
            writer.finish()
        assert beside(path) == ["a.h5", "a.h5.partial.lock"]


# --- rights, room, replacement --------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_what_takes_the_place_of_a_store_has_its_rights(path: Path, way: str) -> None:
    stores.store(path)
    path.chmod(0o440)
    WAYS[way](path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o440


def test_reasons_are_synced_with_their_rows_and_the_name_with_its_folder(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each call would find on the disk after a power cut: whatever was synced by then."""
    imgs, fsync = stores.images(12), os.fsync
    synced: dict[int, bytes] = {}  # by inode
    names: list[list[str]] = []  # in the folder, at each of its syncs

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            names.append(beside(path))
        else:
            synced[status.st_ino] = os.pread(descriptor, status.st_size, 0)

    monkeypatch.setattr(os, "fsync", noted)
    with stores.writer(path, imgs) as writer:
        partial = Path(f"{path}.partial")
        writer.fail(3, "decode", "the reason of a failure")
        stores.fill(writer, imgs, writer.pending)
        writer.commit()
        assert synced[partial.stat().st_ino] == partial.read_bytes()
        assert b"the reason of a failure" in partial.read_bytes()
        writer.finish(max_failures=1)
    assert synced[path.stat().st_ino] == path.read_bytes()
    assert "a.h5" in names[-1] and "a.h5" not in names[-2]


def test_a_folder_that_cannot_be_synced_is_not_passed_over(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imgs, fsync = stores.images(12), os.fsync

    def fails(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with stores.writer(path, imgs) as writer:
        stores.fill(writer, imgs, writer.pending)
        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(StoreError, match="Input/output error"):
            writer.finish()


def test_folders_that_are_made_are_synced_into_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, synced = os.fsync, set()

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", noted)
    stores.store(tmp_path / "deep" / "er" / "a.h5")
    for folder_ in (tmp_path, tmp_path / "deep", tmp_path / "deep" / "er"):
        assert folder_.stat().st_ino in synced


def test_a_protected_file_says_how_it_is_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.store(path)
    path.rename(f"{path}.partial")
    opened = os.open

    def refuse(name: str, flags: int, *rest: int) -> int:
        if str(name).endswith(".partial") and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return opened(name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match=rf"protected .* type: chmod u\+w {path}.partial, and"):
        stores.store(path)


def test_the_room_that_is_missing_is_not_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, full_disk: Callable[..., object]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: os.terminal_size((0, 0)))
    usage = type("usage", (), {"free": 30_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with full_disk(), pytest.raises(DiskFull, match=r"needs [1-9]\.\d MB and 30,000 bytes are"):  # type: ignore[attr-defined]
        stores.store(path)


def test_a_call_of_libhdf5_that_a_signal_interrupted_is_repeated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, calls = h5py.h5d.create, []

    def interrupted(*args: object, **options: object) -> object:
        calls.append(len(args))  # and not the file, which would stay open
        if len(calls) in (3, 9):
            raise RuntimeError("Unable to create dataset (errno = 4, Interrupted system call)")
        return create(*args, **options)

    quiet = stores.store(path.with_name("b.h5"))
    monkeypatch.setattr(h5py.h5d, "create", interrupted)
    stores.store(path)
    assert path.read_bytes() == Path(quiet.paths[0]).read_bytes()
    assert len(calls) > 12


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores.store(path)
    others = [stores.store(path.with_name(f"{k}.h5"), stores.images(13 + k)) for k in range(3)]
    waiting = [Path(other.paths[0]) for other in others]
    read = file_module.read_datasets

    def replaced(name: str) -> object:
        if waiting:
            waiting.pop(0).rename(path)
        return read(name)

    monkeypatch.setattr(file_module, "read_datasets", replaced)
    assert len(FeatureStore.open(path)) == 15

    def gone(name: str) -> object:
        Path(name).unlink(missing_ok=True)
        return read(name)

    monkeypatch.setattr(file_module, "read_datasets", gone)
    with pytest.raises(MissingStore):
        FeatureStore.open(path)


def test_stores_that_are_open_at_the_end_of_a_program_say_nothing(path: Path) -> None:
    stores.store(path)
    code = f"""
import gc, sys
from featcache.store.store import FeatureStore
store = FeatureStore.open({str(path)!r})
class Cycle: pass
sys.kept = cycle = Cycle()
cycle.store, cycle.cycle, cycle.other = store, cycle, FeatureStore.open({str(path)!r})
try:
    FeatureStore.open("nowhere.h5")
except Exception as error:
    sys.error = error
FeatureStore.open.__func__.kept = cycle
gc.disable()
"""
    command = [sys.executable, "-W", "error", "-X", "dev", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
