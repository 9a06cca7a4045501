"""The temperature that makes probabilities of a head's scores."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

# Scores that a temperature is fitted to: 8 MB.
_TEMPERATURE_CELLS = 1 << 20


def fit_temperature(
    logits: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None
) -> float:
    """Return the temperature T that minimises the log loss of ``softmax(logits / T)``.

    As in Platt's method, one part in n + 2 of each target goes to the other classes: scores
    without a single mistake would otherwise call for a temperature of zero.

    The search is bounded in units of the scores' own spread: a strong penalty makes scores of any
    smallness, and they are as good as larger ones. Scores that are all the same get 1.

    Parameters
    ----------
    logits : ndarray of shape (n, k)
        Out-of-fold scores. Rows with NaN are left out.
    y : ndarray of shape (n,), int
        Column of the true class.
    sample_weight : ndarray of shape (n,), optional
        Weights of the rows.
    """
    known = np.flatnonzero(~np.isnan(logits).any(axis=1))
    # One parameter needs no more than some thousand rows, spread evenly.
    known = known[:: max(1, len(known) * logits.shape[1] // _TEMPERATURE_CELLS)]
    values, truth = logits[known].astype(np.float64), y[known]
    spread = float(values.std(axis=1).mean()) if len(values) else 0.0
    if not spread > 0:
        return 1.0
    values /= spread
    weight = np.ones(len(truth)) if sample_weight is None else sample_weight[known]
    n, k = values.shape
    others = 1 / ((n + 2) * (k - 1))
    own = (n + 1) / (n + 2) - others

    def loss(log_temperature: float) -> float:
        logs = log_softmax(values / np.exp(log_temperature), axis=1)
        likelihood = own * logs[np.arange(n), truth] + others * logs.sum(axis=1)
        return -float(np.average(likelihood, weights=weight))

    found = minimize_scalar(loss, bounds=(-7.0, 7.0), method="bounded", options={"xatol": 1e-4})
    return spread * float(np.exp(found.x))


def calibrated_loss(
    logits: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None
) -> float:
    """Return the log loss of scores at the temperature that fits them; see `fit_temperature`."""
    known = ~np.isnan(logits).any(axis=1)
    values, truth = logits[known].astype(np.float64), y[known]
    weight = None if sample_weight is None else sample_weight[known]
    values /= fit_temperature(values, truth, weight)
    return -float(
        np.average(log_softmax(values, axis=1)[np.arange(len(truth)), truth], weights=weight)
    )
