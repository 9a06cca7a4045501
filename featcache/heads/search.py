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
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin

from featcache.errors import TrainingError
from featcache.heads.blocks import RowBlocks

Folds: TypeAlias = Sequence[tuple[np.ndarray, np.ndarray]]
Params: TypeAlias = Mapping[str, Any]
Scoring: TypeAlias = str | Callable[..., float]

# Probabilities are clipped here before the logarithm: a forest gives exact zeros.
_SMALLEST_PROBABILITY = 1e-4

# Scores that a temperature is fitted to: 8 MB.
_TEMPERATURE_CELLS = 1 << 20


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


@dataclass(frozen=True)
class Rows:
    """Training rows, checked, views flattened into rows of their own.

    Attributes
    ----------
    X : ndarray of shape (n * views, d), or RowBlocks
        Features.
    codes : ndarray of shape (n,), int64
        Class of each image.
    classes : ndarray of shape (k,)
        Labels.
    weight : ndarray of shape (n,) or None
        Weight of each image.
    folds : list of (train, valid)
        Image numbers.
    views : int
        Rows of `X` for each image, next to each other.
    """

    X: np.ndarray | RowBlocks
    codes: np.ndarray
    classes: np.ndarray
    weight: np.ndarray | None
    folds: Folds
    views: int

    @classmethod
    def check(
        cls,
        X: np.ndarray | RowBlocks,
        y: np.ndarray,
        folds: Folds,
        sample_weight: np.ndarray | None,
    ) -> Rows:
        """Validate what a search was given.

        Raises
        ------
        TrainingError
            Other lengths, not one class, values that are not finite, no folds.
        """
        if len(X.shape) not in (2, 3):
            raise TrainingError(f"Expected features (n, d) or (n, views, d), got shape {X.shape}.")
        if len(X) != len(y):
            raise TrainingError(f"Expected one label per row: {len(X)} rows, {len(y)} labels.")
        classes, codes = np.unique(np.asarray(y), return_inverse=True)
        if len(classes) < 2:
            raise TrainingError(f"Expected at least two classes, got {classes.tolist()}.")
        if not len(folds):
            raise TrainingError("Expected at least one (train, valid) pair of row numbers, got 0.")
        for number, (train, _) in enumerate(folds):
            missing = np.flatnonzero(np.bincount(codes[train], minlength=len(classes)) == 0)
            if len(missing):
                raise TrainingError(
                    f"Fold {number} has no training row of class {str(classes[missing[0]])!r}. "
                    "Use fewer folds, or more images of that class."
                )
        weight = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        views = X.shape[1] if len(X.shape) == 3 else 1
        if isinstance(X, RowBlocks):
            flat: np.ndarray | RowBlocks = X
        else:
            flat = np.asarray(X, dtype=np.float32).reshape(-1, X.shape[-1])
        return cls(flat, codes.astype(np.int64), classes, weight, folds, views)

    @property
    def labels(self) -> np.ndarray:
        """Label of each image."""
        labels: np.ndarray = self.classes[self.codes]
        return labels

    def rows(self, images: np.ndarray) -> np.ndarray:
        """Row numbers of all views of `images`."""
        numbers: np.ndarray = (
            np.asarray(images)[:, None] * self.views + np.arange(self.views)
        ).ravel()
        return numbers

    def features(self, images: np.ndarray | None = None) -> np.ndarray:
        """Features of all views of `images`, of shape (images * views, d)."""
        if isinstance(self.X, RowBlocks):
            raise TrainingError(
                "This head cannot read its features in blocks: they must fit in memory."
            )
        return self.X if images is None else self.X[self.rows(images)]

    def weights(self, images: np.ndarray | None = None) -> np.ndarray | None:
        """Weights of the same rows: an image's weight is shared out among its views."""
        if self.weight is None and self.views == 1:
            return None
        weight = np.ones(len(self.codes)) if self.weight is None else self.weight
        chosen = weight if images is None else weight[images]
        return np.repeat(chosen / self.views, self.views)

    def targets(self, images: np.ndarray | None = None) -> np.ndarray:
        """Labels of the same rows."""
        codes = self.codes if images is None else self.codes[images]
        targets: np.ndarray = self.classes[np.repeat(codes, self.views)]
        return targets


def fit_estimator(estimator: Any, rows: Rows, images: np.ndarray | None = None) -> Any:
    """Fit a pipeline (or a bare estimator) on `images`, weights going to its last step."""
    weight = rows.weights(images)
    fit_params: dict[str, Any] = {}
    if weight is not None:
        last = estimator.steps[-1][0] + "__" if hasattr(estimator, "steps") else ""
        fit_params[f"{last}sample_weight"] = weight
    return estimator.fit(rows.features(images), rows.targets(images), **fit_params)


def gather(rows: Rows, per_fold: Sequence[np.ndarray]) -> np.ndarray:
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


def stratified(codes: np.ndarray, size: int, random_state: int) -> np.ndarray:
    """Return about `size` row numbers in order, the same part of each class, none left out."""
    if size >= len(codes):
        return np.arange(len(codes))
    shuffled = np.random.default_rng(random_state).permutation(len(codes))
    by_class = shuffled[np.argsort(codes[shuffled], kind="stable")]
    spread = by_class[np.linspace(0, len(codes) - 1, max(size, 1)).astype(np.int64)]
    _, first = np.unique(codes[by_class], return_index=True)
    return np.union1d(spread, by_class[first])
