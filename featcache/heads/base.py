"""What all heads share: a fitted list of steps, and scikit-learn's contract for our estimators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from featcache.errors import TrainingError
from featcache.heads.rows import FeatureBlocks, check_values
from featcache.heads.steps import Log, Step, chained
from featcache.system.defaults import library_defaults

ClassWeight: TypeAlias = str | dict[Any, float] | None

_CHECKED = 10_000  # training images that a fitted head labels again
_WORSE = 0.1  # than cross-validation said, so much that something is broken
_ROWS = 4096  # that go through the steps at a time ...
_CELLS = 1 << 22  # ... or so many that no step needs more numbers than this: 32 MB


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A fitted head: its steps, and the classes that the scores behind the last one are of.

    Attributes
    ----------
    steps : sequence of Step
        From features (n, d) to scores (n, k): decision values, or log-probabilities.
    classes : ndarray of shape (k,)
        Labels: the columns of the scores.
    """

    steps: Sequence[Step]
    classes: np.ndarray

    @library_defaults()
    def logits(self, X: np.ndarray) -> np.ndarray:
        """Return scores (n, k), float32, of features (n, d) or (n, views, d), views averaged."""
        views, k = X.shape[1] if X.ndim == 3 else 1, len(self.classes)
        scores = np.empty((len(X) * views, k), dtype=np.float32)
        for rows, found in through(self.steps, X.reshape(len(scores), X.shape[-1])):
            scores[rows] = found
        mean: np.ndarray = scores.reshape(len(X), views, k).mean(axis=1)
        return mean


def check_fit(
    head: FittedHead,
    X: np.ndarray | FeatureBlocks,
    y: np.ndarray,
    judged: np.ndarray,
    low: float,
    *,
    balanced: bool = False,
) -> None:
    """Refuse a head that does far worse on its own training images than out of fold.

    Parameters
    ----------
    head : FittedHead
        Fitted on all images.
    X : ndarray of shape (n, d) or (n, views, d), or FeatureBlocks
        Features.
    y : ndarray of shape (n,)
        Labels.
    judged : ndarray of shape (n,), bool
        Which images cross-validation judged; at most 10,000 of them are labelled.
    low : float
        Lower end of the interval of the accuracy out of fold.
    balanced : bool
        That is the balanced accuracy.

    Raises
    ------
    TrainingError
        The accuracy is more than 0.1 below.
    """
    images = np.flatnonzero(judged)
    images = images[:: -(-len(images) // _CHECKED)]
    blocks = X if isinstance(X, FeatureBlocks) else FeatureBlocks.of(X)
    numbers = images[:, None] * blocks.views + np.arange(blocks.views)  # (m, views)
    rows = blocks.take(numbers.ravel()).reshape(*numbers.shape, blocks.shape[-1])
    right = head.classes[head.logits(rows).argmax(axis=1)] == y[images]
    _, code, count = np.unique(y[images], return_inverse=True, return_counts=True)
    share = float(np.average(right, weights=1 / count[code] if balanced else None))
    if share < low - _WORSE:
        raise TrainingError(
            f"The fitted head labels {share:.3f} of its own training images right, where "
            f"cross-validation said at least {low:.3f}: it does not compute what was "
            "cross-validated, and is not kept. Train another head, or scale the features."
        )


def through(chain: Sequence[Step], X: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Send rows (n, d) through steps, some at a time: yield which, and what comes out."""
    widest = max(X.shape[1], *(step.cells for step in chain))
    size = max(1, min(_ROWS, _CELLS // widest))
    for start in range(0, len(X), size):
        rows = slice(start, min(start + size, len(X)))
        yield rows, chained(chain, X[rows])


def transformed(chain: Sequence[Step], X: np.ndarray) -> np.ndarray:
    """Return rows (n, d) behind steps: no copy between two steps is whole."""
    return np.concatenate([block for _, block in through(chain, X)]) if chain else X


def class_factors(
    class_weight: ClassWeight, classes: np.ndarray, codes: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Return the factor of each class, of shape (k,), as scikit-learn defines `class_weight`.

    "balanced" counts weighted rows, so that a weight of two is the same as a row twice.

    Raises
    ------
    ValueError
        Another word, a class that there is not, or a factor that is negative or not finite.
    """
    if class_weight is None:
        return np.ones(len(classes))
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise ValueError(f"class_weight is 'balanced', a dict or None, got {class_weight!r}.")
        counts = np.bincount(codes, weights=weight, minlength=len(classes))
        return np.asarray(counts.sum() / (len(classes) * np.maximum(counts, 1e-300)))
    known = classes.tolist()
    unknown = [label for label in class_weight if label not in known]
    if unknown:
        raise ValueError(f"class_weight names {unknown[0]!r}, which is not a class.")
    factors = np.array([float(class_weight.get(label, 1.0)) for label in known])
    if not ((factors >= 0) & (factors < np.inf)).all() or not factors.any():
        raise ValueError(
            "class_weight is finite and not negative, and above 0 for some class, got "
            f"{class_weight!r}."
        )
    return factors


class Head(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Base of the classifiers: `fit` checks and keeps steps, from which all predictions come.

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
        Labels.
    steps_ : list of Step
        From raw features to scores of the classes.
    n_features_in_ : int
        Number of columns.
    """

    _positive: ClassVar[tuple[str, ...]]  # parameters that must be above 0, where they are given

    def _check_parameters(self) -> None:
        for name in self._positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")

    def _fit(self, X: np.ndarray, codes: np.ndarray, weight: np.ndarray) -> list[Step]:
        """Return the steps for rows (n, d), their classes' numbers (n,) and weights (n,)."""
        raise NotImplementedError

    @library_defaults()
    def fit(self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None) -> Self:
        """Fit to features (n, d) and labels (n,).

        Parameters
        ----------
        X : array of shape (n, d)
            Features, float64 or float32; anything else becomes float64.
        y : array of shape (n,)
            Labels of at least two classes.
        sample_weight : array of shape (n,), optional
            Weights of the rows.

        Raises
        ------
        ValueError
            A parameter out of range, or data that scikit-learn refuses.
        TrainingError
            Features above 1e15.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_values(X, slice(0, len(X)))
        check_classification_targets(y)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"Expected at least two classes, got one class: {y[0]!r}.")
        if not (weight > 0).any():
            raise ValueError("Expected at least one row of positive weight, all weights are 0.")
        class_factors(getattr(self, "class_weight", None), self.classes_, codes, weight)
        self.steps_ = self._fit(X, codes, weight)
        return self

    @library_defaults()
    def _scores(self, X: np.ndarray, stop: int | None = None) -> np.ndarray:
        """Return what comes out of the first `stop` steps, of shape (n, k)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return transformed(self.steps_[:stop], X)

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Return scores: (n, k), or (n,) for two classes, positive for the second."""
        scores = self._scores(X)
        result: np.ndarray = scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores
        return result

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return the labels with the highest scores, of shape (n,)."""
        scores = self._scores(X)  # says first whether it is fitted
        labels: np.ndarray = self.classes_[scores.argmax(axis=1)]
        return labels

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Return probabilities of shape (n, k): votes, or the softmax of the scores."""
        check_is_fitted(self)
        if isinstance(self.steps_[-1], Log):
            return self._scores(X, -1)
        proba: np.ndarray = softmax(self._scores(X), axis=1)
        return proba

    def predict_log_proba(self, X: np.ndarray) -> np.ndarray:
        """Return logarithms of the probabilities, of shape (n, k)."""
        with np.errstate(divide="ignore"):
            logs: np.ndarray = np.log(self.predict_proba(X))
        return logs
