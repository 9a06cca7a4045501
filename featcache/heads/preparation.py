"""What is done to features before a head that compares rows or columns: treatment, then components.

Scaling and principal components learn, so they are fitted anew on each fold's training rows.

The components are whitened: scaled to unit variance, so that all directions count alike. Where
classes differ in directions of little variance, a head that compares rows or columns gains by it.
On 3,000 x 2,048 synthetic features of 10 classes, under five folds, nearest neighbours rose from
0.364 to 0.640 and a forest from 0.358 to 0.463, and a Gaussian SVM and a small network chose them,
too; on the demo's features nearest neighbours rose from 0.840 to 0.851, and the others were better
without (``tests/benchmarks/heads.py --only components``). So it is searched.

A linear head with a squared penalty is not changed by a rotation, and cutting off and whitening
gave it little on the same features, and took some on the demo's: it has treatments and the penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sklearn.preprocessing import StandardScaler

from featcache.heads.base import Head, transformed
from featcache.heads.rows import TrainingRows
from featcache.heads.search import Params, fit_estimator
from featcache.heads.steps import Log, Matrix, Scale, Step, Trees
from featcache.heads.treatment import TREATMENTS

_EXACT = 3000  # columns up to which the whole covariance is decomposed, in seconds
_NULL = 1e-6  # a component of less variance than this part of the largest is rounding: left out
_SMALL = 1e-3  # trees and lengths take differences far below it for none
_MOST_ROWS = 20_000  # that the steps are fitted on


@dataclass(frozen=True)
class Preparation:
    """The steps before a head.

    Attributes
    ----------
    treatment : str
        Name from `featcache.heads.treatment.TREATMENTS`.
    n_components : int or None
        Whitened principal components that are kept, but for those of no variance; None for all
        columns as they are.
    scaled : bool
        Whether columns are scaled to unit deviation; before components, they always are.
    random_state : int
        Seed of the decomposition of wide features.
    exact : int
        Columns up to which the whole covariance is decomposed.
    """

    treatment: str = "standard"
    n_components: int | None = None
    scaled: bool = True
    random_state: int = 0
    exact: int = _EXACT

    @property
    def params(self) -> dict[str, Any]:
        """What a trial says of it."""
        if self.n_components is None:
            return {"treatment": self.treatment}
        return {"treatment": self.treatment, "n_components": self.n_components}

    @classmethod
    def of(cls, params: Params, random_state: int, *, scaled: bool = True) -> Preparation:
        """Return what a trial's parameters name."""
        count = params.get("n_components")
        return cls(params.get("treatment", "standard"), count, scaled, random_state)

    def fit(self, rows: TrainingRows, images: np.ndarray | None = None) -> list[Step]:
        """Return the steps, fitted on (at most 20,000 random ones of) the rows of images."""
        X = rows.features() if images is None else rows.features(np.asarray(images))
        if len(X) > _MOST_ROWS:
            chosen = np.random.default_rng(self.random_state).permutation(len(X))[:_MOST_ROWS]
            X = X[np.sort(chosen)]
        steps: list[Step] = []
        largest = max(X.max(), -X.min())
        if 0 < largest < _SMALL:  # all by one power of two, which is exact, to about 1,000
            d = X.shape[1]
            steps.append(Scale(np.zeros(d), np.full(d, 2.0 ** (np.floor(np.log2(largest)) - 10))))
        treat = TREATMENTS[self.treatment]
        steps += [] if treat is None else [treat]
        X = transformed(steps, X)
        if self.scaled or self.n_components is not None:
            scaler = StandardScaler().fit(X)
            steps.append(Scale(scaler.mean_, scaler.scale_))
        if self.n_components is not None:
            from sklearn.decomposition import PCA  # loading a predictor must not wait for it

            solver = "covariance_eigh" if X.shape[1] <= self.exact else "randomized"
            pca = PCA(self.n_components, svd_solver=solver, random_state=self.random_state)
            with np.errstate(invalid="ignore"):  # its shares of no variance at all
                pca.fit(transformed(steps[-1:], X))
            variance = pca.explained_variance_  # (n_components,), falling
            known = variance > _NULL * variance[0]
            known[0] = True
            weight = pca.components_[known] / np.sqrt(np.maximum(variance[known], 1e-30))[:, None]
            steps.append(Matrix(weight, -weight @ pca.mean_))
        return steps

    def on_fold(self, rows: TrainingRows, fold: int) -> np.ndarray:
        """Return the features of all rows, prepared by what a fold's training rows say.

        Returns
        -------
        ndarray of shape (n * views, d or n_components), float32
            The leading columns of components are those of fewer components.
        """
        return transformed(self.fit(rows, rows.folds[fold][0]), rows.features())

    def on_folds(self, rows: TrainingRows) -> list[np.ndarray]:
        """Return that for every fold: the same array for all of them where nothing is learnt."""
        folds = range(len(rows.folds))
        if self.scaled or self.n_components is not None:
            return [self.on_fold(rows, fold) for fold in folds]
        return [self.on_fold(rows, 0)] * len(folds)

    def fit_head(self, rows: TrainingRows, head: Any) -> list[Step]:
        """Fit a head of ours, or a forest of scikit-learn, on all rows: return all steps."""
        steps = self.fit(rows)
        inside = replace(rows, X=transformed(steps, rows.features()))
        fitted = fit_estimator(head, inside)
        own = fitted.steps_ if isinstance(fitted, Head) else [Trees.of_forest(fitted), Log()]
        return [*steps, *own]


def component_counts(rows: TrainingRows, wanted: Sequence[int]) -> tuple[int, ...]:
    """Return those numbers of components that leave out half of the columns, and are estimable."""
    fewest = min(len(train) for train, _ in rows.folds) * rows.views
    return tuple(count for count in wanted if 2 * count <= min(fewest, rows.X.shape[-1]))
