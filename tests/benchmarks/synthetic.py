"""Features shaped like a pooled network's: the ReLU of a low-rank mixture, with labels.

A pooled ReLU layer gives non-negative, sparse, correlated columns of very different scale, whose
spectrum decays; classes differ along a few directions of it. So do these. `Images` and
`FINGERPRINT` are what a store wants to know of images and a network that there are not.
"""

from __future__ import annotations

import numpy as np

from featcache.fingerprint import Fingerprint

TAP = "avgpool:output:flatten"
FINGERPRINT = Fingerprint(
    source="torchvision",
    backbone="resnet50",
    weights="none",
    state_sha256="ab" * 32,
    taps=(TAP,),
    preprocessing={},
    store_dtype="float16",
)


class Images:
    """The tables of n images that a store keeps: names, and labels if there are classes."""

    def __init__(self, n: int, classes: int = 0) -> None:
        names = {"ids": [f"{i:08d}.jpg" for i in range(n)]}
        if classes:
            names["labels"] = [f"class {i % classes}" for i in range(n)]
        self.tables = {name: np.array(x, np.dtypes.StringDType()) for name, x in names.items()}


def features(
    n: int = 10_000,
    d: int = 2_048,
    classes: int = 10,
    *,
    rank: int = 256,
    separation: float | None = None,
    random_state: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return seeded features and labels.

    Parameters
    ----------
    n, d, classes : int
        Rows, columns, classes (equally frequent).
    rank : int
        Directions of the mixture.
    separation : float, optional
        Typical distance of two class centres in units of the spread within a class. The default
        makes the best accuracy fall between 0.7 and 0.9 for 10 and for 100 classes.
    random_state : int
        Seed.

    Returns
    -------
    X : ndarray of shape (n, d), float32
    y : ndarray of shape (n,), int64
    """
    rng = np.random.default_rng(random_state)
    if separation is None:
        separation = 1.7 + 1.2 * np.log(classes)
    spread = (1.0 + np.arange(rank)) ** -0.5  # the spectrum of a network's features decays
    centres = separation / np.sqrt(2 * rank) * rng.normal(size=(classes, rank)) * spread
    mixing = rng.normal(size=(rank, d)) / np.sqrt((spread**2).sum())
    bias = rng.normal(-0.5, 0.5, size=d)  # most units are silent most of the time
    scale = np.exp(rng.normal(-1.0, 0.7, size=d))
    y = rng.permutation(np.arange(n) % classes)
    X = np.empty((n, d), dtype=np.float32)
    for start in range(0, n, 8192):
        rows = slice(start, min(start + 8192, n))
        latent = centres[y[rows]] + rng.normal(size=(rows.stop - start, rank)) * spread
        hidden = latent @ mixing + 0.3 * rng.normal(size=(rows.stop - start, d)) + bias
        X[rows] = np.maximum(hidden, 0.0) * scale
    return X, y.astype(np.int64)
