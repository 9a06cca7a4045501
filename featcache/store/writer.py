"""`FeatureWriter`: fills a feature file row by row so that a kill at any moment loses nothing.

Beside ``flowers.h5`` there may be, until it is complete:

======================================= =========================================================
``flowers.h5.partial``                  the file being filled, valid HDF5 from its first moment
``flowers.h5.partial.failures``         JSON lines: row, id, stage, reason of images that failed
``flowers.h5.partial.lock``             held by the writer; the kernel lets go when it dies
``flowers.h5.partial.old``              an earlier partial file of other images, kept until its
                                        rows were taken over
======================================= =========================================================

Order of writing: a row's features first, then its entry with checksum. Whatever a kill, a crash or
a power cut leaves of that, a row counts only if entry and features match their checksums, and
`pending` is exactly the rest. `finish` writes the digest, fsyncs, and renames. Where images failed,
it first makes a second file without their rows: moving rows inside the one file would save
the space, but a kill in the middle could then lose some.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from featcache.errors import (
    FingerprintMismatch,
    IncompleteStore,
    MissingStore,
    StoreError,
    TooManyFailures,
)
from featcache.fingerprint import Fingerprint
from featcache.store import checksums, disk, layout
from featcache.store.layout import DONE, FAILED, PENDING, StoreFile
from featcache.store.locking import WriteLock
from featcache.store.rows import Source, convert
from featcache.store.store import Failure, FeatureStore
from featcache.store.upkeep import Canaries, contents_of, read_canaries

if TYPE_CHECKING:
    from featcache.images.image_set import ImageSet

__all__ = ["FeatureWriter"]

_COPY_ROWS_BYTES = 8 << 20


class FeatureWriter:
    """Fills the features of an image set. Made by `open`, `create`, `resume` or `open_shared`.

    Use it as a context manager: leaving it releases the lock and keeps what was written.

    Attributes
    ----------
    path : str
        The store to be. The file being filled is ``PATH.partial``.
    status : ndarray of uint8, shape (n,)
        0 pending, 1 done, 2 failed.

    Examples
    --------
    >>> with FeatureWriter.open(path, images, shapes, fingerprint=f) as writer:  # doctest: +SKIP
    ...     for rows in batches(writer.pending):
    ...         writer.write(rows, network(rows), sha256=hashes[rows])
    ...     store = writer.finish()
    """

    def __init__(
        self,
        path: str,
        file: StoreFile,
        lock: WriteLock,
        *,
        shared_rows: np.ndarray | None = None,
        retry_failed: bool = False,
    ) -> None:
        self.path = path
        self._file = file
        self._lock = lock
        self._shared_rows = shared_rows
        self._rows = file.datasets["rows"]
        self._retry_failed = retry_failed
        self.status = np.zeros(file.n, np.uint8)
        self._refresh()

    # --- opening --------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: str | Path,
        images: ImageSet,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        fingerprint: Fingerprint,
        meta: Mapping[str, Any] | None = None,
        canaries: Sequence[tuple[str, bytes]] = (),
        retry_failed: bool = False,
    ) -> Self:
        """Resume the partial file where it is of the same images, else make a new one.

        Parameters and errors are those of `create`.
        """
        real, lock = _locked(path)
        with _releasing(lock):
            contents = _contents(images, shapes, fingerprint, meta, canaries)
            file = _partial_of(real, contents) or _begin(real, contents)
            return cls(real, file, lock, retry_failed=retry_failed)

    @classmethod
    def create(
        cls,
        path: str | Path,
        images: ImageSet,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        fingerprint: Fingerprint,
        meta: Mapping[str, Any] | None = None,
        canaries: Sequence[tuple[str, bytes]] = (),
    ) -> Self:
        """Make a new partial file with all its space reserved; no row is done.

        An earlier partial file is kept as ``PATH.partial.old`` for `sources`.

        Parameters
        ----------
        path : path
            The store to be; its folder is made.
        images : ImageSet
            The rows.
        shapes : dict of str to tuple of int
            Shape of one image's features by canonical tap, the axis of views included.
        fingerprint : Fingerprint
            Its ``taps`` give the order, its ``store_dtype`` the type.
        meta : dict, optional
            JSON values kept under /meta: ``request`` (the `RequestKey` as a dict), ``command`` (how
            to resume, for messages), ``versions``.
        canaries : list of (name, bytes)
            Encoded test images to keep in the file.

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
        real, lock = _locked(path)
        with _releasing(lock):
            file = _begin(real, _contents(images, shapes, fingerprint, meta, canaries))
            return cls(real, file, lock)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        images: ImageSet,
        fingerprint: Fingerprint,
        *,
        retry_failed: bool = False,
    ) -> Self:
        """Go on with the partial file of the same images.

        Raises
        ------
        MissingStore
            There is no partial file of these images.
        FingerprintMismatch
            It holds other features.
        StoreLocked
            Another process writes it.
        """
        real, lock = _locked(path)
        with _releasing(lock):
            file = _partial_of(real, _contents(images, {}, fingerprint, {}, ()))
            if file is None:
                raise MissingStore(f"There is no partial file of these images at {real}.partial.")
            return cls(real, file, lock, retry_failed=retry_failed)

    @classmethod
    def open_shared(cls, path: str | Path, rows: np.ndarray | Sequence[int]) -> Self:
        """Open in another process the partial file that a leader `share`d, to fill `rows`.

        The leader gives every process rows of its own, and calls `finish` when all have closed.
        """
        real = os.path.realpath(path)
        lock = WriteLock(_lock_path(real), real, shared=True)
        with _releasing(lock):
            file = StoreFile(f"{real}.partial", writable=True)
            # A failed row among them is there because the leader wants it tried again.
            return cls(real, file, lock, shared_rows=np.asarray(rows, np.int64), retry_failed=True)

    def share(self) -> None:
        """Let other processes fill rows of this file by `open_shared`, until `finish`."""
        self._lock.share()

    def close(self) -> None:
        """Let go of file and lock; what was written stays. A second call does nothing."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- state ----------------------------------------------------------------------------------

    def _refresh(self, *, features: bool = True) -> None:
        """Read from the file which rows are done, and believe only checksums.

        Parameters
        ----------
        features : bool
            Read the features too: what a power cut lost is found only there.
        """
        mine = np.ones(self._file.n, bool)
        if self._shared_rows is not None:
            mine[:] = False
            mine[self._shared_rows] = True
        for first, entries, ids in checksums.chunks(self._file):
            part = slice(first, first + len(entries))
            status = entries["status"].copy()
            touched = np.flatnonzero(status != PENDING)
            checks = checksums.entry_checks(entries[touched], ids[touched])
            status[touched[checks != entries["check"][touched]]] = PENDING
            status[status > FAILED] = PENDING
            done = (status == DONE) & mine[part]
            if features and done.any():
                for wrong in checksums.bad_features(self._file, first, entries, done).values():
                    status[wrong] = PENDING
            if self._retry_failed:
                status[status == FAILED] = PENDING
            self.status[part] = status

    @property
    def pending(self) -> np.ndarray:
        """Rows to be computed: int64, ascending; of a shared writer only its own."""
        pending = np.flatnonzero(self.status == PENDING)
        if self._shared_rows is None:
            return pending
        return np.intersect1d(pending, self._shared_rows)

    @property
    def failures(self) -> list[Failure]:
        """Images that failed so far, in the order of the rows."""
        lines = self._failure_lines()
        ids = self._file.read("ids")
        unknown = {"stage": "unknown", "reason": "the record of the reason was lost"}
        return [
            Failure(ids[row].decode(), **(lines.get(row) or unknown))
            for row in np.flatnonzero(self.status == FAILED).tolist()
        ]

    def stats(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (size, mtime_ns) as recorded of each image: int64, shape (n,); 0 while pending."""
        entries = self._file.read("rows")
        return entries["size"].copy(), entries["mtime_ns"].copy()

    def retry(self, rows: np.ndarray | Sequence[int]) -> None:
        """Count rows as pending: images that failed or changed since, to be computed again."""
        self.status[np.asarray(rows, np.int64)] = PENDING

    def _failure_lines(self) -> dict[int, dict[str, Any]]:
        """Return the last readable line of each row; a kill may have torn one."""
        found = {}
        try:
            lines = Path(self._failures_path).read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        for line in lines:
            try:
                values = json.loads(line)
                found[int(values.pop("row"))] = {
                    key: values[key] for key in ("stage", "reason", "size", "mtime_ns")
                }
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        return found

    @property
    def _failures_path(self) -> str:
        return f"{self.path}.partial.failures"

    @property
    def fingerprint(self) -> Fingerprint:
        """What the features come from."""
        return self._file.fingerprint

    @property
    def meta(self) -> dict[str, Any]:
        """JSON values under /meta."""
        return {key: self._file.meta(key) for key in self._file.meta_keys}

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a JSON value under /meta: ``settings`` (4 KB) or ``run`` (32 KB)."""
        self._file.set_meta(key, value)

    @property
    def canaries(self) -> Canaries | None:
        """The test images, and their features once they are set."""
        return read_canaries(self._file)

    def set_canaries(self, features: Mapping[str, np.ndarray]) -> None:
        """Keep the features of the test images: by tap, (k, ...) float32, without views."""
        for tap in self._file.features:
            dataset = self._file.datasets[f"canaries/{layout.feature_name(tap)}"]
            values = np.ascontiguousarray(features[tap], dataset.dtype)
            self._file.write_rows(dataset, 0, values.reshape(dataset.shape))

    # --- filling --------------------------------------------------------------------------------

    def write(
        self,
        rows: np.ndarray | Sequence[int],
        features: Mapping[str, np.ndarray],
        *,
        sha256: np.ndarray,
        size: np.ndarray | int = -1,
        mtime_ns: np.ndarray | int = -1,
    ) -> np.ndarray:
        """Write features of rows.

        Parameters
        ----------
        rows : array of int, shape (k,)
            Rows, in any order; consecutive ones are fastest.
        features : dict of str to ndarray, shape (k, ...)
            By tap.
        sha256 : ndarray of uint8, shape (k, 32)
            Of the images' files.
        size, mtime_ns : array of int, shape (k,)
            Of the images' files; -1 = unknown.

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
            stored[tap] = _as_stored(features[tap], (len(rows), *dataset.shape[1:]), dataset.dtype)
            finite &= _finite_rows(stored[tap])
        entries = np.zeros(len(rows), self._rows.dtype)
        entries["sha256"], entries["size"], entries["mtime_ns"] = sha256, size, mtime_ns
        if finite.all():
            self._store(rows, stored, entries)
            return rows[:0]
        good = np.flatnonzero(finite)
        self._store(rows[good], {tap: x[good] for tap, x in stored.items()}, entries[good])
        for k in np.flatnonzero(~finite).tolist():
            self.fail(
                int(rows[k]),
                "forward",
                f"features are not finite in {self.fingerprint.store_dtype}"
                + self._overflow_hint(features, k),
                size=int(entries["size"][k]),
                mtime_ns=int(entries["mtime_ns"][k]),
            )
        return rows[~finite]

    def _overflow_hint(self, features: Mapping[str, np.ndarray], k: int) -> str:
        """Say which flag helps where the features were finite before they were rounded."""
        if all(np.isfinite(features[tap][k]).all() for tap in self._file.features):
            return " (larger than 65,504): use --store-dtype float32"
        return ""

    def _store(
        self, rows: np.ndarray, stored: Mapping[str, np.ndarray], entries: np.ndarray
    ) -> None:
        """Write features, then entries, run by run."""
        if len(rows) == 0:
            return
        self._check_rows(rows)
        with self._keeping():
            self._store_runs(rows, stored, entries)

    def _store_runs(
        self, rows: np.ndarray, stored: Mapping[str, np.ndarray], entries: np.ndarray
    ) -> None:
        seeds = checksums.row_seeds(entries["sha256"])
        for k, (tap, dataset) in enumerate(self._file.features.items()):
            entries["crc32"][:, k] = checksums.row_checksums(stored[tap], seeds)
            for position, first, count in disk.runs(rows):
                self._file.write_rows(dataset, first, stored[tap][position : position + count])
        entries["status"] = DONE
        self._write_entries(rows, entries)

    @contextlib.contextmanager
    def _keeping(self) -> Iterator[None]:
        """Say in words that the disk refused, and that nothing written is lost."""
        try:
            yield
        except OSError as error:
            disk.raise_for(
                error,
                self.path,
                needed=os.fstat(self._file.descriptor).st_size,
                so_far=f"Everything computed so far is kept in {self.path}.partial.",
            )

    def _write_entries(self, rows: np.ndarray, entries: np.ndarray) -> None:
        """Sign entries with their ids and write them."""
        ids = self._file.datasets["ids"]
        for position, first, count in disk.runs(rows):
            part = entries[position : position + count]
            names = self._file.read_rows(ids, first, first + count)
            part["check"] = checksums.entry_checks(part, names)
            self._file.write_rows(self._rows, first, part)
        self.status[rows] = entries["status"]

    def _check_rows(self, rows: np.ndarray) -> None:
        """Refuse rows that are not there, or another process's."""
        if rows.min() < 0 or rows.max() >= self._file.n:
            raise StoreError(f"{self.path}: rows go from 0 to {self._file.n - 1}.")
        if self._shared_rows is not None and not np.isin(rows, self._shared_rows).all():
            raise StoreError(f"{self.path}: a row belongs to another process.")

    def fail(
        self, row: int, stage: str, reason: str, *, size: int = -1, mtime_ns: int = -1
    ) -> None:
        """Record that an image has no features, and why."""
        self._check_rows(np.array([row]))
        name = self._file.read_rows(self._file.datasets["ids"], row, row + 1)
        record = {
            "row": row,
            "id": name[0].decode(),
            "stage": stage,
            "reason": reason,
            "size": size,
            "mtime_ns": mtime_ns,
        }
        # A line of its own whatever a kill left before it; one write, so that processes that
        # append to the same file do not mix.
        line = b"\n" + json.dumps(record).encode() + b"\n"
        entry = np.zeros(1, self._rows.dtype)
        entry["size"], entry["mtime_ns"], entry["status"] = size, mtime_ns, FAILED
        with self._keeping():
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            with disk.opened(self._failures_path, flags) as descriptor:
                os.write(descriptor, line)
            self._write_entries(np.array([row]), entry)

    # --- taking rows over -----------------------------------------------------------------------

    def sources(self) -> list[FeatureStore]:
        """Return the stores whose rows may be copied: the finished one, and an old partial one.

        Of partial ones, rows that are done; whether their bytes are intact is checked by
        `copy_rows`. Only stores with the same fingerprint are returned.
        """
        found = []
        for path in (self.path, f"{self.path}.partial.old"):
            try:
                file = StoreFile(path)
            except StoreError:
                continue
            if file.fingerprint == self.fingerprint:
                done = np.flatnonzero(file.read("rows")["status"] == DONE)
                found.append(FeatureStore([Source([file], file.fingerprint.backbone)], [done]))
        return found

    def copy_rows(
        self,
        store: FeatureStore,
        source_rows: np.ndarray,
        rows: np.ndarray,
        *,
        size: np.ndarray | None = None,
        mtime_ns: np.ndarray | None = None,
    ) -> np.ndarray:
        """Take features over from a store of the same fingerprint, bit for bit.

        Parameters
        ----------
        store : FeatureStore
            Where they are.
        source_rows : array of int, shape (k,)
            Rows of `store`.
        rows : array of int, shape (k,)
            Rows of this file: images with the same content.
        size, mtime_ns : array of int, shape (k,), optional
            Of the images' files now; None = as in `store`.

        Returns
        -------
        ndarray of int64
            Rows of this file that were copied: those whose checksum was right.
        """
        if store.fingerprints != (self.fingerprint,):
            raise FingerprintMismatch("Rows can be copied only between the same features.")
        source_rows, rows = np.asarray(source_rows, np.int64), np.asarray(rows, np.int64)
        widest = max(dataset.row_bytes for dataset in self._file.features.values())
        step = max(1, _COPY_ROWS_BYTES // max(widest, 1))
        copied = [rows[:0]]
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            chosen = store.select(source_rows[part])
            entries = np.zeros(len(chosen), self._rows.dtype)
            entries["sha256"] = chosen.sha256
            entries["size"] = chosen.sizes if size is None else size[part]
            entries["mtime_ns"] = chosen.mtimes_ns if mtime_ns is None else mtime_ns[part]
            stored, good = chosen.stored_rows()
            good = np.flatnonzero(good)
            taken = {tap: np.ascontiguousarray(array[good]) for tap, array in stored.items()}
            self._store(rows[part][good], taken, entries[good])
            copied.append(rows[part][good])
        return np.concatenate(copied)

    # --- ending ---------------------------------------------------------------------------------

    def commit(self) -> None:
        """Have everything written so far on the disk."""
        with self._keeping():
            disk.fsync(self._file.descriptor)

    def finish(self, max_failures: float = 0.01) -> FeatureStore:
        """Make the partial file the store: leave failed rows out, seal, fsync, rename.

        Parameters
        ----------
        max_failures : float
            Share of the images that may have failed, 0 to 1.

        Raises
        ------
        IncompleteStore
            Rows are pending.
        TooManyFailures
            More failed, or all. The partial file is kept with all its good rows.
        DiskFull
            There is no room for the file without the failed rows. Everything is kept.
        StoreLocked
            A process that fills this file has not closed it.
        """
        if self._lock.shared:
            self._lock.own()
            self._retry_failed = False
            self._refresh(features=False)
        if len(self.pending):
            raise IncompleteStore(
                f"{len(self.pending):,} of {self._file.n:,} images of {self.path} are pending. "
                "Run the same command again."
            )
        failures = self.failures
        self._check_failures(failures, max_failures)
        partial = f"{self.path}.partial"
        try:
            if failures:
                self._compact(failures, f"{partial}.compact")
                disk.rename(f"{partial}.compact", self.path)
            else:
                self._file.seal()
                disk.rename(partial, self.path)
        except OSError as error:
            disk.raise_for(
                error,
                self.path,
                needed=os.fstat(self._file.descriptor).st_size,
                so_far=f"All features are kept in {partial}; only leaving out the "
                f"{len(failures)} failed images needs the room.",
            )
        for leftover in ("", ".old", ".failures", ".compact", ".fresh", ".relabelled"):
            Path(partial + leftover).unlink(missing_ok=True)
        self.close()
        return FeatureStore.open(self.path)

    def _check_failures(self, failures: Sequence[Failure], max_failures: float) -> None:
        n = self._file.n
        if len(failures) <= max_failures * n and len(failures) < n:
            return
        some = "; ".join(f"{f.id} ({f.stage}: {f.reason})" for f in failures[:3])
        raise TooManyFailures(
            f"{len(failures):,} of {n:,} images failed ({len(failures) / n:.1%}; "
            f"{max_failures:.1%} are allowed): {some}. The features of the others are kept in "
            f"{self.path}.partial; the reasons are in {self._failures_path}. Mend or remove the "
            "images and run the same command again, or accept more with --max-failures."
        )

    def _compact(self, failures: Sequence[Failure], path: str) -> None:
        """Make a finished file of the rows that did not fail."""
        keep = np.flatnonzero(self.status == DONE)
        contents = contents_of(self._file)
        contents.ids = contents.ids[keep]
        for name in ("labels", "groups", "splits"):
            table = getattr(contents, name)
            setattr(contents, name, None if table is None else table[keep])
        contents.failures = [(f.id, f.stage, f.reason, f.size, f.mtime_ns) for f in failures]
        layout.rewrite(self._file, path, contents, keep)


def _lock_path(path: str) -> str:
    return f"{path}.partial.lock"


def _locked(path: str | Path) -> tuple[str, WriteLock]:
    """Return the real path of a store, its folder made, and the lock on it."""
    real = os.path.realpath(path)
    try:
        if Path(real).is_dir():
            raise StoreError(f"{path} is a folder. Name a file: -o {path}/features.h5")
        Path(real).parent.mkdir(parents=True, exist_ok=True)
        return real, WriteLock(_lock_path(real), real)
    except OSError as error:
        disk.raise_for(error, real)


@contextlib.contextmanager
def _releasing(lock: WriteLock) -> Iterator[None]:
    """Release the lock if what follows fails."""
    try:
        yield
    except BaseException:
        lock.release()
        raise


def _contents(
    images: ImageSet,
    shapes: Mapping[str, tuple[int, ...]],
    fingerprint: Fingerprint,
    meta: Mapping[str, Any] | None,
    canaries: Sequence[tuple[str, bytes]],
) -> layout.Contents:
    """Return what a new file of these images is made from."""
    if len(images) == 0:
        raise StoreError(f"There are no images in {images.source}.")

    def table(texts: np.ndarray | None, what: str) -> np.ndarray | None:
        return None if texts is None else layout.encode_table(texts, what)

    return layout.Contents(
        fingerprint=fingerprint,
        shapes=shapes,
        ids=layout.encode_table(images.ids, "ids"),
        labels=table(images.labels, "labels"),
        groups=table(images.groups, "groups"),
        splits=table(images.splits, "splits"),
        meta=dict(meta or {}),
        canary_names=[name for name, _ in canaries],
        canary_images=[image for _, image in canaries],
    )


def _begin(path: str, contents: layout.Contents) -> StoreFile:
    """Make the partial file; keep an earlier one aside, refuse to replace other features."""
    partial = f"{path}.partial"
    for existing in (path, partial):
        _refuse_other(existing, contents.fingerprint)
    try:
        layout.create_file(f"{partial}.fresh", contents)
    except OSError as error:
        disk.raise_for(
            error,
            path,
            needed=contents.feature_bytes,
            so_far="Nothing was computed.",
            advice="; --store-dtype float16 needs half the space",
        )
    if Path(partial).exists():
        _set_aside(partial)
    Path(f"{partial}.failures").unlink(missing_ok=True)
    disk.rename(f"{partial}.fresh", partial)
    return StoreFile(partial, writable=True)


def _set_aside(partial: str) -> None:
    """Keep a partial file for its rows, unless an earlier one set aside holds more."""

    def done(path: str) -> int:
        try:
            return int(np.count_nonzero(StoreFile(path).read("rows")["status"] == DONE))
        except StoreError:
            return 0

    if done(partial) >= done(f"{partial}.old"):
        disk.rename(partial, f"{partial}.old")


def _refuse_other(path: str, fingerprint: Fingerprint) -> None:
    """Raise where `path` holds something that must not be replaced."""
    if not Path(path).exists() or Path(path).stat().st_size == 0:
        return
    there = StoreFile(path).fingerprint
    difference = there.diff(fingerprint, ("there", "asked for"))
    if difference:
        raise FingerprintMismatch(
            f"{path} holds other features than are asked for:\n{difference}\nChoose another file "
            f"with -o, or delete it: rm {path}"
        )


def _partial_of(path: str, contents: layout.Contents) -> StoreFile | None:
    """Open the partial file if it is of these images, exactly."""
    partial = f"{path}.partial"
    if not Path(partial).exists() or Path(partial).stat().st_size == 0:
        return None
    _refuse_other(partial, contents.fingerprint)
    file = StoreFile(partial, writable=True)
    for name in ("ids", "labels", "groups", "splits"):
        asked = getattr(contents, name)
        there = file.read(name) if name in file.datasets else None
        if not (asked is there if asked is None or there is None else np.array_equal(asked, there)):
            return None
    return file


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
    """Say of each row whether all its values are finite."""
    flat = features.reshape(len(features), -1)
    if features.dtype != np.float16 or flat.size == 0:
        return np.asarray(np.isfinite(flat).all(axis=1))
    # numpy tests float16 one by one. As integers, the largest values are the infinities and NaNs
    # of either sign, and integers have fast maxima.
    signed = flat.view(np.int16).max(axis=1) < 0x7C00
    return np.asarray(signed & (flat.view(np.uint16).max(axis=1) < 0xFC00))
