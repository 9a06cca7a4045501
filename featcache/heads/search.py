"""Cross-validated choice of a head's hyper-parameters on given folds, and what it returns.

The folds come from outside (:mod:`featcache.store.splitting`), so that every head is compared on
the same ones. Everything that is learnt from features, scaling included, is learnt inside a fold.
The out-of-fold scores of the chosen hyper-parameters are kept: the leaderboard's intervals, the
calibration of probabilities and the audit all come from them.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin

from featcache.errors import TrainingError
from featcache.heads.base import ClassWeight, FittedHead, class_factors
from featcache.heads.calibration import (
    Calibration,
    calibrated_loss,
    fit_calibration,
    fit_temperature,
)
from featcache.heads.rows import FeatureBlocks, Folds, TrainingRows
from featcache.heads.steps import Step
from featcache.system.defaults import library_defaults
from featcache.system.tables import first_names, settings_text

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
    calibration : Calibration
        ``calibration.proba(logits)`` are calibrated probabilities, fitted on `logits`.
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
    calibration: Calibration
    search_seconds: float
    fit_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def score(self) -> float:
        """Mean score of the chosen hyper-parameters over the folds."""
        return self.best.score

    @property
    def fold_scores(self) -> tuple[float, ...]:
        """Score of the chosen hyper-parameters on each fold."""
        return self.best.fold_scores

    def __repr__(self) -> str:
        return f"SearchResult({self.head}: {settings_text(self.params)}; score {self.score:.4f})"


@dataclass(frozen=True)
class SearchOptions:
    """What all heads are searched under.

    Attributes
    ----------
    scoring : str, callable or None
        One of scikit-learn's scorers; what decides. None: accuracy, under class weights balanced
        accuracy. A rare class that is weighted up costs accuracy, so that accuracy would choose
        whatever heeds the weights least.
    class_weight : "balanced", dict or None
        As in scikit-learn.
    random_state : int
        Seed: the same search gives the same result.
    n_jobs : int
        Fits at a time of ``rbf-svm`` and ``boosting``, trees at a time of ``forest`` (-1: one a
        core). Each fit of the others uses all cores that torch and the BLAS are given: more at a
        time would wait for each other.
    memory : int, optional
        Bytes of working memory to stay under; left out, 1 GiB where that matters.
    progress : callable, optional
        Called with a number of fits whenever so many more are done.
    """

    scoring: Scoring | None = None
    class_weight: ClassWeight = None
    random_state: int = 0
    n_jobs: int = 1
    memory: int | None = None
    progress: Callable[[int], object] | None = None

    @property
    def decides(self) -> Scoring:
        """What decides: `scoring`, or what stands for None."""
        usual = "accuracy" if self.class_weight is None else "balanced_accuracy"
        return usual if self.scoring is None else self.scoring

    @property
    def decides_name(self) -> str:
        """What decides, for people."""
        decides = self.decides
        return decides if isinstance(decides, str) else getattr(decides, "__name__", "score")

    @property
    def balances(self) -> bool:
        """Whether balanced accuracy tells heads apart, and not accuracy."""
        return self.class_weight is not None or self.scoring == "balanced_accuracy"

    @property
    def difference_of(self) -> str:
        """What the differences between heads are of, for people."""
        return "balanced accuracy" if self.balances else "accuracy"

    @property
    def room(self) -> int:
        """Bytes of working memory."""
        return self.memory or 1 << 30


@dataclass(eq=False)
class Trial:
    """One setting of the hyper-parameters and how it did.

    Attributes
    ----------
    params : mapping
        Name to value.
    score : float
        Mean over the folds, or as `FoldScorer` says where a fold lacks a class.
    fold_scores : tuple of float
        Score on each fold's validation rows, in the order of the folds; NaN in one that does not
        count.
    seconds : float
        Wall-clock seconds since the trial before.
    predicted : ndarray of shape (n,), int32
        Number of the class with the highest out-of-fold score; -1 in rows that no fold validates.
    logits : ndarray of shape (n, k), float32, or None
        Out-of-fold scores, NaN in such rows; None where they were given up to save memory.
    rough : bool
        Whether it only served to decide what to try next.
    log_loss : float or None
        Out of fold, calibrated; None where nothing had to be decided by it.
    """

    params: Params
    score: float
    fold_scores: tuple[float, ...]
    seconds: float
    predicted: np.ndarray
    logits: np.ndarray | None = None
    rough: bool = False
    log_loss: float | None = None

    @property
    def rank(self) -> tuple[bool, float]:
        """What it is chosen by: scores that differ by rounding are equal, NaN is the last."""
        return not self.rough, round(self.score, 9) if np.isfinite(self.score) else -np.inf

    def to_dict(self) -> dict[str, Any]:
        """Return setting, scores and seconds as JSON values."""
        return {
            "params": dict(self.params),
            "score": _finite(self.score),
            "fold_scores": [_finite(score) for score in self.fold_scores],
            "seconds": self.seconds,
        }


def _finite(score: float) -> float | None:
    return score if np.isfinite(score) else None


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
        self.options = options
        self.judge_on(rows)
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self._since = time.perf_counter()

    def judge_on(self, rows: TrainingRows) -> None:
        """Score what is tried from now on on these rows."""
        self.rows = rows
        self._scorer = FoldScorer(self.options.decides, rows.codes, rows.classes, rows.folds)

    @property
    def best(self) -> Trial:
        """The trial with the highest score; where scores tie, that with the lowest log loss.

        Rough ones count only as long as there is no other.
        """
        top = max(one.rank for one in self.trials)
        tied = [one for one in self.trials if one.rank == top]
        return tied[0] if len(tied) == 1 else min(tied, key=self._log_loss)

    def _log_loss(self, trial: Trial) -> float:
        """Return the out-of-fold log loss of a trial, which keeps it."""
        rows, logits = self.rows, trial.logits
        if trial.log_loss is None and logits is not None:
            logits = logits if rows.images is None else logits[rows.images]
            trial.log_loss = calibrated_loss(logits, rows.codes, rows.weight)
        return np.inf if trial.log_loss is None else trial.log_loss

    def fitted(self, count: int = 1) -> None:
        """Tell whoever watches that so many more fits are done."""
        if self.options.progress is not None:
            self.options.progress(count)

    def tried(self, params: Params, logits: np.ndarray, *, rough: bool = False) -> Trial:
        """Score and keep the out-of-fold logits (images, k) of one setting; NaN if not judged."""
        rows, now = self.rows, time.perf_counter()
        values = rows.spread(logits)
        predicted = values.argmax(axis=1).astype(np.int32)
        predicted[np.isnan(values).any(axis=1)] = -1
        seconds = now - self._since
        trial = Trial(params, *self._scorer(logits), seconds, predicted, values, rough)
        self._since = now
        self.trials.append(trial)
        kept = [one.logits.nbytes for one in self.trials if one.logits is not None]
        if len(kept) > 1 and sum(kept) > self.options.room // 8:
            best = self.best
            for one in self.trials:
                one.logits = one.logits if one is best else None
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


@library_defaults()
def search(head: HeadKind, rows: TrainingRows) -> SearchResult:
    """Explore a head's settings, choose the best, and fit it on all rows.

    One rule where memory or time is short: the settings are chosen on a random part of each class,
    the chosen one is judged once more by fits on all rows of the other folds, and the last fit
    takes all rows, or as many as there is memory for. How many depends on counts (of rows, columns,
    classes and bytes), never on a clock.

    Raises
    ------
    TrainingError
        scikit-learn knows no such scoring, it is not defined for these labels and folds, or class
        weights are not for these classes.
    """
    options, start = head.options, time.perf_counter()
    FoldScorer(options.decides, rows.codes, rows.classes, rows.folds)  # refuses before all else
    try:
        class_factors(options.class_weight, rows.classes, rows.codes, np.ones(len(rows)))
    except ValueError as error:
        raise TrainingError(str(error)) from error
    kept = rows
    if isinstance(rows.X, FeatureBlocks) and not head.out_of_core:
        some = rows.images_in(options.room // COPIES)
        kept = rows.sample(some, options.random_state).loaded()
    kept = kept.sample(head.most_images(kept), options.random_state)
    part = kept.sample(head.enough_images(kept), options.random_state)
    found = Search(part, options)
    head.explore(part, found)
    best = found.best
    if best.rough or len(part) < len(kept) or best.logits is None:
        params = head.final(kept, best.params)
        for one in found.trials:
            one.rough = True
        found.judge_on(kept.judging(part))
        found.tried(params, refitted(head, params, found))
    best, middle = found.best, time.perf_counter()
    if not np.isfinite(best.score):
        raise TrainingError(f"scoring {options.decides!r} is not a number for any setting.")
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
        calibration=fit_calibration(best.logits, rows.codes, rows.folds, rows.weight),
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


@dataclass(eq=False, repr=False)
class _Scored(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Predictions that are known already, in the shape that scikit-learn's scorers want.

    "X" is an array of row numbers.
    """

    logits: np.ndarray
    classes_: np.ndarray
    codes: np.ndarray
    proba: np.ndarray | None = None

    def predict(self, X: np.ndarray) -> np.ndarray:
        return np.asarray(self.classes_[self.logits[X].argmax(axis=1)])

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        if self.proba is None:
            temperature = fit_temperature(self.logits, self.codes)
            self.proba = np.asarray(softmax(self.logits / temperature, axis=1))
        chosen: np.ndarray = self.proba[X]
        return chosen


def check_scoring(scoring: Scoring) -> Callable[..., float]:
    """Return the scorer of a name, or the scorer that was given.

    Raises
    ------
    TrainingError
        scikit-learn knows no such name.
    """
    from sklearn.metrics import get_scorer, get_scorer_names

    if not isinstance(scoring, str) and not callable(scoring):
        raise TrainingError(f"scoring is the name of a scorer or a scorer, not {scoring!r}.")
    if isinstance(scoring, str) and scoring not in get_scorer_names():
        near = difflib.get_close_matches(scoring, get_scorer_names(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else "Try accuracy."
        raise TrainingError(f"scikit-learn has no scoring {scoring!r}. {hint}")
    scorer: Callable[..., float] = get_scorer(scoring)
    function = getattr(scorer, "_score_func", None)  # no public way tells what it is of
    if getattr(function, "__module__", "").endswith("_regression"):
        raise TrainingError(
            f"scoring {scoring!r} compares numbers, and classes are none. Try accuracy, "
            "balanced_accuracy or neg_log_loss."
        )
    return scorer


class FoldScorer:
    """Any of scikit-learn's scorers on out-of-fold scores, also where folds lack classes.

    Where the validation images of a fold lack a class, scores of predictions (accuracy, F1) are
    those of all folds' images together. Log loss, Brier score and top-k accuracy get all labels.
    What compares images of different classes (AUC, average precision, scorers of one's own) is the
    mean of the folds that have every class. Of two classes, the second in sorted order is the
    positive one.

    Parameters
    ----------
    scoring : str or callable
        One of scikit-learn's scorers.
    codes, classes : ndarray of shape (n,), ndarray of shape (k,)
        Column of the true class, and labels.
    folds : list of (train, valid)
        Row numbers.

    Attributes
    ----------
    notes : list of str
        What the user should be told of the score.
    of_images, resampled : bool
        Whether it is of single images, and whether at least folds can be drawn: otherwise there is
        but one score of all images.

    Raises
    ------
    TrainingError
        scikit-learn knows no such scoring, or it is not defined for these labels and folds.
    """

    def __init__(
        self, scoring: Scoring, codes: np.ndarray, classes: np.ndarray, folds: Folds
    ) -> None:
        from sklearn.metrics import roc_auc_score

        self.scoring, self.codes, self.classes = scoring, codes, classes
        self.notes: list[str] = []
        scorer: Any = check_scoring(scoring)
        function = getattr(scorer, "_score_func", None)  # no public way tells what it takes
        takes = inspect.signature(function).parameters if function else {}
        predicts = bool(function) and scorer._response_method == "predict"
        options = {}
        if len(classes) == 2 and "pos_label" in takes and "pos_label" not in scorer._kwargs:
            options["pos_label"] = classes[1]
            self.notes.append(f"{scoring}: {str(classes[1])!r} is the positive class")
        if "labels" in takes and not predicts and function is not roc_auc_score:
            options["labels"] = classes
        if options:
            scorer = copy.copy(scorer)
            scorer._kwargs = {**options, **scorer._kwargs}
        self.scorer: Callable[..., float] = scorer
        self.folds = [np.asarray(valid) for _, valid in folds]
        present = np.stack([np.isin(np.arange(len(classes)), codes[rows]) for rows in self.folds])
        whole = present.all(axis=1)
        self.counted = np.logical_or(whole, predicts or "labels" in options)
        self.together = predicts and not whole.all()
        if len(lacking := classes[~present.any(axis=0)].tolist()):
            names = first_names([*map(repr, lacking)], 5)
            self.notes.append(f"no validation image is of {names}: the scores tell nothing of such")
        elif self.together:
            self.notes.append(
                "a fold lacks a class: the score is that of all folds' images together"
            )
        if not self.counted.all():
            self.notes.append(
                f"the score is the mean of {self.counted.sum()} of {len(folds)} folds: the others "
                "lack a class"
            )
        self.of_images = scoring in ("accuracy", "balanced_accuracy")
        self.resampled = self.of_images or (self.counted.sum() > 1 and not self.together)
        self._check(np.flatnonzero(present.any(axis=0)))

    def _check(self, present: np.ndarray) -> None:
        """Refuse what cannot score even right predictions of the classes that folds validate."""
        from sklearn.exceptions import UndefinedMetricWarning
        from sklearn.metrics import get_scorer_names

        codes = np.repeat(present, 2)  # every class twice
        right = np.eye(len(self.classes), dtype=np.float32)[codes]
        known = _Scored(right, self.classes, codes)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", UndefinedMetricWarning)
                if not self.counted.any():
                    raise ValueError("no fold has validation images of every class")
                if not np.isfinite(self._one(known, np.arange(len(codes)))):
                    raise ValueError("it is not a number")
        except (ValueError, TypeError, UndefinedMetricWarning) as error:
            why = str(error).partition("\n")[0].rstrip(".")
            lacking = np.delete(self.classes, present)
            if isinstance(error, UndefinedMetricWarning) and len(lacking):
                why = f"no validation image is of {str(lacking[0])!r}"
            cure = "balanced_accuracy, f1_macro or neg_log_loss"
            of_more = {f"{self.scoring}_macro", f"{self.scoring}_ovr"} & {*get_scorer_names()}
            if of_more and len(self.classes) > 2:
                why, cure = "it is for two", of_more.pop()
            raise TrainingError(
                f"scoring {self.scoring!r} cannot score {len(self.classes)} classes such as "
                f"{str(self.classes[0])!r}: {why}. Try {cure}."
            ) from error

    def _one(self, known: _Scored, rows: np.ndarray) -> float:
        if self.scoring == "accuracy":  # the usual one, without sorting a million labels
            return float((known.logits[rows].argmax(axis=1) == known.codes[rows]).mean())
        return float(self.scorer(known, rows, self.classes[known.codes[rows]]))

    def __call__(
        self, logits: np.ndarray, proba: np.ndarray | None = None
    ) -> tuple[float, tuple[float, ...]]:
        """Score out-of-fold `logits` (n, k): return the score, and that of each fold.

        Scorers of probabilities see `proba` (n, k), or, left out, calibrated ones. A fold that does
        not count has NaN.
        """
        known = _Scored(logits, self.classes, self.codes, proba)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that a fold lacks
            each = tuple(
                self._one(known, rows) if counts and len(rows) else np.nan
                for rows, counts in zip(self.folds, self.counted, strict=True)
            )
            if self.together:
                return self._one(known, np.unique(np.concatenate(self.folds))), each
            return float(np.nanmean(each)), each


def fit_estimator(estimator: Any, rows: TrainingRows) -> Any:
    """Fit a head's classifier on all rows, with their weights and the numbers of their classes."""
    if hasattr(estimator, "class_weight"):
        estimator.set_params(class_weight=rows.numbered(estimator.class_weight))
    return estimator.fit(rows.features(), rows.row_codes(), sample_weight=rows.weights())


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
