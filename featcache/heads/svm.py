"""The support vector machine with a Gaussian kernel.

It solves what scikit-learn's `SVC` solves, by libsvm, but hands it the kernel as a
matrix. libsvm computes a kernel pair by pair in double precision; as one matrix product it is 20
to 30 times faster on 2,048 features, and all values of C share it. The same holds for prediction.
The price is memory: 8 bytes for each pair of rows. So no more than 20,000 rows are trained on. Of
50,000 images of ten classes (Fashion-MNIST through MobileNetV2, 1,280 columns) that many had 0.885
of 10,000 others right, as a linear SVM on 2,000 Nystroem features of all 50,000 had.

scikit-learn-intelex is not used, because it is slower: 8,000 rows x 2,048, 10 classes, fit and
2,000 predictions on two cores of an EPYC took 97 s with `SVC`, 7.3 s with scikit-learn-intelex, and
4.3 s with this, at the same accuracy (``tests/benchmarks/heads.py --only rbf-svm --classes 10``).
It could not share the kernel between values of C either.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from joblib import Parallel, delayed

from featcache.heads.base import ClassWeight, Head
from featcache.heads.preparation import Preparation, component_counts
from featcache.heads.rows import TrainingRows
from featcache.heads.search import HeadKind, Params, Search, SearchOptions, gather
from featcache.heads.steps import Gaussian, PairVotes, Step, kernel, squared_distances
from featcache.heads.treatment import TREATMENTS

_MOST_ROWS = 20_000  # that are trained on: 3.2 GB of kernel ...
_ENOUGH_ROWS = 5_000  # ... and that choose the parameters
_C = 10.0
_COUNTS = (128, 256, 512)  # of principal components
_GAMMAS = (0.25, 0.5, 2.0)
_CS = (1.0, 3.0, 30.0)


def _default_gamma(X: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Return what scikit-learn calls ``gamma="scale"``, of weighted rows."""
    mean = np.average(X, axis=0, weights=weight)
    squares = np.average(np.square(X, dtype=np.float64), axis=0, weights=weight)
    variance = float(squares.mean() - mean.mean() ** 2)
    return 1.0 / (X.shape[1] * variance) if variance > 0 else 1.0


def _fit(
    K: np.ndarray,
    y: np.ndarray,
    weight: np.ndarray | None,
    *,
    C: float,
    class_weight: ClassWeight,
    tol: float = 1e-3,
) -> tuple[np.ndarray, PairVotes]:
    """Fit on a kernel matrix (n, n): return the numbers of the support vectors, and the votes."""
    from sklearn.svm import SVC  # here, because loading a predictor must not wait for it

    machine = SVC(C=C, kernel="precomputed", class_weight=class_weight, tol=tol, cache_size=500)
    machine.fit(K, y, sample_weight=weight)
    votes = PairVotes(machine.n_support_, machine.dual_coef_, machine.intercept_)
    return machine.support_, votes


class GaussianSVM(Head):
    """Support vector machine with a Gaussian kernel: `SVC`, by matrix products.

    With more than two classes, each pair of them gives the one a smooth vote, ``tanh(4 f)`` of the
    decision value f, and the other as much less.

    Parameters
    ----------
    C : float
        Weight of the loss.
    gamma : float
        Width of the kernel, in units of ``1 / (d * X.var())`` (scikit-learn's "scale").
    class_weight : "balanced", dict or None
        As in `SVC`.
    tol : float
        As in `SVC`.

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
        Labels.
    gamma_ : float
        The kernel is ``exp(-gamma_ * |a - b|^2)``.
    support_ : ndarray of shape (s,)
        Numbers of the rows that count, class by class.
    steps_ : list of Step
        A `Gaussian` of these rows and the `PairVotes`.
    n_features_in_ : int
        Number of columns.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        gamma: float = 1.0,
        class_weight: ClassWeight = None,
        tol: float = 1e-3,
    ) -> None:
        self.C = C
        self.gamma = gamma
        self.class_weight = class_weight
        self.tol = tol

    _positive = "C", "gamma", "tol"

    def _fit(self, X: np.ndarray, codes: np.ndarray, weight: np.ndarray) -> list[Step]:
        self.gamma_ = self.gamma * _default_gamma(X, weight)
        self.support_, votes = _fit(
            kernel(squared_distances(X, X), self.gamma_),
            self.classes_[codes],
            weight,
            C=self.C,
            class_weight=self.class_weight,
            tol=self.tol,
        )
        return [Gaussian(np.ascontiguousarray(X[self.support_]), self.gamma_), votes]


@dataclass(frozen=True)
class GaussianSVMHead(HeadKind):
    """SVM with a Gaussian kernel: its parameters are chosen one after the other.

    These are the treatment, whether and how many principal components are kept, the width of the
    kernel, and C. Of the widths, the widest is taken whose score is within one standard error of
    the best's: a narrow kernel is no better on images like those of training, and much worse on
    others. The kernel's matrix grows with the square of the rows: at most 20,000 are
    trained on, or those whose matrix takes half of the memory, and 5,000 choose.
    """

    treatments: Sequence[str] = tuple(TREATMENTS)
    name: ClassVar[str] = "rbf-svm"

    def most_images(self, rows: TrainingRows) -> int:
        """Return as many as there is room for their kernel."""
        most = _MOST_ROWS
        if self.options.memory is not None:
            most = min(most, int((self.options.memory / 24) ** 0.5))  # 12 bytes a pair, in half
        return most // rows.views

    def enough_images(self, rows: TrainingRows) -> int:
        """Return fewer: a fit takes time by the square of the rows."""
        return _ENOUGH_ROWS // rows.views

    def explore(self, rows: TrainingRows, search: Search) -> None:
        """Try the treatments, then other values of one parameter after the other."""
        start = {"C": _C, "gamma": 1.0}
        self._try(rows, search, [{"treatment": name, **start} for name in self.treatments])
        counts = component_counts(rows, _COUNTS)
        for name, values in (("n_components", counts), ("gamma", _GAMMAS), ("C", _CS)):
            best = dict(search.best.params)
            if name == "n_components":  # which stand behind the treatment
                best = {"treatment": best["treatment"], name: None, **best}
            self._try(rows, search, [{**best, name: value} for value in values])
            if name == "gamma":
                _prefer_wide(search)

    def _try(self, rows: TrainingRows, search: Search, settings: Sequence[Params]) -> None:
        per_fold: list[list[np.ndarray]] = []
        for found in Parallel(n_jobs=self.options.n_jobs, return_as="generator")(
            delayed(_fold_scores)(rows, fold, settings, self.options)
            for fold in range(len(rows.folds))
        ):
            per_fold.append(found)
            search.fitted(len(settings))
        for params, values in zip(settings, zip(*per_fold, strict=True), strict=True):
            search.tried(params, gather(rows, values))

    def fit(self, rows: TrainingRows, params: Params) -> list[Step]:
        """Fit on all rows."""
        estimator = GaussianSVM(
            params["C"], gamma=params["gamma"], class_weight=self.options.class_weight
        )
        preparation = Preparation.of(params, self.options.random_state)
        return preparation.fit_head(rows, estimator)


def _prefer_wide(search: Search) -> None:
    """Leave to the choice the widest kernel within one standard error of the best, and wider ones.

    The error is that of the differences from fold to fold; of one fold, there is none.
    """
    best = search.best
    for one in sorted(search.trials, key=lambda trial: float(trial.params["gamma"])):
        if {**one.params, "gamma": None} == {**best.params, "gamma": None}:
            off = np.subtract(best.fold_scores, one.fold_scores)
            off = off[np.isfinite(off)]
            error = off.std(ddof=1) / len(off) ** 0.5 if len(off) > 1 else 0.0
            if off.mean() <= error:
                break
    for other in search.trials:
        other.rough |= other.params["gamma"] > one.params["gamma"]


def _fold_scores(
    rows: TrainingRows, fold: int, settings: Sequence[Params], options: SearchOptions
) -> list[np.ndarray]:
    """Return scores of one fold's validation rows at each setting.

    Settings of one treatment share its components, those of one width share the kernel.
    """
    train, valid = (np.asarray(part) for part in rows.folds[fold])
    y, weight = rows.row_codes(train), rows.weights(train)
    class_weight = rows.numbered(options.class_weight)
    found: list[np.ndarray] = []
    for treatment, alike in itertools.groupby(settings, key=lambda one: one["treatment"]):
        several = list(alike)
        most = max((one.get("n_components") or 0 for one in several), default=0) or None
        X = Preparation(treatment, most, random_state=options.random_state).on_fold(rows, fold)
        A, B = X[rows.rows(train)], X[rows.rows(valid)]
        for count, same in itertools.groupby(several, key=lambda one: one.get("n_components")):
            inner = squared_distances(A[:, :count], A[:, :count])
            outer = squared_distances(B[:, :count], A[:, :count])
            scale = _default_gamma(A[:, :count], weight)
            for gamma, some in itertools.groupby(same, key=lambda one: one["gamma"]):
                K = kernel(inner, gamma * scale)
                for one in some:
                    support, votes = _fit(K, y, weight, C=one["C"], class_weight=class_weight)
                    values = votes(kernel(outer[:, support], gamma * scale))
                    found.append(values.reshape(len(valid), rows.views, -1).mean(axis=1))
    return found
