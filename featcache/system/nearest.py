"""The one search for nearest rows: of a store, of the head `knn`, and of an audit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BLOCK = 4096  # rows of an array compared with a block of queries at a time
_QUERIES = 256
SHORTEST = 1e-15  # rows whose squares are not float32's rounding


def unit(X: Array) -> Array:
    """Return rows (n, d) scaled to length 1, those that are shorter than 1e-15 as they are."""
    scaled: Array = X / lengths_of(X)[:, None]
    return scaled


def lengths_of(X: Array) -> Array:
    """Return the lengths of rows (n, d) that are longer than 1e-15, and 1 for the others: (n,)."""
    length: Array = np.sqrt(np.einsum("ij,ij->i", X, X))
    length[length < SHORTEST] = 1.0
    return length


def nearest(queries: Array, references: Array | Iterable[Array], count: int) -> tuple[Array, Array]:
    """Find the references with the largest dot products with each query, in one pass over them.

    Memory is that of the result and one block.

    Parameters
    ----------
    queries : ndarray of shape (q, d)
        Rows of length 1, so that the products are cosines; float32 or float64.
    references : ndarray of shape (n, d), or iterable of ndarray of shape (m, d)
        Rows of length 1, or rows of any length block by block, which are scaled here.
    count : int
        How many, at most n.

    Returns
    -------
    similarities : ndarray of shape (q, count)
        Falling.
    indices : ndarray of shape (q, count), int64
        Rows of `references`.

    Examples
    --------
    >>> import numpy as np
    >>> corners = np.eye(3, dtype=np.float32)
    >>> nearest(unit(np.array([[2, 1, 0]], np.float32)), corners, 2)
    (array([[0.8944272, 0.4472136]], dtype=float32), array([[0, 1]]))
    """
    import torch

    best = torch.from_numpy(np.full((len(queries), count), -np.inf, queries.dtype))
    where = torch.zeros(best.shape, dtype=torch.int64)
    scaled = isinstance(references, np.ndarray)
    if isinstance(references, np.ndarray):
        starts = range(0, len(references), BLOCK)
        references = [references[start : start + BLOCK] for start in starts]
    row = 0
    for block in references:
        columns = block.astype(queries.dtype, copy=False).T  # (d, m)
        lengths = None if scaled else torch.from_numpy(lengths_of(block))
        indices = torch.arange(row, row + len(block))
        row += len(block)
        for start in range(0, len(queries), _QUERIES):
            part = slice(start, start + _QUERIES)
            values = torch.from_numpy(queries[part] @ columns)
            if lengths is not None:
                values /= lengths
            if (values.amax(dim=1) <= best[part, -1]).all():
                continue  # most blocks, where there are few queries
            found = torch.cat([best[part], values], dim=1).topk(count, dim=1)
            known = torch.cat([where[part], indices.expand(values.shape)], dim=1)
            best[part], where[part] = found.values, known.gather(1, found.indices)
    return best.numpy(), where.numpy()


def without(similarities: Array, indices: Array, own: Array) -> tuple[Array, Array]:
    """Take the row `own` (q,) out of what `nearest` found for each query: (q, k + 1) to (q, k).

    Where it was not found, which copies of it may cause, the last one goes; -1 is no row.
    """
    other = indices != np.asarray(own)[:, None]
    other[other.all(axis=1), -1] = False
    shape = len(indices), indices.shape[1] - 1
    return similarities[other].reshape(shape), indices[other].reshape(shape)
