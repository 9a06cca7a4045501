"""How probabilities are made of a head's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

# Scores that a calibration is fitted to: 8 MB; a part of them while its kinds are compared.
_CELLS = 1 << 20
_COMPARED_CELLS = 1 << 17
_PARTS = 5  # where the folds make none

Weights: TypeAlias = np.ndarray | None


@dataclass(frozen=True)
class Calibration:
    """Probabilities are ``softmax(logits / temperature + bias)``.

    The label is that of the highest of the `logits`, whatever the bias: class weights moved the
    decision on purpose, and the probabilities tell how often it is right. So the label's
    probability need not be the highest.

    Attributes
    ----------
    temperature : float
        As in Guo et al., On calibration of modern neural networks, 2017.
    bias : tuple of float
        One a class; all 0 where a temperature does as well.
    """

    temperature: float
    bias: tuple[float, ...]

    def proba(self, logits: np.ndarray) -> np.ndarray:
        """Return probabilities (n, k), float64, of scores (n, k)."""
        values: np.ndarray = softmax(self.scores(logits), axis=1)
        return values

    def losses(self, logits: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return -log(probability of the true class) of each row."""
        losses: np.ndarray = -log_softmax(self.scores(logits), axis=1)[np.arange(len(y)), y]
        return losses

    def scores(self, logits: np.ndarray) -> np.ndarray:
        """Return what the softmax makes probabilities of: (n, k), float64, of scores (n, k)."""
        return np.asarray(logits.astype(np.float64) / self.temperature + self.bias)


def fit_calibration(
    logits: np.ndarray,
    y: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    sample_weight: Weights = None,
) -> Calibration:
    """Fit a temperature, with a bias for each class where that is better on other rows.

    Both are fitted to the rows that all folds but one validate, and judged on those of that one:
    on the rows that it is fitted to, the larger model always wins. It is taken where it lowers the
    log loss by more than one standard error of the difference.

    Parameters
    ----------
    logits : ndarray of shape (n, k)
        Out-of-fold scores. Rows with NaN are left out.
    y : ndarray of shape (n,), int
        Column of the true class.
    folds : list of (train, valid)
        Row numbers. Where there is one fold, its rows are dealt in turn.
    sample_weight : ndarray of shape (n,), optional
        Weights of the rows.
    """
    part = np.arange(len(y)) % _PARTS
    for number, (_, valid) in enumerate(folds if len(folds) > 1 else ()):
        part[valid] = number
    some, gains = _known(logits, _COMPARED_CELLS), []
    near = [_fit(logits, y, sample_weight, some)] * 2
    near[1] = _fit(logits, y, sample_weight, some, biased=True, near=near[0])
    for number in np.unique(part[some]):
        others, own = some[part[some] != number], some[part[some] == number]
        plain, biased = (
            _fit(logits, y, sample_weight, others, bias, near[bias]).losses(logits[own], y[own])
            for bias in (False, True)
        )
        gains.append((plain - biased) * (1 if sample_weight is None else sample_weight[own]))
    gain = np.concatenate(gains) if gains else np.zeros(1)
    better = bool(gain.sum() > gain.std() * np.sqrt(len(gain)))
    return _fit(logits, y, sample_weight, _known(logits, _CELLS), better, near[better])


def fit_temperature(logits: np.ndarray, y: np.ndarray, sample_weight: Weights = None) -> float:
    """Return the temperature alone that minimises the log loss; see `fit_calibration`."""
    return _fit(logits, y, sample_weight, _known(logits, _CELLS)).temperature


def _fit(
    logits: np.ndarray,
    y: np.ndarray,
    weight: Weights,
    rows: np.ndarray,
    biased: bool = False,
    near: Calibration | None = None,
) -> Calibration:
    """Minimise the log loss on some rows, from what minimises that of nearly the same rows.

    As in Platt's method, one part in n + 2 of each target goes to the other classes: scores
    without a single mistake would otherwise call for a temperature of zero.

    The search is bounded in units of the scores' own spread: a strong penalty makes scores of any
    smallness, and they are as good as larger ones. Scores that are all the same get 1.
    """
    # A class a row: sums over few classes are slow in the other order.
    values = np.array(logits[rows].T, np.float64, order="C")  # (k, n)
    k, n = values.shape
    spread = float(values.std(axis=0).mean()) if n else 0.0
    if not spread > 0:
        return Calibration(1.0, (0.0,) * k)
    values /= spread
    other = 1 / ((n + 2) * (k - 1))
    own, cells = (n + 1) / (n + 2) - other, (y[rows], np.arange(n))
    share = np.ones(n) if weight is None else weight[rows]
    share = share / share.sum()
    free_bias = k if biased else 0

    def loss(free: np.ndarray) -> tuple[float, np.ndarray]:
        scores = values * free[0]
        if biased:
            scores += free[1:, None]
        scores -= scores.max(axis=0)
        fit = other * scores.sum(axis=0) + own * scores[cells]
        slope = np.exp(scores, out=scores)
        total = slope.sum(axis=0)
        slope /= total
        slope -= other
        slope[cells] -= own
        slope *= share
        # Not by the BLAS, whose threads would cost more than they sum.
        ends = np.append(np.einsum("ij,ij->", slope, values), slope.sum(axis=1)[:free_bias])
        return float(np.sum(share * (np.log(total) - fit))), ends

    bounds = [(np.exp(-7.0), np.exp(7.0)), *[(-50.0, 50.0)] * free_bias]
    first = (1.0, *[0.0] * k) if near is None else (spread / near.temperature, *near.bias)
    start = np.clip(first[: len(bounds)], *np.transpose(bounds))
    scale, *bias = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x.tolist()
    return Calibration(spread / scale, tuple(bias or [0.0] * k))


def _known(logits: np.ndarray, cells: int) -> np.ndarray:
    """Return rows without NaN, of many an evenly spread part."""
    known = np.flatnonzero(~np.isnan(logits).any(axis=1))
    return known[:: max(1, len(known) * logits.shape[1] // cells)]


def calibrated_loss(logits: np.ndarray, y: np.ndarray, sample_weight: Weights = None) -> float:
    """Return the log loss of scores at the temperature that fits them; see `fit_temperature`."""
    made = _fit(logits, y, sample_weight, _known(logits, _COMPARED_CELLS))
    known = _known(logits, logits.size)
    weight = None if sample_weight is None else sample_weight[known]
    return float(np.average(made.losses(logits[known], y[known]), weights=weight))
