"""The support vector machines: linear, and with a Gaussian kernel.

The linear one minimises the primal squared hinge loss with the solver of the logistic regression.
The kernel one is scikit-learn's `SVC`; where the extra ``fast`` is installed it is fitted by
scikit-learn-intelex, and its fitted state is copied into scikit-learn's class, which is what is
kept: intelex's objects cannot be saved safely.
"""

from __future__ import annotations

from featcache.heads.linear import ClassWeight, LinearModel
from featcache.heads.solver import Loss

KERNEL_ROWS = 20_000
"""More training rows than this get Nystroem features and a linear SVM instead of `SVC`."""

_COMPONENTS = 2000


class LinearSVM(LinearModel):
    """Linear support vector machine: squared hinge loss, one against the rest, primal.

    Minimises, for each class, ``C * sum_i s_i max(0, 1 - t_i f(x_i))^2 + ||w||^2 / 2``, which is
    the objective of scikit-learn's ``LinearSVC(loss="squared_hinge")`` but for the intercept,
    which liblinear penalises and this does not unless `penalize_intercept`. Two classes have one
    vector of weights.

    Parameters
    ----------
    C : float
        Weight of the loss.
    class_weight : "balanced", dict or None
        Weights of the classes; as in liblinear, with more than two classes they weight the rows
        of the class that a problem is about, not the rest.
    standardize : bool
        Whether columns are scaled to unit deviation first.
    penalize_intercept : bool
        Whether ``b^2 / 2`` is added, as liblinear does.
    tol : float
        Distance to the minimum, as a part of the objective, at which to stop.
    max_iter : int
        Passes over the rows at most.

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
        Labels.
    coef_ : ndarray of shape (k, d) or (1, d), float64
        Weights for raw features.
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
        penalize_intercept: bool = False,
        tol: float = 1e-5,
        max_iter: int = 1000,
    ) -> None:
        self.C = C
        self.class_weight = class_weight
        self.standardize = standardize
        self.penalize_intercept = penalize_intercept
        self.tol = tol
        self.max_iter = max_iter

    def _loss(self, k: int) -> Loss:
        return "squared_hinge"

    def _penalizes_intercept(self) -> bool:
        return self.penalize_intercept
