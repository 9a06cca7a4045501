"""The parts that all sources of images share: sorted tables of text, and words for messages.

A text column is an array of numpy's `StringDType`: ten million ids take 16 bytes a row and the
text itself, and no Python objects.
"""

from __future__ import annotations

import difflib
import errno
import fnmatch
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.dtypes import StringDType

from featcache.errors import DecodeError, ExtractionError, ImageSetError
from featcache.system.files import open_file
from featcache.system.tables import first_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from featcache.pixels.decode import RawImage

SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe"}
    | {".jpeg", ".jpg", ".npy", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff"}
    | {".webp"}
)
"""Suffixes of the files that are taken for images, in lower case."""

SHARDS = (".tar", ".parquet")
"""Suffixes of the files that hold many images; their ids begin with the file's name."""

# What an image's own file can be blamed for, and what no image can.
_OWN_FAULTS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP}
_OWN_FAULTS |= {errno.ENAMETOOLONG, errno.ENOTDIR, errno.ENXIO, errno.ENODEV}
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC}

# By suffixes: what is named for images by mistake, and what to type.
_OTHERS = {
    ".txt .lst": "a text file. IMAGES are the images themselves: if it lists their files, type "
    "$(cat {name}) in its place; if it lists addresses, fetch them first: wget -P photos -i {name}",
    ".csv .tsv": "a table. To label images with it, name their folder and type: --labels {name}",
    ".h5 .hdf5 .partial": "a feature file: its images are computed. To train on it, type: "
    "featcache train {name} -o PREDICTOR",
    ".zip": "an archive. Unpack it (unzip {name} -d photos) and name the folder",
}
# Folders that systems make, in lower case: thumbnails and waste of a NAS, Windows, Linux, a Mac.
_OF_SYSTEMS = frozenset(
    {b"@eadir", b"#recycle", b"$recycle.bin", b"system volume information", b"lost+found"}
    | {b"__macosx"}
)

NO_IMAGES = "no image by its name"
HIDDEN = "hidden, or a folder of the system"
"""Reasons to leave files out."""

_TWICE = "{count} ids occur more than once (first: {first})"
_NAMED = 3  # so many names are given in a message


@dataclass(frozen=True, kw_only=True)
class Source:
    """The images of one source, listed and ready to be read.

    Each kind of source is a subclass that says how an image is read. Sources can be pickled and
    hold no open files.

    Attributes
    ----------
    tables : dict of str to ndarray of StringDType, shape (n,)
        "ids", sorted and unique, and "labels", "groups" and "splits" where the source has them.
    name : str
        Name of the folder, file or array, for messages.
    left_out : dict of str to (int, str)
        For each reason why files were left out: how many, and the first of them.
    notes : tuple of str
        What else the user should know about this source.
    places : ndarray of int64, shape (n,) or (n, k)
        Position of each image in the source; empty if images are found by their ids.
    unreadable : frozenset of str
        Ids that stand for a name that is not UTF-8: such a file cannot be read.
    """

    tables: dict[str, NDArray[Any]]
    name: str
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    places: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    unreadable: frozenset[str] = frozenset()

    def paths(self) -> Iterable[str] | None:
        """Return the images' paths if their folders may be classes; None if they say nothing."""
        return None

    def read(self, row: int) -> RawImage:
        """Return one image as it is stored; raise `DecodeError`, or what the system raised."""
        raise NotImplementedError

    def where(self, row: int) -> str:
        """Return what stands before the system's reason why an image cannot be read."""
        return ""

    def stat(self, row: int) -> tuple[int, int]:
        """Return size in bytes and `stamp`; (-1, -1) is unknown."""
        return -1, -1

    def select(self, rows: NDArray[np.int64]) -> Self:
        """Return a source of these images alone, in this order."""
        return replace(
            self,
            tables={name: table[rows] for name, table in self.tables.items()},
            places=self.places[rows] if len(self.places) else self.places,
        )

    def without(self, excluded: NDArray[np.bool_], reason: str) -> Self:
        """Return the images that are not in a mask (n,); the others are counted."""
        left_out = dict(self.left_out)
        for id in self.tables["ids"][excluded]:
            leave_out(left_out, reason, id)
        return replace(self.select(np.flatnonzero(~excluded)), left_out=left_out)

    def excluding(self, excluded: Callable[[str], bool]) -> Self:
        """Return the images whose ids the user has not excluded."""
        mask = np.fromiter(map(excluded, self.tables["ids"]), bool)  # (n,)
        return self.without(mask, "excluded")


@dataclass(frozen=True)
class Shard:
    """A file of many images, as it was when they were listed."""

    path: str
    status: os.stat_result

    @classmethod
    def of(cls, path: str) -> Shard:
        """Return what a path leads to now, which is no pipe."""
        with open_file(path) as file:
            return cls(path, os.fstat(file.fileno()))

    def check(self, now: os.stat_result) -> None:
        """Raise `DecodeError` if its content is another; its permissions may be."""
        for one in ("st_size", "st_mtime_ns", "st_ino"):
            if getattr(now, one) != getattr(self.status, one):
                raise DecodeError("read", f"{self.path} has changed since its images were listed")


@dataclass(frozen=True, kw_only=True)
class Shards(Source):
    """Images in files that hold many.

    Attributes
    ----------
    shards : tuple of Shard
        The files. `places` has a row for each image: the number of its file, and two numbers that
        say where it is in the file, shape (n, 3).
    """

    shards: tuple[Shard, ...]

    def place(self, row: int) -> tuple[Shard, int, int]:
        """Return the file that an image is in, and where."""
        number, first, second = self.places[row].tolist()
        return self.shards[number], first, second

    def where(self, row: int) -> str:
        """Return the path of the file."""
        return f"{self.place(row)[0].path}: "

    def stat(self, row: int) -> tuple[int, int]:
        """Return 0 in place of a size, and the file's stamp."""
        return 0, stamp(self.place(row)[0].status)


def column(texts: Iterable[str], source: str) -> NDArray[Any]:
    """Return texts as an array of `StringDType`, shape (n,).

    Raises
    ------
    ImageSetError
        If a text is not valid Unicode. The message names `source`.
    """
    try:
        return np.fromiter(texts, StringDType())
    except UnicodeEncodeError as error:
        raise ImageSetError(f"{source}: {error.object!r} is not valid Unicode") from error


def sorted_tables(
    values: Mapping[str, Iterable[str]], source: str, twice: str = _TWICE
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Make the tables of a source, sorted by "ids".

    Returns
    -------
    tables : dict of str to ndarray of StringDType, shape (n,)
        The values as columns.
    order : ndarray of int64, shape (n,)
        For each row of the tables, its place in `values`.

    Raises
    ------
    ImageSetError
        If an id occurs twice (`twice` is the template of the message), or a text is not valid
        Unicode.
    """
    tables = {name: column(texts, source) for name, texts in values.items()}
    order = np.argsort(tables["ids"], kind="stable")
    tables = {name: table[order] for name, table in tables.items()}
    ids = tables["ids"]
    same = sorted(set(ids[1:][ids[1:] == ids[:-1]]))
    if same:
        what = twice.format(count=len(same), first=first_few(same))
        raise ImageSetError(f"{source}: {what}")
    return tables, order


def leave_out(left_out: dict[str, tuple[int, str]], reason: str, name: str | bytes) -> None:
    """Count a file that is left out, and keep the first name."""
    name = name if isinstance(name, str) else name.decode(errors="backslashreplace")
    count, first = left_out.get(reason, (0, name))
    left_out[reason] = count + 1, min(first, name)


def is_hidden(name: bytes) -> bool:
    """Return whether a file or folder of this name is hidden, or the system's."""
    return name.startswith(b".") or name.lower() in _OF_SYSTEMS


def matcher(globs: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a path, or a folder it lies in, matches a pattern."""
    patterns = [part for glob in globs for part in (glob, f"{glob.rstrip('/')}/*")]
    found = re.compile("|".join(map(fnmatch.translate, patterns)) or r"(?!)")
    return lambda path: found.match(path) is not None


def label_text(value: Any) -> str:
    """Return a label as text; "" for None and NaN.

    Raises
    ------
    ImageSetError
        If it is several values: scores, coordinates, a one-hot row.
    """
    if hasattr(value, "item") and math.prod(value.shape) == 1:  # of numpy or torch
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, list | tuple | dict | set) or hasattr(value, "item"):
        raise ImageSetError(
            f"expected one label an image, got {value!r:.60}. Several labels per image are out of "
            "scope; of one-hot rows give rows.argmax(axis=1)"
        )
    try:
        missing = value is None or bool(value != value)  # NaN is not itself
    except TypeError:  # of pandas.NA nothing is true
        missing = True
    return "" if missing else str(value)


def numbered(n: int) -> list[str]:
    """Return ids for n images without names: they sort like their numbers."""
    return [f"{number:08d}" for number in range(n)]


def id_of(name: bytes, unreadable: set[str]) -> str:
    """Return the id of a file by its name; one that is not UTF-8 is escaped and `unreadable`."""
    try:
        return name.decode()
    except UnicodeDecodeError:
        id = name.decode(errors="backslashreplace")
        unreadable.add(id)
        return id


def no_images(source: str, others: int, suffixes: Iterable[str] = SUFFIXES) -> ImageSetError:
    """Return the error for a source in which no file is an image."""
    known = " ".join(sorted(suffixes))
    return ImageSetError(
        f"{source}: expected images, found none among {others} files. Known suffixes: {known}"
    )


def stamp(status: os.stat_result) -> int:
    """Return a number that changes with a file's times and inode: also if its time is put back."""
    return hash((status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


def read_error(error: OSError, prefix: str = "") -> DecodeError | ExtractionError:
    """Return what reading an image raises: the image's own fault, one that may pass, or the end."""
    reason = f"{prefix}{error.strerror or error}"
    if error.errno in _EXHAUSTED:
        return ExtractionError(
            f"The system refuses to read images: {reason}. No image is to blame. Make room (ulimit "
            "-n 65536, less --workers) and run the same command again; what was computed is kept."
        )
    if error.errno in _OWN_FAULTS:
        return DecodeError("read", reason)
    return DecodeError("system", f"could not be read now: {reason}")


def refuse_others(names: Sequence[str]) -> None:
    """Raise `ImageSetError` where all files that were named are, by their suffix, no images."""
    for suffixes, what in _OTHERS.items():
        if names and all(name.lower().endswith(tuple(suffixes.split())) for name in names):
            raise ImageSetError(f"{names[0]} is {what.format(name=names[0])}")


def first_few(names: Sequence[object]) -> str:
    """Return the first few names, for a message."""
    return first_names([*map(str, names)], _NAMED)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question after names like this one, whatever their case; "" if there are none."""
    spelling = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), spelling, n=_NAMED, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(spelling[k]) for k in near)}?" if near else ""
