"""Columns of text for millions of rows: a few arrays instead of one Python object a row."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_BLOCK = 65536  # rows handled at once where a loop over rows would be slow or an index large


class Strings(Sequence[str]):
    """Text of many rows in two arrays: the UTF-8 bytes side by side, and where each row begins.

    Parameters
    ----------
    rows : iterable of str
        The text.
    """

    __slots__ = ("_bytes", "_starts")

    def __init__(self, rows: Iterable[str] = ()) -> None:
        self._bytes: NDArray[np.uint8]
        self._starts: NDArray[np.int64]
        self._bytes, self._starts = _joined(row.encode() for row in rows)

    @classmethod
    def from_utf8(cls, rows: Iterable[bytes]) -> Strings:
        """Make a column of rows that are encoded already."""
        return cls._of(*_joined(rows))

    @classmethod
    def _of(cls, text: NDArray[np.uint8], starts: NDArray[np.int64]) -> Strings:
        strings = cls.__new__(cls)
        strings._bytes, strings._starts = text, starts
        return strings

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Strings: ...
    def __getitem__(self, index: int | slice) -> str | Strings:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._bytes[self._starts[index] : self._starts[index + 1]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _BLOCK):  # blocks: far faster than one row at a time
            starts = self._starts[first : first + _BLOCK + 1]
            text = self._bytes[starts[0] : starts[-1]].tobytes()
            for a, b in itertools.pairwise((starts - starts[0]).tolist()):
                yield text[a:b].decode()

    def take(self, rows: ArrayLike) -> Strings:
        """Return these rows, in this order, as `Strings`."""
        rows = np.asarray(rows, np.int64)
        lengths = np.diff(self._starts)[rows]
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        text = np.empty(starts[-1], np.uint8)
        for first in range(0, len(rows), _BLOCK):  # blocks bound the size of the index below
            block = slice(first, first + _BLOCK)
            begin, end = starts[first], starts[min(first + _BLOCK, len(rows))]
            shift = self._starts[rows[block]] - starts[:-1][block]
            text[begin:end] = self._bytes[np.arange(begin, end) + np.repeat(shift, lengths[block])]
        return self._of(text, starts)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Strings):
            return np.array_equal(self._starts, other._starts) and np.array_equal(
                self._bytes, other._bytes
            )
        return list(self) == other if isinstance(other, list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(list(self), dtype=dtype or np.str_)

    def __repr__(self) -> str:
        return f"Strings({_few(self)})"


class Categories(Sequence[str]):
    """Text of many rows that repeats: an integer a row, and the distinct values.

    Parameters
    ----------
    rows : iterable of str
        The text.

    Attributes
    ----------
    codes : ndarray of int32
        For each row, the index of its value in `values`.
    values : list of str
        The distinct values, in the order of their first appearance.
    """

    __slots__ = ("codes", "values")

    def __init__(self, rows: Iterable[str] = ()) -> None:
        index: dict[str, int] = {}
        codes = array("i", (index.setdefault(row, len(index)) for row in rows))
        self.codes: NDArray[np.int32] = np.array(codes, np.int32)
        self.values = list(index)

    @classmethod
    def of(cls, codes: NDArray[np.int32], values: list[str]) -> Categories:
        """Make a column of codes and values that are known already."""
        column = cls.__new__(cls)
        column.codes, column.values = codes, values
        return column

    def __len__(self) -> int:
        return len(self.codes)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Categories: ...
    def __getitem__(self, index: int | slice) -> str | Categories:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        return self.values[int(self.codes[index])]

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _BLOCK):
            yield from map(self.values.__getitem__, self.codes[first : first + _BLOCK].tolist())

    def take(self, rows: ArrayLike) -> Categories:
        """Return these rows, in this order, as `Categories`."""
        return self.of(self.codes[np.asarray(rows, np.int64)], self.values)

    def distinct(self) -> list[str]:
        """Return the values that some row has, sorted."""
        return sorted(self.values[code] for code in np.unique(self.codes))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = np.array(self.values, dtype=dtype or np.str_)
        return values[self.codes] if len(self.values) else values

    def __repr__(self) -> str:
        return f"Categories({_few(self)})"


def _joined(rows: Iterable[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return rows side by side, and where each begins (and the last one ends)."""
    text, starts = bytearray(), array("q", [0])
    for row in rows:
        text += row
        starts.append(len(text))
    return np.frombuffer(bytes(text), np.uint8), np.array(starts, np.int64)


def _few(rows: Sequence[str]) -> str:
    shown = ", ".join(repr(row) for row in rows[:3])
    return f"[{shown}, ...] ({len(rows)} rows)" if len(rows) > 3 else f"[{shown}]"
