"""`StoreFile`: one feature file that is open, in the format of `featcache.store.format`."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import CorruptStore, FormatVersionError, MissingStore, StoreError, explained
from featcache.fingerprint import FORMAT_VERSION, Fingerprint, canonical_json
from featcache.store import disk
from featcache.store.disk import as_bytes
from featcache.store.format import (
    COPIED,
    FAILED,
    META_SLOTS,
    NOT_TABLES,
    Canaries,
    Contents,
    Dataset,
    Failure,
    decode_table,
    feature_name,
    hash_of,
    misfit,
    read_datasets,
)
from featcache.system.tables import typed

__all__ = ["StoreFile"]

_DIGEST_BYTES = 8 << 20
_REASON_BYTES = 1000
_TRIES = 10
_SPARSE = 100  # times that a file system may make tables smaller by compressing them
_NEEDED = ("rows", "ids", "failures/id", "digest", "meta/fingerprint", "meta/datasets")
_NO_REASON = ("unknown", "the record of the reason was lost")
# What is made anew with each file.
_INNER = {"copy", "datasets", "sha256"}
# Types of JSON values that are no objects.
_META_TYPES = {"classes": list, "datasets": list, "command": str, "sha256": str}
_ELSEWHERE = "Restore it from a copy, or compute the features again, into another file."


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
    MissingStore, CorruptStore, FormatVersionError, StoreLocked
    """

    def __init__(self, path: str, *, writable: bool = False) -> None:
        self.path = path
        self.descriptor = -1
        self._checked: tuple[int, int] | None = None  # when the tables were: time of change, size
        self._digest = b""
        self._rows_only = False
        self._known: dict[str, Any] = {}
        self._check_format(self._open(writable))
        self.features = {tap: self.datasets[feature_name(tap)] for tap in self.fingerprint.taps}
        self.n = self.datasets["ids"].shape[0]

    def _open(self, writable: bool) -> list[str]:
        """Open the file, list its contiguous datasets, and return the names of the others."""
        path = self.path
        for _ in range(_TRIES):
            try:
                self.descriptor = disk.open_file(path, writable=writable)
            except FileNotFoundError as error:
                raise MissingStore(f"There is no feature file {path}.") from error
            except OSError as error:
                if writable and isinstance(error, PermissionError) and Path(path).exists():
                    raise StoreError(
                        f"{path} is protected from writing. To go on with it, type: "
                        f"{typed('chmod u+w', path)}, and run the same command again."
                    ) from error
                if writable:
                    disk.raise_for(error, path)
                raise StoreError(f"Cannot read {path}: {explained(error)}.") from error
            # At exit it runs while there are still modules.
            self._finalizer = weakref.finalize(self, os.close, self.descriptor)
            disk.check_unlocked(self.descriptor, path)
            try:
                self.datasets, others = read_datasets(path)
            except CorruptStore:
                if disk.is_at(self.descriptor, path):
                    raise
            else:
                if disk.is_at(self.descriptor, path):
                    return others
            self.close()  # the path leads to another file meanwhile
        raise StoreError(f"{path} is replaced again and again while it is opened.")

    def __reduce__(self) -> tuple[Any, ...]:
        # For processes of joblib: they open the file themselves, if it is still this one.
        return _reopen, (self.path, self.read("digest").tobytes())

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        self._finalizer()
        self.descriptor = -1

    def _check_format(self, others: Sequence[str]) -> None:
        """Compare everything with the format.

        Leaves datasets of this format in `datasets`, and the names of others in `foreign`.
        """
        found, damaged = self.datasets, f"{self.path} is damaged"
        status = os.fstat(self.descriptor)
        for name, dataset in found.items():
            if dataset.offset + dataset.nbytes > status.st_size:
                raise CorruptStore(f"{self.path} was truncated: {name!r} reaches beyond its end.")
        there = status.st_blocks * 512
        tables = sum(x.nbytes for name, x in found.items() if not name.startswith("features/"))
        if tables > _SPARSE * (there + _DIGEST_BYTES):  # reading nothing but holes takes for ever
            raise CorruptStore(
                f"{damaged}: its tables are said to have {tables:,} bytes, and the disk holds "
                f"{there:,} in all. {_ELSEWHERE}"
            )
        self._known = self._identity()
        ours = {*_NEEDED, *self._known["datasets"]}
        if missing := sorted(ours - found.keys()):
            raise CorruptStore(f"{damaged}: it has no contiguous /{missing[0]}. {_ELSEWHERE}")
        copied = self._known | {"copy": self._known, "sha256": hash_of(self._known)}
        self._copied = {f"meta/{key}": canonical_json(copied[key]).encode() for key in copied}
        self.datasets = {name: found[name] for name in found if name in ours}
        groups = {name.split("/")[0] for name in ours}
        top = {name: name.split("/")[0] for name in {*found, *others} - ours}
        self.foreign = sorted({name if top[name] in groups else top[name] for name in top})
        try:
            self.fingerprint = Fingerprint.from_dict(self._known["fingerprint"])
        except CorruptStore as error:
            raise CorruptStore(f"{damaged}: {error}. {_ELSEWHERE}") from error
        if odd := misfit(self.datasets, self.fingerprint):
            raise CorruptStore(
                f"{damaged}: /{odd} is not there in the shape and type that the format says. "
                f"{_ELSEWHERE}"
            )

    def _identity(self) -> dict[str, Any]:
        """Return what tells how the file is to be read, of which two copies and a hash are kept."""

        def told(key: str) -> Any:
            try:
                return self.meta(key)
            except CorruptStore:
                return None

        plain, copy, sha256 = {key: told(key) for key in COPIED}, told("copy"), told("sha256")
        if copy is None and plain["versions"] is None:
            raise CorruptStore(f"{self.path} is HDF5 but not a feature file of featcache.")
        both = [values for values in (plain, copy) if values and values.keys() == plain.keys()]
        intact = [values for values in both if hash_of(values) == sha256]
        known = plain if plain == copy else next(iter(intact), None)
        self.is_torn = len(intact) < 2
        names, versions = (known or plain)["datasets"], (known or plain)["versions"]
        version = versions.get("format") if isinstance(versions, dict) else None
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise FormatVersionError(
                f"{self.path} has format version {version}; this featcache reads version "
                f"{FORMAT_VERSION}. "
                + (
                    "Type: pip install --upgrade featcache"
                    if version > FORMAT_VERSION
                    else "Run `featcache extract` into a new file."
                )
            )
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if known is None or version is None or not is_list:
            raise CorruptStore(
                f"{self.path} is damaged, and nothing tells which network its features are of: "
                f"/meta/fingerprint and its copy are not what was written. {_ELSEWHERE}"
            )
        return known

    def refuse_foreign(self) -> None:
        """Raise `StoreError` if the file holds more than a new one would that takes its place."""
        if self.foreign:
            own, names = f"{self.path}.own.h5", json.dumps(self.foreign)
            code = (
                f'import h5py; a, b = [h5py.File(p, "a") for p in {json.dumps([self.path, own])}]; '
                f"[(a.copy(n, b, name=n), a.pop(n)) for n in {names}]"
            )
            raise StoreError(
                f"{self.path} holds what featcache did not write: {', '.join(self.foreign)}. The "
                "file that is to take its place would not hold that. To move it to a file of its "
                f"own, {own}, type: {typed('python -c', code)}"
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a dataset, or its rows from `start` to `stop`."""
        dataset = self.datasets[name]
        shape = dataset.shape if stop is None else (stop - start, *dataset.shape[1:])
        array = np.empty(shape, dataset.dtype)
        self.read_into(dataset, start, array)
        return array

    def read_into(self, dataset: Dataset, start: int, out: np.ndarray) -> None:
        """Fill a contiguous array of the dataset's type with its rows from `start` on."""
        if out.nbytes:
            offset = dataset.offset + start * dataset.row_bytes
            disk.pread_into(self.descriptor, as_bytes(out), offset, self.path)

    def write_rows(self, dataset: Dataset, start: int, array: np.ndarray) -> None:
        """Write rows from `start` on; the array has the dataset's type and is contiguous."""
        offset = dataset.offset + start * dataset.row_bytes
        disk.pwrite_all(self.descriptor, as_bytes(array), offset)

    @property
    def tables(self) -> list[str]:
        """Names of the columns of text, ``ids`` among them."""
        return [name for name in self.datasets if "/" not in name and name not in NOT_TABLES]

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
        if self._rows_only:
            return []
        texts = [decode_table(self.read(f"failures/{x}")) for x in ("id", "stage", "reason")]
        numbers = [self.read(f"failures/{x}") for x in ("size", "stamp")]
        columns = [column.tolist() for column in (*texts, *numbers)]
        found = [Failure(*values) for values in zip(*columns, strict=True)]
        if rows is None:
            status = self.read("rows")["status"] if not self.finished else np.zeros(0)
            rows = np.flatnonzero(status == FAILED)
        if not len(rows):
            return found
        entries, ids, reasons = self.read("rows"), self.read("ids"), self.reasons
        for row in rows.tolist():
            size, stamp = entries[row]["size"].item(), entries[row]["stamp"].item()
            stage, reason = reasons.get(row, _NO_REASON)
            found.append(Failure(ids[row].decode(), stage, reason, size, stamp))
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

    @property
    def reasons(self) -> dict[int, tuple[str, str]]:
        """(stage, reason) by row from the last whole line of each; a kill may tear one."""
        text = bytearray(max(os.fstat(self.descriptor).st_size - self._end, 0))
        disk.pread_into(self.descriptor, memoryview(text), self._end, self.path)
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
        if key in self._known:
            return self._known[key]
        dataset = self.datasets.get(f"meta/{key}")
        if dataset is None:
            return None
        try:
            if dataset.shape or dataset.dtype.kind != "S":
                raise ValueError("not a text")
            value = json.loads(bytes(self.read(f"meta/{key}").item()))
            canonical_json(value).encode()  # raises for what a text cannot hold
            if not isinstance(value, _META_TYPES.get(key, dict | None)):
                raise ValueError("not what the format says")
            return value
        except (ValueError, RecursionError) as error:
            if key in META_SLOTS and not self.finished:
                return None  # a kill tore the writing of it
            raise CorruptStore(f"{self.path} is damaged: /meta/{key} is {error}.") from error

    @property
    def all_meta(self) -> dict[str, Any]:
        """The JSON values under /meta by key."""
        keys = [name[5:] for name in self.datasets if name[:5] == "meta/"]
        return {key: self.meta(key) for key in keys if key not in _INNER}

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
            step = len(buffer) // max(dataset.row_bytes, 1) * dataset.row_bytes or len(buffer)
            digest.update(name.encode() + b"\0" + dataset.nbytes.to_bytes(8, "little"))
            if name in self._copied:  # if one of the copies is damaged, the other counts
                digest.update(self._copied[name].ljust(dataset.nbytes, b"\0"))
                continue
            for start in range(0, dataset.nbytes, step):
                block = buffer[: min(step, dataset.nbytes - start)]
                disk.pread_into(self.descriptor, block, dataset.offset + start, self.path)
                if name == "rows":
                    np.frombuffer(block, dataset.dtype)["stamp"] = 0
                digest.update(block)
        return digest.digest()

    @property
    def intact(self) -> bool:
        """True if everything outside /features is what it was when the file was finished."""
        return self.digest() == self.read("digest").tobytes()

    def check_tables(self) -> None:
        """Raise `CorruptStore` if the file is finished and not intact."""
        if self.finished and not self.intact:
            raise CorruptStore(
                f"The tables of {self.path} (ids, labels, rows, metadata) are not what was written:"
                " they do not match their digest. To write them again and keep the features that "
                f"are intact: {self.again}"
            )

    def recheck(self) -> bool:
        """Check the tables, once for each time of change; return whether that was done now.

        Raises
        ------
        CorruptStore
            They are not what was written.
        StoreError
            The file was overwritten in place since it was first looked at.
        """
        stat = os.fstat(self.descriptor)
        changed = (stat.st_mtime_ns, stat.st_size)
        if changed == self._checked or self._rows_only:
            return False
        digest = self.read("digest").tobytes()
        if digest != (self._digest or digest):
            raise StoreError(
                f"{self.path} was overwritten while it was open, and what was read of it before "
                "is of another file. Run the command again; to replace a file in use, mv is safe "
                "and cp is not."
            )
        self.check_tables()
        self._digest, self._checked = digest, changed
        return True

    def keep_rows_only(self) -> None:
        """Forget all tables but ids and rows, whose checksums are their own: they are damaged."""
        kept = {"ids", "rows", "digest"}
        self.datasets = {
            name: dataset
            for name, dataset in self.datasets.items()
            if name in kept or name.startswith("features/")
        }
        self._rows_only = True

    @property
    def again(self) -> str:
        """What to type to write again what is damaged, and lose nothing by it."""
        partial, run = f"{self.path}.partial", "run the same `featcache extract` command"
        if self.path.endswith(".partial"):
            return f"{run} with its labels (--labels FILE), or with --drop-labels."
        if Path(partial).exists():  # it goes on, and takes from here what is intact
            return f"{run}."
        needed = "without the mv it would not look at the rows"
        return f"{typed('mv', self.path, partial)}, then {run} ({needed})."

    @property
    def left_open(self) -> bool:
        """True if a program that had the file open for writing ended without closing it."""
        return bool(os.pread(self.descriptor, 1, 11)[0] & 1)  # a flag of HDF5's superblock

    @property
    def finished(self) -> bool:
        """True if the digest is written, the last act of finishing."""
        return bool(self.read("digest").any())

    def unseal(self) -> None:
        """Let the file count as unfinished, before the first byte of it is changed."""
        if self.finished:
            disk.pwrite_all(self.descriptor, bytes(32), self.datasets["digest"].offset)
            disk.fsync(self.descriptor)

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
