"""Cross-validated choice of a head's hyper-parameters on given folds, and what it returns.

The folds come from outside (:mod:`featcache.store.splitting`), so that every head is compared on
the same ones. Everything that is learnt from features, scaling included, is learnt inside a fold.
The out-of-fold scores of the chosen hyper-parameters are kept: the leaderboard's intervals, the
calibration of probabilities and the audit all come from them.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, TypeAlias

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin

from featcache.errors import TrainingError
from featcache.heads.base import ClassWeight, FittedHead
from featcache.heads.calibration import fit_temperature
from featcache.heads.rows import FeatureBlocks, Folds, TrainingRows
from featcache.heads.steps import Step

Params: TypeAlias = Mapping[str, Any]
Scoring: TypeAlias = str | Callable[..., float]

COPIES = 3  # of the features, that training takes: folds, scaled rows


@dataclass(frozen=True)
class SearchResult:
    """What a head's search found.

    Attributes
    ----------
    head : str
        Name of the head.
    estimator : FittedHead
        Fitted on all rows with the chosen hyper-parameters; takes float32 (n, d).
    params : mapping
        The chosen hyper-parameters, and what the last fit found by itself (its best epoch).
    best : Trial
        The chosen hyper-parameters with their scores.
    trials : tuple of Trial
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
    estimator: FittedHead
    params: Params
    best: Trial
    trials: tuple[Trial, ...]
    classes: np.ndarray
    logits: np.ndarray
    temperature: float
    search_seconds: float
    fit_seconds: float
    notes: tuple[str, ...] = field(default=())

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


@dataclass(frozen=True)
class SearchOptions:
    """What all heads are searched under.

    Attributes
    ----------
    scoring : str or callable
        One of scikit-learn's scorers; what decides.
    class_weight : "balanced", dict or None
        As in scikit-learn.
    random_state : int
        Seed: the same search gives the same result.
    n_jobs : int
        Fits at a time (-1: one a core).
    memory : int, optional
        Bytes of working memory to stay under; left out, 1 GiB where that matters.
    progress : callable, optional
        Called with a number of fits whenever so many more are done.
    """

    scoring: Scoring = "accuracy"
    class_weight: ClassWeight = None
    random_state: int = 0
    n_jobs: int = 1
    memory: int | None = None
    progress: Callable[[int], object] | None = None

    @property
    def room(self) -> int:
        """Bytes of working memory."""
        return self.memory or 1 << 30


@dataclass(frozen=True)
class Trial:
    """One setting of the hyper-parameters and how it did.

    Attributes
    ----------
    params : mapping
        Name to value.
    fold_scores : tuple of float
        Score on each fold's validation rows, in the order of the folds.
    seconds : float
        Wall-clock seconds since the trial before.
    predicted : ndarray of shape (n,), int32, or None
        Number of the class with the highest out-of-fold score; -1 in rows that no fold validates.
    logits : ndarray of shape (n, k), float32, or None
        Out-of-fold scores, NaN in such rows; None where they were given up to save memory.
    rough : bool
        Whether it only served to decide what to try next.
    """

    params: Params
    fold_scores: tuple[float, ...]
    seconds: float = 0.0
    predicted: np.ndarray | None = None
    logits: np.ndarray | None = None
    rough: bool = False

    @property
    def score(self) -> float:
        """Mean over the folds."""
        return float(np.mean(self.fold_scores))


class Search:
    """The trials of one search: scored and kept, and chosen from, in one place.

    Parameters
    ----------
    rows : TrainingRows
        What is tried on.
    options : SearchOptions
        What decides, and the memory: an eighth of it may hold logits; of the trials that it has
        no room for, except the best, only the predicted classes are kept.

    Attributes
    ----------
    trials : list of Trial
        All, in order.
    notes : list of str
        What the user should be told, one sentence each.
    """

    def __init__(self, rows: TrainingRows, options: SearchOptions) -> None:
        self.rows, self.options = rows, options
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self._since = time.perf_counter()

    @property
    def best(self) -> Trial:
        """The trial with the highest score; the earlier (simpler) one where scores tie.

        Rough ones count only as long as there is no other.
        """
        return max(self.trials, key=lambda one: (not one.rough, one.score))

    def fitted(self, count: int = 1) -> None:
        """Tell whoever watches that so many more fits are done."""
        if self.options.progress is not None:
            self.options.progress(count)

    def tried(self, params: Params, logits: np.ndarray, *, rough: bool = False) -> Trial:
        """Score and keep the out-of-fold logits (images, k) of one setting; NaN if not judged."""
        rows, now = self.rows, time.perf_counter()
        scores = score_folds(logits, rows.codes, rows.classes, rows.folds, self.options.scoring)
        values = rows.spread(logits)
        predicted = np.where(np.isnan(values).any(axis=1), -1, values.argmax(axis=1))
        trial = Trial(params, scores, now - self._since, predicted.astype(np.int32), values, rough)
        self._since = now
        self.trials.append(trial)
        kept = [one.logits.nbytes for one in self.trials if one.logits is not None]
        if len(kept) > 1 and sum(kept) > self.options.room // 8:
            best = self.best
            self.trials = [one if one is best else replace(one, logits=None) for one in self.trials]
        return trial


@dataclass(frozen=True)
class HeadKind:
    """One kind of head: what to try, and how to fit it.

    Attributes
    ----------
    options : SearchOptions
        What it is searched under.
    name : str
        What it is called on the command line.
    out_of_core : bool
        Whether it reads features that are larger than memory; others get a part of them.
    """

    options: SearchOptions = SearchOptions()
    name: ClassVar[str]
    out_of_core: ClassVar[bool] = False

    def explore(self, rows: TrainingRows, search: Search) -> None:
        """Try settings on the folds of `rows`, and tell `search` the out-of-fold logits of each."""
        raise NotImplementedError

    def fit(self, rows: TrainingRows, params: Params) -> list[Step]:
        """Fit one setting on all of `rows`, and return the steps of the head."""
        raise NotImplementedError

    def final(self, rows: TrainingRows, params: Params) -> Params:
        """Return what the best of rough trials is judged and fitted with."""
        return params

    def report(self, params: Params, steps: Sequence[Step]) -> Params:
        """Return the settings of the last fit, with what it found by itself."""
        return params

    def most_images(self, rows: TrainingRows) -> int:
        """How many images the head can be fitted on: a matter of memory."""
        return len(rows)

    def enough_images(self, rows: TrainingRows) -> int:
        """How many images it chooses its settings on: a matter of time."""
        return len(rows)

    @classmethod
    def search(
        cls,
        X: np.ndarray | FeatureBlocks,
        y: np.ndarray,
        folds: Folds,
        *,
        sample_weight: np.ndarray | None = None,
        **options: Any,
    ) -> SearchResult:
        """Choose the hyper-parameters by cross-validation on `folds` and fit on all rows.

        Parameters
        ----------
        X : ndarray of shape (n, d) or (n, views, d), or FeatureBlocks
            Features. All views of an image are trained on, predictions are averaged over them.
        y : ndarray of shape (n,)
            Labels.
        folds : list of (train, valid)
            Row numbers (of images, not of views).
        sample_weight : ndarray of shape (n,), optional
            Weights of the images.
        **options
            See `SearchOptions`.

        Returns
        -------
        SearchResult

        Raises
        ------
        TrainingError
            Labels, classes or folds that cannot be trained on, or an unknown scoring.
        """
        rows = TrainingRows.check(X, y, folds, sample_weight)
        return search(cls(SearchOptions(**options)), rows)


def search(head: HeadKind, rows: TrainingRows) -> SearchResult:
    """Explore a head's settings, choose the best, and fit it on all rows.

    One rule where memory or time is short: the settings are chosen on a random part of each class,
    the chosen one is judged once more by fits on all rows of the other folds, and the last fit
    takes all rows, or as many as there is memory for. How many depends on counts (of rows, columns,
    classes and bytes), never on a clock.

    Raises
    ------
    TrainingError
        scikit-learn knows no such scoring, or it does not score classes.
    """
    options, start = head.options, time.perf_counter()
    check_scoring(options.scoring, rows.classes)
    kept = rows
    if isinstance(rows.X, FeatureBlocks) and not head.out_of_core:
        some = rows.images_in(options.room // COPIES)
        kept = rows.sample(some, options.random_state).loaded()
    kept = kept.sample(head.most_images(kept), options.random_state)
    part = kept.sample(head.enough_images(kept), options.random_state)
    found = Search(part, options)
    head.explore(part, found)
    if found.best.rough or len(part) < len(kept):
        params = head.final(kept, found.best.params)
        found.trials = [replace(one, rough=True) for one in found.trials]
        found.rows = kept.judging(part)
        found.tried(params, refitted(head, params, found))
    best, middle = found.best, time.perf_counter()
    assert best.logits is not None
    estimator = FittedHead(head.fit(kept, best.params), rows.classes)
    found.fitted()
    if len(part) < len(rows):
        found.notes.append(_note(head.name, len(part), len(kept), len(rows)))
    return SearchResult(
        head=head.name,
        estimator=estimator,
        params=head.report(best.params, estimator.steps),
        best=best,
        trials=tuple(found.trials),
        classes=rows.classes,
        logits=best.logits,
        temperature=fit_temperature(best.logits, rows.codes, rows.weight),
        search_seconds=middle - start,
        fit_seconds=time.perf_counter() - middle,
        notes=tuple(found.notes),
    )


def _note(name: str, part: int, kept: int, everything: int) -> str:
    """Say that not all images were trained on."""
    whole = f"all {everything:,}" if kept == everything else f"{kept:,}"
    if part == kept:
        return (
            f"{name} was trained on {kept:,} of {everything:,} images, a random part of each class."
        )
    return (
        f"{name} chose its settings on {part:,} of {everything:,} images, a random part of each "
        f"class, and was fitted on {whole}."
    )


def refitted(head: HeadKind, params: Params, search: Search) -> np.ndarray:
    """Return the out-of-fold logits (images, k) of one setting, by a whole fit for each fold."""
    rows, per_fold = search.rows, []
    for train, valid in rows.folds:
        fitted = FittedHead(head.fit(rows.only(train), params), rows.classes)
        X = rows.features(valid).reshape(len(valid), rows.views, -1)
        per_fold.append(fitted.logits(X))
        search.fitted()
    return gather(rows, per_fold)


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


def check_scoring(scoring: Scoring, classes: np.ndarray | None = None) -> Callable[..., float]:
    """Return the scorer of a name.

    Parameters
    ----------
    scoring : str or callable
        Name of a scorer, or a scorer.
    classes : ndarray of shape (k,), optional
        Labels that it is to be tried on.

    Raises
    ------
    TrainingError
        scikit-learn knows no such name, or it scores something else than these labels.
    """
    from sklearn.metrics import get_scorer, get_scorer_names

    if not isinstance(scoring, str) and not callable(scoring):
        raise TrainingError(f"scoring is the name of a scorer or a scorer, not {scoring!r}")
    if isinstance(scoring, str) and scoring not in get_scorer_names():
        near = difflib.get_close_matches(scoring, get_scorer_names(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else "Try accuracy."
        raise TrainingError(f"scikit-learn has no scoring {scoring!r}. {hint}")
    scorer: Callable[..., float] = get_scorer(scoring)
    if classes is not None:
        codes = np.repeat(np.arange(len(classes)), 2)  # (2k,): every class twice, and all right
        known = _Scored(np.eye(len(classes), dtype=np.float32)[codes], classes, codes)
        try:
            float(scorer(known, np.arange(len(codes)), classes[codes]))
        except (ValueError, TypeError) as error:
            why = str(error).partition("\n")[0].rstrip(".")
            raise TrainingError(
                f"scoring {scoring!r} cannot score {len(classes)} classes such as "
                f"{str(classes[0])!r}: {why}. Try balanced_accuracy, f1_macro or neg_log_loss"
            ) from error
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


def fit_estimator(estimator: Any, rows: TrainingRows) -> Any:
    """Fit a scikit-learn classifier on all rows, with their weights."""
    return estimator.fit(rows.features(), rows.targets(), sample_weight=rows.weights())


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
