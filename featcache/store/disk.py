"""Bytes on a disk: reserving room, writing in full, copying, and renaming so that it lasts."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np

from featcache.errors import CorruptStore, DiskFull, StoreError
from featcache.store.locking import fcntl

_COPY_BYTES = 8 << 20
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}


def reserve(descriptor: int, start: int, stop: int, *, zeros: bool) -> None:
    """Have the file system keep room for bytes `start` to `stop`.

    Where it cannot promise (macOS, some network file systems), write zeros if `zeros`.

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
            if error.errno not in _NOT_SUPPORTED:
                raise
    available = os.fstatvfs(descriptor)
    if stop - start > available.f_bavail * available.f_frsize + os.fstat(descriptor).st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if zeros:
        _write_zeros(descriptor, start, stop)


def _write_zeros(descriptor: int, start: int, stop: int) -> None:
    """Fill the holes between `start` and `stop`, keeping what is written already."""
    block = bytes(_COPY_BYTES)
    position = start
    while position < stop:
        length = min(len(block), stop - position)
        old = os.pread(descriptor, length, position)
        pwrite_all(descriptor, old + block[len(old) : length], position)
        position += length


def raise_for(
    error: OSError, path: str, *, needed: int = 0, so_far: str = "", advice: str = ""
) -> NoReturn:
    """Raise what an operating system's refusal to write `path` means to the user.

    Parameters
    ----------
    error : OSError
        The refusal.
    path : str
        The store.
    needed : int
        Bytes that the file needs.
    so_far : str
        What has become of the work, in a sentence.
    advice : str
        What else helps where there is no room.
    """
    folder = str(Path(path).parent)
    if error.errno in _NO_SPACE:
        raise DiskFull(
            f"There is no room for {path}: it needs {needed / 1e6:,.1f} MB and "
            f"{_free_bytes(folder) / 1e6:,.1f} MB are free in {folder} ({error.strerror}). "
            f"{so_far} Free some space or choose another disk with -o, and run the command "
            f"again{advice}."
        ) from error
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        raise StoreError(
            f"Cannot write in {folder}: {error.strerror}. Choose a folder of your own with -o."
        ) from error
    raise StoreError(f"Cannot write {path}: {error}. {so_far}".rstrip()) from error


def _free_bytes(folder: str) -> int:
    try:
        status = os.statvfs(folder)
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


class opened:
    """A file descriptor for the length of a ``with`` block."""

    def __init__(self, path: str, flags: int) -> None:
        self._descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def __enter__(self) -> int:
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def as_bytes(array: np.ndarray) -> memoryview:
    """Return the bytes of a C-contiguous array, not copied."""
    return array.reshape(-1).view(np.uint8).data


def pwrite_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data`; the system may take less at a time."""
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def pread_into(descriptor: int, out: memoryview, offset: int) -> None:
    """Fill `out` from the file.

    Raises
    ------
    CorruptStore
        The file ends before.
    """
    while len(out):
        count = os.preadv(descriptor, [out], offset)
        if count == 0:
            raise CorruptStore(f"The file ends at byte {offset}: it was truncated.")
        out, offset = out[count:], offset + count


def copy_range(source: int, start: int, target: int, to: int, count: int) -> None:
    """Copy bytes between files, inside the kernel where it can (shared extents cost nothing)."""
    kernel_copy = getattr(os, "copy_file_range", None)
    while count and kernel_copy is not None:
        try:
            copied = kernel_copy(source, target, count, start, to)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED | {errno.EXDEV, errno.EPERM, errno.EBADF}:
                raise
            break
        if copied == 0:
            break  # the source's end, or a file system that pretends: read and see
        start, to, count = start + copied, to + copied, count - copied
    buffer = memoryview(bytearray(min(count, _COPY_BYTES)))
    while count:
        block = buffer[: min(count, len(buffer))]
        pread_into(source, block, start)
        pwrite_all(target, block, to)
        start, to, count = start + len(block), to + len(block), count - len(block)


def fsync(descriptor: int) -> None:
    """Have the bytes on the disk itself, through the drive's cache on macOS too."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with contextlib.suppress(OSError):  # not every file system knows it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def rename(source: str, target: str) -> None:
    """Replace `target` by `source` so that a power cut leaves the one or the other."""
    Path(source).replace(target)
    with (
        opened(str(Path(target).parent), os.O_RDONLY | os.O_DIRECTORY) as folder,
        contextlib.suppress(OSError),  # some network file systems cannot fsync a folder
    ):
        os.fsync(folder)


def runs(rows: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (position, first row, number of rows) of each run of consecutive rows."""
    if len(rows) == 0:
        return
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = np.concatenate([[0], cuts])
    stops = np.concatenate([cuts, [len(rows)]])
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        yield start, int(rows[start]), stop - start
