"""The linear heads: multinomial logistic regression, and the search that is shared with the SVM.

Both are one scikit-learn classifier on the solver of :mod:`featcache.heads.solver`; standardisation
is part of the model, and ends folded into `coef_`, so that prediction is one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from featcache.heads.base import ClassWeight, Head
from featcache.heads.rows import FeatureBlocks, TrainingRows, Transform
from featcache.heads.search import HeadKind, Params, Search, Trial
from featcache.heads.solver import (
    Design,
    Loss,
    Problems,
    Workers,
    minimise,
    product,
    unstandardise,
)
from featcache.heads.steps import Matrix, Step
from featcache.heads.treatment import TREATMENTS

CS: tuple[float, ...] = tuple(float(10.0**power) for power in range(-5, 3))
"""Coarse values of C; a search refines around the best by half a decade."""

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


class LinearModel(Head):
    """Base of the classifiers that are one `Matrix`: of linear loss or of ridge regression.

    Attributes
    ----------
    coef_ : ndarray of shape (k, d) or (1, d), float64
        Weights for raw features: the standardisation is folded in.
    intercept_ : ndarray of shape (k,) or (1,), float64
        Intercepts.
    """

    class_weight: ClassWeight
    standardize: bool

    def _fit(self, X: np.ndarray, codes: np.ndarray, weight: np.ndarray) -> list[Step]:
        return [self.solve(X, codes, weight)]

    def solve(
        self,
        X: np.ndarray | FeatureBlocks,
        codes: np.ndarray,
        weight: np.ndarray,
        transform: Transform | None = None,
    ) -> Matrix:
        """Return the step for rows in memory or in blocks, behind a row-wise treatment."""
        factors = class_factors(self.class_weight, self.classes_, codes, weight)[None]
        in_loss, positive = self._loss_weights(weight[None], codes, factors)
        design = Design.build(
            X, codes, weight[None], in_loss, standardize=self.standardize, transform=transform
        )
        self.coef_, self.intercept_ = unstandardise(design, 0, *self._minimum(design, positive))
        return Matrix.of_scores(self.coef_, self.intercept_)

    def _loss_weights(
        self, weights: np.ndarray, codes: np.ndarray, factors: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return weights in the loss (1, n), and factors (1, k) of one-vs-rest problems."""
        raise NotImplementedError

    def _minimum(self, design: Design, positive: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """Return standardised weights (k, d) and intercepts (k, 1)."""
        raise NotImplementedError

    def fit_rows(self, rows: TrainingRows, treatment: str) -> list[Step]:
        """Fit behind a treatment on all rows, in memory or in blocks."""
        self.classes_, treat = rows.classes, TREATMENTS[treatment]
        matrix = self.solve(rows.X, rows.row_codes(), rows.every_weight(), treat)
        return [matrix] if treat is None else [treat, matrix]


class LinearClassifier(LinearModel):
    """A linear classifier on standardised features: logistic regression, or a linear SVM.

    Minimises ``C * sum_i s_i loss_i + ||w||^2 / 2`` for standardised features, with a free
    intercept. Two classes have one vector of weights. The loss is that of

    - scikit-learn's `LogisticRegression` ("log"), multinomial with more than two classes, or
    - ``LinearSVC(loss="squared_hinge")``, one against the rest: ``max(0, 1 - t_i f(x_i))^2``.

    Parameters
    ----------
    C : float
        Weight of the loss.
    loss : "log" or "squared_hinge"
        The loss.
    class_weight : "balanced", dict or None
        Weights of the classes. As in liblinear, those of a squared hinge weight, with more than
        two classes, the rows of the class that a problem is about, not the rest.
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
    steps_ : list of Step
        The same as one `Matrix`.
    n_features_in_ : int
        Number of columns.
    n_iter_ : ndarray of shape (1,)
        Passes over the rows.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        loss: str = "log",
        class_weight: ClassWeight = None,
        standardize: bool = True,
        tol: float = 1e-6,
        max_iter: int = 1000,
    ) -> None:
        self.C = C
        self.loss = loss
        self.class_weight = class_weight
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter

    def _check_parameters(self) -> None:
        if not self.C > 0 or not self.tol > 0 or not self.max_iter > 0:
            raise ValueError(
                f"C, tol and max_iter must be positive, got {self.C}, {self.tol}, {self.max_iter}."
            )
        if self.loss not in ("log", "squared_hinge"):
            raise ValueError(f"loss is 'log' or 'squared_hinge', got {self.loss!r}.")

    def _loss_weights(
        self, weights: np.ndarray, codes: np.ndarray, factors: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        return loss_weights(solver_loss(self.loss, factors.shape[1]), weights, codes, factors)

    def _minimum(self, design: Design, positive: np.ndarray | None) -> tuple[Tensor, Tensor]:
        k = len(self.classes_)
        loss = solver_loss(self.loss, k)
        problems, zeros = (
            _problems(design, loss, [self.C], [0], positive),
            _zeros(1, k, loss, design),
        )
        solution = minimise(design, problems, *zeros, tol=self.tol, max_iter=self.max_iter)
        self.n_iter_ = solution.passes
        return solution.W[0], solution.b[0]


def solver_loss(loss: str, k: int) -> Loss:
    """Return what the solver calls a loss for `k` classes."""
    if loss == "squared_hinge":
        return "squared_hinge"
    return "logistic" if k == 2 else "softmax"


def _problems(
    design: Design,
    loss: Loss,
    Cs: Sequence[float],
    folds: Sequence[int],
    positive: np.ndarray | None,
) -> Problems:
    """All values of C times all folds, the folds running faster."""
    dtype = design.weights.dtype
    fold = torch.tensor(list(folds) * len(Cs), dtype=torch.int64)
    C = torch.from_numpy(np.repeat(np.asarray(Cs), len(folds))).to(dtype)[:, None, None]
    factors = None if positive is None else torch.from_numpy(positive).to(dtype)[fold]
    return Problems(loss, C, fold, factors)


def _zeros(p: int, classes: int, loss: Loss, design: Design) -> tuple[Tensor, Tensor]:
    k = 1 if classes == 2 and loss != "softmax" else classes
    shape = (p, k, design.d)
    dtype = design.weights.dtype
    return torch.zeros(shape, dtype=dtype), torch.zeros((*shape[:2], 1), dtype=dtype)


def fold_weights(rows: TrainingRows, class_weight: ClassWeight) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of all rows in each fold's training, and the folds' class factors.

    Returns
    -------
    weights : ndarray of shape (folds, n * views), float32
        Zero where a fold does not train on a row. An image's weight is shared out among its views.
    factors : ndarray of shape (folds, k)
        See `class_factors`.
    """
    images = len(rows.codes)
    masks = np.zeros((len(rows.folds), images), dtype=np.float32)
    for fold, (train, _) in enumerate(rows.folds):
        masks[fold, train] = 1.0
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
        The rows, with one set of weights a fold.
    rows : TrainingRows
        The same rows.
    W, b : Tensor of shape (settings, folds, k, d) and (settings, folds, k, 1)
        Solutions in standardised coordinates.

    Yields
    ------
    ndarray of shape (images, k), float32
        Means over the views, and over the folds that validate an image; NaN where none does. One
        column for two classes becomes two, -f/2 and f/2.
    """
    at_a_time = max(1, _SCORES // (4 * design.n * W.shape[2]))
    valid = np.zeros((len(rows.folds), len(rows.codes)), dtype=bool)
    for fold, (_, images) in enumerate(rows.folds):
        valid[fold, images] = True
    valid = np.repeat(valid, rows.views, axis=1)[:, design.order]
    Wg = W * design.ratios[:, None]
    offset = b - (Wg * design.means[:, None]).sum(dim=3, keepdim=True)
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
class LinearHead(HeadKind):
    """Multinomial logistic regression: treatment and C, coarse to fine.

    Attributes
    ----------
    treatments : tuple of str
        Names from `featcache.heads.treatment.TREATMENTS`.
    Cs : tuple of float
        Coarse values of C.
    refine : bool
        Whether to stop early on the way up, to try other treatments than the first only within
        a decade of the best so far, and at the end half a decade either side of the best.
        Otherwise exactly `Cs` are tried with every treatment. Of more than 100,000 rows, 20,000
        choose the treatment and a decade either side of C; a note says so.
    """

    treatments: Sequence[str] = tuple(TREATMENTS)
    Cs: Sequence[float] = CS
    refine: bool = True
    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "multinomial logistic regression"
    out_of_core: ClassVar[bool] = True
    loss: ClassVar[str] = "log"

    def explore(self, rows: TrainingRows, search: Search) -> None:
        """Try treatments and values of C."""
        treatments, Cs = self.treatments, self.Cs
        some = min(_SOME // rows.views, rows.images_in(self.options.room // 4))
        if self.refine and len(rows) * rows.views > _MANY and some >= _SOME // rows.views:
            part = rows.sample(some, random_state=0)
            rough = Search(part, self.options)
            best = self._scan(_Paths(self, part, rough), treatments, Cs).params
            treatments, Cs = (best["treatment"],), _within_a_decade(Cs, best["C"])
            search.notes.append(
                f"{self.name} chose its treatment, and C to within a decade, on {len(part):,} of "
                f"{len(rows):,} images, a random part of each class."
            )
        paths = _Paths(self, rows, search)
        best = self._scan(paths, treatments, Cs).params
        if self.refine:
            near = [float(f"{best['C'] * factor:.2g}") for factor in (10**-0.5, 10**0.5)]
            paths.follow(best["treatment"], near, stop_early=False, start=paths.best)

    def _scan(self, paths: _Paths, treatments: Sequence[str], Cs: Sequence[float]) -> Trial:
        for treatment in treatments:
            near = Cs
            if self.refine and paths.best is not None:
                near = _within_a_decade(Cs, paths.best.C)
            paths.follow(treatment, near, stop_early=self.refine)
        return paths.search.best

    def fit(self, rows: TrainingRows, params: Params) -> list[Step]:
        """Fit on all rows, in memory or in blocks."""
        estimator = LinearClassifier(
            params["C"], loss=self.loss, class_weight=self.options.class_weight
        )
        return estimator.fit_rows(rows, params["treatment"])


@dataclass(frozen=True)
class LinearSVMHead(LinearHead):
    """Linear SVM: treatment and C, as `LinearHead`."""

    name: ClassVar[str] = "svm"
    summary: ClassVar[str] = "linear SVM (squared hinge, one against the rest)"
    loss: ClassVar[str] = "squared_hinge"


@dataclass(frozen=True)
class _Start:
    """The solutions of all folds at one C, from which others start."""

    C: float
    W: Tensor  # (folds, k, d)
    b: Tensor


class _Paths:
    """Paths of solutions over C on all folds, one treatment after the other.

    Values of C are solved from the smallest (which converges in a few passes) upwards, as many at
    a time as fill a matrix product, each from the solutions before it. A path goes no further
    upwards once two values of C in a row have scored below its best.

    The weights of a logistic regression grow nearly linearly with log C where it separates the
    classes well, so its path is started from the line through the two solutions before: on 10,000
    x 2,048 features of 100 classes, the path of 8 values took 45 passes instead of 117. The squared
    hinge's weights stop growing, and from such starts take longer.
    """

    def __init__(self, head: LinearHead, rows: TrainingRows, search: Search) -> None:
        self.rows, self.search, self.options = rows, search, head.options
        self.loss = solver_loss(head.loss, len(rows.classes))
        self.best: _Start | None = None  # the solutions of the search's best
        self._codes = rows.row_codes()
        self._row_weights, factors = fold_weights(rows, head.options.class_weight)
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
                transform=TREATMENTS[treatment],
            )
        return self._designs[treatment]

    def _group_size(self, d: int) -> int:
        """Values of C to solve at a time."""
        folds, k = len(self.rows.folds), len(self.rows.classes)
        if not isinstance(self.rows.X, FeatureBlocks):
            return max(1, round(_COLUMNS[self.loss] / (folds * k)))
        # From disk a pass is dear: as many as the solver's state (about 30 copies of the
        # weights) leaves room for.
        return max(1, self.options.room // 2 // (30 * 4 * folds * k * d))

    def follow(
        self,
        treatment: str,
        Cs: Sequence[float],
        *,
        tol: float = _SEARCH_TOL,
        stop_early: bool = True,
        start: _Start | None = None,
    ) -> None:
        """Try all `Cs`, smallest first."""
        design = self._design(treatment)
        size = self._group_size(design.d)
        ordered = sorted(Cs)
        folds = range(len(self.rows.folds))
        scores: list[float] = []
        before: _Start | None = None
        for first in range(0, len(ordered), size):
            group = ordered[first : first + size]
            if start is None:
                W, b = _zeros(len(group) * len(folds), len(self.rows.classes), self.loss, design)
            else:
                starts = [self._start(C, start, before) for C in group]
                W, b = (torch.cat(parts) for parts in zip(*starts, strict=True))
            problems = _problems(design, self.loss, group, folds, self._positive)
            solution = minimise(design, problems, W, b, tol=tol)
            self.search.fitted(len(W))
            W, b = (
                part.view(len(group), len(folds), *part.shape[1:])
                for part in (solution.W, solution.b)
            )
            for number, values in enumerate(out_of_fold(design, self.rows, W, b)):
                C = group[number]
                trial = self.search.tried({"treatment": treatment, "C": C}, values)
                before, start = start, _Start(C, W[number], b[number])
                if self.search.best.params == trial.params:
                    self.best = start
                scores.append(trial.score)
            if stop_early and len(scores) > 2 and max(scores[-2:]) < max(scores):
                break

    def _start(self, C: float, last: _Start, before: _Start | None) -> tuple[Tensor, Tensor]:
        """Return where to start for C: the last solution, or the line through the last two."""
        if before is None or before.C == last.C or self.loss == "squared_hinge":
            return last.W, last.b
        ahead = float(np.log(C / last.C) / np.log(last.C / before.C))
        return torch.lerp(before.W, last.W, 1 + ahead), torch.lerp(before.b, last.b, 1 + ahead)


def _within_a_decade(Cs: Sequence[float], centre: float) -> list[float]:
    return [C for C in Cs if 0.09 < C / centre < 11]
