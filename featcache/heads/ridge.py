"""Ridge regression on class indicators: the head that is solved in closed form.

One pass over the rows gives the Gram matrix of each part of them that is on the same side in all
folds. Those of a fold's training rows are a sum of such parts, standardisation is an affine map
of it, and one Cholesky factorisation gives the weights of every class. So does a path of
penalties on all folds cost one pass, some factorisations of d x d matrices, and a second pass to
score the validation rows.

Classic leave-one-out would be cheaper still, but puts the copies of an image, or the members of a
group, on both sides; the penalty is therefore chosen on the same folds as with all other heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh
from torch import Tensor

from featcache.heads.base import ClassWeight
from featcache.heads.linear import LinearModel, fold_weights, out_of_fold
from featcache.heads.rows import TrainingRows
from featcache.heads.search import HeadKind, Params, Search
from featcache.heads.solver import Design
from featcache.heads.steps import Step
from featcache.heads.treatment import TREATMENTS

ALPHAS: tuple[float, ...] = (100.0, 10.0, 3.0, 1.0, 0.3, 1e-1, 1e-2, 1e-3)
"""Penalties that are tried, in units of the number of rows; the first wins where scores tie."""


class Ridge(LinearModel):
    """Least squares on class indicators of -1 and 1, with a penalty on the weights.

    Minimises ``sum_i s_i |f(x_i) - t_i|^2 + alpha * ||w||^2`` for standardised features, as
    scikit-learn's `RidgeClassifier` behind a scaler, with a free intercept.

    Parameters
    ----------
    alpha : float
        Strength of the penalty.
    class_weight : "balanced", dict or None
        Weights of the classes.
    standardize : bool
        Whether columns are scaled to unit deviation first.

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
        Labels.
    coef_ : ndarray of shape (k, d) or (1, d), float64
        Weights for raw features.
    intercept_ : ndarray of shape (k,) or (1,), float64
        Intercepts.
    steps_ : list of Step
        The same as one `Matrix`.
    n_features_in_ : int
        Number of columns.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        class_weight: ClassWeight = None,
        standardize: bool = True,
    ) -> None:
        self.alpha = alpha
        self.class_weight = class_weight
        self.standardize = standardize

    def _check_parameters(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha must be positive, got {self.alpha}.")

    def _loss_weights(
        self, weights: np.ndarray, codes: np.ndarray, factors: np.ndarray
    ) -> tuple[np.ndarray, None]:
        return weights * factors[:, codes], None

    def _minimum(self, design: Design, positive: np.ndarray | None) -> tuple[Tensor, Tensor]:
        sums = _sums(design, len(self.classes_))[0]
        W, b = _solutions(design, sums, 0, [self.alpha])
        return W[0], b[0]


@dataclass
class _Sums:
    """Weighted sums over some rows, in the design's coordinates."""

    weight: float
    x: np.ndarray  # (d,)
    t: np.ndarray  # (k,)
    xx: np.ndarray  # (d, d)
    xt: np.ndarray  # (d, k)

    def __iadd__(self, other: _Sums) -> _Sums:
        self.weight += other.weight
        for mine, yours in (
            (self.x, other.x),
            (self.t, other.t),
            (self.xx, other.xx),
            (self.xt, other.xt),
        ):
            mine += yours
        return self

    @classmethod
    def zero(cls, d: int, k: int) -> _Sums:
        return cls(0.0, np.zeros(d), np.zeros(k), np.zeros((d, d)), np.zeros((d, k)))

    def add(self, X: np.ndarray, T: np.ndarray, weight: np.ndarray) -> None:
        """Add rows (r, d) with targets (r, k) and weights (r,)."""
        weighted = X * weight[:, None]
        self.weight += float(weight.sum(dtype=np.float64))
        self.x += weighted.sum(axis=0, dtype=np.float64)
        self.t += weight @ T
        self.xx += X.T @ weighted
        self.xt += weighted.T @ T


def _sums(design: Design, classes: int) -> list[_Sums]:
    """Return the sums of each fold's training rows, from one pass.

    Rows with the same weights in all folds up to being left out are summed once.
    """
    weights = design.weights.numpy()
    largest = weights.max(axis=0)
    used = weights > 0
    shared = bool(((weights == largest) | ~used).all())
    k = 1 if classes == 2 else classes
    d, codes = design.d, design.codes.numpy()
    if not shared:
        folds = [_Sums.zero(d, k) for _ in weights]
        for rows, block in design.blocks(d):
            X = design.standardised(block)
            T = _targets(codes[rows], k, X.numpy().dtype)
            for one, weight in zip(folds, weights, strict=True):
                one.add(X.numpy(), T, weight[rows])
        return folds
    keys, pattern = np.unique(np.packbits(used, axis=0).T, axis=0, return_inverse=True)
    parts = [_Sums.zero(d, k) for _ in keys]
    for rows, block in design.blocks(d):
        X = design.standardised(block)
        T, inside = _targets(codes[rows], k, X.numpy().dtype), pattern[rows]
        for number in np.unique(inside).tolist():
            some = inside == number
            whole = bool(some.all())
            features = X.numpy() if whole else X.numpy()[some]
            parts[number].add(features, T[some], largest[rows][some])
    folds = [_Sums.zero(d, k) for _ in weights]
    for number, part in enumerate(parts):
        members = used[:, np.flatnonzero(pattern == number)[0]]
        for fold in np.flatnonzero(members).tolist():
            folds[fold] += part
    return folds


def _targets(codes: np.ndarray, k: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Return indicators of -1 and 1, (r, k); of the second class where there are two."""
    own = codes[:, None] == (np.arange(k) if k > 1 else np.array([1]))
    targets: np.ndarray = (own * 2 - 1).astype(dtype)
    return targets


def _solutions(
    design: Design, sums: _Sums, fold: int, alphas: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return standardised weights (alphas, k, d) and intercepts (alphas, k, 1) of one fold."""
    ratio = design.ratios[fold].double().numpy()
    mean, target = sums.x / sums.weight, sums.t / sums.weight
    gram = sums.xx - sums.weight * np.outer(mean, mean)
    gram *= np.outer(ratio, ratio)
    right = (sums.xt - sums.weight * np.outer(mean, target)) * ratio[:, None]
    away = (mean - design.means[fold].double().numpy()) * ratio
    dtype = design.sample.dtype
    W = np.empty((len(alphas), right.shape[1], design.d), dtype=dtype)
    b = np.empty((len(alphas), right.shape[1], 1), dtype=dtype)
    for number, alpha in enumerate(alphas):
        penalised = gram.copy()
        penalised[np.diag_indices_from(penalised)] += alpha
        try:
            found = cho_solve(cho_factor(penalised, overwrite_a=True), right)
        except LinAlgError:
            # With fewer rows than columns the products' rounding makes null directions negative.
            found = _solve_clipped(gram, alpha, right)
        W[number] = found.T
        b[number, :, 0] = target - away @ found
    return torch.from_numpy(W), torch.from_numpy(b)


def _solve_clipped(gram: np.ndarray, alpha: float, right: np.ndarray) -> np.ndarray:
    """Solve ``(gram + alpha I) w = right`` with the negative eigenvalues of `gram` taken as 0."""
    values, vectors = eigh(gram)
    solution: np.ndarray = vectors @ (
        (vectors.T @ right) / (np.maximum(values, 0) + alpha)[:, None]
    )
    return solution


@dataclass(frozen=True)
class RidgeHead(HeadKind):
    """Ridge regression on class indicators: treatment and penalty.

    Attributes
    ----------
    treatments : tuple of str
        Names from `featcache.heads.treatment.TREATMENTS`.
    alphas : tuple of float
        Penalties, in units of the number of rows.
    """

    treatments: Sequence[str] = tuple(TREATMENTS)
    alphas: Sequence[float] = ALPHAS
    name: ClassVar[str] = "ridge"
    summary: ClassVar[str] = "ridge regression on class indicators"
    out_of_core: ClassVar[bool] = True

    def explore(self, rows: TrainingRows, search: Search) -> None:
        """Solve all penalties on all folds, treatment by treatment."""
        weights, factors = fold_weights(rows, self.options.class_weight)
        codes, folds = rows.row_codes(), range(len(rows.folds))
        in_loss = weights * np.take(factors, codes, axis=1)
        penalties = [alpha * len(rows) for alpha in self.alphas]
        for treatment in self.treatments:
            transform = TREATMENTS[treatment]
            design = Design.build(rows.X, codes, weights, in_loss, transform=transform)
            sums = _sums(design, len(rows.classes))
            solved = [_solutions(design, sums[fold], fold, penalties) for fold in folds]
            search.fitted(len(folds) * len(penalties))
            W, b = (torch.stack(parts, dim=1) for parts in zip(*solved, strict=True))
            for alpha, values in zip(penalties, out_of_fold(design, rows, W, b), strict=True):
                search.tried({"treatment": treatment, "alpha": alpha}, values)

    def fit(self, rows: TrainingRows, params: Params) -> list[Step]:
        """Fit on all rows, in memory or in blocks."""
        estimator = Ridge(params["alpha"], class_weight=self.options.class_weight)
        return estimator.fit_rows(rows, params["treatment"])
