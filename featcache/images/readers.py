"""Where the bytes of one image come from: a file, a member of a tar, an array, a data set."""
# Paths are bytes here, which pathlib does not know: a file's name need not be text.
# ruff: noqa: PTH116, PTH118, PTH123

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

import numpy as np

from featcache.errors import DecodeError
from featcache.pixels import pillow

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    RawImage: TypeAlias = bytes | NDArray[Any] | Image.Image
else:
    RawImage: TypeAlias = Any

_NOT_UTF8 = "its name is not UTF-8; rename the file"


class Reader(Protocol):
    """What an `ImageSet` reads from. Readers can be pickled and hold no open files."""

    def read(self, row: int, id: str) -> RawImage:
        """Return one image as it is stored; raise `DecodeError` with stage "read"."""

    def stat(self, row: int, id: str) -> tuple[int, int]:
        """Return size in bytes and time of the last change in ns; (-1, -1) is unknown."""

    def select(self, rows: NDArray[np.int64]) -> Self:
        """Return a reader of these rows alone."""


@dataclass(frozen=True)
class Files:
    """One file an image: ``root/ID`` + suffix.

    Attributes
    ----------
    root : bytes
        Absolute path of the folder. Paths are bytes, whatever the locale is.
    suffix : bytes
        What is added to an id.
    unreadable : frozenset of str
        Ids that stand for a name that is not UTF-8.
    """

    root: bytes
    suffix: bytes = b""
    unreadable: frozenset[str] = frozenset()

    def path(self, id: str) -> bytes:
        """Return the path of an image."""
        return os.path.join(self.root, id.encode() + self.suffix)

    def read(self, row: int, id: str) -> bytes:
        """Return the file's bytes."""
        if id in self.unreadable:
            raise DecodeError("read", _NOT_UTF8)
        try:
            return _read(self.path(id))
        except OSError as error:
            raise DecodeError("read", error.strerror or str(error)) from error
        except (MemoryError, OverflowError) as error:
            raise DecodeError("read", "the file does not fit into memory") from error

    def stat(self, row: int, id: str) -> tuple[int, int]:
        """Return size and time of the file's last change."""
        if id in self.unreadable:
            return -1, -1
        try:
            result = os.stat(self.path(id))
        except OSError:
            return -1, -1
        return result.st_size, result.st_mtime_ns

    def select(self, rows: NDArray[np.int64]) -> Files:
        """Return this reader: it finds a file by its id."""
        return self


def _read(path: bytes) -> bytes:
    # Without O_NONBLOCK, opening a named pipe would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DecodeError("read", "not a regular file")
        return file.readall()


@dataclass(frozen=True)
class Shard:
    """One tar file, as it was when its members were listed."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class TarMembers:
    """Members of tar files, read in place.

    Attributes
    ----------
    shards : tuple of Shard
        The tar files.
    shard, offset, size : ndarray of int64, shape (n,)
        For each row, the number of its shard, and where its bytes are.
    unreadable : frozenset of str
        Ids that stand for a name that is not UTF-8.
    """

    shards: tuple[Shard, ...]
    shard: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    unreadable: frozenset[str] = frozenset()

    def read(self, row: int, id: str) -> bytes:
        """Return the member's bytes."""
        if id in self.unreadable:
            raise DecodeError("read", _NOT_UTF8)
        shard, size = self.shards[self.shard[row]], int(self.size[row])
        try:
            # Opening takes microseconds; keeping thousands of shards open would meet limits.
            descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                now = os.fstat(descriptor)
                data = os.pread(descriptor, size, int(self.offset[row]))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DecodeError("read", f"{shard.path}: {error.strerror}") from error
        except (MemoryError, OverflowError) as error:
            raise DecodeError("read", "the member does not fit into memory") from error
        if (now.st_size, now.st_mtime_ns) != (shard.size, shard.mtime_ns) or len(data) != size:
            raise DecodeError("read", f"{shard.path} has changed since its members were listed")
        return data

    def stat(self, row: int, id: str) -> tuple[int, int]:
        """Return the member's size, and the time of its shard's last change."""
        return int(self.size[row]), self.shards[self.shard[row]].mtime_ns

    def select(self, rows: NDArray[np.int64]) -> TarMembers:
        """Return a reader of these members alone."""
        return replace(self, shard=self.shard[rows], offset=self.offset[rows], size=self.size[rows])


@dataclass(frozen=True)
class Arrays:
    """Images in one array, or anything that is indexed like one.

    Attributes
    ----------
    images : array_like, shape (n, h, w) or (n, h, w, c)
        The pixels.
    order : ndarray of int64, shape (n,)
        For each row, its index in `images`.
    """

    images: Any
    order: NDArray[np.int64]

    def read(self, row: int, id: str) -> NDArray[Any]:
        """Return the image's pixels."""
        return np.asarray(self.images[self.order[row]])

    def stat(self, row: int, id: str) -> tuple[int, int]:
        """Return that nothing is known."""
        return -1, -1

    def select(self, rows: NDArray[np.int64]) -> Arrays:
        """Return a reader of these rows alone."""
        return replace(self, order=self.order[rows])


@dataclass(frozen=True)
class Datasets:
    """Items of map-style data sets of (PIL image, target), one data set after the other."""

    datasets: tuple[Any, ...]
    dataset: NDArray[np.int64]
    item: NDArray[np.int64]

    def read(self, row: int, id: str) -> RawImage:
        """Return the item's image."""
        from PIL import Image

        try:
            with pillow.quiet:
                image = self.datasets[self.dataset[row]][int(self.item[row])][0]
                if isinstance(image, Image.Image):
                    image.load()  # now, where a damaged file is this image's failure
        except Exception as error:  # a data set is foreign code that may raise anything
            raise DecodeError("read", pillow.reason(error)) from error
        if not isinstance(image, Image.Image):
            raise DecodeError("read", f"expected a PIL image, got {type(image).__name__}")
        return image

    def stat(self, row: int, id: str) -> tuple[int, int]:
        """Return that nothing is known."""
        return -1, -1

    def select(self, rows: NDArray[np.int64]) -> Datasets:
        """Return a reader of these items alone."""
        return replace(self, dataset=self.dataset[rows], item=self.item[rows])
