"""The feature file on disk: one plain HDF5 file that any HDF5 reader opens.

Specification (format version 2)
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
/NAME                (n,) UTF-8             any further column of text
/failures/FIELD      (k,) UTF-8, int64      images without features: id, stage, reason, size,
                                            mtime_ns
/meta/KEY            scalar UTF-8           JSON: fingerprint, request, versions, classes, ...
/canaries/names      (k,) UTF-8             names of test images; the group may be absent
/canaries/images/I   (bytes,) uint8         test image I = 0, 1, ..., as encoded
/canaries/features/T (k, ...) float32       their features, without views; NaN = not computed
/digest              (32,) uint8            SHA-256 over all datasets outside /features and
                                            itself; zeros = the file is not finished
==================== ====================== =======================================================

A row of /rows holds, packed and little-endian: ``sha256`` (32 bytes: of the image's file),
``size`` and ``mtime_ns`` (int64, -1 = unknown), ``crc32`` (uint32 for each tap, in the order of
fingerprint.taps: CRC-32 of that tap's bytes as stored, seeded with the CRC-32 of ``sha256``),
``status`` (uint8: 0 pending, 1 done, 2 failed) and ``entry_crc`` (uint32: CRC-32 of the bytes
before it, seeded with the CRC-32 of the row's id). The seeds make a row that was written in the
place of another one fail its checksum, even if its bytes are intact.

Every dataset is contiguous, allocated early, little-endian, begins at a multiple of 4,096 bytes,
and has no filter. Files are made with ``libver=("v110", "v110")``: that version's metadata is
checksummed and every HDF5 since 2016 reads it. Strings are of fixed width, padded with NUL, so
that the tables, too, are plain arrays at a known offset.

The digest is taken over the datasets in the order of their names (without the leading ``/``),
each as: name, NUL, number of bytes as 8 little-endian bytes, bytes.

A file that is not finished may go on behind the end of the HDF5 file (HDF5 ignores what is there)
with the reasons of failed rows, one JSON array ``[row, stage, reason]`` a line; the last line of a
row counts. Whether a row failed is said by its ``status`` alone. Finishing leaves the failed rows
out, puts the reasons into /failures, and cuts the file at the end of the HDF5 file.

Why libhdf5 writes nothing but the empty layout
-----------------------------------------------
A process that is killed while libhdf5 has a file open for writing leaves one that does not open,
and libhdf5 aborts the process when the disk fills. So the layout is made under another name,
closed, its space reserved, fsynced and renamed; from then on bytes are written with ``pwrite`` at
the datasets' offsets, and the file is valid HDF5 at any moment.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featcache.errors import CorruptStore, FormatVersionError, MissingStore, StoreError
from featcache.fingerprint import FORMAT_VERSION, Fingerprint, canonical_json
from featcache.store import disk
from featcache.store.disk import as_bytes

__all__ = ["DONE", "FAILED", "PENDING", "Canaries", "Contents", "Failure", "StoreFile"]

PENDING, DONE, FAILED = 0, 1, 2

_ALIGNMENT = 4096
# Metadata of the layout itself: a few kilobytes a dataset, measured; generous for reserving.
_METADATA_BYTES = 65_536
# JSON that is written after the layout is made needs its place beforehand.
_META_SLOTS = {"settings": 4_096, "run": 32_768}
_DIGEST_BYTES = 8 << 20
_REASON_BYTES = 1000
# Names at the root of the file that are not tables of text.
_NOT_TABLES = {"features", "rows", "failures", "meta", "canaries", "digest"}
_NO_REASON = ("unknown", "the record of the reason was lost")


def rows_dtype(n_taps: int) -> np.dtype[Any]:
    """Return the type of a row of /rows for a number of taps."""
    return np.dtype(
        [
            ("sha256", "u1", (32,)),
            ("size", "<i8"),
            ("mtime_ns", "<i8"),
            ("crc32", "<u4", (n_taps,)),
            ("status", "u1"),
            ("entry_crc", "<u4"),
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
    mtime_ns: int = -1


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
    def row_bytes(self) -> int:
        """Bytes of one image's features."""
        size = np.dtype(self.fingerprint.store_dtype).itemsize
        return sum(math.prod(self.shapes[tap]) * size for tap in self.fingerprint.taps)

    @property
    def feature_bytes(self) -> int:
        """Bytes of all features."""
        return self.row_bytes * len(self.tables["ids"])

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
        for key in ("size", "mtime_ns"):
            add(f"failures/{key}", np.array([getattr(x, key) for x in self.failures], "<i8"))
        for key, value in sorted(self._all_meta().items()):
            text = canonical_json(value).encode()
            width = max(len(text), _META_SLOTS.get(key, 1))
            add(f"meta/{key}", np.array(text, dtype=f"S{width}"))
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
        return plan

    def _all_meta(self) -> dict[str, Any]:
        """Return the metadata with the keys that every file has."""
        versions = dict(self.meta.get("versions", {}))
        versions |= {"format": FORMAT_VERSION, "h5py": h5py.__version__}
        labels = self.tables.get("labels")
        own = {
            "fingerprint": self.fingerprint.to_dict(),
            "classes": [] if labels is None else sorted(counts(labels).keys() - {""}),
            "versions": versions,
        }
        return {"settings": None, "run": None, **self.meta, **own}


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
        if not name or "/" in name or name.startswith(".") or name in _NOT_TABLES:
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
    """Return a table of UTF-8 as an array of str."""
    if table.size == 0 or table.view(np.uint8).max() < 128:
        return table.astype(f"U{max(table.dtype.itemsize, 1)}")
    return np.char.decode(table, "utf-8")


def counts(table: np.ndarray) -> Counter[str]:
    """Count the texts of a table of UTF-8 (many times as fast as sorting millions of them)."""
    found: Counter[bytes] = Counter()
    for start in range(0, len(table), 65_536):
        found.update(table[start : start + 65_536].tolist())
    return Counter({name.decode(): count for name, count in found.items()})


def create_file(path: str, contents: Contents, *, room: int | None = None) -> None:
    """Make a feature file, valid HDF5, closed and fsynced, with its space reserved.

    The file is made as ``PATH.new`` and renamed: at `path` there is a whole layout or none.

    Parameters
    ----------
    path : str
        The file to make.
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
    plan = contents.plan()
    temporary = f"{path}.new"
    bound = sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in plan.values())
    bound += _METADATA_BYTES * len(plan)
    if room is not None:
        bound += room - contents.feature_bytes
    try:
        # Before libhdf5 sees the file: a disk that fills under libhdf5 aborts the process.
        with disk.opened(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as descriptor:
            disk.reserve(descriptor, 0, bound, zeros=False)
        _write_layout(temporary, plan)
        datasets = read_datasets(temporary)
        with disk.opened(temporary, os.O_RDWR) as descriptor:
            if room is None:
                disk.reserve(descriptor, 0, os.fstat(descriptor).st_size, zeros=True)
            for name, (_, _, data) in plan.items():
                start, size = datasets[name].offset, datasets[name].nbytes
                if not name.startswith("features/"):
                    disk.reserve(descriptor, start, start + size, zeros=True)
                if data is not None and size:
                    disk.pwrite_all(descriptor, as_bytes(data), start)
            disk.fsync(descriptor)
        disk.rename(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write_layout(path: str, plan: Plan) -> None:
    """Make an HDF5 file whose datasets are contiguous, allocated, and never filled.

    It uses h5py's low-level interface, because only there the times of creation can be left out, so
    that the same features give the same file, byte for byte.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
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

    file = h5py.h5f.create(path.encode(), h5py.h5f.ACC_TRUNC, for_file, access)
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


def read_datasets(path: str) -> dict[str, Dataset]:
    """Return the place of each dataset of an HDF5 file.

    Raises
    ------
    CorruptStore
        Not HDF5, truncated, or not laid out as the format says.
    """
    found: dict[str, Dataset] = {}

    def visit(name: str, node: Any) -> None:
        if not isinstance(node, h5py.Dataset):
            return
        offset = node.id.get_offset()
        if offset is None and node.nbytes:
            raise CorruptStore(f"{path}: dataset {name!r} is not contiguous.")
        # Without h5py's marks on strings; a compound type has none.
        dtype = node.dtype if node.dtype.names else np.dtype(node.dtype.str)
        found[name] = Dataset(offset or 0, node.shape, dtype)

    try:
        with h5py.File(path, "r", locking=False) as file:
            file.visititems(visit)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise CorruptStore(
            f"{path} is damaged or not an HDF5 file: {error}. If it was complete once, restore "
            "it from a copy; else move it away and run `featcache extract` again."
        ) from error
    return found


class StoreFile:
    """One feature file, open for reading (and, while it is filled, for ``pwrite``).

    Holds a file descriptor, so that a file that is replaced meanwhile stays readable.

    Parameters
    ----------
    path : str
        The file.
    writable : bool
        Open for writing too.

    Raises
    ------
    MissingStore, CorruptStore, FormatVersionError
    """

    def __init__(self, path: str, *, writable: bool = False) -> None:
        self.path = path
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise MissingStore(f"There is no feature file {path}.") from error
        except OSError as error:
            if writable:
                disk.raise_for(error, path)
            hint = " Type: ulimit -n 65536" if error.errno == errno.EMFILE else ""
            raise StoreError(f"Cannot read {path}: {error.strerror}.{hint}") from error
        if Path(path).is_dir():
            raise StoreError(f"{path} is a folder, not a feature file.")
        self.datasets = read_datasets(path)
        if not disk.is_at(self.descriptor, path):
            raise StoreError(f"{path} was replaced while it was opened. Try again.")
        self._check_format()
        self.fingerprint = Fingerprint.from_dict(self.meta("fingerprint"))
        self.features = {tap: self._features(tap) for tap in self.fingerprint.taps}
        self.n = self.datasets["ids"].shape[0]

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # For processes of joblib: they open the file themselves, if it is still this one.
        return _reopen, (self.path, self.read("digest").tobytes())

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _check_format(self) -> None:
        size = os.fstat(self.descriptor).st_size
        for name, dataset in self.datasets.items():
            if dataset.offset + dataset.nbytes > size:
                raise CorruptStore(f"{self.path} was truncated: {name!r} reaches beyond its end.")
        if "meta/versions" not in self.datasets:
            raise CorruptStore(f"{self.path} is HDF5 but not a feature file of featcache.")
        version = self.meta("versions").get("format")
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"{self.path} has format version {version}; this featcache reads version "
                f"{FORMAT_VERSION}. "
                + (
                    "Type: pip install --upgrade featcache"
                    if isinstance(version, int) and version > FORMAT_VERSION
                    else "Run `featcache extract` into a new file."
                )
            )
        for name in ("rows", "ids", "failures/id", "digest", "meta/fingerprint"):
            if name not in self.datasets:
                raise CorruptStore(f"{self.path} is damaged: it has no /{name}.")

    def _features(self, tap: str) -> Dataset:
        try:
            return self.datasets[feature_name(tap)]
        except KeyError as error:
            raise CorruptStore(f"{self.path} is damaged: it has no features {tap!r}.") from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a dataset, or its rows from `start` to `stop`."""
        dataset = self.datasets[name]
        shape = dataset.shape if stop is None else (stop - start, *dataset.shape[1:])
        array = np.empty(shape, dataset.dtype)
        if array.nbytes:
            offset = dataset.offset + start * dataset.row_bytes
            disk.pread_into(self.descriptor, as_bytes(array), offset)
        return array

    def write_rows(self, dataset: Dataset, start: int, array: np.ndarray) -> None:
        """Write rows from `start` on; the array has the dataset's type and is contiguous."""
        offset = dataset.offset + start * dataset.row_bytes
        disk.pwrite_all(self.descriptor, as_bytes(array), offset)

    @property
    def tables(self) -> list[str]:
        """Names of the columns of text, ``ids`` among them."""
        return [name for name in self.datasets if "/" not in name and name not in _NOT_TABLES]

    def contents(self, tables: Mapping[str, np.ndarray], failures: Sequence[Failure]) -> Contents:
        """Return what a file of other rows holds, with all that does not depend on rows from here.

        Parameters
        ----------
        tables : dict of str to ndarray of bytes, shape (n,)
            The columns of the new file, in UTF-8.
        failures : list of Failure
            Its failures.
        """
        return Contents(
            fingerprint=self.fingerprint,
            shapes={tap: dataset.shape[1:] for tap, dataset in self.features.items()},
            tables=tables,
            meta=self.all_meta,
            failures=failures,
            canaries=self.canaries,
        )

    # --- failures -------------------------------------------------------------------------------

    def failures(self, rows: np.ndarray | None = None) -> list[Failure]:
        """Return the images without features.

        Parameters
        ----------
        rows : ndarray of int, optional
            The rows that failed; left out, those whose status says so.
        """
        texts = [decode_table(self.read(f"failures/{x}")) for x in ("id", "stage", "reason")]
        numbers = [self.read(f"failures/{x}") for x in ("size", "mtime_ns")]
        columns = [column.tolist() for column in (*texts, *numbers)]
        found = [Failure(*values) for values in zip(*columns, strict=True)]
        if rows is None:
            status = self.read("rows")["status"] if not self.finished else np.zeros(0)
            rows = np.flatnonzero(status == FAILED)
        if not len(rows):
            return found
        entries, ids, reasons = self.read("rows"), self.read("ids"), self._reasons()
        for row in rows.tolist():
            size, mtime_ns = entries[row]["size"].item(), entries[row]["mtime_ns"].item()
            stage, reason = reasons.get(row, _NO_REASON)
            found.append(Failure(ids[row].decode(), stage, reason, size, mtime_ns))
        return found

    @property
    def _end(self) -> int:
        """Length of the HDF5 file in bytes, from its superblock."""
        return int.from_bytes(os.pread(self.descriptor, 8, 28), "little")

    def add_reason(self, row: int, stage: str, reason: str) -> None:
        """Append the reason of a failure, cut if it is long, behind the HDF5 file."""
        text = reason.replace("\0", "\\0").encode(errors="backslashreplace")
        reason = text[:_REASON_BYTES].decode(errors="ignore")
        # A line of its own whatever a kill left before it.
        line = b"\n" + json.dumps([row, stage, reason]).encode() + b"\n"
        disk.pwrite_all(self.descriptor, line, os.fstat(self.descriptor).st_size)

    def _reasons(self) -> dict[int, tuple[str, str]]:
        """Return (stage, reason) by row from the last whole line of each; a kill may tear one."""
        text = bytearray(os.fstat(self.descriptor).st_size - self._end)
        disk.pread_into(self.descriptor, memoryview(text), self._end)
        found = {}
        for line in text.split(b"\n"):
            try:
                row, stage, reason = json.loads(line)
                found[int(row)] = (str(stage), str(reason))
            except (ValueError, TypeError):
                continue
        return found

    # --- metadata -------------------------------------------------------------------------------

    def meta(self, key: str) -> Any:
        """Return the JSON value under /meta, None if there is none."""
        if f"meta/{key}" not in self.datasets:
            return None
        text = bytes(self.read(f"meta/{key}").item())
        try:
            return json.loads(text)
        except ValueError as error:
            if key in _META_SLOTS and not self.finished:
                return None  # a kill tore the writing of it
            raise CorruptStore(f"{self.path} is damaged: /meta/{key} is not JSON.") from error

    @property
    def all_meta(self) -> dict[str, Any]:
        """The JSON values under /meta by key."""
        return {name[5:]: self.meta(name[5:]) for name in self.datasets if name[:5] == "meta/"}

    def set_meta(self, key: str, value: Any) -> None:
        """Write a JSON value into the place that /meta keeps for it."""
        dataset = self.datasets.get(f"meta/{key}")
        if dataset is None:
            raise StoreError(f"{self.path} has no place for the metadata {key!r}.")
        text = canonical_json(value).encode()
        if len(text) > dataset.dtype.itemsize:
            raise StoreError(
                f"{self.path} keeps {dataset.dtype.itemsize} bytes for the metadata {key!r}; "
                f"{len(text)} came."
            )
        disk.pwrite_all(self.descriptor, text.ljust(dataset.dtype.itemsize, b"\0"), dataset.offset)
        disk.fsync(self.descriptor)  # settings are on the disk before the rows that they decided

    @property
    def canaries(self) -> Canaries | None:
        """The test images, and their features once they are set."""
        if "canaries/names" not in self.datasets:
            return None
        names = decode_table(self.read("canaries/names")).tolist()
        images = [self.read(f"canaries/images/{i}").tobytes() for i in range(len(names))]
        features = {tap: self.read(f"canaries/{feature_name(tap)}") for tap in self.features}
        known = not any(np.isnan(values).any() for values in features.values())
        return Canaries(names, images, features if known else {})

    # --- finishing ------------------------------------------------------------------------------

    def digest(self) -> bytes:
        """Return the SHA-256 over everything outside /features, as /digest should hold it."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_DIGEST_BYTES))
        for name in sorted(self.datasets):
            if name == "digest" or name.startswith("features/"):
                continue
            dataset = self.datasets[name]
            digest.update(name.encode() + b"\0" + dataset.nbytes.to_bytes(8, "little"))
            for start in range(0, dataset.nbytes, len(buffer)):
                block = buffer[: min(len(buffer), dataset.nbytes - start)]
                disk.pread_into(self.descriptor, block, dataset.offset + start)
                digest.update(block)
        return digest.digest()

    @property
    def finished(self) -> bool:
        """True if the digest is written, the last act of finishing."""
        return bool(self.read("digest").any())

    def seal(self) -> None:
        """Cut off the reasons behind the HDF5 file, write the digest, and sync everything."""
        os.ftruncate(self.descriptor, self._end)
        disk.pwrite_all(self.descriptor, self.digest(), self.datasets["digest"].offset)
        disk.fsync(self.descriptor)


def _reopen(path: str, digest: bytes) -> StoreFile:
    """Open in another process the file that this one had open."""
    file = StoreFile(path)
    if file.read("digest").tobytes() != digest:
        raise StoreError(f"{path} was replaced meanwhile. Run the command again.")
    return file
