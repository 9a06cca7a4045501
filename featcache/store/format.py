"""The feature file on disk: one plain HDF5 file that any HDF5 reader opens.

Specification (format version 4)
--------------------------------
A writer MUST lay the file out as follows; a reader MAY rely on it.

==================== ====================== =======================================================
dataset              shape, type            content
==================== ====================== =======================================================
/features/TAP        (n, [views,] ...)      the features, float32 or float16; ``/`` and ``%`` of the
                                            tap's name are written %2F and %25
/rows                (n,) compound          what is known of each row, see below
/ids                 (n,) UTF-8             ids of the images, all different
/labels              (n,) UTF-8             labels, ``""`` = none; the dataset may be absent
/groups /splits      (n,) UTF-8             as scanned; may be absent
/column:NAME         (n,) UTF-8             a further column of the user's table; ``/`` and ``%``
                                            as in a tap's name
/failures/FIELD      (k,) UTF-8, int64      images without features: id, stage, reason, size,
                                            stamp
/meta/KEY            scalar UTF-8           JSON: fingerprint, request, versions, classes, ...
/meta/datasets       scalar UTF-8           JSON: names of all datasets of this format in the file,
                                            its own among them; any others are a user's
/meta/copy           scalar UTF-8           JSON: datasets, fingerprint and versions once more, in
                                            an object with sorted keys and no spaces
/meta/sha256         scalar UTF-8           JSON: the SHA-256 of the text of /meta/copy
/canaries/names      (k,) UTF-8             names of test images; the group may be absent
/canaries/images/I   (bytes,) uint8         test image I = 0, 1, ..., as encoded
/canaries/features/T (k, ...) float32       their features, without views; NaN = not computed
/digest              (32,) uint8            SHA-256 over all datasets outside /features and
                                            itself, but a user's; zeros = the file is not
                                            finished
==================== ====================== =======================================================

A row of /rows holds, packed and little-endian: ``sha256`` (32 bytes: of the image's file),
``size`` (int64, -1 = unknown; that of a pending row with a right ``entry_crc``
is its place in the order of computing, from 1), ``crc32`` (uint32 for each tap, in the order of
fingerprint.taps: CRC-32 of that tap's bytes as stored, seeded with the CRC-32 of ``sha256``),
``status`` (uint8: 0 pending, 1 done, 2 failed) and ``entry_crc`` (uint32: CRC-32 of the bytes
before it, seeded with the CRC-32 of the row's id), and ``stamp`` (int64: a number that changes with
the file's times and inode, -1 = unknown; it only says when to read the file again, may be rewritten
in a finished file, and counts as 0 in the digest). The seeds make a row that was written in the
place of another one fail its checksum, even if its bytes are intact.

Every dataset is contiguous, allocated early, little-endian, begins at a multiple of 4,096 bytes,
and has no filter. Files are made with ``libver=("v108", "v108")``: that version's metadata is
checksummed, every HDF5 since 2008 reads it, and none refuses to read a file that a program which
was killed had open for writing. Strings are of fixed width, padded with NUL, so
that the tables, too, are plain arrays at a known offset.

The digest is taken over the datasets in the order of their names (without the leading ``/``),
each as: name, NUL, number of bytes as 8 little-endian bytes, bytes.

Datasets, fingerprint and versions are what two of three agree on: the values as they stand, those
of /meta/copy, and the hash. The digest is taken with what they agree on in the place of the third.

A file that is not finished may go on behind the end of the HDF5 file (HDF5 ignores what is there)
with the reasons of failed rows, one JSON array ``[row, stage, reason]`` a line; the last line of a
row counts. Whether a row failed is said by its ``status`` alone; the reason of row -1 marks a file
that was set aside for its rows. Finishing leaves the failed rows out, puts the reasons into
/failures, and cuts the file at the end of the HDF5 file.

Why libhdf5 writes nothing but the empty layout
-----------------------------------------------
A process that is killed while libhdf5 has a file open for writing leaves one that does not open,
and libhdf5 aborts the process when the disk fills. So the layout is made under another name,
closed, its space reserved, fsynced and renamed; from then on bytes are written with ``pwrite`` at
the datasets' offsets, and the file is valid HDF5 at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featcache.errors import CorruptStore, StoreError, explained, of_system
from featcache.fingerprint import FORMAT_VERSION, Fingerprint, canonical_json
from featcache.store import disk
from featcache.store.disk import as_bytes
from featcache.system import files
from featcache.system.tables import in_order

__all__ = ["DONE", "ENTRY", "FAILED", "PENDING", "Canaries", "Contents", "Failure"]

PENDING, DONE, FAILED = 0, 1, 2

# What is known of an image beside its features.
ENTRY = np.dtype([("status", "u1"), ("size", "<i8"), ("stamp", "<i8"), ("sha256", "u1", (32,))])

_ALIGNMENT = 4096
# Metadata of the layout itself: a few kilobytes a dataset, measured; generous for reserving.
_METADATA_BYTES = 65_536
# JSON that is written after the layout is made needs its place beforehand.
META_SLOTS = {"settings": 4_096, "run": 32_768}
# What tells how a file is to be read.
COPIED = ("datasets", "fingerprint", "versions")
# Names at the root of the file that are not tables of text.
NOT_TABLES = {"features", "rows", "failures", "meta", "canaries", "digest"}


def rows_dtype(n_taps: int) -> np.dtype[Any]:
    """Return the type of a row of /rows for a number of taps."""
    return np.dtype(
        [
            ("sha256", "u1", (32,)),
            ("size", "<i8"),
            ("crc32", "<u4", (n_taps,)),
            ("status", "u1"),
            ("entry_crc", "<u4"),
            ("stamp", "<i8"),
        ]
    )


@dataclass(frozen=True)
class Dataset:
    """Place of a dataset in the file: offset in bytes, shape and type."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (of everything, if there is no axis of rows)."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Failure:
    """An image that has no features, and why."""

    id: str
    stage: str
    reason: str
    size: int = -1
    stamp: int = -1


@dataclass(frozen=True)
class Canaries:
    """Test images kept in the file, and what the network made of them.

    Parameters
    ----------
    names : list of str
        Names of the images.
    images : list of bytes
        The images, encoded.
    features : dict of str to ndarray, shape (k, ...), float32
        Their features by tap, without views; empty if they were not computed.
    """

    names: list[str]
    images: list[bytes]
    features: Mapping[str, np.ndarray] = field(default_factory=dict)


# Shape, type and first bytes (None = zeros) of each dataset, by name.
Plan = dict[str, tuple[tuple[int, ...], np.dtype[Any], np.ndarray | None]]


@dataclass
class Contents:
    """Everything that a new file holds except the features.

    Parameters
    ----------
    fingerprint : Fingerprint
        Its taps name the feature datasets.
    shapes : dict of str to tuple of int
        Shape of one image's features by tap, the axis of views included.
    tables : dict of str to ndarray of bytes, shape (n,)
        ``ids``, and any further column, in UTF-8.
    meta : dict
        JSON values by key; ``settings`` and ``run`` may also be set later.
    failures : list of Failure
        Images without features.
    canaries : Canaries, optional
        Test images.
    """

    fingerprint: Fingerprint
    shapes: Mapping[str, tuple[int, ...]]
    tables: Mapping[str, np.ndarray]
    meta: Mapping[str, Any] = field(default_factory=dict)
    failures: Sequence[Failure] = ()
    canaries: Canaries | None = None

    @property
    def feature_bytes(self) -> int:
        """Bytes of all features."""
        values = sum(math.prod(self.shapes[tap]) for tap in self.fingerprint.taps)  # of one image
        return values * np.dtype(self.fingerprint.store_dtype).itemsize * len(self.tables["ids"])

    def file_bytes(self, room: int | None = None) -> int:
        """Return the bytes that the file takes at most, with `room` bytes of features or all."""
        plan = self.plan()
        found = sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in plan.values())
        found += _METADATA_BYTES * len(plan)
        return found if room is None else found + room - self.feature_bytes

    def plan(self) -> Plan:
        """Return shape, type and first bytes (None = zeros) of each dataset by name."""
        n = len(self.tables["ids"])
        taps = self.fingerprint.taps
        store_dtype = np.dtype(self.fingerprint.store_dtype).newbyteorder("<")
        plan: Plan = {}

        def add(name: str, array: np.ndarray) -> None:
            plan[name] = (array.shape, array.dtype, array)

        for tap in taps:
            plan[feature_name(tap)] = ((n, *self.shapes[tap]), store_dtype, None)
        plan["rows"] = ((n,), rows_dtype(len(taps)), None)
        for name, table in sorted(self.tables.items()):
            add(name, table)
        for key in ("id", "stage", "reason"):
            texts = [getattr(failure, key) for failure in self.failures]
            add(f"failures/{key}", encode_table(texts, f"failures' {key}"))
        for key in ("size", "stamp"):
            add(f"failures/{key}", np.array([getattr(x, key) for x in self.failures], "<i8"))

        def add_meta(key: str, value: Any) -> None:
            text = canonical_json(value).encode()
            width = max(len(text), META_SLOTS.get(key, 1))
            add(f"meta/{key}", np.array(text, dtype=f"S{width}"))

        for key, value in sorted(self._all_meta().items()):
            add_meta(key, value)
        if self.canaries:
            add("canaries/names", encode_table(self.canaries.names, "canary names"))
            for i, image in enumerate(self.canaries.images):
                add(f"canaries/images/{i}", np.frombuffer(image, np.uint8))
            for tap in taps:
                shape = self.shapes[tap][1 if self.fingerprint.views > 1 else 0 :]
                values = np.full((len(self.canaries.names), *shape), np.nan, "<f4")
                values[...] = self.canaries.features.get(tap, np.nan)
                add(f"canaries/{feature_name(tap)}", values)
        add("digest", np.zeros(32, np.uint8))
        names = sorted({*plan, "meta/datasets", "meta/copy", "meta/sha256"})
        add_meta("datasets", names)
        meta = self._all_meta() | {"datasets": names}
        add_meta("copy", copy := {key: meta[key] for key in COPIED})
        add_meta("sha256", hash_of(copy))
        return plan

    def _all_meta(self) -> dict[str, Any]:
        """Return the metadata with the keys that every file has."""
        versions = dict(self.meta.get("versions", {}))
        versions |= {"format": FORMAT_VERSION, "h5py": h5py.__version__}
        labels = self.tables.get("labels")
        own = {
            "fingerprint": self.fingerprint.to_dict(),
            "classes": [] if labels is None else in_order(counts(labels).keys() - {""}),
            "versions": versions,
        }
        return {"settings": None, "run": None, **self.meta, **own}


def hash_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def feature_name(tap: str) -> str:
    """Return the name of the dataset that holds a tap: HDF5 takes ``/`` for a group."""
    return "features/" + tap.replace("%", "%25").replace("/", "%2F")


def encode_tables(tables: Mapping[str, Sequence[str] | np.ndarray]) -> dict[str, np.ndarray]:
    """Return columns of text as they are stored: UTF-8 of fixed width.

    Raises
    ------
    StoreError
        The name of a column is taken by the format, or a text holds a NUL or is not valid Unicode.
    """
    for name in tables:
        if not name or "/" in name or name.startswith(".") or name in NOT_TABLES:
            raise StoreError(f"A column cannot be called {name!r} in a feature file. Rename it.")
    return {name: encode_table(texts, name) for name, texts in tables.items()}


def encode_table(texts: Sequence[str] | np.ndarray, what: str) -> np.ndarray:
    """Return texts as UTF-8 of fixed width."""

    def encoded() -> Iterator[bytes]:
        for text in texts:
            if "\0" in text:
                raise StoreError(f"One of the {what} holds a NUL character: {text!r}")
            yield text.encode()

    try:  # twice through the texts, so that they are never all in memory as Python objects
        width = max(map(len, encoded()), default=1) or 1
        return np.fromiter(encoded(), dtype=f"S{width}", count=len(texts))
    except UnicodeEncodeError as error:
        raise StoreError(f"One of the {what} is not valid Unicode: {error.object!r}") from error


def decode_table(table: np.ndarray) -> np.ndarray:
    """Return a table of UTF-8 as an array of str.

    Raises
    ------
    CorruptStore
        A text is not UTF-8.
    """
    if table.size == 0 or table.view(np.uint8).max() < 128:
        return table.astype(f"U{max(table.dtype.itemsize, 1)}")
    try:
        return np.char.decode(table, "utf-8")
    except UnicodeDecodeError as error:
        raise CorruptStore(
            f"A text of the feature file is damaged on the disk: {error.object!r} is not UTF-8. "
            "`featcache verify` says how to mend the file"
        ) from error


def counts(table: np.ndarray) -> Counter[str]:
    """Count the texts of a table of UTF-8 (many times as fast as sorting millions of them)."""
    found: Counter[bytes] = Counter()
    for start in range(0, len(table), 65_536):
        found.update(table[start : start + 65_536].tolist())
    names = decode_table(np.array(list(found), table.dtype))
    return Counter(dict(zip(names.tolist(), found.values(), strict=True)))


def misfit(found: Mapping[str, Dataset], fingerprint: Fingerprint) -> str:
    """Return the name of a dataset that is not what `Contents.plan` makes; "" if there is none."""

    def rows(name: str) -> tuple[int, ...]:
        return found[name].shape[:1] if name in found and found[name].shape else (0,)

    n, k, images = rows("ids"), rows("failures/id"), rows("canaries/names")
    views = (fingerprint.views,) if fingerprint.views > 1 else ()
    dtype = np.dtype(fingerprint.store_dtype).newbyteorder("<")
    plan: dict[str, tuple[tuple[int, ...], Any]] = {
        name: (() if "/" in name else n, "S")
        for name in found
        if name.startswith("meta/") or ("/" not in name and name not in NOT_TABLES)
    }
    plan |= {f"failures/{key}": (k, "S") for key in ("id", "stage", "reason")}
    plan |= {f"failures/{key}": (k, "<i8") for key in ("size", "stamp")}
    plan |= {"rows": (n, rows_dtype(len(fingerprint.taps))), "digest": ((32,), "u1")}
    for name in map(feature_name, fingerprint.taps):
        shape = found[name].shape[1 + len(views) :] if name in found else ()
        plan[name] = (n + views + shape, dtype)
        if images != (0,):
            plan[f"canaries/{name}"] = (images + shape, "<f4")
    if images != (0,):
        plan["canaries/names"] = (images, "S")
        for name in (f"canaries/images/{i}" for i in range(min(*images, len(found)))):
            plan[name] = (rows(name), "u1")

    def is_odd(name: str) -> bool:
        if name not in plan or name not in found:
            return True
        kind: Any = found[name].dtype
        return (found[name].shape, "S" if kind.kind == "S" else kind) != plan[name]

    return min(filter(is_odd, plan.keys() | found.keys()), default="" if n != (0,) else "ids")


@contextlib.contextmanager
def new_file(target: str, contents: Contents, *, room: int | None = None) -> Iterator[str]:
    """Make a feature file, valid HDF5 and fsynced, with its space reserved; yield its path.

    If the block does not rename it, it is removed.

    Parameters
    ----------
    target : str
        What it is going to be called.
    contents : Contents
        What it holds.
    room : int, optional
        Bytes of features for which there must be room now; none is reserved for them. If left
        out, the room for all features is reserved.

    Raises
    ------
    OSError
        The space cannot be reserved or the folder not be written to; nothing is left behind.
        `disk.raise_for` says it in words.
    """
    plan, bound = contents.plan(), contents.file_bytes(room)
    temporary, descriptor = files.new_file(Path(target))
    path = str(temporary)
    try:
        # Before libhdf5 sees the file: a disk that fills under libhdf5 aborts the process.
        disk.reserve(descriptor, 0, bound, zeros=False)
        try:
            _through_libhdf5(_write_layout, path, plan)
        except RuntimeError as error:  # so libhdf5 says that it could not write
            raise OSError(errno.EIO, f"libhdf5: {error}") from error
        datasets, _ = read_datasets(path)
        if room is None:
            disk.reserve(descriptor, 0, os.fstat(descriptor).st_size, zeros=True)
        for name, (_, _, data) in plan.items():
            start, size = datasets[name].offset, datasets[name].nbytes
            if not name.startswith("features/"):
                disk.reserve(descriptor, start, start + size, zeros=True)
            if data is not None and size:
                disk.pwrite_all(descriptor, as_bytes(data), start)
        disk.fsync(descriptor)
        yield path
    finally:
        disk.remove(path)
        os.close(descriptor)


def _through_libhdf5(function: Callable[..., None], *arguments: Any) -> None:
    """Call what uses libhdf5, which does not go on after a signal, and has errors of its own."""
    while True:
        try:
            return function(*arguments)
        except (OSError, RuntimeError, KeyError) as error:
            fault = of_system(error)
            if fault is None:
                raise
            if fault.errno != errno.EINTR:
                raise fault from error


def _write_layout(path: str, plan: Plan) -> None:
    """Make an HDF5 file whose datasets are contiguous, allocated, and never filled.

    It uses h5py's low-level interface, because only there the times of creation can be left out, so
    that the same features give the same file, byte for byte.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    access.set_alignment(1, _ALIGNMENT)
    access.set_file_locking(False, True)  # the lock is ours, see `featcache.store.disk`
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    for_file = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    for_groups = h5py.h5p.create(h5py.h5p.GROUP_CREATE)
    for properties in (creation, for_file, for_groups):
        properties.set_obj_track_times(False)
    utf8 = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    utf8.set_char_encoding(h5py.h5t.CSET_UTF8)

    file = h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, for_file, access)
    groups = {""}
    for name, (shape, dtype, _) in plan.items():
        for depth in range(1, name.count("/") + 1):
            group = "/".join(name.split("/")[:depth])
            if group not in groups:
                h5py.h5g.create(file, group.encode(), gcpl=for_groups)
                groups.add(group)
        space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
        text = h5py.string_dtype("utf-8", dtype.itemsize) if dtype.kind == "S" else dtype
        kind = h5py.h5t.py_create(text, logical=True)
        dataset = h5py.h5d.create(file, None, kind, space, dcpl=creation)
        h5py.h5o.link(dataset, file, name.encode(), lcpl=utf8)
        del dataset
    file.close()


def read_datasets(path: str) -> tuple[dict[str, Dataset], list[str]]:
    """Return the place of each contiguous dataset of an HDF5 file, and the names of the others.

    Raises
    ------
    CorruptStore
        Not HDF5, or truncated.
    """
    found: dict[str, Dataset] = {}
    others: list[str] = []

    def visit(raw: str | bytes, node: Any) -> None:
        if not isinstance(node, h5py.Dataset):
            return
        # A name that is not UTF-8 comes as bytes.
        name = raw if isinstance(raw, str) else raw.decode(errors="backslashreplace")
        try:
            kind, shape, offset = node.dtype, node.shape, node.id.get_offset()
        except TypeError:  # a type that numpy does not have
            shape = None
        if shape is None or (offset is None and math.prod(shape)):
            others.append(name)
            return
        # Without h5py's marks on strings; a compound type has none.
        found[name] = Dataset(offset or 0, shape, kind if kind.names else np.dtype(kind.str))

    def look() -> None:
        with h5py.File(path, "r", locking=False) as file:
            file.visititems(visit)

    try:
        _through_libhdf5(look)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if fault := of_system(error):
            raise StoreError(f"Cannot read {path}: {explained(fault)}.") from error
        if not h5py.is_hdf5(path):
            raise CorruptStore(
                f"{path} is not a feature file: it does not begin as HDF5 does. If it was one, "
                "restore it from a copy."
            ) from error
        raise CorruptStore(
            f"{path} is damaged: {error}. If it was complete once, restore it from a copy; else "
            "move it away and run `featcache extract` again."
        ) from error
    return found, others
