"""`FeatureStore`: features on disk, opened for reading.

A store is one file or several of the same fingerprint with different images (what a cluster run
writes); stores of different fingerprints over the same images are joined by id. Nothing is read
until it is asked for, and the file's arrays are mapped, not loaded: `load` of float32 features
costs no memory of its own. float16 features come as float32 (scikit-learn would make float64 of
them); `blocks` walks through files that are larger than memory, in the order of the disk.

What is read is compared with its checksums: tables before the first of them is used, each row when
it is first read, and both again once the file has changed. A mapped array cannot be watched: while
a store is in use, replace its file by ``mv``, which leaves those who read it the old one, never in
place, as ``cp`` does: mapped arrays would change, or end the process if the file shrinks.

The format is specified in `featcache.store.format`.
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from featcache.errors import (
    CorruptStore,
    FingerprintMismatch,
    IncompleteStore,
    MissingFeatures,
    MissingStore,
    StoreError,
    TrainingError,
)
from featcache.fingerprint import FORMAT_VERSION, Fingerprint, Tap
from featcache.store import checksums, disk, format
from featcache.store.checksums import VerifyReport
from featcache.store.file import StoreFile
from featcache.store.format import DONE, Canaries, Dataset, Failure
from featcache.system.nearest import nearest, unit, without
from featcache.system.tables import (
    counted,
    first_names,
    html_table,
    in_order,
    kept_columns,
    printable,
    typed,
)

__all__ = ["FORMAT_VERSION", "Canaries", "Failure", "FeatureStore", "TapInfo", "VerifyReport"]

_BLOCK_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20
# A gap that is cheaper to read than to seek over.
_GAP_BYTES = 1 << 16


@dataclass(frozen=True)
class TapInfo:
    """Shape and type of the features of one tap.

    Parameters
    ----------
    shape : tuple of int
        Shape of one image's features: (d,), (c, h, w), and (views, ...) if views are stored.
    dtype : numpy.dtype
        As stored: float32 or float16.
    views : int
        1 means that there is no axis of views.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    views: int = 1

    @property
    def width(self) -> int:
        """Columns that this tap gives to `FeatureStore.matrix`: features of one view."""
        return math.prod(self.shape[1:] if self.views > 1 else self.shape)


class FileGroup:
    """Rows of one fingerprint: some rows, or all (None), of files one after the other."""

    def __init__(self, files: Sequence[StoreFile], rows: np.ndarray | None = None) -> None:
        self.unchecked = list(files)
        self.rows = rows
        self.fingerprint = files[0].fingerprint
        self.name = self.fingerprint.backbone
        self.starts = np.cumsum([0, *(file.n for file in files)]).tolist()
        self._tables: dict[str, np.ndarray] = {}
        self._right: dict[str, np.ndarray] = {}  # by tap: rows of all whose checksum was right

    @property
    def files(self) -> list[StoreFile]:
        """The files, whose tables are what was written."""
        self._recheck()
        return self.unchecked

    def _recheck(self) -> None:
        """Check the tables of files that were not looked at since they changed, and rows again."""
        for file in self.unchecked:
            if file.recheck():
                self._right.clear()

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.rows is None else len(self.rows)

    def select(self, rows: np.ndarray) -> FileGroup:
        """Return some of these rows, in the order given."""
        chosen = copy.copy(self)  # shares the tables that were read
        chosen.rows = rows if self.rows is None else self.rows[rows]
        return chosen

    def has(self, name: str) -> bool:
        """Return whether one of the files has a table."""
        return any(name in file.datasets for file in self.files)

    def table(self, name: str) -> np.ndarray:
        """Return a table; of a file that does not have it, ``""`` for each row."""
        whole = self._whole(name)
        return whole if self.rows is None else whole[self.rows]

    def _whole(self, name: str) -> np.ndarray:
        """Return a table of all rows of the files."""
        if name not in self._tables:
            parts = [
                file.read(name) if name in file.datasets else np.zeros(file.n, "S1")
                for file in self.files
            ]
            self._tables[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._tables[name]

    def locate(self, tap: str, row: int) -> tuple[StoreFile, Dataset, int]:
        """Return the file that holds a row of all, the dataset, and the row's number there."""
        k = bisect.bisect_right(self.starts, row) - 1
        return self.unchecked[k], self.unchecked[k].features[tap], row - self.starts[k]

    def check(self, tap: str, start: int, values: np.ndarray) -> None:
        """Compare rows that were read from `start` on with their checksums, each row once.

        Raises
        ------
        CorruptStore
            They are not what was written.
        """
        self._recheck()
        stop = start + len(values)
        rows = np.arange(start, stop) if self.rows is None else self.rows[start:stop]
        right = self._right.setdefault(tap, np.zeros(self.starts[-1], bool))
        new = np.flatnonzero(~right[rows])
        if not len(new):
            return
        rows, values = rows[new], values if len(new) == len(values) else values[new]
        entries = self._whole("rows")[rows]
        sums = checksums.row_checksums(values, checksums.row_seeds(entries["sha256"]))
        wrong = entries["crc32"][:, self.fingerprint.taps.index(tap)] != np.array(sums, np.uint32)
        right[rows] = ~wrong
        if wrong.any():
            file, _, _ = self.locate(tap, int(rows[wrong][0]))
            names = format.decode_table(self._whole("ids")[rows[wrong]]).tolist()
            raise CorruptStore(
                f"{file.path} is damaged: features {tap} of {first_names(names)} are not what was "
                f"written. To compute only damaged rows again: {file.again} To list all of them: "
                f"{typed('featcache verify', file.path)}"
            )

    def fetch(self, tap: str, start: int, out: np.ndarray) -> None:
        """Fill `out` (m, ...), in the type stored, with m of these rows."""
        if self.rows is None:
            self._fetch_run(tap, start, out)
            return
        rows = self.rows[start : start + len(out)]
        if (np.diff(rows) >= 0).all():
            self._fetch_ascending(tap, rows, out)
            return
        order = np.argsort(rows, kind="stable")
        ascending = np.empty_like(out)
        self._fetch_ascending(tap, rows[order], ascending)
        out[order] = ascending

    def _fetch_ascending(self, tap: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Read rows with small gaps between them as one span, and pick them from it."""
        row_bytes = max(self.unchecked[0].features[tap].row_bytes, 1)
        cuts = np.flatnonzero(np.diff(rows) > max(1, _GAP_BYTES // row_bytes)) + 1
        for start, stop in itertools.pairwise([0, *cuts.tolist(), len(rows)]):
            first, last = int(rows[start]), int(rows[stop - 1])
            if (np.diff(rows[start:stop]) == 1).all():
                self._fetch_run(tap, first, out[start:stop])
            else:
                span = np.empty((last - first + 1, *out.shape[1:]), out.dtype)
                self._fetch_run(tap, first, span)
                np.take(span, rows[start:stop] - first, axis=0, out=out[start:stop])

    def _fetch_run(self, tap: str, start: int, out: np.ndarray) -> None:
        """Read consecutive rows of all, across files."""
        done = 0
        while done < len(out):
            file, dataset, row = self.locate(tap, start + done)
            count = min(len(out) - done, file.n - row)
            file.read_into(dataset, row, out[done : done + count])
            done += count


def convert(source: np.ndarray, out: np.ndarray) -> None:
    """Copy between types; for float16 and float32 torch is ten times as fast as numpy.

    Both round to nearest, ties to even. (From float64 torch rounds twice, so that is numpy's.)
    """
    halves = {source.dtype, out.dtype} == {np.dtype(np.float16), np.dtype(np.float32)}
    if halves and source.flags.writeable and source.size > 4096:
        import torch

        torch.from_numpy(out).copy_(torch.from_numpy(source))
    else:
        out[...] = source


class FeatureStore:
    """Features of an image set, opened read-only. Made by `open`, `join` or `extract`.

    Indexing goes by row; rows are in the order of the image set. `select` and `split` give views:
    stores on the same files with fewer rows.

    Attributes
    ----------
    paths : list of str
        The files.
    taps : dict of str to TapInfo
        In the order of the columns. Of joined stores ``"BACKBONE/tap"``.
    fingerprints : tuple of Fingerprint
        One a joined store.
    rows : ndarray of int64, shape (n,)
        Rows of the underlying files that this store shows, in order.

    Examples
    --------
    >>> store = FeatureStore.open("flowers.h5")          # doctest: +SKIP
    >>> X, y = store.load("avgpool")                     # doctest: +SKIP
    """

    def __init__(self, sources: Sequence[FileGroup]) -> None:
        if isinstance(sources, str | Path) or isinstance(next(iter(sources), None), str | Path):
            raise StoreError(f"A feature file is opened. Type: FeatureStore.open({sources!r})")
        # The summary of the run that gave this store, None if it was opened. Any, because its type
        # belongs to extraction, which imports this module.
        self.extraction: Any = None
        self._sources = list(sources)
        # (rows of files, tap) by the name that the user sees
        self._columns = {
            f"{source.name}/{tap}" if len(sources) > 1 else tap: (source, tap)
            for source in sources
            for tap in source.fingerprint.taps
        }

    # --- opening --------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | Path | Sequence[str | Path]) -> Self:
        """Open a feature file, or several with different images of the same fingerprint.

        Raises
        ------
        MissingStore
            No file there.
        IncompleteStore
            Only a ``.partial`` file is there.
        CorruptStore, FormatVersionError
            The file cannot be read.
        FingerprintMismatch
            The files' fingerprints differ.
        StoreError
            An image is in two of the files.
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        if not paths:
            raise StoreError("No feature file was named.")
        files = [_open_finished(str(path)) for path in paths]
        for file in files[1:]:
            difference = files[0].fingerprint.diff(file.fingerprint, (files[0].path, file.path))
            if difference:
                raise FingerprintMismatch(
                    f"{files[0].path} and {file.path} hold features of different origin and "
                    f"cannot be one store:\n{difference}"
                )
        group = FileGroup(files)
        if len(files) > 1:
            _check_disjoint(group.files)
        return cls([group])

    @classmethod
    def of_file(cls, file: StoreFile, rows: np.ndarray | None = None) -> Self:
        """Return some rows of an open file, finished or not, as a store."""
        return cls([FileGroup([file], rows)])

    def close(self) -> None:
        """Close the files. Nothing can be read any more, but arrays that were mapped stay."""
        for file in self._unchecked:
            file.close()

    @classmethod
    def join(cls, stores: Sequence[FeatureStore]) -> Self:
        """Put the features of several stores of the same images side by side, by id.

        Rows, labels, groups and splits are the first store's, and kept columns are those of all.
        Taps become ``"BACKBONE/tap"`` (``"BACKBONE@DIGEST/tap"`` if two stores share the backbone's
        name).

        Raises
        ------
        MissingFeatures
            An image is in one store and not in another; the message names some.
        StoreError
            The same id has another content or another label in another store.
        """
        if not stores:
            raise StoreError("No store was given to join.")
        if len(stores) == 1:
            return cls(stores[0]._sources)
        sources: list[FileGroup] = []
        for store in stores:
            rows = _align_rows(stores[0], store)
            sources += [source.select(rows) for source in store._sources]
        _disambiguate_names(sources)
        return cls(sources)

    # --- what the rows are ----------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._sources[0])

    def __repr__(self) -> str:
        taps = ", ".join(f"{name} {info.shape}" for name, info in self.taps.items())
        return f"FeatureStore({', '.join(self.paths)}: {counted(len(self), 'image')}; {taps})"

    def checked_files(self) -> list[StoreFile]:
        """Return the open files, each once, whose tables are what was written."""
        return list(dict.fromkeys(file for source in self._sources for file in source.files))

    @property
    def _unchecked(self) -> list[StoreFile]:
        return list(dict.fromkeys(file for source in self._sources for file in source.unchecked))

    @property
    def paths(self) -> list[str]:
        """Paths of the files, each once."""
        return list(dict.fromkeys(file.path for file in self._unchecked))

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows of the (first) underlying store, in order: int64, shape (n,)."""
        rows = self._sources[0].rows
        return np.arange(len(self)) if rows is None else rows

    def _text(self, name: str) -> np.ndarray:
        return format.decode_table(self._sources[0].table(name))

    @cached_property
    def ids(self) -> np.ndarray:
        """Ids of the images: array of str, shape (n,)."""
        return self._text("ids")

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels: array of str, shape (n,); ``""`` = none."""
        return self._text("labels")

    @cached_property
    def groups(self) -> np.ndarray | None:
        """Groups: array of str, shape (n,), or None."""
        return self._text("groups") if self._sources[0].has("groups") else None

    @cached_property
    def splits(self) -> np.ndarray | None:
        """Names of predefined splits: array of str, shape (n,), or None."""
        return self._text("splits") if self._sources[0].has("splits") else None

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """Columns of text, (n,): ``ids`` and ``labels``, and those that the file has."""
        known = {"ids", "labels"}.union(*(file.tables for file in self._sources[0].files))
        return {name: self._text(name) for name in sorted(known)}

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Further columns that ``--keep-columns`` keeps: arrays of str, shape (n,), by name."""
        found: dict[str, np.ndarray] = {}
        for part in self.parts[::-1]:  # of several, the first that has it
            found |= kept_columns(part.tables)
        return found

    @cached_property
    def classes(self) -> list[str]:
        """Distinct labels in their order, that of numbers where all are numbers; ``""`` is none."""
        return in_order(self._label_counts.keys() - {""})

    @property
    def _class_counts(self) -> dict[str, int]:
        """Images of each label, those without one first."""
        return {k: self._label_counts[k] for k in ("", *self.classes) if k in self._label_counts}

    @cached_property
    def _label_counts(self) -> Counter[str]:
        return format.counts(self._sources[0].table("labels"))

    @cached_property
    def _entries(self) -> np.ndarray:
        """The rows of /rows."""
        return self._sources[0].table("rows")

    @property
    def sha256(self) -> np.ndarray:
        """SHA-256 of each image's file: uint8, shape (n, 32)."""
        return np.ascontiguousarray(self._entries["sha256"])

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each image's file: int64, shape (n,); -1 = unknown."""
        return np.ascontiguousarray(self._entries["size"])

    @property
    def stamps(self) -> np.ndarray:
        """Number that changes with each file's times and inode: int64, (n,); -1 = unknown."""
        return np.ascontiguousarray(self._entries["stamp"])

    @cached_property
    def taps(self) -> dict[str, TapInfo]:
        """Shape and type of each tap, in the order of the columns."""
        found = {}
        for name, (source, tap) in self._columns.items():
            dataset = source.files[0].features[tap]
            found[name] = TapInfo(dataset.shape[1:], dataset.dtype, source.fingerprint.views)
        return found

    @property
    def views(self) -> int:
        """Views of each image; 1 means that arrays have no axis of views.

        Raises
        ------
        StoreError
            Joined stores have different numbers of views.
        """
        views = {source.fingerprint.views for source in self._sources}
        if len(views) > 1:
            raise StoreError(
                f"The joined stores hold different numbers of views: {sorted(views)}. Extract "
                "them with the same --views."
            )
        return views.pop()

    @property
    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """The fingerprints of the joined stores."""
        return tuple(source.fingerprint for source in self._sources)

    @property
    def fingerprint(self) -> Fingerprint:
        """The fingerprint of the features.

        Raises
        ------
        StoreError
            Several stores are joined: use `fingerprints`.
        """
        if len(self._sources) > 1:
            raise StoreError("This is a join of several stores: it has several fingerprints.")
        return self._sources[0].fingerprint

    @cached_property
    def failures(self) -> list[Failure]:
        """Images that were asked for and have no features."""
        found: dict[str, Failure] = {}
        for file in self.checked_files():
            for failure in file.failures():
                found.setdefault(failure.id, failure)
        return list(found.values())

    @cached_property
    def meta(self) -> dict[str, Any]:
        """JSON values under /meta of the first file: versions, settings, run, ..."""
        return self._sources[0].files[0].all_meta

    @cached_property
    def canaries(self) -> Canaries | None:
        """Test images and their features of the (first) file; None if there are none."""
        return self._sources[0].files[0].canaries

    @property
    def parts(self) -> tuple[FeatureStore, ...]:
        """The stores that are joined here, each with the rows of this one."""
        return tuple(FeatureStore([source]) for source in self._sources)

    @cached_property
    def digest(self) -> str:
        """Digest of the (first) file's tables, 64 hexadecimal digits: another for other rows."""
        return self._sources[0].files[0].read("digest").tobytes().hex()

    def describe(self) -> dict[str, Any]:
        """Return what the store holds, as JSON values."""
        return {
            "paths": self.paths,
            "bytes": self._bytes,
            "images": len(self),
            "classes": self._class_counts,
            "groups": 0 if self.groups is None else len(np.unique(self.groups)),
            "splits": [] if self.splits is None else np.unique(self.splits).tolist(),
            "columns": {name: len(np.unique(x)) for name, x in self.columns.items()},
            "taps": {
                name: {"shape": list(tap.shape), "dtype": str(tap.dtype), "views": tap.views}
                for name, tap in self.taps.items()
            },
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
            "fingerprints": [f.to_dict() for f in self.fingerprints],
            "versions": self.meta.get("versions"),
            "run": self.meta.get("run"),
        }

    def _facts(self) -> list[tuple[str, str]]:
        """Return what people want to know, each under its name."""
        classes = [f"{name or '(no label)'} {k:,}" for name, k in self._class_counts.items()]
        facts = [("classes", first_names(classes))]
        for name, values in self.columns.items():
            counts = Counter(values.tolist()).most_common()
            shown = first_names([f"{value or '(none)'} {k:,}" for value, k in counts], 5)
            facts.append(("column", f"{name}: {counted(len(counts), 'value')} ({shown})"))
        facts += [("tap", f"{name}  {tap.shape} {tap.dtype}") for name, tap in self.taps.items()]
        for one in self.fingerprints:
            facts += [("backbone", one.title), *(("weights", note) for note in one.notes)]
        if self.failures:
            first = self.failures[0]
            reason = f"{first.id}: {first.stage}: {first.reason}"
            facts.append(("failures", f"{len(self.failures):,} (first: {reason})"))
        return facts

    @property
    def _bytes(self) -> int:
        return sum(Path(path).stat().st_size for path in self.paths)

    def _title(self) -> str:
        paths = printable(", ".join(self.paths))
        return f"{paths}: {counted(len(self), 'image')}, {self._bytes / 1e6:,.1f} MB"

    def to_text(self) -> str:
        """Return what the store holds, for people."""
        return "\n".join([self._title(), *(f"{name:9} {text}" for name, text in self._facts())])

    def _repr_html_(self) -> str:
        return html_table([self._title(), ""], self._facts())

    # --- choosing rows --------------------------------------------------------------------------

    def select(self, indices: Sequence[int] | np.ndarray) -> FeatureStore:
        """Return a store of some rows, in the order given; no features are read.

        Parameters
        ----------
        indices : array of int, shape (m,), or of bool, shape (n,)
            Rows of this store, negative ones counted from its end; or a mask.

        Raises
        ------
        IndexError
            Neither, another length, or a row that is not there.
        """
        chosen, n = np.asarray(indices), len(self)
        if chosen.dtype == object and all(isinstance(one, bool | np.bool_) for one in chosen.flat):
            chosen = chosen.astype(bool)  # a mask of pandas
        if chosen.dtype == bool and chosen.shape == (n,):
            chosen = np.flatnonzero(chosen)
        rows = chosen.astype(np.int64) if chosen.dtype.kind in "iu" or not chosen.size else None
        if rows is None or rows.ndim != 1 or ((rows < -n) | (rows >= n)).any():
            raise IndexError(
                f"Expected integers from {-n} to {n - 1}, or a mask of {n} booleans, got "
                f"{chosen.dtype} {chosen.shape}: {chosen.flat[:5].tolist()}"
            )
        chosen = np.where(rows < 0, rows + n, rows)
        return FeatureStore([source.select(chosen) for source in self._sources])

    def split(
        self,
        test_size: float | None = 0.25,
        *,
        stratify: bool = True,
        group: bool = False,
        random_state: int = 0,
    ) -> tuple[FeatureStore, FeatureStore]:
        """Return (fit, test): two stores without an image, a group or a content in common.

        Parameters
        ----------
        test_size : float, optional
            Share of the test part; None = the split column decides: ``test`` against the rest.
        stratify : bool
            Keep the classes' shares.
        group : bool
            Keep the images of one group on one side; a split column that does not is refused.
        random_state : int
            Seed.

        Raises
        ------
        TrainingError
            No labels, no groups, no such split column or one that groups cross, or too few images
            of a class.
        """
        from featcache.store import splitting

        if group and self.groups is None:
            raise TrainingError(
                f"{', '.join(self.paths)} has no groups. Extract with --group-column (nothing is "
                "computed again)."
            )
        if test_size is None:
            if self.splits is None:
                raise TrainingError(
                    f"{self.paths[0]} has no split column. Run `featcache extract` with "
                    "--split-column, or give a test size."
                )
            fit, test = splitting.predefined(self.splits, self.labels, sha256=self.sha256)
            if group and self.groups is not None:
                mine = self.groups[fit]
                if (shared := splitting.crossing(mine, self.groups[test])).any():
                    cure = "store.split(None), then drop_crossing_groups=True"
                    raise splitting.crossing_error(mine[shared], "the held-out images", cure)
        else:
            fit, test = splitting.holdout(
                self.labels,
                groups=self.groups if group else None,
                sha256=self.sha256,
                test_size=test_size,
                stratify=stratify,
                random_state=random_state,
            )
        return self.select(fit), self.select(test)

    # --- reading features -----------------------------------------------------------------------

    def load(
        self, tap: str | None = None, *, dtype: str | None = "float32"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return one tap's features and the labels.

        Parameters
        ----------
        tap : str, optional
            A name in `taps`, in any unambiguous spelling (``"avgpool"``, ``"layer2:mean"``). None =
            the only one.
        dtype : {"float32", "float16", None}
            Type of X; None = as stored.

        Returns
        -------
        X : ndarray, shape (n, d), (n, c, h, w), or (n, views, ...)
            Mapped from the file, copy-on-write, if it is one run of rows in the type stored,
            otherwise read. Writing to it never changes the file. Rows are read once for their
            checksums, at 2 to 5 GB/s; a selection that is needed alone is loaded alone:
            ``store.select(rows).load()``.
        y : ndarray of str, shape (n,)
            ``""`` = no label.

        Raises
        ------
        MissingFeatures
            No such tap; near names are given.
        CorruptStore
            Features or tables are not what was written; the message names rows and what to type.
        """
        name = self._resolve(tap)
        wanted = self.taps[name].dtype if dtype is None else np.dtype(dtype)
        return self._array(name, wanted), self.labels

    def _resolve(self, tap: str | None) -> str:
        """Return the full name of a tap."""
        names = list(self.taps)
        if tap is None:
            if len(names) > 1:
                raise MissingFeatures(
                    f"{self.paths[0]} holds several taps: name one of {', '.join(names)}."
                )
            return names[0]
        if tap in names:
            return tap
        found = self._spelled(tap)
        if len(found) == 1:
            return found[0]
        near = found or get_close_matches(tap, names, cutoff=0.3) or names
        raise MissingFeatures(
            f"{', '.join(self.paths)} holds no features {tap!r}. Did you mean "
            f"{' or '.join(repr(name) for name in near)}? To add a layer, run `featcache extract` "
            f"with --layer {tap} into another file."
        )

    def _spelled(self, text: str) -> list[str]:
        """Return the full names that a spelling of a tap may mean, ``BACKBONE/`` before it or not.

        As it was typed for the extraction, it means what it meant there: ``layer4`` the default
        reduction, ``avgpool:mean`` the only number of each channel.
        """
        typed, fitting = [], []
        for name, (source, tap) in self._columns.items():
            asked = Tap.parse(text.removeprefix(name.removesuffix(tap)))
            taps = source.fingerprint.taps
            request = (source.files[0].meta("request") or {}).get("taps") or ()
            given = dict(zip(taps, request, strict=True)) if len(request) == len(taps) else {}
            if tap in given and Tap.parse(given[tap]) == asked:
                typed.append(name)
            elif asked.fits(tap):
                fitting.append(name)
        outputs = [name for name in fitting if ":output:" in name]
        return typed or outputs or fitting

    def _array(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        """Return one tap's rows in a type: mapped from the file if possible."""
        mapped = self._mapped(name)
        if mapped is not None and mapped.dtype == dtype:
            source, tap = self._columns[name]
            step = max(1, _PIECE_BYTES // max(mapped[0].nbytes, 1))
            for start in range(0, len(mapped), step):
                source.check(tap, start, mapped[start : start + step])
            return mapped
        out = np.empty((len(self), *self.taps[name].shape), dtype)
        self._read(name, slice(0, len(self)), out)
        return out

    def _mapped(self, name: str) -> np.ndarray | None:
        """Return the rows mapped from the file, None if they are not one run in one file."""
        source, tap = self._columns[name]
        if len(self) == 0:
            return None
        first = 0 if source.rows is None else int(source.rows[0])
        if source.rows is not None and (np.diff(source.rows) != 1).any():
            return None
        file, dataset, row = source.locate(tap, first)
        if row + len(self) > file.n or dataset.nbytes == 0:
            return None
        with Path(file.path).open("rb") as handle:
            if not disk.is_at(file.descriptor, file.path):
                return None  # replaced meanwhile; what we opened is still there to be read
            return np.memmap(
                handle,
                dataset.dtype,
                mode="c",
                offset=dataset.offset + row * dataset.row_bytes,
                shape=(len(self), *dataset.shape[1:]),
            )

    def _read(self, name: str, part: slice, out: np.ndarray, checked: bool = True) -> None:
        """Fill `out` with the rows `part` of this store, converted to its type.

        In pieces that stay in the processor's cache, through one small buffer: new memory for each
        block would cost more in page faults than the reading.
        """
        source, tap = self._columns[name]
        stored, shape = self.taps[name].dtype, self.taps[name].shape
        direct = out.dtype == stored and out.flags.c_contiguous
        step = max(1, _PIECE_BYTES // max(math.prod(shape) * stored.itemsize, 1))
        buffer = np.empty((0 if direct else min(step, len(out)), *shape), stored)
        for start in range(part.start, part.stop, step):
            stop = min(start + step, part.stop)
            target = out[start - part.start : stop - part.start]
            piece = target if direct else buffer[: stop - start]
            source.fetch(tap, start, piece)
            if checked:
                source.check(tap, start, piece)
            if not direct:
                convert(piece.reshape(target.shape), target)

    def resolve(self, layers: str | Sequence[str] | None) -> list[str]:
        """Return the full names of taps, given as for `load`; none: of all.

        Raises
        ------
        MissingFeatures
            No such tap; near names are given.
        """
        if not layers:
            return list(self.taps)
        return [self._resolve(tap) for tap in ([layers] if isinstance(layers, str) else layers)]

    def width(self, layers: str | Sequence[str] | None = None) -> int:
        """Return the number of columns of `matrix`."""
        return sum(self.taps[name].width for name in self.resolve(layers))

    def matrix(
        self, layers: str | Sequence[str] | None = None, dtype: str = "float32"
    ) -> np.ndarray:
        """Return the features of several taps side by side, maps flattened.

        Parameters
        ----------
        layers : str or list of str, optional
            Taps; None = all, in order.
        dtype : str
            Type of the result.

        Returns
        -------
        ndarray, shape (n, d) or (n, views, d)
            d is the sum of the taps' widths. Mapped if one tap is asked for in its own type.
        """
        names = self.resolve(layers)
        if len(names) == 1:
            shape = (*self._head(len(self)), self.width(names))
            return self._array(names[0], np.dtype(dtype)).reshape(shape)
        out = np.empty((*self._head(len(self)), self.width(names)), dtype)
        self._read_block(names, slice(0, len(self)), out)
        return out

    def _head(self, rows: int) -> tuple[int, ...]:
        """Return the axes before the features'."""
        return (rows, self.views) if self.views > 1 else (rows,)

    def blocks(
        self,
        layers: str | Sequence[str] | None = None,
        rows: int | None = None,
        *,
        out: np.ndarray | None = None,
        dtype: str | None = "float32",
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows of `matrix` block by block, in the order of the disk.

        Parameters
        ----------
        layers : str or list of str, optional
            Taps; None = all.
        rows : int, optional
            Rows of a block; None = what fits in 64 MiB, at most 8,192.
        out : ndarray, shape (rows, [views,] d), optional
            Memory to use again for each block, which is then valid until the next one: saves the
            page faults of new memory, several times the time of reading.
        dtype : {"float32", "float16", None}
            Type of a block without `out`. None = as the first tap is stored.

        Yields
        ------
        part : slice
            Rows of this store.
        block : ndarray, shape (m, d) or (m, views, d)
        """
        names = self.resolve(layers)
        width = self.width(names)
        kind = self.taps[names[0]].dtype if dtype is None else np.dtype(dtype)
        bytes_of_row = kind.itemsize * math.prod(self._head(1)) * width
        step = rows or max(1, min(8192, _BLOCK_BYTES // max(bytes_of_row, 1)))
        step = step if out is None else len(out)
        for start in range(0, len(self), step):
            part = slice(start, min(start + step, len(self)))
            count = part.stop - part.start
            block = np.empty((*self._head(count), width), kind) if out is None else out[:count]
            self._read_block(names, part, block)
            yield part, block

    def _read_block(
        self, names: Sequence[str], part: slice, out: np.ndarray, checked: bool = True
    ) -> None:
        """Fill `out` ([m, [views,] d]) with taps side by side."""
        column = 0
        for name in names:
            width = self.taps[name].width
            self._read(name, part, out[..., column : column + width], checked)
            column += width

    def to_pandas(self, layers: str | Sequence[str] | None = None) -> Any:
        """Return a table with a row an image, for pandas and seaborn.

        Parameters
        ----------
        layers : str or list of str, optional
            Taps; None = all.

        Returns
        -------
        pandas.DataFrame, shape (n, 2 + d)
            Ids as index; ``label``, ``group``, ``split`` and kept columns as far as the store has
            them (categories), then the features of each tap, float32, as ``TAP[0]``, ``TAP[1]``,
            ... A row a view where views are stored, numbered in the column ``view``.

        Raises
        ------
        MissingExtra
            pandas is not installed.

        Examples
        --------
        >>> import featcache as fc
        >>> images = fc.ImageSet.open("flowers").select([0, 1, 40])
        >>> store = fc.extract(images, fc.Backbone("resnet18", weights=None), "three.h5")
        >>> store.to_pandas().iloc[:, :2].round(3)
                           label  avgpool:output:flatten[0]
        id
        dahlia/00.jpg     dahlia                        ...
        dahlia/01.jpg     dahlia                        ...
        palace/00.jpg     palace                        ...
        """
        from featcache.store.export import to_pandas

        return to_pandas(self, layers)

    def nearest(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        *,
        layers: str | Sequence[str] | None = None,
        exclude: npt.ArrayLike | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Find the rows whose features have the largest cosine with each query: exact, in one pass.

        The pass takes the memory of one small block, and does not compare rows with their
        checksums; `verify` does. Views are averaged, and several taps stand side by side.

        Parameters
        ----------
        queries : array of int, shape (q,), or of float, shape (q, d) or (q, views, d)
            Rows of this store, which are not listed among their own neighbours, or features as
            `matrix` gives them.
        k : int
            Neighbours, at most as many as there are.
        layers : str or list of str, optional
            Taps; None = all.
        exclude : array of int, shape (q,), optional
            For each query of features a row that is not listed, such as its own; -1 = none.

        Returns
        -------
        cosines : ndarray of float32, shape (q, k)
            Falling.
        rows : ndarray of int64, shape (q, k)

        Raises
        ------
        MissingFeatures
            No such tap; near names are given.
        IndexError
            A row that is not there.
        ValueError
            Queries of another shape, or with numbers that are not finite; `k` below 1.

        Examples
        --------
        >>> import featcache as fc
        >>> images = fc.ImageSet.open("flowers").select([0, 1, 2, 40, 41])
        >>> store = fc.extract(images, fc.Backbone("resnet18", weights=None), "five.h5")
        >>> cosines, rows = store.nearest([0], k=3)  # by row
        >>> store.ids[rows].shape
        (1, 3)
        >>> X = store.matrix()[3:]
        >>> store.nearest(X, k=1)[1]  # by features: each is its own nearest
        array([[3],
               [4]])
        """
        names, asked = self.resolve(layers), np.asarray(queries)
        if asked.dtype.kind in "iu" and asked.ndim == 1:
            exclude, asked = asked % max(len(self), 1), self.select(asked).matrix(names)
        asked = _one_view(asked.astype(np.float32))
        if k < 1 or asked.shape[1:] != (self.width(names),) or not np.isfinite(asked).all():
            raise ValueError(
                f"Expected rows (q,) or finite features (q, {self.width(names)}), and k from 1 on; "
                f"got {np.shape(queries)} and {k}."
            )
        shape = (*self._head(1)[1:], self.width(names))
        most = _PIECE_BYTES * min(8, len(asked))  # for one query, a piece stays in the cache
        size = max(1, min(len(self), most // (4 * math.prod(shape))))
        piece = np.empty((size, *shape), np.float32)

        def pieces() -> Iterator[np.ndarray]:
            for start in range(0, len(self), size):
                block = piece[: len(self) - start]
                self._read_block(names, slice(start, start + len(block)), block, checked=False)
                yield _one_view(block)

        if exclude is None:
            return nearest(unit(asked), pieces(), min(k, len(self)))
        found = nearest(unit(asked), pieces(), min(k + 1, len(self)))
        return without(*found, np.asarray(exclude))

    def stored_rows(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Return features as stored, and which rows match their checksums.

        Returns
        -------
        features : dict of str to ndarray, shape (n, ...)
            Features by tap, in the type stored.
        intact : ndarray of bool, shape (n,)
        """
        entries = self._entries
        intact = entries["status"] == DONE
        crcs = checksums.entry_crcs(entries, self._sources[0].table("ids"))
        intact &= crcs == entries["entry_crc"]
        seeds = checksums.row_seeds(entries["sha256"])
        found = {}
        for k, (name, info) in enumerate(self.taps.items()):
            found[name] = np.empty((len(self), *info.shape), info.dtype)
            source, tap = self._columns[name]
            source.fetch(tap, 0, found[name])
            sums = np.array(checksums.row_checksums(found[name], seeds), np.uint32)
            intact &= sums == entries["crc32"][:, k]
        return found, intact

    def verify(self) -> VerifyReport:
        """Read everything and compare it with its checksums.

        Finds flipped bits, torn, lost and swapped writes, in features and tables.
        """
        return checksums.verify(self._unchecked)


def _one_view(X: np.ndarray) -> np.ndarray:
    """Return the mean of the views, if there are any: (n, views, d) -> (n, d)."""
    return X.mean(axis=1) if X.ndim == 3 else X


def _open_finished(path: str) -> StoreFile:
    """Open a finished file; the error says what is missing and what to type."""
    final = path.removesuffix(".partial")
    partial = Path(f"{final}.partial")
    try:
        file = StoreFile(path)
    except MissingStore as error:
        if path != final and Path(final).exists():
            raise MissingStore(f"There is no {path}: {final} is there, and finished.") from error
        if not (partial.exists() or Path(f"{partial}.plan").exists()):
            raise MissingStore(
                f"There is no feature file {printable(final)}. Make it with: "
                f"{typed('featcache extract IMAGES -o', final)}"
            ) from error
        raise _incomplete(final, partial) from error
    if not file.finished and path != final:
        raise _incomplete(final, partial)
    if not file.finished:
        raise IncompleteStore(
            f"{path} was never finished: it was renamed from a .partial file. Rename it to "
            f"{partial} and run `featcache extract` again."
        )
    if file.left_open:
        file.check_tables()
    return file


def _incomplete(path: str, partial: Path) -> IncompleteStore:
    """Return the error for a store that a run has not finished."""
    command = f"{typed('featcache extract IMAGES -o', path)} ..."
    try:
        file = StoreFile(str(partial))
        done = int(np.count_nonzero(file.read("rows")["status"] == DONE))
        command = file.meta("command") or command
        state = f"{done:,} of {file.n:,} images are done in {partial}"
    except MissingStore:
        state = "it is computed in parts, which are kept beside it"
    except StoreError as error:
        state = str(error)
    return IncompleteStore(
        f"The run that writes {path} is not finished: {state}. To resume, run the same command "
        f"again: {command}"
    )


def _check_disjoint(files: Sequence[StoreFile]) -> None:
    """Refuse files that share an image."""
    ids = np.concatenate([file.read("ids") for file in files])
    values, counts = np.unique(ids, return_counts=True)
    twice = values[counts > 1]
    if len(twice):
        raise StoreError(
            f"{counted(len(twice), 'image is', 'images are')} in more than one of "
            f"{', '.join(f.path for f in files)} (first: {twice[0].decode()}). "
            "To put features of the same images side by side, use FeatureStore.join."
        )


def _align_rows(first: FeatureStore, other: FeatureStore) -> np.ndarray:
    """Return the rows of `other` that hold the images of `first`, in its order."""
    mine, theirs = first.ids, other.ids
    rows = np.arange(len(mine)) if np.array_equal(mine, theirs) else _rows_of(first, other)
    changed = np.flatnonzero((first.sha256 != other.sha256[rows]).any(axis=1))
    if len(changed):
        raise StoreError(
            f"{counted(len(changed), 'image')} changed between {', '.join(first.paths)} and "
            f"{', '.join(other.paths)} (first: {mine[changed[0]]}). Run `featcache extract` again "
            "for both."
        )
    labels = other.labels[rows]
    differ = np.flatnonzero((first.labels != labels) & (labels != ""))
    if len(differ):
        k = differ[0]
        was, now = str(first.labels[k]), str(labels[k])
        raise StoreError(
            f"{counted(len(differ), 'image is', 'images are')} labelled differently in "
            f"{', '.join(first.paths)} and {', '.join(other.paths)} "
            f"(first: {mine[k]}: {was!r}, {now!r}). "
            "Run `featcache extract` again for both; only the labels are rewritten."
        )
    return rows


def _rows_of(first: FeatureStore, other: FeatureStore) -> np.ndarray:
    """Return the rows of `other` with the ids of `first`, or raise with those that are missing."""
    mine, theirs = first.ids, other.ids
    for a, b, here, there in ((mine, theirs, first, other), (theirs, mine, other, first)):
        missing = np.setdiff1d(a, b)
        if len(missing):
            names = ", ".join(missing[:5].tolist())
            raise MissingFeatures(
                f"{len(missing)} of {len(a)} images of {', '.join(here.paths)} have no features "
                f"in {', '.join(there.paths)} (first: {names}). Extract both from the same images."
            )
    rows = np.empty(len(mine), np.int64)
    rows[np.argsort(mine)] = np.argsort(theirs)
    return rows


def _disambiguate_names(sources: Sequence[FileGroup]) -> None:
    """Name stores of the same backbone by their digests, whatever their order."""
    names = [source.fingerprint.backbone for source in sources]
    for source, name in zip(sources, names, strict=True):
        twice = names.count(name) > 1
        source.name = f"{name}@{source.fingerprint.digest[:8]}" if twice else name
    if len({source.name for source in sources}) < len(sources):
        raise StoreError("The same features were given twice to join.")
