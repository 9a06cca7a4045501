"""Row-wise treatments of features that come before a head.

They learn nothing, so they cannot leak from one fold into another, and are applied to blocks as
they are read. What does learn (scaling, PCA) is fitted inside each fold.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer
from sklearn.utils.validation import validate_data

from featcache.heads.rows import Transform


class SignedPower(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Raise the absolute values to a power and keep the signs.

    The square root tames the long tail of pooled ReLU features (Perronnin, Sanchez and Mensink,
    Improving the Fisher kernel, 2010).

    Parameters
    ----------
    exponent : float
        The power.
    """

    def __init__(self, exponent: float = 0.5) -> None:
        self.exponent = exponent

    def fit(self, X: np.ndarray, y: Any = None) -> SignedPower:
        """Check `X` and remember its width; nothing is learnt."""
        validate_data(self, X, dtype=[np.float64, np.float32])
        return self

    def transform(self, X: np.ndarray) -> np.ndarray:
        """Return ``sign(X) * abs(X) ** exponent``, in a new array."""
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return power(X, self.exponent)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        tags.requires_fit = False
        return tags


def power(X: np.ndarray, exponent: float = 0.5) -> np.ndarray:
    """Return ``sign(X) * abs(X) ** exponent`` in a new array of the same dtype."""
    size = np.abs(X)
    treated = np.sqrt(size, out=size) if exponent == 0.5 else np.power(size, exponent, out=size)
    signed: np.ndarray = np.copysign(treated, X, out=treated)
    return signed


def unit_norm(X: np.ndarray) -> np.ndarray:
    """Return rows of Euclidean length 1, in a new array; rows of zeros stay."""
    length = np.sqrt(np.einsum("ij,ij->i", X, X))[:, None]
    length[length == 0] = 1.0
    scaled: np.ndarray = X / length
    return scaled


TREATMENTS: dict[str, tuple[Any, Transform | None]] = {
    "standard": (None, None),
    "l2": (Normalizer, unit_norm),
    "power": (SignedPower, power),
}
"""Name of a treatment to the class of its pipeline step and the same thing as a function."""


def with_treatment(treatment: str, estimator: Any, name: str) -> Any:
    """Return a fitted estimator behind the step of its treatment, if that has one."""
    step = TREATMENTS[treatment][0]
    if step is None:
        return estimator
    fitted = step().fit(np.zeros((1, estimator.n_features_in_), dtype=np.float32))
    return Pipeline([("treatment", fitted), (name, estimator)])
