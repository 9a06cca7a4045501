"""Class scores of any classifier, in the shape in which a search keeps them."""

from __future__ import annotations

from typing import Any

import numpy as np

from featcache.heads.base import FittedHead


def logits(estimator: Any, X: np.ndarray) -> np.ndarray:
    """Return scores (n, k), float32: decision values, or log-probabilities above 1e-4."""
    if isinstance(estimator, FittedHead):
        return estimator.logits(X)
    flat = X.reshape(-1, X.shape[-1])
    if hasattr(estimator, "decision_function"):
        values = np.asarray(estimator.decision_function(flat), dtype=np.float32)
        if values.ndim == 1:
            values = np.stack([-values / 2, values / 2], axis=1)
    else:
        proba = np.asarray(estimator.predict_proba(flat))
        values = np.log(np.maximum(proba, 1e-4)).astype(np.float32)
    mean: np.ndarray = values.reshape(len(X), -1, values.shape[1]).mean(axis=1)
    return mean
