"""Classifiers on cached features ("heads"), each with its own search over hyper-parameters.

::

    folds = splitting.folds(y, cv=5, random_state=0)      # [(train, valid), ...]
    found = HEADS["linear"].search(X, y, folds)
    found.score, found.params, found.logits               # out of fold
    found.estimator.logits(X_new)                         # (n, classes)
    found.calibration.proba(found.logits)                 # calibrated probabilities

`HEADS` holds all of them; `CLASSICS` are the four that are compared when none is named.

============ ============================================================ =======================
head         what the search tries                                        larger than memory
============ ============================================================ =======================
``linear``   treatment, C                                                 yes
``svm``      treatment, C                                                 yes
``rbf-svm``  treatment, components, kernel width, C                       a part
``forest``   random forest or extra trees, leaf size, components          a part
``boosting`` components or, of few columns, these alone; rounds           a part
``ridge``    treatment, penalty                                           yes
``knn``      treatment, components, k, temperature                        a part
``mlp``      treatment, components, dropout, epochs                       a part
============ ============================================================ =======================

*Treatment* is standardised columns, rows of length 1, or signed square roots. *Components* are all
columns, or whitened principal components that are fitted inside each fold. On 3,000 synthetic
features of 10 classes components took ``knn`` from an accuracy of 0.364 to 0.640 and ``forest``
from 0.358 to 0.463; on the demo's features ``knn`` from 0.840 to 0.851
(``python tests/benchmarks/heads.py --only components``).
"""

from __future__ import annotations

from featcache.heads.linear import LinearHead, LinearSVMHead
from featcache.heads.mlp import MLPHead
from featcache.heads.neighbors import NeighborsHead
from featcache.heads.ridge import RidgeHead
from featcache.heads.search import HeadKind
from featcache.heads.svm import GaussianSVMHead
from featcache.heads.trees import BoostingHead, ForestHead

HEADS: dict[str, type[HeadKind]] = {
    kind.name: kind
    for kind in (
        LinearHead,
        LinearSVMHead,
        GaussianSVMHead,
        ForestHead,
        BoostingHead,
        RidgeHead,
        NeighborsHead,
        MLPHead,
    )
}
CLASSICS: tuple[str, ...] = ("linear", "svm", "rbf-svm", "forest")
