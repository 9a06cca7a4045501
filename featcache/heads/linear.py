"""The linear heads: multinomial logistic regression, and the search that is shared with the SVM.

Both are one scikit-learn classifier on the solver of :mod:`featcache.heads.solver`; standardisation
is part of the model, and ends folded into `coef_`, so that prediction is one matrix product.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from featcache.heads.base import ClassWeight, Head, class_factors
from featcache.heads.rows import FeatureBlocks, TrainingRows
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
_COLUMNS: dict[Loss, int] = {"log": 100, "squared_hinge": 50}
_SEARCH_TOL, _TOL = 1e-4, 1e-6  # of what is chosen from; of the chosen setting and the last fit
_EASY, _ROUGH_TOL = 0.005, 1e-3  # a fit goes through values of C above the one, up to the other
# Rows above which treatment and the decade of C are chosen on a part of them, and that part.
_MANY = 100_000
_SOME = 20_000
_SCORES = 1 << 25  # bytes of out-of-fold scores computed in one pass


def loss_weights(
    loss: str,
    class_weight: ClassWeight,
    classes: np.ndarray,
    codes: np.ndarray,
    weights: np.ndarray,
) -> tuple[np.ndarray, Tensor | None]:
    """Return the weights (folds, n) in a loss, and factors (folds, k, 1) on the own class's.

    "balanced" counts the rows of each fold, as its own fit does: with a strong penalty, one row of
    a class more or less would move the scores by more than the features do. As in liblinear,
    one-vs-rest with more than two classes weights only the rows of the class that a problem is
    about.
    """
    by_fold = [class_factors(class_weight, classes, codes, own) for own in weights]
    factors = np.stack(by_fold).astype(weights.dtype)
    if (factors == 1.0).all():
        return weights, None
    if loss == "squared_hinge" and len(classes) > 2:
        return weights, torch.from_numpy(factors)[:, :, None]
    return weights * factors[:, codes], None


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
    loss: str

    def _fit(self, X: np.ndarray, codes: np.ndarray, weight: np.ndarray) -> list[Step]:
        return [self.solve(X, codes, weight)]

    def solve(
        self,
        X: np.ndarray | FeatureBlocks,
        codes: np.ndarray,
        weight: np.ndarray,
        treatment: Step | None = None,
    ) -> Matrix:
        """Return the step for rows in memory or in blocks, behind a row-wise treatment."""
        in_loss, positive = loss_weights(
            self.loss, self.class_weight, self.classes_, codes, weight[None]
        )
        design = Design.build(
            X, codes, weight[None], in_loss, standardize=self.standardize, treatment=treatment
        )
        self.coef_, self.intercept_ = unstandardise(design, 0, self._minimum(design, positive))
        return Matrix.of_scores(self.coef_, self.intercept_)

    def _minimum(self, design: Design, positive: Tensor | None) -> Tensor:
        """Return standardised weights, and the intercepts in the last column, (k, d + 1)."""
        raise NotImplementedError

    def fit_rows(self, rows: TrainingRows, treatment: str) -> list[Step]:
        """Fit behind a treatment on all rows, in memory or in blocks."""
        self.classes_, treat = rows.classes, TREATMENTS[treatment]
        matrix = self.solve(rows.X, rows.row_codes(), rows.weights(), treat)
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
        loss: Loss = "log",
        class_weight: ClassWeight = None,
        standardize: bool = True,
        tol: float = _TOL,
        max_iter: int = 1000,
    ) -> None:
        self.C = C
        self.loss: Loss = loss
        self.class_weight = class_weight
        self.standardize = standardize
        self.tol = tol
        self.max_iter = max_iter

    _positive = "C", "tol", "max_iter"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.loss not in ("log", "squared_hinge"):
            raise ValueError(f"loss is 'log' or 'squared_hinge', got {self.loss!r}.")

    def _minimum(self, design: Design, positive: Tensor | None) -> Tensor:
        # Logarithmic loss at large C is reached by decades: with 100 classes and C = 100 in 79
        # passes over the rows in place of 353.
        below = [self.C / 10**decades for decades in (4, 3, 2, 1)] if self.loss == "log" else []
        path = [_Start(0.0, _zeros(1, len(self.classes_), design))]
        self.n_iter_ = np.zeros(1, dtype=np.int64)
        for C in [*(one for one in below if one > _EASY), self.C]:
            problems = _problems(design, self.loss, [C], positive)
            tol = self.tol if C == self.C else max(self.tol, _ROUGH_TOL)
            V = _ahead(self.loss, C, path)
            solution = minimise(design, problems, V, tol=tol, max_iter=self.max_iter)
            self.n_iter_ += solution.passes
            if not solution.finished:
                warnings.warn(
                    f"LinearClassifier(C={C:g}) did not converge in "
                    f"max_iter={self.max_iter} passes: scale the features, or raise it.",
                    ConvergenceWarning,
                    stacklevel=5,
                )
            path.append(_Start(C, solution.V))
        return path[-1].V[0]


def _problems(design: Design, loss: Loss, Cs: Sequence[float], positive: Tensor | None) -> Problems:
    """All values of C times all folds, the folds running faster."""
    weights, folds = design.weights, len(design.weights)
    fold = torch.arange(folds).repeat(len(Cs))
    C = torch.tensor(Cs, dtype=weights.dtype).repeat_interleave(folds)[:, None, None]
    return Problems(loss, C, fold, None if positive is None else positive[fold])


def _zeros(p: int, classes: int, design: Design) -> Tensor:
    k = 1 if classes == 2 else classes
    return torch.zeros((p, k, design.d + 1), dtype=design.weights.dtype)


def fold_weights(rows: TrainingRows) -> np.ndarray:
    """Return weights (folds, n * views), float32, of all rows; 0 where a fold leaves one out."""
    weights = np.zeros((len(rows.folds), len(rows) * rows.views), dtype=np.float32)
    for own, (train, _) in zip(weights, rows.folds, strict=True):
        own[rows.rows(train)] = rows.weights(train)
    return weights


def out_of_fold(design: Design, rows: TrainingRows, V: Tensor) -> Iterator[np.ndarray]:
    """Yield, for each setting, the scores of each fold's solution on its validation rows.

    Parameters
    ----------
    design : Design
        The rows, with one set of weights a fold.
    rows : TrainingRows
        The same rows.
    V : Tensor of shape (settings, folds, k, d + 1)
        Solutions in standardised coordinates, the intercept in the last column.

    Yields
    ------
    ndarray of shape (images, k), float32
        Means over the views, and over the folds that validate an image; NaN where none does. One
        column for two classes becomes two, -f/2 and f/2.
    """
    at_a_time = max(1, _SCORES // (4 * design.n * V.shape[2]))
    valid = np.zeros((len(rows.folds), design.n), dtype=bool)
    for own, (_, images) in zip(valid, rows.folds, strict=True):
        own[rows.rows(images)] = True
    valid = valid[:, design.order]
    for first in range(0, len(V), at_a_time):
        some = V[first : first + at_a_time]
        yield from _validate(design, rows, valid, *design.affine(some, torch.arange(len(valid))))


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
    out_of_core: ClassVar[bool] = True
    loss: ClassVar[Loss] = "log"

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
            paths.sharpen()

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
    loss: ClassVar[Loss] = "squared_hinge"


@dataclass(frozen=True)
class _Start:
    """The solutions of all folds at one C, from which others start; zeros at C = 0."""

    C: float
    V: Tensor  # (folds, k, d + 1)


def _ahead(loss: Loss, C: float, path: Sequence[_Start]) -> Tensor:
    """Return where to start for C: the last solution, or the line through the last two."""
    before, last = path[-2] if len(path) > 1 else path[-1], path[-1]
    if before.C in (0.0, last.C) or loss == "squared_hinge":
        return last.V
    ahead = float(np.log(C / last.C) / np.log(last.C / before.C))
    return torch.lerp(before.V, last.V, 1 + ahead)


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
        self.loss: Loss = head.loss
        self.best: _Start | None = None  # the solutions of the search's best
        self._codes, self._row_weights = rows.row_codes(), fold_weights(rows)
        self._loss_weights, self._positive = loss_weights(
            self.loss, head.options.class_weight, rows.classes, self._codes, self._row_weights
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
                treatment=TREATMENTS[treatment],
            )
        return self._designs[treatment]

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
        ordered = sorted(Cs)
        folds, classes = len(self.rows.folds), len(self.rows.classes)
        # The same from disk as in memory: other starts end within the tolerance, but elsewhere.
        size = max(1, round(_COLUMNS[self.loss] / (folds * classes)))
        scores: list[float] = []
        path = [start or _Start(0.0, _zeros(folds, classes, design))]
        for first in range(0, len(ordered), size):
            group = ordered[first : first + size]
            V = torch.cat([_ahead(self.loss, C, path) for C in group])
            problems = _problems(design, self.loss, group, self._positive)
            solution = minimise(design, problems, V, tol=tol)
            self.search.fitted(len(V))
            if not solution.finished:
                most = f"{int(solution.passes.max()):,} passes over the rows"
                self.search.notes.append(
                    f"{treatment}, C {group[-1]:g} did not converge in {most}."
                )
            V = solution.V.view(len(group), folds, *V.shape[1:])
            for C, own, values in zip(group, V, out_of_fold(design, self.rows, V), strict=True):
                trial = self.search.tried({"treatment": treatment, "C": C}, values)
                path = [*path, _Start(C, own)][-2:]
                if self.search.best is trial:
                    self.best = path[-1]
                scores.append(trial.score)
                # What was solved beside it is left out.
                if stop_early and len(scores) > 2 and max(scores[-2:]) < max(scores):
                    return

    def sharpen(self) -> None:
        """Solve the best setting's folds as closely as the last fit, and judge it by that."""
        trials, best = self.search.trials, self.search.best
        for one in trials:
            one.rough = True
        C = [best.params["C"]]
        self.follow(best.params["treatment"], C, tol=_TOL, stop_early=False, start=self.best)
        trials[trials.index(best)] = trials.pop()


def _within_a_decade(Cs: Sequence[float], centre: float) -> list[float]:
    return [C for C in Cs if 0.09 < C / centre < 11]
