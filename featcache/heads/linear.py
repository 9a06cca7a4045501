"""The linear heads: multinomial logistic regression, and the search that is shared with the SVM.

Both are scikit-learn classifiers on the solver of :mod:`featcache.heads.solver`; standardisation
is part of the model, and ends folded into `coef_`, so that prediction is one matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.special import expit, log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from featcache.heads.calibration import fit_temperature
from featcache.heads.rows import FeatureBlocks, TrainingRows, stratified
from featcache.heads.search import Candidate, Scoring, SearchResult, score_folds
from featcache.heads.solver import (
    Design,
    Loss,
    Problems,
    Solution,
    Workers,
    minimise,
    product,
    standardise,
    unstandardise,
)
from featcache.heads.treatment import TREATMENTS, with_treatment

ClassWeight: TypeAlias = str | dict[Any, float] | None

CS: tuple[float, ...] = tuple(float(10.0**power) for power in range(-5, 3))
"""Coarse values of C; `search_linear` refines around the best by half a decade."""

# Scores to compute at a time (values of C x folds x classes). More fill a matrix product better,
# fewer start nearer to their solutions; the squared hinge gains most from a near start.
_COLUMNS: dict[Loss, int] = {"softmax": 100, "logistic": 100, "squared_hinge": 50}
_SEARCH_TOL = 1e-4
# Rows above which treatment and the decade of C are chosen on a part of them, and that part.
_MANY = 100_000
_SOME = 20_000
_SCORES = 1 << 25  # bytes of out-of-fold scores computed in one pass


def class_factors(
    class_weight: ClassWeight, classes: np.ndarray, codes: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Return the factor of each class, of shape (k,), as scikit-learn defines `class_weight`.

    "balanced" counts weighted rows, so that a weight of two is the same as a row twice.
    """
    if class_weight is None:
        return np.ones(len(classes))
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise ValueError(f"class_weight is 'balanced', a dict or None, got {class_weight!r}.")
        counts = np.bincount(codes, weights=weight, minlength=len(classes))
        return np.asarray(weight.sum() / (len(classes) * np.maximum(counts, 1e-300)))
    known = set(classes.tolist())
    unknown = [label for label in class_weight if label not in known]
    if unknown:
        raise ValueError(f"class_weight names {unknown[0]!r}, which is not a class.")
    return np.array([float(class_weight.get(label, 1.0)) for label in classes.tolist()])


def loss_weights(
    loss: Loss, row_weights: np.ndarray, codes: np.ndarray, factors: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return loss weights (folds, n), and one-vs-rest factors (folds, k) of the own class.

    As liblinear does, one-vs-rest with more than two classes weights only the rows of the class
    that a problem is about.
    """
    if (factors == 1.0).all():
        return row_weights, None
    if loss == "squared_hinge" and factors.shape[1] > 2:
        return row_weights, factors
    return row_weights * np.take(factors.astype(row_weights.dtype), codes, axis=1), None


class LinearModel(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """What the linear classifiers share: fit, decision values, prediction."""

    class_weight: ClassWeight
    standardize: bool

    def _check_parameters(self) -> None:
        raise NotImplementedError

    def _solve(
        self, X: np.ndarray, codes: np.ndarray, classes: np.ndarray, weight: np.ndarray
    ) -> LinearModel:
        raise NotImplementedError

    def fit(
        self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None
    ) -> LinearModel:
        """Fit to features (n, d) and labels (n,).

        Parameters
        ----------
        X : array of shape (n, d)
            Features. float64 is computed in float64, anything else in float32.
        y : array of shape (n,)
            Labels of at least two classes.
        sample_weight : array of shape (n,), optional
            Weights of the rows in the loss and in the standardisation.

        Raises
        ------
        ValueError
            A parameter out of range, or data that scikit-learn refuses.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=[np.float32, np.float64])
        check_classification_targets(y)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"Expected at least two classes, got one class: {classes[0]!r}.")
        return self._solve(X, codes, classes, weight)

    def _take(
        self, design: Design, fold: int, W: Tensor, b: Tensor, classes: np.ndarray
    ) -> LinearModel:
        """Keep a solution, of shapes (k, d) and (k, 1), as weights for raw features."""
        self.classes_ = classes
        self.n_features_in_ = design.d
        self.coef_, self.intercept_ = unstandardise(design, fold, W, b)
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Return scores: (n, k), or (n,) for two classes, positive for the second."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        scores = X @ self.coef_.T.astype(X.dtype) + self.intercept_.astype(X.dtype)
        result: np.ndarray = scores[:, 0] if scores.shape[1] == 1 else scores
        return result

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return the labels with the highest scores, of shape (n,)."""
        scores = self.decision_function(X)
        positive = scores > 0 if scores.ndim == 1 else None
        chosen = scores.argmax(axis=1) if positive is None else positive.astype(np.int64)
        labels: np.ndarray = self.classes_[chosen]
        return labels


class IterativeModel(LinearModel):
    """A linear classifier that the solver of :mod:`featcache.heads.solver` fits."""

    C: float
    tol: float
    max_iter: int

    def _loss(self, k: int) -> Loss:
        raise NotImplementedError

    def _penalizes_intercept(self) -> bool:
        return False

    def _check_parameters(self) -> None:
        if not self.C > 0 or not self.tol > 0 or not self.max_iter > 0:
            raise ValueError(
                f"C, tol and max_iter must be positive, got {self.C}, {self.tol}, {self.max_iter}."
            )

    def _solve(
        self, X: np.ndarray, codes: np.ndarray, classes: np.ndarray, weight: np.ndarray
    ) -> IterativeModel:
        loss = self._loss(len(classes))
        factors = class_factors(self.class_weight, classes, codes, weight)[None]
        weights = weight[None]
        in_loss, positive = loss_weights(loss, weights, codes, factors)
        design = Design.build(X, codes, weights, in_loss, standardize=self.standardize)
        problems = _problems(design, loss, [self.C], [0], positive, self._penalizes_intercept())
        W, b = _zeros(1, len(classes), loss, design)
        solution = minimise(design, problems, W, b, tol=self.tol, max_iter=self.max_iter)
        return self._keep(design, 0, solution, classes)

    def _keep(
        self, design: Design, fold: int, solution: Solution, classes: np.ndarray
    ) -> IterativeModel:
        self._take(design, fold, solution.W[0], solution.b[0], classes)
        self.n_iter_ = solution.passes
        return self


class LinearClassifier(IterativeModel):
    """Multinomial logistic regression on standardised features.

    Minimises the objective of scikit-learn's `LogisticRegression`, ``C * sum_i s_i loss_i +
    ||w||^2 / 2`` with a free intercept, for standardised features. Two classes have one vector
    of weights, as there.

    Parameters
    ----------
    C : float
        Inverse strength of the penalty.
    class_weight : "balanced", dict or None
        Weights of the classes.
    standardize : bool
        Whether columns are scaled to unit deviation first. Constant columns are left alone.
    tol : float
        Distance to the minimum, as a part of the objective, at which to stop.
    max_iter : int
        Passes over the rows at most.

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
        Labels.
    coef_ : ndarray of shape (k, d) or (1, d), float64
        Weights for raw features: the standardisation is folded in.
    intercept_ : ndarray of shape (k,) or (1,), float64
        Intercepts.
    n_features_in_ : int
        Number of columns.
    n_iter_ : ndarray of shape (1,)
        Passes over the rows.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        class_weight: ClassWeight = None,
        standardize: bool = True,
        tol: float = 1e-6,
        max_iter: int = 1000,
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter

    def _loss(self, k: int) -> Loss:
        return "logistic" if k == 2 else "softmax"

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Return probabilities of shape (n, k)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.stack([expit(-scores), expit(scores)], axis=1)
        proba: np.ndarray = softmax(scores, axis=1)
        return proba

    def predict_log_proba(self, X: np.ndarray) -> np.ndarray:
        """Return logarithms of the probabilities, of shape (n, k)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            scores = np.stack([np.zeros_like(scores), scores], axis=1)
        logs: np.ndarray = log_softmax(scores, axis=1)
        return logs


def _problems(
    design: Design,
    loss: Loss,
    Cs: Sequence[float],
    folds: Sequence[int],
    positive: np.ndarray | None,
    penalise_intercept: bool,
) -> Problems:
    """All values of C times all folds, the folds running faster."""
    dtype = design.weights.dtype
    fold = torch.tensor(list(folds) * len(Cs), dtype=torch.int64)
    C = torch.from_numpy(np.repeat(np.asarray(Cs), len(folds))).to(dtype)[:, None, None]
    factors = None if positive is None else torch.from_numpy(positive).to(dtype)[fold]
    return Problems(loss, C, fold, factors, penalise_intercept)


def _zeros(p: int, classes: int, loss: Loss, design: Design) -> tuple[Tensor, Tensor]:
    k = 1 if classes == 2 and loss != "softmax" else classes
    shape = (p, k, design.d)
    dtype = design.weights.dtype
    return torch.zeros(shape, dtype=dtype), torch.zeros((*shape[:2], 1), dtype=dtype)


def fold_weights(rows: TrainingRows, class_weight: ClassWeight) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of all rows in each fold's training, and the folds' class factors.

    Returns
    -------
    weights : ndarray of shape (folds + 1, n * views), float32
        Zero where a fold does not train on a row; the last one is the fit on all rows. An
        image's weight is shared out among its views.
    factors : ndarray of shape (folds + 1, k)
        See `class_factors`.
    """
    images = len(rows.codes)
    masks = np.zeros((len(rows.folds) + 1, images), dtype=np.float32)
    for fold, (train, _) in enumerate(rows.folds):
        masks[fold, train] = 1.0
    masks[-1] = 1.0
    if rows.weight is not None or rows.views > 1:
        masks *= ((1.0 if rows.weight is None else rows.weight) / np.float32(rows.views)).astype(
            np.float32
        )
    factors = np.stack([class_factors(class_weight, rows.classes, rows.codes, m) for m in masks])
    return masks if rows.views == 1 else np.repeat(masks, rows.views, axis=1), factors


def out_of_fold(design: Design, rows: TrainingRows, W: Tensor, b: Tensor) -> Iterator[np.ndarray]:
    """Yield, for each setting, the scores of each fold's solution on its validation rows.

    Parameters
    ----------
    design : Design
        The rows, with one set of weights a fold and a last one for the fit on all rows.
    rows : TrainingRows
        The same rows.
    W, b : Tensor of shape (settings, folds, k, d) and (settings, folds, k, 1)
        Solutions in standardised coordinates.

    Yields
    ------
    ndarray of shape (images, k), float32
        Means over the views, and over the folds that validate an image; NaN where none does. One
        column for two classes becomes two, as in `featcache.heads.logits`.
    """
    at_a_time = max(1, _SCORES // (4 * design.n * W.shape[2]))
    valid = np.zeros((len(rows.folds), len(rows.codes)), dtype=bool)
    for fold, (_, images) in enumerate(rows.folds):
        valid[fold, images] = True
    valid = np.repeat(valid, rows.views, axis=1)[:, design.order]
    Wg = W * design.ratios[:-1, None]
    offset = b - (Wg * design.means[:-1, None]).sum(dim=3, keepdim=True)
    for first in range(0, len(W), at_a_time):
        some = slice(first, first + at_a_time)
        yield from _validate(design, rows, valid, Wg[some], offset[some])


def _validate(
    design: Design, rows: TrainingRows, valid: np.ndarray, Wg: Tensor, offset: Tensor
) -> Iterator[np.ndarray]:
    settings, _, k, d = Wg.shape
    total = np.zeros((settings, k, design.n), dtype=np.float32)

    def add(block: slice, raw: Tensor | np.ndarray) -> None:
        X = design.standardised(raw)
        for fold in np.flatnonzero(valid[:, block].any(axis=1)).tolist():
            scores = product(Wg[:, fold].reshape(-1, d), X.T).reshape(settings, k, -1)
            values = scores.numpy() + offset[:, fold].numpy()
            total[:, :, block] += values * valid[fold, block]

    with Workers.start() as workers:
        for _ in workers.in_order(partial(add, *pair) for pair in design.blocks(settings * k)):
            pass
    count = valid.sum(axis=0)
    total[:, :, count == 0] = np.nan
    total /= np.maximum(count, 1).astype(np.float32)
    for one in total:
        ordered = np.empty((design.n, k), dtype=np.float32)
        ordered[design.order] = one.T
        mean: np.ndarray = ordered.reshape(len(rows.codes), rows.views, k).mean(axis=1)
        yield np.concatenate([-mean / 2, mean / 2], axis=1) if k == 1 else mean


@dataclass(frozen=True)
class _Tried:
    """One treatment and C on all folds."""

    candidate: Candidate
    logits: np.ndarray
    treatment: str
    C: float
    W: Tensor  # (folds, k, d)
    b: Tensor


class LinearSearch:
    """Cross-validated choice of treatment and C for one of the linear classifiers.

    Values of C are solved from the smallest (which converges in a few passes) upwards, as many at
    a time as fill a matrix product, each from the solutions before it. The search goes no further
    upwards once two values of C in a row have scored below the best.

    The weights of a logistic regression grow nearly linearly with log C where it separates the
    classes well, so its path is started from the line through the two solutions before: on 10,000
    x 2,048 features of 100 classes, the path of 8 values took 45 passes instead of 117. The squared
    hinge's weights stop growing, and from such starts take longer.
    """

    def __init__(
        self,
        rows: TrainingRows,
        estimator: IterativeModel,
        *,
        head: str,
        scoring: Scoring = "accuracy",
        memory: int | None = None,
    ) -> None:
        self.rows = rows
        self.estimator = estimator
        self.name = head
        self.scoring = scoring
        self.memory = memory
        self.loss = estimator._loss(len(rows.classes))
        self.candidates: list[Candidate] = []
        self.best: _Tried | None = None
        self._before_best: _Tried | None = None
        self._codes = np.repeat(rows.codes, rows.views)
        self._row_weights, factors = fold_weights(rows, estimator.class_weight)
        self._loss_weights, self._positive = loss_weights(
            self.loss, self._row_weights, self._codes, factors
        )
        self._designs: dict[str, Design] = {}

    def _design(self, treatment: str) -> Design:
        if treatment not in self._designs:
            # One copy of the features at a time, besides the caller's.
            self._designs.clear()
            self._designs[treatment] = Design.build(
                self.rows.X,
                self._codes,
                self._row_weights,
                self._loss_weights,
                standardize=self.estimator.standardize,
                transform=TREATMENTS[treatment][1],
            )
        return self._designs[treatment]

    def _group_size(self, d: int) -> int:
        """Values of C to solve at a time."""
        folds, k = len(self.rows.folds), len(self.rows.classes)
        if not isinstance(self.rows.X, FeatureBlocks):
            return max(1, round(_COLUMNS[self.loss] / (folds * k)))
        # From disk a pass is dear: as many as the solver's state (about 30 copies of the
        # weights) leaves room for.
        room = (self.memory or 1 << 30) // 2
        return max(1, room // (30 * 4 * folds * k * d))

    def path(
        self,
        treatment: str,
        Cs: Sequence[float],
        *,
        tol: float = _SEARCH_TOL,
        stop_early: bool = True,
        start: _Tried | None = None,
    ) -> None:
        """Try all `Cs`, smallest first, and keep the best; the smaller one where scores tie."""
        design = self._design(treatment)
        size = self._group_size(design.d)
        ordered = sorted(Cs)
        folds = range(len(self.rows.folds))
        scores: list[float] = []
        before: _Tried | None = None
        for first in range(0, len(ordered), size):
            group = ordered[first : first + size]
            if start is None:
                W, b = _zeros(len(group) * len(folds), len(self.rows.classes), self.loss, design)
            else:
                starts = [self._start(C, start, before) for C in group]
                W, b = (torch.cat(parts) for parts in zip(*starts, strict=True))
            problems = self._problems(design, group, folds)
            solution = minimise(design, problems, W, b, tol=tol, max_iter=self.estimator.max_iter)
            for tried in self._judge(design, treatment, group, solution):
                # Of the solutions that the next ones start from, the scores are not needed.
                before, start = start, replace(tried, logits=tried.logits[:0].copy())
                self.candidates.append(tried.candidate)
                scores.append(tried.candidate.score)
                if self.best is None or scores[-1] > self.best.candidate.score:
                    self.best, self._before_best = tried, before
            if stop_early and len(scores) > 2 and max(scores[-2:]) < max(scores):
                break

    def scan(self, treatments: Sequence[str], Cs: Sequence[float], *, refine: bool) -> _Tried:
        """Try values of C with every treatment, and return the best; see `search_linear`."""
        for treatment in treatments:
            near = _within_a_decade(Cs, self.best.C) if refine and self.best is not None else Cs
            self.path(treatment, near, stop_early=refine)
        assert self.best is not None, "nothing was tried"
        return self.best

    def _start(self, C: float, last: _Tried, before: _Tried | None) -> tuple[Tensor, Tensor]:
        """Return where to start for C: the last solution, or the line through the last two."""
        if before is None or before.C == last.C or self.loss == "squared_hinge":
            return last.W, last.b
        ahead = float(np.log(C / last.C) / np.log(last.C / before.C))
        return torch.lerp(before.W, last.W, 1 + ahead), torch.lerp(before.b, last.b, 1 + ahead)

    def _problems(self, design: Design, Cs: Sequence[float], folds: Sequence[int]) -> Problems:
        penalized = self.estimator._penalizes_intercept()
        return _problems(design, self.loss, Cs, folds, self._positive, penalized)

    def _judge(
        self, design: Design, treatment: str, Cs: Sequence[float], solution: Solution
    ) -> Iterator[_Tried]:
        rows, folds = self.rows, len(self.rows.folds)
        W, b = (part.view(len(Cs), folds, *part.shape[1:]) for part in (solution.W, solution.b))
        for number, values in enumerate(out_of_fold(design, rows, W, b)):
            scores = score_folds(values, rows.codes, rows.classes, rows.folds, self.scoring)
            candidate = Candidate({"treatment": treatment, "C": Cs[number]}, scores)
            yield _Tried(candidate, values, treatment, Cs[number], W[number], b[number])

    def finish(self, search_seconds: float, notes: Sequence[str] = ()) -> SearchResult:
        """Fit the best on all rows, starting from the mean of its folds' solutions."""
        begin = time.perf_counter()
        chosen = self.best
        assert chosen is not None, "nothing was tried"
        design = self._design(chosen.treatment)
        everything = len(self.rows.folds)
        # More rows at the same C are a weaker penalty: as a larger C is on a fold's rows.
        mass = design.weights.sum(dim=1)
        more = float(mass[-1] / mass[:-1].mean())
        starts = zip(*self._start(chosen.C * more, chosen, self._before_best), strict=True)
        pairs = [unstandardise(design, fold, W, b) for fold, (W, b) in enumerate(starts)]
        W, b = standardise(
            design,
            everything,
            np.mean([w for w, _ in pairs], axis=0),
            np.mean([c for _, c in pairs], axis=0),
        )
        problems = self._problems(design, [chosen.C], [everything])
        solution = minimise(
            design,
            problems,
            W[None],
            b[None],
            tol=self.estimator.tol,
            max_iter=self.estimator.max_iter,
        )
        estimator: Any = self.estimator.set_params(C=chosen.C)
        estimator._keep(design, everything, solution, self.rows.classes)
        estimator = with_treatment(chosen.treatment, estimator, self.name)
        return SearchResult(
            head=self.name,
            estimator=estimator,
            best=chosen.candidate,
            candidates=tuple(self.candidates),
            classes=self.rows.classes,
            logits=chosen.logits,
            temperature=fit_temperature(chosen.logits, self.rows.codes, self.rows.weight),
            search_seconds=search_seconds,
            fit_seconds=time.perf_counter() - begin,
            notes=tuple(notes),
        )


def search_linear(
    rows: TrainingRows,
    estimator: IterativeModel,
    *,
    head: str,
    scoring: Scoring = "accuracy",
    memory: int | None = None,
    Cs: Sequence[float] = CS,
    treatments: Sequence[str] = tuple(TREATMENTS),
    refine: bool = True,
) -> SearchResult:
    """Choose treatment and C by cross-validation, coarse to fine, and fit on all rows.

    Parameters
    ----------
    rows : TrainingRows
        Training rows with their folds.
    estimator : LinearClassifier or LinearSVM
        Gives all other parameters, and is the one that is fitted.
    head : str
        Name of the head.
    scoring : str or callable
        See `featcache.heads.search.score_folds`.
    memory : int, optional
        Bytes to stay under when features are read from disk.
    Cs : list of float
        Coarse values of C.
    treatments : list of str
        Names from `featcache.heads.treatment.TREATMENTS`.
    refine : bool
        Whether to stop early on the way up, to try other treatments than the first only within
        a decade of the best so far, and at the end half a decade either side of the best.
        Otherwise exactly `Cs` are tried with every treatment. Of more than 100,000 rows, 20,000
        choose the treatment and a decade either side of C; a note says so.
    """
    start = time.perf_counter()
    notes = []
    some = _some_of(rows, memory) if refine else None
    if some is not None:
        first = LinearSearch(some, estimator, head=head, scoring=scoring)
        best = first.scan(treatments, Cs, refine=True)
        treatments, Cs = (best.treatment,), _within_a_decade(Cs, best.C)
        notes.append(
            f"{head} chose its treatment, and C to within a decade, on {len(some.codes):,} of "
            f"{len(rows.codes):,} images, a random part of each class."
        )
    search = LinearSearch(rows, estimator, head=head, scoring=scoring, memory=memory)
    best = search.scan(treatments, Cs, refine=refine)
    if refine:
        near = [float(f"{best.C * factor:.2g}") for factor in (10**-0.5, 10**0.5)]
        search.path(best.treatment, near, stop_early=False, start=best)
    return search.finish(time.perf_counter() - start, notes)


def _within_a_decade(Cs: Sequence[float], centre: float) -> list[float]:
    return [C for C in Cs if 0.09 < C / centre < 11]


def _some_of(rows: TrainingRows, memory: int | None) -> TrainingRows | None:
    """Return a part of many rows to choose roughly on; None where that does not pay or fit."""
    size = _SOME // rows.views
    if len(rows.codes) * rows.views <= _MANY:
        return None
    if 2 * 4 * size * rows.views * rows.X.shape[-1] > (memory or 1 << 30) // 2:
        return None
    chosen = stratified(rows.codes, size, random_state=0)
    folds = [
        (np.flatnonzero(np.isin(chosen, train)), np.flatnonzero(np.isin(chosen, valid)))
        for train, valid in rows.folds
    ]
    codes = rows.codes[chosen]
    for train, valid in folds:
        if len(np.unique(codes[train])) < len(rows.classes) or not len(valid):
            return None  # of a rare class, or a small validation part, too few were drawn
    X = (
        rows.X.take(rows.rows(chosen))
        if isinstance(rows.X, FeatureBlocks)
        else rows.features(chosen)
    )
    weight = None if rows.weight is None else rows.weight[chosen]
    return TrainingRows(X, codes, rows.classes, weight, folds, rows.views)
