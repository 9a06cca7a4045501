"""Cross-validated choice of a head's hyper-parameters on given folds, and what it returns.

The folds come from outside (:mod:`featcache.store.splitting`), so that every head is compared on
the same ones. Everything that is learnt from features, scaling included, is learnt inside a fold.
The out-of-fold scores of the chosen hyper-parameters are kept: the leaderboard's intervals, the
calibration of probabilities and the audit all come from them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin

from featcache.errors import TrainingError
from featcache.heads.calibration import fit_temperature
from featcache.heads.rows import Folds, TrainingRows

Params: TypeAlias = Mapping[str, Any]
Scoring: TypeAlias = str | Callable[..., float]

# Probabilities are clipped here before the logarithm: a forest gives exact zeros.
_SMALLEST_PROBABILITY = 1e-4


@dataclass(frozen=True)
class Candidate:
    """One setting of the hyper-parameters and how it did.

    Attributes
    ----------
    params : mapping
        Name to value.
    fold_scores : tuple of float
        Score on each fold's validation rows, in the order of the folds.
    """

    params: Params
    fold_scores: tuple[float, ...]

    @property
    def score(self) -> float:
        """Mean over the folds."""
        return float(np.mean(self.fold_scores))


@dataclass(frozen=True)
class SearchResult:
    """What a head's search found.

    Attributes
    ----------
    head : str
        Name of the head.
    estimator : estimator
        Fitted on all rows with the chosen hyper-parameters; takes float32 (n, d).
    best : Candidate
        The chosen hyper-parameters with their scores.
    candidates : tuple of Candidate
        All that were tried, in order.
    classes : ndarray of shape (k,)
        Sorted class labels: the columns of `logits`.
    logits : ndarray of shape (n, k), float32
        Out-of-fold scores at the chosen hyper-parameters: decision values, or log-probabilities
        where the head has no decision values. NaN in rows that no fold validates.
    temperature : float
        ``softmax(logits / temperature)`` are calibrated probabilities (Guo et al., On calibration
        of modern neural networks, 2017), fitted on `logits`.
    search_seconds, fit_seconds : float
        Wall-clock seconds of the whole cross-validation, and of the last fit on all rows.
    notes : tuple of str
        What the user should be told, one sentence each.
    """

    head: str
    estimator: Any
    best: Candidate
    candidates: tuple[Candidate, ...]
    classes: np.ndarray
    logits: np.ndarray
    temperature: float
    search_seconds: float
    fit_seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def params(self) -> Params:
        """The chosen hyper-parameters."""
        return self.best.params

    @property
    def score(self) -> float:
        """Mean score of the chosen hyper-parameters over the folds."""
        return self.best.score

    @property
    def fold_scores(self) -> tuple[float, ...]:
        """Score of the chosen hyper-parameters on each fold."""
        return self.best.fold_scores

    def __repr__(self) -> str:
        chosen = ", ".join(f"{name}={value}" for name, value in self.params.items())
        return f"SearchResult({self.head}: {chosen}; score {self.score:.4f})"


def logits(estimator: Any, X: np.ndarray) -> np.ndarray:
    """Return an estimator's class scores, averaged over views.

    Parameters
    ----------
    estimator : fitted classifier
        With `decision_function` or `predict_proba`.
    X : ndarray of shape (n, d) or (n, views, d)
        Features.

    Returns
    -------
    ndarray of shape (n, k), float32
        Decision values, or log-probabilities. A binary decision value ``f`` becomes
        ``[-f/2, f/2]``, whose softmax is the logistic function of ``f``.
    """
    n = len(X)
    flat = X.reshape(-1, X.shape[-1])
    if hasattr(estimator, "decision_function"):
        values = np.asarray(estimator.decision_function(flat), dtype=np.float32)
        if values.ndim == 1:
            values = np.stack([-values / 2, values / 2], axis=1)
    else:
        proba = np.asarray(estimator.predict_proba(flat))
        values = np.log(np.maximum(proba, _SMALLEST_PROBABILITY)).astype(np.float32)
    mean: np.ndarray = values.reshape(n, -1, values.shape[1]).mean(axis=1)
    return mean


class _Scored(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Predictions that are known already, in the shape that scikit-learn's scorers want.

    "X" is an array of row numbers.
    """

    def __init__(self, logits: np.ndarray, classes: np.ndarray, codes: np.ndarray) -> None:
        self.logits = logits
        self.classes = classes
        self.codes = codes

    def __sklearn_is_fitted__(self) -> bool:
        return True

    @property
    def classes_(self) -> np.ndarray:
        return self.classes

    def predict(self, X: np.ndarray) -> np.ndarray:
        chosen: np.ndarray = self.classes[self.logits[X].argmax(axis=1)]
        return chosen

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        proba: np.ndarray = softmax(self.logits[X].astype(np.float64) / self._temperature, axis=1)
        return proba

    @cached_property
    def _temperature(self) -> float:
        return fit_temperature(self.logits, self.codes)


def check_scoring(scoring: Scoring) -> Callable[..., float]:
    """Return the scorer of a name.

    Raises
    ------
    TrainingError
        scikit-learn knows no such name.
    """
    from sklearn.metrics import get_scorer, get_scorer_names

    if isinstance(scoring, str) and scoring not in get_scorer_names():
        near = difflib.get_close_matches(scoring, get_scorer_names(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else "Try accuracy."
        raise TrainingError(f"scikit-learn has no scoring {scoring!r}. {hint}")
    scorer: Callable[..., float] = get_scorer(scoring)
    return scorer


def score_folds(
    logits: np.ndarray, y: np.ndarray, classes: np.ndarray, folds: Folds, scoring: Scoring
) -> tuple[float, ...]:
    """Score out-of-fold `logits` on each fold with any of scikit-learn's scorers.

    Parameters
    ----------
    logits : ndarray of shape (n, k)
        Out-of-fold scores.
    y : ndarray of shape (n,), int
        Column of the true class.
    classes : ndarray of shape (k,)
        Labels.
    folds : list of (train, valid)
        Row numbers.
    scoring : str or callable
        Name of a scorer ("accuracy", "balanced_accuracy", "f1_macro", "neg_log_loss", ...), or
        ``scorer(estimator, X, y)``. Scorers of probabilities see them calibrated.
    """
    if scoring == "accuracy":  # the usual one, without sorting a million labels
        right = logits.argmax(axis=1) == y
        return tuple(float(right[valid].mean()) for _, valid in folds)
    scorer = check_scoring(scoring)
    known = _Scored(logits, classes, y)
    labels = classes[y]
    return tuple(float(scorer(known, valid, labels[valid])) for _, valid in folds)


def fit_estimator(estimator: Any, rows: TrainingRows, images: np.ndarray | None = None) -> Any:
    """Fit a pipeline (or a bare estimator) on `images`, weights going to its last step."""
    weight = rows.weights(images)
    fit_params: dict[str, Any] = {}
    if weight is not None:
        last = estimator.steps[-1][0] + "__" if hasattr(estimator, "steps") else ""
        fit_params[f"{last}sample_weight"] = weight
    return estimator.fit(rows.features(images), rows.targets(images), **fit_params)


def gather(rows: TrainingRows, per_fold: Sequence[np.ndarray]) -> np.ndarray:
    """Put the folds' validation scores into one (n, k) array; the mean where folds overlap."""
    total = np.zeros((len(rows.codes), len(rows.classes)), dtype=np.float64)
    count = np.zeros(len(rows.codes))
    for (_, valid), values in zip(rows.folds, per_fold, strict=True):
        np.add.at(total, valid, values)
        np.add.at(count, valid, 1)
    total[count == 0] = np.nan
    total[count > 0] /= count[count > 0][:, None]
    return total.astype(np.float32)


def choose(tried: Sequence[tuple[Candidate, np.ndarray]]) -> tuple[Candidate, np.ndarray]:
    """Return the best candidate; the earlier (simpler) one where scores tie."""
    return max(tried, key=lambda one: one[0].score)
