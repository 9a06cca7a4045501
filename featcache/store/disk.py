"""Bytes on a disk: reserve room, read and write in full, rename durably, one writer at a time.

A `WriteLock` is ``flock`` on a small file beside the store. The kernel drops it when its holder
dies, however it dies, so there is no stale lock to remove by hand. The text in the file (process,
host, since when) is for messages only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import NoReturn, Self

import numpy as np

from featcache.errors import (
    CorruptStore,
    DiskFull,
    StoreError,
    StoreLocked,
    explained,
    of_system,
)
from featcache.system.files import NOT_SUPPORTED
from featcache.system.files import fsync as fsync
from featcache.system.files import remove as remove
from featcache.system.files import rename as rename

try:
    import fcntl
except ImportError as error:  # pragma: no cover (Windows)
    raise StoreError(
        "Feature files need a POSIX system (Linux or macOS). On Windows, run featcache inside "
        "the Windows Subsystem for Linux: https://learn.microsoft.com/windows/wsl/install"
    ) from error

_ZEROS_BYTES = 8 << 20
_POLL_SECONDS = 0.2
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def reserve(descriptor: int, start: int, stop: int, *, zeros: bool) -> None:
    """Reserve room in the file system for bytes `start` to `stop`.

    A file system that cannot promise it (macOS, some over networks) gets zeros written if `zeros`.

    Raises
    ------
    OSError
        There is no room.
    """
    if stop <= start:
        return
    fallocate = getattr(os, "posix_fallocate", None)
    if fallocate is not None:
        try:
            fallocate(descriptor, start, stop - start)
            return
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
    if stop - start > shutil.disk_usage(descriptor).free + os.fstat(descriptor).st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if zeros:
        _write_zeros(descriptor, start, stop)


def _write_zeros(descriptor: int, start: int, stop: int) -> None:
    """Fill the holes between `start` and `stop`, keeping what is written already."""
    block = bytes(_ZEROS_BYTES)
    position = start
    while position < stop:
        length = min(len(block), stop - position)
        old = os.pread(descriptor, length, position)
        pwrite_all(descriptor, old + block[len(old) : length], position)
        position += length


def raise_for(
    error: OSError, path: str, *, needed: int = 0, so_far: str = "", advice: str = ""
) -> NoReturn:
    """Translate an error of the disk into a `StoreError` that says what to do.

    Parameters
    ----------
    error : OSError
        The error.
    path : str
        The store.
    needed : int
        Bytes that the file needs.
    so_far : str
        A sentence about what is kept of the work.
    advice : str
        What else helps if there is no room.
    """
    folder = str(Path(path).parent)
    if error.errno in _NO_SPACE:
        free = shutil.disk_usage(folder).free
        sizes = [f"{x / 1e6:,.1f} MB" if x > 1e5 else f"{x:,} bytes" for x in (needed, free)]
        raise DiskFull(
            f"There is no room for {path}: it needs {' and '.join(sizes)} are free in {folder} "
            f"({error.strerror}). {so_far} Free some space or choose another disk with -o, and run "
            f"the command again{advice}."
        ) from error
    if error.errno == errno.ELOOP:
        raise StoreError(
            f"{error.filename} is a symbolic link, and is not followed. Move it away and run the "
            "same command again."
        ) from error
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        raise StoreError(
            f"Cannot write in {folder}: {error.strerror}. Choose a folder of your own with -o."
        ) from error
    raise StoreError(f"Cannot write {path}: {explained(error)}. {so_far}".rstrip()) from error


def open_file(path: str, *, writable: bool = False) -> int:
    """Open a file: what is no file is not waited for, and for writing no link is followed.

    Raises
    ------
    StoreError
        It is a folder, a pipe or a device; or a link, for writing.
    OSError
    """
    for_writing = os.O_RDWR | os.O_NOFOLLOW if writable else os.O_RDONLY
    descriptor = os.open(path, for_writing | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        check_is_file(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_is_file(path: str, status: os.stat_result) -> None:
    """Raise `StoreError` if what is at a path is no file."""
    if stat.S_ISREG(status.st_mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a symbolic link"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "a pipe or a device")
    raise StoreError(f"{path} is {kind}, not a feature file. Move it away, or name a file.")


def as_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of a C-contiguous array, not copied."""
    return array.reshape(-1).view(np.uint8).data


def pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`; the system may take less at a time."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def pread_into(descriptor: int, out: memoryview, offset: int, path: str) -> None:
    """Fill `out` from the file that is open, which messages call `path`.

    Raises
    ------
    CorruptStore
        The file ends before.
    StoreError
        The system cannot read it.
    """
    while len(out):
        try:
            count = os.preadv(descriptor, [out], offset)
        except OSError as error:
            if not of_system(error):
                raise
            raise StoreError(f"Cannot read {path}: {explained(error)}.") from error
        if count == 0:
            raise CorruptStore(f"{path} ends at byte {offset}: it was truncated.")
        out, offset = out[count:], offset + count


def runs(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (position, first row, number of rows) of each run of consecutive rows."""
    if len(rows) == 0:
        return
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = np.concatenate([[0], cuts])
    stops = np.concatenate([cuts, [len(rows)]])
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        yield start, int(rows[start]), stop - start


def identity(file: int | str) -> tuple[int, int] | None:
    """Return what tells an open file, or the one at a path, from all others; None: none there."""
    try:
        stat = Path(file).stat() if isinstance(file, str) else os.fstat(file)
    except FileNotFoundError:
        return None
    return stat.st_dev, stat.st_ino


def is_at(descriptor: int, path: str) -> bool:
    """Return whether `path` still leads to the open file."""
    return identity(path) == identity(descriptor)


def check_unlocked(descriptor: int, path: str) -> None:
    """Refuse a file that a program has open for writing, as libhdf5 locks it.

    Raises
    ------
    StoreLocked
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except BlockingIOError as error:
        raise StoreLocked(
            f"{path} is open for writing in {_locking_process(descriptor)}. Close it there (of "
            "h5py: file.close()), or open it with mode 'r', and run the same command again."
        ) from error
    except OSError:
        pass  # a file system without locks


def _locking_process(descriptor: int) -> str:
    """Return a text that names the process which has locked an open file."""
    stat = os.fstat(descriptor)
    place = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    with contextlib.suppress(OSError):  # only Linux has the list
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, mode, pid, file, *_ = line.split()
            if (kind, mode, file) == ("FLOCK", "WRITE", place):
                return "this process" if int(pid) == os.getpid() else f"process {pid}"
    return "another program"


class WriteLock:
    """The right to write one store, held until `release` or the end of the process.

    Parameters
    ----------
    store : str
        Path of the store; the lock file is ``PATH.partial.lock``, made if there is none.
    wait : float
        Seconds to wait for another process that holds it.

    Raises
    ------
    StoreLocked
        Another process holds it; the message says which, where, and since when.
    OSError
        The lock file cannot be made.
    """

    def __init__(self, store: str, *, wait: float = 0) -> None:
        self._path = f"{store}.partial.lock"
        self._descriptor = -1
        until = time.monotonic() + wait
        while self._descriptor < 0:
            # Not to be waited for if it is a pipe, not followed if it is a link.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last holder may have removed the file between our open and our lock.
                if is_at(descriptor, self._path):
                    check_is_file(self._path, os.fstat(descriptor))
                    if not _is_signature(os.pread(descriptor, 4096, 0).strip(b"\0")):
                        raise StoreError(
                            f"{self._path} is not what featcache makes of that name. Move it away "
                            "and run the same command again."
                        )
                    self._descriptor, descriptor = descriptor, -1
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    holder = _holder(os.pread(descriptor, 4096, 0))
                    raise StoreLocked(
                        f"{store} is being written by {holder}. Wait until it is done, or stop it "
                        "and run the same command again."
                    ) from error
                time.sleep(_POLL_SECONDS)
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        # For those who come second.
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        with contextlib.suppress(OSError):  # a full disk
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(who).encode(), 0)
        register_after_fork(self, WriteLock._forget)

    def _forget(self) -> None:
        """Let go of the lock in a forked child, which would otherwise hold it too."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def release(self) -> None:
        """Give it up and remove the lock file. May be called twice."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                Path(self._path).unlink()
            self._forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_signature(text: bytes) -> bool:
    """Return whether a lock file holds what we write into it, whole or torn."""
    start = b'{"pid": '
    return text.startswith(start) or start.startswith(text)


def _holder(text: bytes) -> str:
    """Return a text that names the process which signed the lock file."""
    try:
        who = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["since"]))
        return f"process {who['pid']} on {who['host']} (since {since})"
    except (ValueError, KeyError, TypeError):
        return "another process"
