"""Features that are read block by block because they do not fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Transform: TypeAlias = Callable[[np.ndarray], np.ndarray]

_ROWS = 8192  # read at a time


def working_dtype(X: np.ndarray) -> np.dtype[Any]:
    """Return what to compute in: float64 for float64, else float32."""
    return np.result_type(X.dtype, np.float32)


@dataclass(frozen=True)
class RowBlocks:
    """Rows of features that only exist as a sequence of blocks.

    Parameters
    ----------
    shape : tuple of int
        (n, d) or (n, views, d).
    read : callable
        ``read(rows)`` gives ``(slice, block)`` pairs, in order and without gaps; a block is
        float16 or float32, of shape (at most `rows`, ...).

    Examples
    --------
    ``RowBlocks((len(store), d), lambda rows: store.blocks(layers, rows))``
    """

    shape: tuple[int, ...]
    read: Callable[[int], Iterator[tuple[slice, np.ndarray]]]

    @classmethod
    def of(cls, X: np.ndarray) -> RowBlocks:
        """Return the blocks of an array, mapped or not."""

        def read(rows: int) -> Iterator[tuple[slice, np.ndarray]]:
            for start in range(0, len(X), rows):
                stop = min(start + rows, len(X))
                yield slice(start, stop), X[start:stop]

        return cls(tuple(X.shape), read)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def views(self) -> int:
        """Rows of each image."""
        return self.shape[1] if len(self.shape) == 3 else 1

    def blocks(self, rows: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (images, block of shape (images * views, d)) with about `rows` rows."""
        for images, block in self.read(max(1, rows // self.views)):
            flat = np.asarray(block).reshape(-1, self.shape[-1])
            yield images, flat.astype(working_dtype(flat), copy=False)

    def take(self, numbers: np.ndarray, transform: Transform | None = None) -> np.ndarray:
        """Return some rows, by ascending number, each block's transformed; reads all blocks once.

        Parameters
        ----------
        numbers : ndarray of shape (m,), int
            Row numbers; an image has `views` of them.
        transform : callable, optional
            Takes rows (r, d), gives (r, w).

        Returns
        -------
        ndarray of shape (m, d or w)
        """
        found: np.ndarray | None = None
        for images, block in self.blocks(_ROWS):
            part = self.rows_of(images)
            a, b = np.searchsorted(numbers, [part.start, part.stop])
            some = block[numbers[a:b] - part.start]
            if transform is not None:
                some = transform(some)
            if found is None:
                found = np.empty((len(numbers), some.shape[1]), dtype=some.dtype)
            found[a:b] = some
        assert found is not None, "no blocks"
        return found

    def rows_of(self, images: slice) -> slice:
        """Return the numbers of all rows of a slice of images."""
        return slice(images.start * self.views, images.stop * self.views)
