"""Classifiers on cached features ("heads"), each with its own search over hyper-parameters.

::

    folds = splitting.folds(y, cv=5, random_state=0)      # [(train, valid), ...]
    found = HEADS["linear"].search(X, y, folds)
    found.score, found.params, found.logits               # out of fold
    logits(found.estimator, X_new)                        # (n, classes)
    # softmax(logits / found.temperature) are calibrated probabilities

`HEADS` holds all of them; `CLASSICS` are the four that are compared when none is named.

============ ============================================================ =======================
head         what the search tries                                        larger than memory
============ ============================================================ =======================
``linear``   treatment, C                                                 yes
``svm``      treatment, C                                                 yes
``rbf-svm``  treatment, components, kernel width, C                       Nystroem above 20,000
``forest``   random forest or extra trees, leaf size, components          no
``boosting`` components, rounds                                           yes
``ridge``    treatment, penalty                                           yes
``knn``      treatment, components, k, temperature                        without components
``mlp``      treatment, components, dropout, epochs                       no
============ ============================================================ =======================

*Treatment* is standardised columns, rows of length 1, or signed square roots. *Components* are all
columns, or whitened principal components that are fitted inside each fold. On 3,000 synthetic
features of 10 classes components took ``knn`` from an accuracy of 0.364 to 0.640 and ``forest``
from 0.358 to 0.463; on the demo's features ``knn`` from 0.840 to 0.851
(``python tests/benchmarks/heads.py --only components``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.heads.calibration import fit_temperature
from featcache.heads.linear import LinearClassifier, search_linear
from featcache.heads.mlp import MLP, search_mlp
from featcache.heads.neighbors import CosineNeighbors, search_knn
from featcache.heads.ridge import Ridge, search_ridge
from featcache.heads.rows import FeatureBlocks, Folds, TrainingRows
from featcache.heads.search import (
    Candidate,
    Scoring,
    SearchResult,
    check_scoring,
    logits,
    score_folds,
)
from featcache.heads.svm import GaussianSVM, LinearSVM, search_kernel_svm
from featcache.heads.trees import BoostedTrees, search_boosting, search_forest

__all__ = [
    "CLASSICS",
    "HEADS",
    "MLP",
    "BoostedTrees",
    "Candidate",
    "CosineNeighbors",
    "FeatureBlocks",
    "GaussianSVM",
    "HeadSpec",
    "LinearClassifier",
    "LinearSVM",
    "Ridge",
    "SearchResult",
    "fit_temperature",
    "logits",
    "score_folds",
]


@dataclass(frozen=True)
class HeadSpec:
    """One kind of head.

    Attributes
    ----------
    name : str
        What it is called on the command line.
    summary : str
        One line for tables and help.
    out_of_core : bool
        Whether it can be trained on features larger than memory.
    """

    name: str
    summary: str
    out_of_core: bool
    _search: Callable[..., SearchResult]

    def search(
        self,
        X: np.ndarray | FeatureBlocks,
        y: np.ndarray,
        folds: Folds,
        *,
        sample_weight: np.ndarray | None = None,
        class_weight: str | dict[Any, float] | None = None,
        scoring: Scoring = "accuracy",
        random_state: int = 0,
        n_jobs: int = 1,
        memory: int | None = None,
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
        class_weight : "balanced" or dict, optional
            As in scikit-learn.
        scoring : str or callable
            One of scikit-learn's scorers.
        random_state : int
            Seed: the same call gives the same result.
        n_jobs : int
            Fits at a time (-1: one a core).
        memory : int, optional
            Bytes of working memory to stay under.

        Returns
        -------
        SearchResult

        Raises
        ------
        TrainingError
            Labels, classes or folds that cannot be trained on, or an unknown scoring.
        """
        check_scoring(scoring)
        rows = TrainingRows.check(X, y, folds, sample_weight)
        return self._search(
            rows,
            class_weight=class_weight,
            scoring=scoring,
            random_state=random_state,
            n_jobs=n_jobs,
            memory=memory,
        )


def _search_linear(
    rows: TrainingRows, *, class_weight: Any, scoring: Scoring, memory: int | None, **_: Any
) -> SearchResult:
    estimator = LinearClassifier(class_weight=class_weight)
    return search_linear(rows, estimator, head="linear", scoring=scoring, memory=memory)


def _search_svm(
    rows: TrainingRows, *, class_weight: Any, scoring: Scoring, memory: int | None, **_: Any
) -> SearchResult:
    estimator = LinearSVM(class_weight=class_weight)
    return search_linear(rows, estimator, head="svm", scoring=scoring, memory=memory)


def _search_rbf_svm(rows: TrainingRows, **options: Any) -> SearchResult:
    return search_kernel_svm(rows, **options)


def _search_ridge(
    rows: TrainingRows, *, class_weight: Any, scoring: Scoring, **_: Any
) -> SearchResult:
    return search_ridge(rows, class_weight=class_weight, scoring=scoring)


HEADS: dict[str, HeadSpec] = {
    spec.name: spec
    for spec in (
        HeadSpec("linear", "multinomial logistic regression", True, _search_linear),
        HeadSpec("svm", "linear SVM (squared hinge, one against the rest)", True, _search_svm),
        HeadSpec("rbf-svm", "SVM with a Gaussian kernel", False, _search_rbf_svm),
        HeadSpec("forest", "random forest or extra trees", False, search_forest),
        HeadSpec("boosting", "gradient-boosted trees on discriminants", True, search_boosting),
        HeadSpec("ridge", "ridge regression on class indicators", True, _search_ridge),
        HeadSpec("knn", "nearest neighbours by cosine similarity", True, search_knn),
        HeadSpec("mlp", "network of one hidden layer", False, search_mlp),
    )
}
CLASSICS: tuple[str, ...] = ("linear", "svm", "rbf-svm", "forest")
