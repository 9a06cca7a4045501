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
``rbf-svm``  treatment, components, kernel width, C                       no
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

from featcache.heads.linear import LinearHead, LinearSVMHead
from featcache.heads.mlp import search_mlp
from featcache.heads.neighbors import search_knn
from featcache.heads.ridge import RidgeHead
from featcache.heads.rows import FeatureBlocks, Folds, TrainingRows
from featcache.heads.search import Scoring, SearchResult, check_scoring
from featcache.heads.svm import GaussianSVMHead
from featcache.heads.trees import search_boosting, search_forest


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


HEADS: dict[str, Any] = {
    spec.name: spec
    for spec in (
        LinearHead,
        LinearSVMHead,
        GaussianSVMHead,
        HeadSpec("forest", "random forest or extra trees", False, search_forest),
        HeadSpec("boosting", "gradient-boosted trees on discriminants", True, search_boosting),
        RidgeHead,
        HeadSpec("knn", "nearest neighbours by cosine similarity", True, search_knn),
        HeadSpec("mlp", "network of one hidden layer", False, search_mlp),
    )
}
CLASSICS: tuple[str, ...] = ("linear", "svm", "rbf-svm", "forest")
