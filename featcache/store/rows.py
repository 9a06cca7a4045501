"""Reading rows of features from files: runs, selections, and conversion of types."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Sequence

import numpy as np

from featcache.store import disk
from featcache.store.layout import Dataset, StoreFile

# A gap that is cheaper to read than to seek over.
_GAP_BYTES = 1 << 16


class Source:
    """Rows of one fingerprint: files one after the other."""

    def __init__(self, files: Sequence[StoreFile], name: str) -> None:
        self.files = list(files)
        self.name = name
        self.fingerprint = files[0].fingerprint
        self.starts = np.cumsum([0, *(file.n for file in files)]).tolist()
        self._tables: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def table(self, name: str) -> np.ndarray | None:
        """Return a table of all files, None where no file has it; absent ones count as ``""``."""
        if not any(name in file.datasets for file in self.files):
            return None
        if name not in self._tables:
            parts = [
                file.read(name) if name in file.datasets else np.zeros(file.n, "S1")
                for file in self.files
            ]
            self._tables[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._tables[name]

    def locate(self, tap: str, row: int) -> tuple[StoreFile, Dataset, int]:
        """Return the file that holds a row, the dataset, and the row's number there."""
        k = bisect.bisect_right(self.starts, row) - 1
        return self.files[k], self.files[k].features[tap], row - self.starts[k]

    def fetch(self, tap: str, rows: slice | np.ndarray, out: np.ndarray) -> None:
        """Fill `out` (m, ...), in the type stored, with rows given as a run or as numbers."""
        if isinstance(rows, slice):
            self._fetch_run(tap, rows.start, out)
            return
        if (np.diff(rows) >= 0).all():
            self._fetch_ascending(tap, rows, out)
            return
        order = np.argsort(rows, kind="stable")
        ascending = np.empty_like(out)
        self._fetch_ascending(tap, rows[order], ascending)
        out[order] = ascending

    def _fetch_ascending(self, tap: str, rows: np.ndarray, out: np.ndarray) -> None:
        """Read rows with small gaps between them as one span, and pick them from it."""
        row_bytes = max(self.files[0].features[tap].row_bytes, 1)
        cuts = np.flatnonzero(np.diff(rows) > max(1, _GAP_BYTES // row_bytes)) + 1
        for start, stop in itertools.pairwise([0, *cuts.tolist(), len(rows)]):
            if start < stop:
                first, last = int(rows[start]), int(rows[stop - 1])
                if (np.diff(rows[start:stop]) == 1).all():
                    self._fetch_run(tap, first, out[start:stop])
                else:
                    span = np.empty((last - first + 1, *out.shape[1:]), out.dtype)
                    self._fetch_run(tap, first, span)
                    np.take(span, rows[start:stop] - first, axis=0, out=out[start:stop])

    def _fetch_run(self, tap: str, start: int, out: np.ndarray) -> None:
        """Read consecutive rows, across files."""
        done = 0
        while done < len(out):
            file, dataset, row = self.locate(tap, start + done)
            count = min(len(out) - done, file.n - row)
            part = out[done : done + count]
            if part.nbytes:
                offset = dataset.offset + row * dataset.row_bytes
                disk.pread_into(file.descriptor, disk.as_bytes(part), offset)
            done += count

    def advise(self, tap: str, start: int, stop: int) -> None:
        """Tell the system that these rows are wanted next, where it listens."""
        if hasattr(os, "posix_fadvise") and start < min(stop, len(self)):
            file, dataset, row = self.locate(tap, start)
            offset = dataset.offset + row * dataset.row_bytes
            length = (stop - start) * dataset.row_bytes
            os.posix_fadvise(file.descriptor, offset, length, os.POSIX_FADV_WILLNEED)


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
