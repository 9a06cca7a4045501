"""Two-dimensional maps of features, and features whose cosines mean something.

Nearness is the cosine after the mean of all features was taken off: features behind a ReLU all
point the same way, so that the plain cosine of two unrelated images is often over 0.9.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from featcache.errors import MissingExtra, TrainingError
from featcache.store.store import FeatureStore

__all__ = ["METHODS", "centred", "embed", "pooled"]

Method = Literal["pca", "tsne", "umap"]
METHODS: Mapping[Method, str] = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}

_FIRST = 50  # principal components that t-SNE and UMAP start from: the rest is mostly noise


def embed(
    features: FeatureStore | npt.NDArray[Any],
    method: Method = "pca",
    *,
    layers: str | Sequence[str] | None = None,
    random_state: int = 0,
) -> npt.NDArray[np.float32]:
    """Lay features out in the plane, so that near images lie near each other.

    Parameters
    ----------
    features : FeatureStore or ndarray of shape (n, d) or (n, views, d)
        Views are averaged, and of maps the positions.
    method : {"pca", "tsne", "umap"}
        ``pca``: the two directions of largest variance; instant, distances mean something.
        ``tsne`` (van der Maaten and Hinton, JMLR 9, 2008) and ``umap`` (McInnes, Healy and
        Melville, arXiv:1802.03426): neighbours stay neighbours, distances between clusters mean
        little. Both start from the first 50 principal components.
    layers : str or list of str, optional
        Taps of the store to use; None: all.
    random_state : int
        Seed: the same features give the same map on the same machine.

    Returns
    -------
    ndarray of float32, shape (n, 2)

    Raises
    ------
    MissingExtra
        ``umap`` is asked for and umap-learn is not installed.
    TrainingError
        There are fewer than three images.
    ValueError
        Unknown method.
    """
    from sklearn.decomposition import PCA

    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; {method!r} came.")
    X = _matrix(features, layers)
    if len(X) < 3:
        raise TrainingError(f"A map needs at least 3 images, {len(X)} came.")
    if not (np.ptp(X, axis=0) ** 2).any():  # one point, on which t-SNE and UMAP divide by zero
        return np.zeros((len(X), 2), dtype=np.float32)
    components = min(2 if method == "pca" else _FIRST, *X.shape)
    placed = PCA(components, svd_solver="randomized", random_state=random_state).fit_transform(X)
    if method == "tsne":
        placed = _tsne(placed, random_state)
    elif method == "umap":
        placed = _umap(placed, random_state)
    if placed.shape[1] < 2:  # one feature: a line
        placed = np.column_stack([placed, np.zeros(len(placed))])
    return np.ascontiguousarray(placed, dtype=np.float32)


def pooled(
    store: FeatureStore, layers: str | Sequence[str] | None = None
) -> npt.NDArray[np.float32]:
    """Return features of several taps side by side as `FeatureStore.matrix`, maps as channel means.

    Maps are read in blocks: what is in memory has a number for each channel, not each position.

    Returns
    -------
    ndarray of float32, shape (n, d) or (n, views, d)
    """
    names = store.resolve(layers)
    shapes = [store.taps[name].shape[store.views > 1 :] for name in names]  # (d,) or (c, h, w)
    if all(len(shape) == 1 for shape in shapes):
        return store.matrix(names)
    views = (store.views,) * (store.views > 1)
    X = np.empty((len(store), *views, sum(shape[0] for shape in shapes)), dtype=np.float32)
    column = 0
    for name, (channels, *_) in zip(names, shapes, strict=True):
        for part, block in store.blocks(name):
            # (m, [views,] c h w) -> (m, [views,] c)
            means = block.reshape(*block.shape[:-1], channels, -1).mean(axis=-1)
            X[part, ..., column : column + channels] = means
        column += channels
    return X


def _matrix(
    features: FeatureStore | npt.NDArray[Any], layers: str | Sequence[str] | None
) -> npt.NDArray[np.float32]:
    X = pooled(features, layers) if isinstance(features, FeatureStore) else np.asarray(features)
    if X.ndim == 3:
        X = X.mean(axis=1)
    if X.ndim != 2:
        raise ValueError(f"Features of shape (n, d) or (n, views, d) are needed, {X.shape} came.")
    return X.astype(np.float32, copy=False)


def _tsne(X: npt.NDArray[Any], random_state: int) -> npt.NDArray[Any]:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    perplexity = min(30.0, (len(X) - 1) / 3)
    # Its threads wait for each other a thousand times: on a busy machine, two took three times as
    # long as one.
    with threadpool_limits(1):
        placed: npt.NDArray[Any] = TSNE(
            2, perplexity=perplexity, init="pca", random_state=random_state
        ).fit_transform(X)
    return placed


def _umap(X: npt.NDArray[Any], random_state: int) -> npt.NDArray[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an absent tensorflow, and of numba's own plans
        try:
            import umap
        except ImportError as error:
            raise MissingExtra("umap-learn", "report", "A UMAP map") from error
        placed: npt.NDArray[Any] = umap.UMAP(
            n_neighbors=min(15, len(X) - 1),
            init="pca",
            n_jobs=1,  # what a seed makes of it anyway
            random_state=random_state,
        ).fit_transform(X)
    return placed


def centred(
    features: FeatureStore | npt.NDArray[Any], layers: str | Sequence[str] | None = None
) -> npt.NDArray[np.float32]:
    """Return features (n, d), views averaged, with the mean of all taken off.

    Where rows equal that mean they have no direction: a further column makes them near each other.
    """
    X = _matrix(features, layers)
    centred: npt.NDArray[np.float32] = X - X.mean(axis=0, dtype=np.float64).astype(np.float32)
    middle = ~centred.any(axis=1)
    return np.column_stack([centred, middle.astype(np.float32)]) if middle.any() else centred
