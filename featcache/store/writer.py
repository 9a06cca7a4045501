"""`FeatureWriter`: fills a feature file row by row so that a kill at any moment loses nothing.

Beside ``flowers.h5`` there may be, until it is complete:

======================================= =========================================================
``flowers.h5.partial``                  the file being filled, valid HDF5 from its first moment
``flowers.h5.partial.lock``             held by the writer; the kernel lets go when it dies
``flowers.h5.partial.old``              an earlier partial file of other images, kept until its
                                        rows are copied
``.flowers.h5.*.tmp``                   a file that is being laid out, or written anew; useless once
                                        its process is dead
======================================= =========================================================

Order of writing: a row's features first, then its entry with checksum. Whatever a kill, a crash or
a power cut leaves of that, a row counts only if entry and features match their checksums, and
`pending` is exactly the rest. `finish` writes the digest, fsyncs, and renames.

There is one way to make a file from others: begin a file with its tables, copy rows (each is
checked), finish. An image set that grew is filled that way from the earlier store; `finish` leaves
failed rows out that way (moving rows inside the one file would save the space, but a kill in the
middle could then lose some); `relabel` changes the tables, and `merge` puts parts together.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from featcache.errors import (
    FingerprintMismatch,
    IncompleteStore,
    MissingFeatures,
    StoreError,
    TooManyFailures,
)
from featcache.fingerprint import Fingerprint
from featcache.store import checksums, disk, format
from featcache.store.disk import WriteLock
from featcache.store.file import StoreFile
from featcache.store.format import DONE, FAILED, PENDING, Canaries, Contents, Failure
from featcache.store.store import FeatureStore, convert
from featcache.system.console import check_stopped
from featcache.system.files import remove_temporary, sync_folder, take_place
from featcache.system.tables import counted

__all__ = ["FeatureWriter", "check_replaceable", "locked", "merge", "relabel", "restamp"]

_COPY_ROWS_BYTES = 8 << 20
_ASIDE = -1  # a row that is none, whose reason marks a file that was set aside

# Columns of text, as they come (of str) and as they are stored (of UTF-8).
Tables = Mapping[str, np.ndarray]


class FeatureWriter:
    """Fills the features of a list of images. Made by `begin`.

    Use it as a context manager: leaving it releases the lock and keeps what was written.

    Attributes
    ----------
    path : str
        The store to be. The file being filled is ``PATH.partial``.
    status : ndarray of uint8, shape (n,)
        0 pending, 1 done, 2 failed.

    Examples
    --------
    >>> with FeatureWriter.begin(path, tables, shapes, fingerprint=f) as writer:  # doctest: +SKIP
    ...     for rows in batches(writer.pending):
    ...         writer.write(rows, network(rows), sha256=hashes[rows])
    ...     store = writer.finish()
    """

    def __init__(
        self,
        path: str,
        file: StoreFile,
        lock: WriteLock | None,
        *,
        kept: str = "",
        earlier: Sequence[str | Path] = (),
        retry_failed: bool = False,
    ) -> None:
        self.path = path
        self._file = file
        self._lock = lock
        self._kept = kept or f"Everything computed so far is kept in {path}.partial."
        self._earlier = [path, f"{path}.partial.old", *map(str, earlier)]
        self._rows = file.datasets["rows"]
        self.status = checksums.row_status(file)
        failed = np.flatnonzero(self.status == FAILED)
        known = [] if retry_failed or not len(failed) else list(file.reasons)
        self.status[failed[~np.isin(failed, known)]] = PENDING  # a power cut may lose the reason

    # --- opening --------------------------------------------------------------------------------

    @classmethod
    def begin(
        cls,
        path: str | Path,
        tables: Tables,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        fingerprint: Fingerprint,
        meta: Mapping[str, Any] | None = None,
        canaries: Sequence[tuple[str, bytes]] = (),
        earlier: Sequence[str | Path] = (),
        retry_failed: bool = False,
        wait: float = 0,
    ) -> Self:
        """Resume the partial file if it has exactly these tables, else make a new one.

        A new one has all its space reserved, and no row is done. An earlier partial file is kept
        as ``PATH.partial.old`` for `earlier_stores`.

        Parameters
        ----------
        path : path
            The store to be; its folder is made.
        tables : dict of str to ndarray of str, shape (n,)
            Columns of text (of numpy's ``StringDType``): ``ids``, all different, and perhaps
            ``labels``, ``groups``, ``splits``, and others.
        shapes : dict of str to tuple of int
            Shape of one image's features by canonical tap, the axis of views included.
        fingerprint : Fingerprint
            Its ``taps`` give the order, its ``store_dtype`` the type.
        meta : dict, optional
            JSON values kept under /meta: ``request`` (what was asked for), ``command`` (how
            to resume, for messages), ``versions``.
        canaries : list of (name, bytes)
            Encoded test images to keep in the file.
        earlier : list of path
            Further files with rows that may be copied, see `earlier_stores`.
        retry_failed : bool
            Count images that failed as pending.
        wait : float
            Seconds to wait for another process that writes this store.

        Raises
        ------
        DiskFull
            The space cannot be reserved; nothing is left behind.
        StoreLocked
            Another process writes this store.
        FingerprintMismatch
            At `path` is a store, or a partial one, of other features.
        StoreError
            No images, or the folder cannot be written to.
        """
        real, lock = locked(path, wait)
        with contextlib.ExitStack() as unless_begun:
            unless_begun.enter_context(lock)
            check_replaceable(real, fingerprint)
            names, images = zip(*canaries, strict=True) if canaries else ((), ())
            contents = Contents(
                fingerprint=fingerprint,
                shapes=shapes,
                tables=_encoded(tables, real),
                meta=dict(meta or {}),
                canaries=Canaries(list(names), list(images)) if canaries else None,
            )
            file = _resumed(real, contents) or _begun(real, contents)
            writer = cls(real, file, lock, earlier=earlier, retry_failed=retry_failed)
            unless_begun.pop_all()
        return writer

    def close(self) -> None:
        """Close the files and release the lock; what was written stays. May be called twice."""
        self._file.close()
        for store in self.__dict__.pop("earlier_stores", ()):
            store.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self._lock is not None and _holds_nothing(self._file):
            disk.remove(f"{self.path}.partial")  # nothing is lost
        self.close()

    # --- state ----------------------------------------------------------------------------------

    @property
    def pending(self) -> np.ndarray:
        """Rows to be computed: int64, ascending."""
        return np.flatnonzero(self.status == PENDING)

    @property
    def failures(self) -> list[Failure]:
        """Images that failed so far, in the order of the rows."""
        return self._file.failures(np.flatnonzero(self.status == FAILED))

    def entries(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return what the file holds of some rows.

        Returns
        -------
        structured ndarray, shape (k,)
            With the fields ``sha256``, ``size`` and ``stamp`` among others: see
            `featcache.store.format`.
        """
        return self._file.read("rows")[np.asarray(rows, np.int64)]

    def mark_pending(self, rows: np.ndarray | Sequence[int]) -> None:
        """Count rows as pending: images that failed or changed since, to be computed again."""
        self.status[np.asarray(rows, np.int64)] = PENDING

    def pack(self, rows: np.ndarray) -> None:
        """Give pending rows (k,) the places 0 to k - 1, whose order a resumed run keeps."""
        entries = np.zeros(len(rows), self._rows.dtype)
        entries["size"] = np.arange(1, len(rows) + 1)  # 0 is a row without a place
        with self._keeping():
            self._write_entries(rows, entries)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Return the places of pending rows in the order of computing: int64, (k,), all different.

        That is the place that `pack` gave a row, or else its number. Rows that were done or failed
        before come after all others.
        """
        entries = self.entries(rows)
        again = entries["status"] != PENDING
        places = rows.copy()
        packed = np.flatnonzero(~again & (entries["size"] > 0))
        if len(packed):
            crcs = checksums.entry_crcs(entries[packed], self._file.read("ids")[rows[packed]])
            packed = packed[crcs == entries["entry_crc"][packed]]
            places[packed] = entries["size"][packed] - 1
        places[again] = places[~again].max(initial=-1) + 1 + np.arange(np.count_nonzero(again))
        return places

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the features."""
        return self._file.fingerprint

    @property
    def meta(self) -> dict[str, Any]:
        """JSON values under /meta."""
        return self._file.all_meta

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a JSON value under /meta: ``settings`` (4 KB) or ``run`` (32 KB)."""
        with self._keeping():
            self._file.set_meta(key, value)

    @property
    def canaries(self) -> Canaries | None:
        """The test images, and their features once they are set."""
        return self._file.canaries

    def set_canaries(self, features: Mapping[str, np.ndarray]) -> None:
        """Keep the features of the test images: by tap, (k, ...) float32, without views."""
        for tap in features:
            dataset = self._file.datasets[f"canaries/{format.feature_name(tap)}"]
            values = np.ascontiguousarray(features[tap], dataset.dtype)
            with self._keeping():
                self._file.write_rows(dataset, 0, values.reshape(dataset.shape))

    # --- filling --------------------------------------------------------------------------------

    def write(
        self,
        rows: np.ndarray | Sequence[int],
        features: Mapping[str, np.ndarray],
        *,
        sha256: np.ndarray,
        size: np.ndarray | int = -1,
        stamp: np.ndarray | int = -1,
    ) -> np.ndarray:
        """Write features of rows.

        Parameters
        ----------
        rows : array of int, shape (k,)
            Rows, in any order; consecutive ones are fastest.
        features : dict of str to ndarray, shape (k, ...)
            Features by tap.
        sha256 : ndarray of uint8, shape (k, 32)
            Hash of each image's file.
        size, stamp : array of int, shape (k,)
            Size and time of change of each image's file; -1 = unknown.

        Returns
        -------
        ndarray of int64
            Rows whose features are not finite in the type stored; they are recorded as failed.
        """
        rows = np.asarray(rows, np.int64)
        if len(rows) == 0:
            return rows
        stored = {}
        finite = np.ones(len(rows), bool)
        for tap, dataset in self._file.features.items():
            # (k, ...) in any type -> (k, ...) contiguous in the type stored
            stored[tap] = _as_stored(features[tap], (len(rows), *dataset.shape[1:]), dataset.dtype)
            finite &= _finite_rows(stored[tap])
        entries = np.zeros(len(rows), self._rows.dtype)
        entries["sha256"], entries["size"], entries["stamp"] = sha256, size, stamp
        entries["status"] = np.where(finite, DONE, FAILED)
        self._check_rows(rows)
        for k in np.flatnonzero(~finite).tolist():
            with self._keeping():
                self._file.add_reason(int(rows[k]), "forward", self._overflow(features, k))
        self._store(rows, stored, entries)
        return rows[~finite]

    def _overflow(self, features: Mapping[str, np.ndarray], k: int) -> str:
        """Return in which type features are not finite, and which flag helps."""
        made_by = self.fingerprint
        if all(np.isfinite(features[tap][k]).all() for tap in self._file.features):
            rounded = f"features are not finite in {made_by.store_dtype} (larger than 65,504)"
            return f"{rounded}: use --store-dtype float32"
        if made_by.precision == "float16":
            return "features are not finite in a float16 forward pass: use --precision bfloat16"
        return "features are not finite"

    def _store(
        self, rows: np.ndarray, stored: Mapping[str, np.ndarray], entries: np.ndarray
    ) -> None:
        """Write features (k, ...), then entries (k,), run by run."""
        seeds = checksums.row_seeds(entries["sha256"])
        with self._keeping():
            for k, (tap, dataset) in enumerate(self._file.features.items()):
                entries["crc32"][:, k] = checksums.row_checksums(stored[tap], seeds)
                for position, first, count in disk.runs(rows):
                    self._file.write_rows(dataset, first, stored[tap][position : position + count])
            self._write_entries(rows, entries)

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Translate an error of the disk; the message says that nothing written is lost."""
        try:
            yield
        except OSError as error:
            needed = os.fstat(self._file.descriptor).st_size
            disk.raise_for(error, self.path, needed=needed, so_far=self._kept)

    def _write_entries(self, rows: np.ndarray, entries: np.ndarray) -> None:
        """Sign entries with their ids and write them."""
        for position, first, count in disk.runs(rows):
            part = entries[position : position + count]
            names = self._file.read("ids", first, first + count)
            part["entry_crc"] = checksums.entry_crcs(part, names)
            self._file.write_rows(self._rows, first, part)
        self.status[rows] = entries["status"]

    def _check_rows(self, rows: np.ndarray) -> None:
        """Refuse rows that are not there."""
        if ((rows < 0) | (rows >= self._file.n)).any():
            raise StoreError(f"{self.path}: rows go from 0 to {self._file.n - 1}.")

    def fail(self, row: int, stage: str, reason: str, *, size: int = -1, stamp: int = -1) -> None:
        """Record that an image has no features, and why."""
        self._check_rows(np.array([row]))
        entry = np.zeros(1, self._rows.dtype)
        entry["size"], entry["stamp"], entry["status"] = size, stamp, FAILED
        with self._keeping():
            self._file.add_reason(row, stage, reason)
            self._write_entries(np.array([row]), entry)

    # --- copying rows ---------------------------------------------------------------------------

    @cached_property
    def earlier_stores(self) -> list[FeatureStore]:
        """Stores whose rows may be copied; they are closed with the writer.

        These are the finished store, an older partial file, and those that `begin` was given, if
        their fingerprint is the same. Of partial ones the rows that are done; whether their bytes
        are intact is checked by `copy_rows`. Where tables are damaged nothing but rows is believed.
        """
        found = []
        for path in self._earlier:
            with contextlib.suppress(StoreError):
                file = StoreFile(path)
                if file.finished and not file.intact:
                    file.keep_rows_only()
                if file.fingerprint == self.fingerprint:
                    done = np.flatnonzero(checksums.row_status(file, features=False) == DONE)
                    found.append(FeatureStore.of_file(file, done))
        return found

    def copy_rows(
        self,
        store: FeatureStore,
        source_rows: np.ndarray | Sequence[int],
        rows: np.ndarray | Sequence[int],
        *,
        size: np.ndarray | None = None,
        stamp: np.ndarray | None = None,
    ) -> np.ndarray:
        """Copy features from a store of the same fingerprint, bit for bit.

        Parameters
        ----------
        store : FeatureStore
            The store to copy from.
        source_rows : array of int, shape (k,)
            Rows of `store`.
        rows : array of int, shape (k,)
            Rows of this file: images with the same content.
        size, stamp : array of int, shape (k,), optional
            Size and time of change of each image's file now; None = as in `store`.

        Returns
        -------
        ndarray of int64
            Rows of this file that were copied: those whose checksum was right.
        """
        if store.fingerprints != (self.fingerprint,):
            raise FingerprintMismatch("Rows can be copied only between the same features.")
        source_rows, rows = np.asarray(source_rows, np.int64), np.asarray(rows, np.int64)
        self._check_rows(rows)
        widest = max(dataset.row_bytes for dataset in self._file.features.values())
        step = max(1, _COPY_ROWS_BYTES // max(widest, 1))
        copied = [rows[:0]]
        for start in range(0, len(rows), step):
            check_stopped()
            part = slice(start, start + step)
            chosen = store.select(source_rows[part])
            entries = np.zeros(len(chosen), self._rows.dtype)
            entries["status"], entries["sha256"] = DONE, chosen.sha256
            entries["size"] = chosen.sizes if size is None else size[part]
            entries["stamp"] = chosen.stamps if stamp is None else stamp[part]
            stored, intact = chosen.stored_rows()
            good = np.flatnonzero(intact)
            taken = {tap: np.ascontiguousarray(array[good]) for tap, array in stored.items()}
            self._store(rows[part][good], taken, entries[good])
            copied.append(rows[part][good])
        return np.concatenate(copied)

    def _move_part(self, part: str, wait: float) -> None:
        """Copy the rows of a part, sync them, and remove the part."""
        with WriteLock(part, wait=wait):
            file = StoreFile(part)
            # (rows of the part,) -> their rows here; -1 = they are not wanted
            ours = _positions(self._file.read("ids"), file.read("ids"))
            entries = file.read("rows")
            theirs = np.flatnonzero((entries["status"] == DONE) & (ours >= 0))
            ours, written = ours[theirs], self.entries(ours[theirs])["entry_crc"]
            missing = self.status[ours] != DONE
            missing |= written != entries["entry_crc"][theirs]
            ours, theirs = ours[missing], theirs[missing]
            with self._keeping():
                for dataset in self._file.features.values():
                    for _, first, count in disk.runs(ours):
                        start = dataset.offset + first * dataset.row_bytes
                        end = start + count * dataset.row_bytes
                        disk.reserve(self._file.descriptor, start, end, zeros=True)
            copied = self.copy_rows(FeatureStore.of_file(file), theirs, ours)
            _check_copied(file, theirs[~np.isin(ours, copied)])
            file.close()
            self.commit()
            disk.remove(part)

    # --- ending ---------------------------------------------------------------------------------

    def commit(self) -> None:
        """Sync everything written so far to the disk."""
        with self._keeping():
            disk.fsync(self._file.descriptor)

    def finish(self, max_failures: float | None = None) -> FeatureStore:
        """Make the partial file the store: leave failed rows out, seal, fsync, rename.

        Parameters
        ----------
        max_failures : float, optional
            Share of the images that may have failed, 0 to 1. Left out: 1 %, at least 5 images,
            and under half of them.

        Raises
        ------
        IncompleteStore
            Rows are pending.
        TooManyFailures
            More failed, or all. The partial file is kept with all its good rows.
        DiskFull
            There is no room for the file without the failed rows. Everything is kept.
        StoreError
            A row was damaged on the disk after it was written, or the store that is replaced got
            datasets of a user. Run the same command again.
        """
        self._complete()
        check_replaceable(self.path, self.fingerprint)
        images = self._file.n + len(self._file.read("failures/id"))
        _check_failures(self.path, self.failures, images, max_failures)
        done = np.flatnonzero(self.status == DONE)
        if len(done) < self._file.n:
            self._leave_out_failures(done)
        else:
            with self._keeping():
                self._file.seal()
                take_place(self._file.descriptor, self._file.path, self.path)
        self._clean_up()
        return FeatureStore.open(self.path)

    def finish_part(self) -> None:
        """Give the file its name with its failed rows in it: a part for `merge`, not a store.

        Raises
        ------
        IncompleteStore
            Rows are pending.
        """
        self._complete()
        with self._keeping():
            take_place(self._file.descriptor, self._file.path, self.path)
        self._clean_up()

    def _complete(self) -> None:
        """Raise if rows are pending; sync them, and remove the file that was kept for its rows."""
        if len(self.pending):
            raise IncompleteStore(
                f"{len(self.pending):,} of {self._file.n:,} images of {self.path} are pending. "
                "Run the same command again."
            )
        self.commit()
        if _is_aside(aside := f"{self.path}.partial.old"):
            disk.remove(aside)
            sync_folder(
                Path(aside).parent
            )  # before the store has its name: no run looks for it then

    def _leave_out_failures(self, done: np.ndarray) -> None:
        """Make the store from the rows that are done."""
        partial, failures = f"{self.path}.partial", self.failures
        tables = {name: self._file.read(name)[done] for name in self._file.tables}
        kept = (
            f"All features are kept in {partial}; only leaving out the {len(failures)} failed "
            "images needs the room."
        )
        contents = self._file.contents(tables, failures)
        _make(self._file, done, contents, self.path, kept=kept)

    def _clean_up(self) -> None:
        """Remove what only an unfinished file needs, and close."""
        disk.remove(f"{self.path}.partial")
        self.close()


def remove_leftovers(path: str) -> None:
    """Remove what a process that was killed left beside a finished store, unless one writes it."""
    remove_temporary(Path(path))
    if Path(f"{path}.partial.lock").exists():
        with contextlib.suppress(StoreError):
            locked(path)[1].release()


def check_unreplaced(path: str, seen: tuple[int, int] | None) -> None:
    """Raise `StoreError`, under the lock, if the file at a path is not the one that was looked at.

    Parameters
    ----------
    path : str
        The store.
    seen : (int, int) or None
        `featcache.store.disk.identity` of the file that was looked at, before the lock.
    """
    if disk.identity(path) != seen:
        raise StoreError(
            f"{path} was written by another process meanwhile; that is kept. To go on from there, "
            "run the same command again."
        )


def restamp(store: FeatureStore, rows: np.ndarray, stamps: np.ndarray) -> None:
    """Note in a finished file that images (k,) of new stamps (k,) were read and are unchanged."""
    (seen,) = store.checked_files()
    real, lock = locked(seen.path)
    with lock:
        check_unreplaced(real, disk.identity(seen.descriptor))
        file = StoreFile(real, writable=True)
        entries = file.read("rows")
        entries["stamp"][rows] = stamps
        file.write_rows(file.datasets["rows"], 0, entries)
        file.close()


def relabel(store: FeatureStore, tables: Tables) -> FeatureStore:
    """Give the files of a store other labels, groups and splits; features stay as they are.

    Parameters
    ----------
    store : FeatureStore
        The store. It keeps reading its old files.
    tables : dict of str to ndarray of str, shape (m,)
        As for `FeatureWriter.begin`; of these images or more, in any order.

    Returns
    -------
    FeatureStore
        Opened anew.

    Raises
    ------
    MissingFeatures
        The tables lack an image of the store.
    StoreLocked
        The file is being written.
    CorruptStore
        The tables do not match their digest. The file is left as it is.
    StoreError
        A row fails its checksum, or another process has written the file since the store was
        opened. The file is left as it is.
    """
    if len(store.fingerprints) > 1:
        raise StoreError("This is a join of several stores: relabel each by itself.")
    for file in store.checked_files():
        real, lock = locked(file.path)
        with lock:
            check_unreplaced(real, disk.identity(file.descriptor))
            _relabel(StoreFile(real), _encoded(tables, real))
    return FeatureStore.open(store.paths)


def _relabel(file: StoreFile, tables: Tables) -> None:
    """Replace one file by one with other tables."""
    file.check_tables()  # a new digest would cover the damage
    ids = file.read("ids")
    rows = _positions(tables["ids"], ids)
    missing = ids[rows < 0]
    if len(missing):
        raise MissingFeatures(
            f"{len(missing)} of {len(ids)} images of {file.path} are not among the images given "
            f"(first: {missing[0].decode()}). Run `featcache extract` to drop them."
        )
    new = {name: table[rows] for name, table in tables.items()}
    contents = file.contents(new, file.failures())
    kept = f"{file.path} is as it was; what takes its place is written beside it."
    _make(file, np.arange(file.n), contents, file.path, kept=kept)


def merge(
    path: str | Path,
    tables: Tables,
    parts: Sequence[str | Path],
    *,
    run: Any = None,
    max_failures: float | None = None,
    wait: float = 0,
) -> FeatureStore:
    """Make one store from parts that hold different rows of it.

    Each part is removed as soon as its rows are copied, checked and synced, so the disk holds one
    part more than the store. After a kill at any moment call it again with the same arguments.

    Parameters
    ----------
    path : path
        The store to be.
    tables : dict of str to ndarray of str, shape (n,)
        As for `FeatureWriter.begin`: of all images, in the order of the rows.
    parts : list of path
        Files that `FeatureWriter.finish_part` ended. Those that are not there any more were merged
        by an earlier call.
    run : object, optional
        JSON value to keep under ``/meta/run``.
    max_failures : float, optional
        As for `FeatureWriter.finish`.
    wait : float
        Seconds to wait for another process that writes the store or a part.

    Returns
    -------
    FeatureStore
        Without the failed images; its ``failures`` are those of all parts.

    Raises
    ------
    IncompleteStore
        An image is in no part.
    TooManyFailures
        More failed, or all. The parts are kept.
    DiskFull
        There is no room for the tables and one more part. Everything is kept.
    StoreLocked
        Another process writes the store or a part.
    StoreError
        A row of a part fails its checksum. The part is kept.
    """
    real, lock = locked(path, wait)
    with lock:
        there = [os.path.realpath(part) for part in parts if Path(part).exists()]
        file = _merging(real, _encoded(tables, real), there, max_failures)
        kept = f"All rows are kept, in {real}.partial and in the parts that are left."
        with FeatureWriter(real, file, lock, kept=kept) as writer:
            for part in there:
                writer._move_part(part, wait)
            if run is not None:
                writer.set_meta("run", run)
            return writer.finish(max_failures)


def _merging(
    path: str, tables: Tables, parts: Sequence[str], max_failures: float | None
) -> StoreFile:
    """Return the file to merge into: that of an earlier call, or a new one."""
    ids = tables["ids"]
    covered = np.zeros(len(ids), bool)
    failures: list[tuple[int, Failure]] = []
    room, model = 0, None
    for part in parts:
        file = StoreFile(part)
        model = model or file
        check_replaceable(part, model.fingerprint)
        rows, status = _positions(ids, file.read("ids")), checksums.row_status(file, features=False)
        status[rows < 0] = PENDING
        done, failed = np.flatnonzero(status == DONE), np.flatnonzero(status == FAILED)
        covered[rows[done]] = covered[rows[failed]] = True
        failures += zip(rows[failed].tolist(), file.failures(failed), strict=True)
        room = max(room, len(done) * sum(data.row_bytes for data in file.features.values()))
    partial = f"{path}.partial"
    with contextlib.suppress(StoreError):
        file = StoreFile(partial, writable=True)
        known = {failure.id for failure in file.failures()}
        keep = np.array([name.decode() not in known for name in ids.tolist()])
        if known >= {failure.id for _, failure in failures} and _take_up(
            file, {name: table[keep] for name, table in tables.items()}
        ):
            return file
    if model is None or not covered.all():
        first = ids[np.argmin(covered)].decode()
        raise IncompleteStore(
            f"{np.count_nonzero(~covered):,} of {len(ids):,} images of {path} are in no finished "
            f"part (first: {first}). Run the same command again."
        )
    failures.sort(key=lambda failure: failure[0])
    without = [failure for _, failure in failures]
    _check_failures(path, without, len(ids), max_failures)
    gone = [row for row, _ in failures]
    contents = model.contents({name: np.delete(x, gone) for name, x in tables.items()}, without)
    return _begun(path, contents, room=room)


def _make(
    source: StoreFile,
    rows: np.ndarray,
    contents: Contents,
    path: str,
    *,
    kept: str,
) -> None:
    """Make the finished file `path` from some rows of another file.

    Raises
    ------
    StoreError
        Rows fail their checksums. Nothing is made.
    """
    source.refuse_foreign()
    try:
        with (
            format.new_file(path, contents) as working,
            FeatureWriter(path, StoreFile(working, writable=True), None, kept=kept) as target,
        ):
            store, numbers = FeatureStore.of_file(source, rows), np.arange(len(rows))
            copied = target.copy_rows(store, numbers, numbers)
            _check_copied(source, np.delete(rows, copied))
            target._file.seal()
            take_place(target._file.descriptor, working, path)
    except OSError as error:
        disk.raise_for(error, path, needed=contents.file_bytes(), so_far=kept)


def _check_copied(file: StoreFile, refused: np.ndarray) -> None:
    """Raise if rows of a file could not be copied because they are damaged."""
    if len(refused):
        path, first = file.path, file.read("ids")[refused[0]].decode()
        again = file.again if file.finished else "run the same `featcache extract` command."
        raise StoreError(
            f"{counted(len(refused), 'row')} of {path} cannot be copied: damaged on the disk "
            f"(first: {first}). Nothing else is lost. To compute them again: {again}"
        )


def _positions(ids: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Return the index of each of `names` (k,) in `ids` (n,): int64 (k,), -1 if it is not there."""
    order = np.argsort(ids)
    found = order[np.minimum(np.searchsorted(ids, names, sorter=order), len(ids) - 1)]
    return np.where(ids[found] == names, found, -1)


def locked(path: str | Path, wait: float = 0) -> tuple[str, WriteLock]:
    """Return the real path of a store, its folder made, and the lock on it."""
    real = os.path.realpath(path)
    try:
        if Path(real).is_dir():
            raise StoreError(f"{path} is a folder. Name a file: -o {path}/features.h5")
        made = [folder for folder in Path(real).parents if not folder.exists()]
        Path(real).parent.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync_folder(folder.parent)
        lock = WriteLock(real, wait=wait)
        remove_temporary(Path(real))
        return real, lock
    except OSError as error:
        disk.raise_for(error, real)


def _encoded(tables: Tables, path: str) -> dict[str, np.ndarray]:
    """Return columns of text as they are stored, of one length that is not 0."""
    encoded = format.encode_tables(tables)
    lengths = {name: len(table) for name, table in encoded.items()}
    if not lengths["ids"]:
        raise StoreError(f"There are no images to make {path} of.")
    if len(set(lengths.values())) > 1:
        raise StoreError(f"The columns of {path} are not of one length: {lengths}.")
    return encoded


def _begun(path: str, contents: Contents, room: int | None = None) -> StoreFile:
    """Make the partial file; keep an earlier one aside, refuse to replace other features."""
    partial = f"{path}.partial"
    check_replaceable(partial, contents.fingerprint)
    try:
        with format.new_file(partial, contents, room=room) as working:
            if Path(partial).exists():
                _set_aside(partial)
            disk.rename(working, partial)
    except OSError as error:
        so_far, advice = "Nothing was computed.", "; --store-dtype float16 needs half the space"
        if Path(path).exists():
            so_far, advice = f"{path} is as it was; what takes its place is written beside it.", ""
        if room is not None:
            so_far, advice = "The parts are kept.", ""
        needed = contents.file_bytes(room)
        disk.raise_for(error, path, needed=needed, so_far=so_far, advice=advice)
    return StoreFile(partial, writable=True)


def _set_aside(partial: str) -> None:
    """Keep a partial file for its rows, unless an earlier one that was kept holds more."""
    aside = f"{partial}.old"

    def done(path: str) -> int:
        try:
            return int(np.count_nonzero(StoreFile(path).read("rows")["status"] == DONE))
        except StoreError:
            return 0

    if not (rows := done(partial)):
        return
    if os.path.lexists(aside) and not _is_aside(aside):
        raise StoreError(
            f"{aside} is not what featcache makes of that name. Move it away and run the same "
            "command again."
        )
    if rows >= done(aside):
        with contextlib.closing(StoreFile(partial, writable=True)) as file:
            file.add_reason(_ASIDE, "", "set aside for its rows")
            disk.fsync(file.descriptor)
        disk.rename(partial, aside)


def _is_aside(path: str) -> bool:
    """Return whether `_set_aside` kept a file: what else has its name is a user's."""
    try:
        return _ASIDE in StoreFile(path).reasons
    except (StoreError, PermissionError):  # a disk that fails is no answer
        return False


def _holds_nothing(file: StoreFile) -> bool:
    """Return whether a file was begun, and no image is done or has failed."""
    return not file.finished and not file.read("rows")["status"].any()


def check_replaceable(path: str, fingerprint: Fingerprint) -> None:
    """Raise if `path` holds something that a file of such features must not replace."""
    try:
        status = Path(path).lstat()
    except FileNotFoundError:
        return
    disk.check_is_file(path, status)
    if status.st_size == 0:
        return
    file = StoreFile(path)
    if not file.finished and not (file.read("rows")["status"] == DONE).any():
        return  # there are no features in it
    difference = file.fingerprint.diff(fingerprint, ("there", "asked for"))
    if difference:
        raise FingerprintMismatch(
            f"{path} holds other features than are asked for:\n{difference}\nChoose another file "
            "with -o; this one is left as it is."
        )
    file.refuse_foreign()


def _resumed(path: str, contents: Contents) -> StoreFile | None:
    """Open the partial file if it has exactly these tables."""
    partial = f"{path}.partial"
    check_replaceable(partial, contents.fingerprint)
    if not Path(partial).exists() or Path(partial).stat().st_size == 0:
        return None
    file = StoreFile(partial, writable=True)
    if file.fingerprint != contents.fingerprint:  # and nothing in it
        return None
    if file.datasets["failures/id"].nbytes or not _take_up(file, contents.tables):
        return None
    try:  # what a merge began has room for the parts that were merged only
        size = os.fstat(file.descriptor).st_size
        disk.reserve(file.descriptor, 0, size, zeros=False)
    except OSError as error:
        so_far = f"Everything computed so far is kept in {partial}."
        disk.raise_for(error, path, needed=contents.file_bytes(), so_far=so_far)
    return file


def _take_up(file: StoreFile, tables: Tables) -> bool:
    """Return whether a file has exactly these columns of text, all intact: it may be filled.

    A finished file, which was renamed so that damaged rows are computed again, counts as unfinished
    from then on: a kill may tear what is written into it.
    """
    if file.tables != sorted(tables) or file.is_torn or (file.finished and not file.intact):
        return False
    if not all(np.array_equal(file.read(name), table) for name, table in tables.items()):
        return False
    file.unseal()
    return True


def _check_failures(
    path: str, failures: Sequence[Failure], n: int, max_failures: float | None
) -> None:
    some_may = min(max(0.01 * n, 5), (n - 1) // 2)
    allowed = some_may if max_failures is None else max_failures * n
    if len(failures) <= allowed and len(failures) < n:
        return
    some = "; ".join(f"{f.id} ({f.stage}: {f.reason})" for f in failures[:3])
    if len(failures) == n:
        raise TooManyFailures(
            f"None of the {n:,} images has features, so there is no store: {some}. Mend the images "
            "and run the same command again."
        )
    raise TooManyFailures(
        f"{len(failures):,} of {n:,} images failed ({len(failures) / n:.1%}; "
        f"{allowed / n:.1%} are allowed): {some}. The features of the others are kept. Mend or "
        "remove the images and run the same command again, or accept more with --max-failures."
    )


def _as_stored(values: np.ndarray, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return features contiguous in the type stored."""
    values = np.asarray(values)
    if values.shape != shape:
        raise StoreError(f"Features of shape {shape} are needed, {values.shape} came.")
    if values.dtype == dtype and values.flags.c_contiguous:
        return values
    out = np.empty(shape, dtype)
    with np.errstate(over="ignore"):  # infinities are found and reported row by row
        convert(values, out)
    return out


def _finite_rows(features: np.ndarray) -> np.ndarray:
    """Return a mask of the rows whose values are all finite."""
    flat = features.reshape(len(features), -1)
    if features.dtype != np.float16 or flat.size == 0:
        return np.asarray(np.isfinite(flat).all(axis=1))
    # numpy tests float16 one by one. As integers, the largest values are the infinities and NaNs
    # of either sign, and integers have fast maxima.
    signed = flat.view(np.int16).max(axis=1) < 0x7C00
    return np.asarray(signed & (flat.view(np.uint16).max(axis=1) < 0xFC00))
