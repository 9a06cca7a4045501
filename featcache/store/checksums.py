"""Checksums of rows, which find damage row by row and at the speed of memory; `verify`.

CRC-32, because every zlib has it, at 2 to 3 GB/s; SHA-256 would take three times as long to tell a
flipped bit no better. Where the package isal is installed (extra ``fast``), its CRC-32 of the same
values takes rows of 4 KB at 9 GB/s.
"""

from __future__ import annotations

import importlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from featcache.errors import CorruptStore
from featcache.store.disk import as_bytes, runs
from featcache.store.file import StoreFile
from featcache.store.format import DONE, FAILED, PENDING, feature_name

_CHECK_BYTES = 2 << 20


def _fastest_crc32() -> Callable[[bytes | memoryview, int], int]:
    try:
        crc32: Callable[[bytes | memoryview, int], int]
        crc32 = importlib.import_module("isal.isal_zlib").crc32
    except ImportError:
        return zlib.crc32
    return crc32


_crc32 = _fastest_crc32()


def row_seeds(sha256: np.ndarray) -> list[int]:
    """Return the CRC-32 of each row's content hash, the seed of its features' checksums."""
    data = as_bytes(np.ascontiguousarray(sha256))
    return [_crc32(data[i : i + 32], 0) for i in range(0, len(data), 32)]


def row_checksums(features: np.ndarray, seeds: Sequence[int]) -> list[int]:
    """Return the CRC-32 of each row of a contiguous array (k, ...), seeded."""
    data = as_bytes(features)
    size = len(data) // max(len(seeds), 1)
    crc32 = _crc32
    return [crc32(data[i * size : (i + 1) * size], seed) for i, seed in enumerate(seeds)]


def entry_crcs(entries: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return what the field ``entry_crc`` of rows must hold."""
    data = as_bytes(np.ascontiguousarray(entries))
    size = entries.dtype.itemsize
    body = entries.dtype.fields["entry_crc"][1]  # type: ignore[index]
    crc32 = _crc32
    crcs = (
        crc32(data[i * size : i * size + body], crc32(name, 0))
        for i, name in enumerate(ids.tolist())
    )
    return np.fromiter(crcs, np.uint32, count=len(entries))


def chunks(file: StoreFile, rows: int = 65_536) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first row, entries, ids) of chunks of rows: tables larger than memory are fine."""
    for start in range(0, file.n, rows):
        stop = min(start + rows, file.n)
        yield start, file.read("rows", start, stop), file.read("ids", start, stop)


def bad_features(
    file: StoreFile, first: int, entries: np.ndarray, seen: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return which rows fail the checksums of their features, by tap.

    Parameters
    ----------
    file : StoreFile
        The open file.
    first : int
        The first row.
    entries : ndarray, shape (k,)
        Rows of /rows from `first` on.
    seen : ndarray of bool, shape (k,), optional
        Rows to look at; the others are not read.

    Returns
    -------
    dict of str to ndarray of bool, shape (k,)
        True for features that are not those that were written.
    """
    rows = np.arange(len(entries)) if seen is None else np.flatnonzero(seen)
    seeds = np.array(row_seeds(entries["sha256"]), np.uint32)
    result = {tap: np.zeros(len(entries), bool) for tap in file.features}

    def check(job: tuple[int, str, int, int]) -> None:
        k, tap, start, stop = job
        block = file.read(feature_name(tap), first + start, first + stop)
        sums = np.array(row_checksums(block, seeds[start:stop].tolist()), np.uint32)
        result[tap][start:stop] = sums != entries["crc32"][start:stop, k]

    jobs = []
    for k, (tap, dataset) in enumerate(file.features.items()):
        step = max(1, _CHECK_BYTES // max(dataset.row_bytes, 1))
        for _, start, count in runs(rows):
            for begin in range(start, start + count, step):
                jobs.append((k, tap, begin, min(begin + step, start + count)))
    # Reading gives the interpreter to the other thread, and so does the CRC of long rows.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for _ in pool.map(check, jobs):
            pass
    return result


def row_status(file: StoreFile, *, features: bool = True) -> np.ndarray:
    """Return which rows are pending, done or failed, believing only checksums.

    Parameters
    ----------
    file : StoreFile
        The open file.
    features : bool
        Read the features too: what a power cut lost is found only there.

    Returns
    -------
    ndarray of uint8, shape (n,)
    """
    found = np.zeros(file.n, np.uint8)
    for first, entries, ids in chunks(file):
        status = entries["status"].copy()
        touched = np.flatnonzero(status != PENDING)
        crcs = entry_crcs(entries[touched], ids[touched])
        status[touched[crcs != entries["entry_crc"][touched]]] = PENDING
        status[status > FAILED] = PENDING
        if features and (status == DONE).any():
            for wrong in bad_features(file, first, entries, status == DONE).values():
                status[wrong] = PENDING
        found[first : first + len(entries)] = status
    return found


@dataclass(frozen=True)
class VerifyReport:
    """The result of `FeatureStore.verify`.

    Parameters
    ----------
    rows : int
        Rows read.
    bad_rows : list of str
        Ids of the rows whose features, hash, or entry are not what was written.
    problems : list of str
        Sentences for people; empty when all is well.
    notes : list of str
        What was not checked: datasets that a user added.
    """

    rows: int
    bad_rows: list[str]
    problems: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        return "\n".join((self.problems or [f"{self.rows:,} rows, all intact"]) + self.notes)


def verify(files: Sequence[StoreFile]) -> VerifyReport:
    """Compare features, rows and tables of finished files with their checksums."""
    rows, bad_rows, problems, notes = 0, [], [], []
    for file in files:
        rows += file.n
        try:
            file.check_tables()
        except CorruptStore as error:
            problems.append(f"{error}")
        if file.is_torn:
            problems.append(
                f"{file.path}: /meta/fingerprint, versions or datasets, or their copy or its hash, "
                "is damaged. The others agree, so that the file can be used. To write it again: "
                f"{file.again}"
            )
        if file.foreign:
            notes.append(
                f"{file.path} also holds what featcache did not write, and does not check: "
                f"{', '.join(file.foreign)}."
            )
        names: list[str] = []
        taps = dict.fromkeys(file.features, 0)
        for first, entries, ids in chunks(file):
            wrong = entry_crcs(entries, ids) != entries["entry_crc"]
            for tap, bad in bad_features(file, first, entries).items():
                taps[tap] += int(np.count_nonzero(bad))
                wrong |= bad
            names += [name.decode(errors="backslashreplace") for name in ids[wrong].tolist()]
        if names:
            counts = ", ".join(f"{tap}: {count}" for tap, count in taps.items() if count)
            named = f"first: {names[0]}; " if names[0] else ""
            problem = (
                f"{file.path}: {len(names)} of {file.n} rows are damaged "
                f"({named}{counts or 'their entries'})."
            )
            if not any(file.again in one for one in problems):
                problem += f" To compute only these again: {file.again}"
            problems.append(problem)
        bad_rows += names
    return VerifyReport(rows, bad_rows, problems, notes)
