"""The tree heads: forests on the features as they are, boosting on a projection of them.

Boosting looks at every column for every tree, which is what makes it slow on the thousands of
columns of a network. Here it sees the discriminants (Fisher's, inside the leading principal
components) and the leading components themselves: a few dozen columns that hold what separates
the classes. They are learnt inside each fold.

The trees are grown by scikit-learn and kept as plain arrays that numpy walks. On such few columns
LightGBM was less than twice as fast: 0.6 s and 1.0 s of processor time for 60 rounds on 8,000 rows
of 10 classes, at accuracies of 0.739 and 0.738.

scikit-learn's ensembles are imported where trees are grown: loading a predictor needs none of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from joblib import Parallel, delayed
from scipy.linalg import eigh
from sklearn.utils.extmath import randomized_svd

from featcache.heads.base import ClassWeight, Head, class_factors, transformed
from featcache.heads.preparation import Preparation, component_counts
from featcache.heads.rows import TrainingRows, stratified
from featcache.heads.search import HeadKind, Params, Search, fit_estimator, gather, refitted
from featcache.heads.steps import Matrix, Scale, Step, Trees

_TREES = 300
_FIRST_TREES = 60  # of each kind of forest, to choose the kind by
_TREE_ROWS = 6_000_000  # rows that all trees of a forest are grown on together, ...
_FEWEST_TREES = 100  # ... unless that makes fewer trees than this
_ENOUGH_ROWS = 10_000  # that choose the kind
_FOREST_COMPONENTS = (64,)  # more dilute what each split chooses from
_SAMPLE = 8192  # rows that principal components are computed from
_LEADING = 32  # components that stand beside the discriminants
_SHRINKAGE = 0.05  # of the covariance within classes, towards a sphere
_ROUNDS = (10, 20, 40, 60)  # at which a search looks
_SIZES = (128, 512)
# Of few columns a search also tries them alone, in trees as scikit-learn grows them. On the 64 of
# its digits they had an accuracy of 0.965 on the other half, with the discriminants 0.945.
_ALONE: dict[str, Any] = {
    "max_leaf_nodes": 31,
    "min_samples_leaf": 20,
    "l2_regularization": 0.0,
}
_CELLS = 1 << 22  # numbers that trees are walked with at a time: 32 MB
_MANY_CLASSES = 20
_SIDES = ("left", "right")
_BOTH = Matrix(np.array([[-0.5], [0.5]]), np.zeros(2))  # one score for two classes: -f/2 and f/2


class BoostedTrees(Head):
    """Gradient-boosted trees on discriminants and principal components.

    Parameters
    ----------
    n_components : int or None
        Principal components that the discriminants are looked for in; with more columns than
        this they are computed, with fewer the columns stay as they are. None: trees on the columns
        alone.
    n_rounds : int
        Rounds of boosting; each grows a tree a class (one for two classes).
    learning_rate : float
        Part of each tree that is added.
    max_leaf_nodes : int
        Leaves of a tree.
    min_samples_leaf : int
        Training rows of a leaf.
    l2_regularization : float
        Penalty on the values of leaves: without it, those of many classes (small Hessians) diverge.
    class_weight : "balanced", dict or None
        Weights of the classes.
    random_state : int
        Seed of the randomised decomposition.

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
        Labels.
    steps_ : list of Step
        The projection and the trees.
    n_features_in_ : int
        Number of columns.
    """

    def __init__(
        self,
        n_components: int | None = 512,
        *,
        n_rounds: int = 60,
        learning_rate: float = 0.15,
        max_leaf_nodes: int = 8,
        min_samples_leaf: int = 10,
        l2_regularization: float = 5.0,
        class_weight: ClassWeight = None,
        random_state: int = 0,
    ) -> None:
        self.n_components = n_components
        self.n_rounds = n_rounds
        self.learning_rate = learning_rate
        self.max_leaf_nodes = max_leaf_nodes
        self.min_samples_leaf = min_samples_leaf
        self.l2_regularization = l2_regularization
        self.class_weight = class_weight
        self.random_state = random_state

    _positive = "n_components", "n_rounds", "learning_rate", "min_samples_leaf"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.max_leaf_nodes < 2:
            raise ValueError(
                f"max_leaf_nodes must be positive and at least 2, got {self.max_leaf_nodes}."
            )

    def _fit(self, X: np.ndarray, codes: np.ndarray, weight: np.ndarray) -> list[Step]:
        counts = weight > 0
        X, codes, weight = X[counts], codes[counts], weight[counts]
        chosen = stratified(codes, _SAMPLE, self.random_state)
        size = self.n_components or X.shape[1]
        scale, basis = principal(X[chosen], weight[chosen], size, self.random_state)
        Z = transformed([scale, basis], X)  # (n, d) -> (n, r)
        turn, trees = self.grow(Z, codes, weight, self.classes_)
        directions = turn.T @ basis.weight
        steps = [scale, Matrix(directions, np.zeros(len(directions))), trees]
        return [*steps, _BOTH] if len(trees.baseline) == 1 else steps

    def grow(
        self, Z: np.ndarray, codes: np.ndarray, weight: np.ndarray, classes: np.ndarray
    ) -> tuple[np.ndarray, Trees]:
        """Return what turns principal components Z (n, r) into m columns, and trees on these."""
        from sklearn.ensemble import HistGradientBoostingClassifier

        factors = class_factors(self.class_weight, classes, codes, weight)
        turn = np.eye(Z.shape[1], dtype=np.float32)
        if self.n_components is not None:
            turn = discriminants(Z, codes, weight, len(classes))
        model = HistGradientBoostingClassifier(
            learning_rate=self.learning_rate,
            max_iter=self.n_rounds,
            max_leaf_nodes=self.max_leaf_nodes,
            min_samples_leaf=self.min_samples_leaf,
            l2_regularization=self.l2_regularization,
            max_bins=63,
            early_stopping=False,
            random_state=self.random_state,
        )
        columns = Z @ turn
        model.fit(columns, codes, sample_weight=weight * factors[codes])
        return turn, _between(_trees_of(model), columns)


def principal(X: np.ndarray, weight: np.ndarray, size: int, seed: int) -> tuple[Scale, Matrix]:
    """Return steps from rows (n, d) to their leading principal components, not whitened.

    All columns stay as they are, but for their mean, where they are no more than `size`.
    """
    mean, d = np.average(X, axis=0, weights=weight), X.shape[1]
    components = np.eye(d, dtype=np.float32)
    if d > size:
        centred = (X - mean) * np.sqrt(weight / weight.mean())[:, None]
        rank = min(size, *centred.shape)
        _, _, components = randomized_svd(
            centred.astype(np.float32), rank, n_iter=2, random_state=seed
        )
    scale = Scale(mean.astype(np.float32), np.ones(d, dtype=np.float32))
    return scale, Matrix(components, np.zeros(len(components)))


def discriminants(Z: np.ndarray, codes: np.ndarray, weight: np.ndarray, k: int) -> np.ndarray:
    """Return what to multiply coordinates with: discriminants, then leading coordinates.

    Parameters
    ----------
    Z : ndarray of shape (n, r)
        Coordinates.
    codes, weight : ndarray of shape (n,)
        Classes and weights.
    k : int
        Number of classes.

    Returns
    -------
    ndarray of shape (r, m), float32
        m = min(k - 1, r) directions in which the classes' means differ most by the measure of the
        covariance within classes (Fisher's linear discriminants), and min(32, r) coordinates.
    """
    r = Z.shape[1]
    mass = np.maximum(np.bincount(codes, weights=weight, minlength=k), 1e-12)
    weighted = Z * weight[:, None].astype(np.float32)
    sums = np.stack([weighted[codes == c].sum(axis=0, dtype=np.float64) for c in range(k)])
    centre = sums.sum(axis=0) / mass.sum()
    means = sums / mass[:, None] - centre
    between = (means * mass[:, None]).T @ means / mass.sum()
    second = (Z.T @ weighted).astype(np.float64) / mass.sum()
    within = second - np.outer(centre, centre) - between
    size = max(float(np.trace(within)) / r, 1e-12)
    within = (1 - _SHRINKAGE) * within + _SHRINKAGE * size * np.eye(r)
    _, vectors = eigh(between, within)
    count = min(k - 1, r)
    leading = np.eye(r)[:, : min(_LEADING, r)]
    return np.concatenate([vectors[:, ::-1][:, :count], leading], axis=1).astype(np.float32)


def _trees_of(model: Any) -> Trees:
    """Return the trees of scikit-learn's histogram gradient boosting.

    `_predictors` and `_baseline_prediction` are all that we read of scikit-learn's private
    attributes; a test compares what comes of it with scikit-learn's own predictions.
    """
    trees = []
    for tree in itertools.chain.from_iterable(model._predictors):
        nodes, leaf = tree.nodes, tree.nodes["is_leaf"].astype(bool)
        left, right = (np.where(leaf, -1, nodes[side].astype(np.int64)) for side in _SIDES)
        trees.append(
            {
                "feature": nodes["feature_idx"],
                "threshold": nodes["num_threshold"],
                "left": left,
                "right": right,
                "value": nodes["value"][:, None],
            }
        )
    return Trees.joined(trees, len(model._predictors[0]), model._baseline_prediction.ravel())


def _between(trees: Trees, columns: np.ndarray) -> Trees:
    """Move thresholds from a training row's value half the way to the next larger one.

    scikit-learn puts them on the values: a row's last bit would decide where it goes, and another
    processor computes another last bit.
    """
    threshold = trees.threshold.copy()
    for number, values in enumerate(np.sort(columns, axis=0).T):
        own = trees.feature == number
        above = np.searchsorted(values, threshold[own], side="right")
        larger = values[np.minimum(above, len(values) - 1)]
        threshold[own] += np.maximum(larger - threshold[own], 0) / 2
    return replace(trees, threshold=threshold)


def _staged(trees: Trees, Z: np.ndarray, rounds: Sequence[int]) -> np.ndarray:
    """Return scores (stages, n, k) after some numbers of rounds."""
    size, parts = max(1, _CELLS // trees.cells), []
    for start in range(0, len(Z), size):
        sums = np.cumsum(trees.rounds(Z[start : start + size]), axis=0, dtype=np.float64)
        parts.append(trees.baseline + sums[np.array(rounds) - 1])
    return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class BoostingHead(HeadKind):
    """Gradient-boosted trees: the size of the projection and the number of rounds."""

    name: ClassVar[str] = "boosting"

    def explore(self, rows: TrainingRows, search: Search) -> None:
        """Grow the most rounds on each size, and look at fewer on the way."""
        d = rows.X.shape[-1]
        sizes: list[int | None] = [size for size in _SIZES if size < d]
        sizes = sizes or [None, d]
        rounds = _ROUNDS if len(rows.classes) <= _MANY_CLASSES else _ROUNDS[:-1]
        settings = list(itertools.product(sizes, rounds))
        per_fold = []
        for found in Parallel(n_jobs=self.options.n_jobs, prefer="threads", return_as="generator")(
            delayed(self._fold_scores)(rows, fold, sizes, rounds) for fold in range(len(rows.folds))
        ):
            per_fold.append(found)
            search.fitted(len(settings))
        for (size, count), values in zip(settings, zip(*per_fold, strict=True), strict=True):
            own = {} if size is None else {"n_components": size}
            search.tried({**own, "rounds": count}, gather(rows, values))

    def _fold_scores(
        self, rows: TrainingRows, fold: int, sizes: Sequence[int | None], rounds: tuple[int, ...]
    ) -> list[np.ndarray]:
        """Return the scores of a fold's validation rows for all settings, in their order."""
        train, valid = (np.asarray(part) for part in rows.folds[fold])
        codes, weight = rows.row_codes(train), rows.weights(train)
        counted = weight > 0
        X, codes, weight = rows.features(train)[counted], codes[counted], weight[counted]
        seed = self.options.random_state
        some = stratified(codes, _SAMPLE, seed)
        steps = principal(X[some], weight[some], sizes[-1] or X.shape[1], seed)
        Z, judged = transformed(steps, X), transformed(steps, rows.features(valid))
        results = []
        for size in sizes:
            r = min(size or Z.shape[1], Z.shape[1])
            model = self._estimator(size, rounds[-1])
            turn, trees = model.grow(Z[:, :r], codes, weight, rows.classes)
            for scores in _staged(trees, judged[:, :r] @ turn, rounds):
                both = _BOTH(scores) if scores.shape[1] == 1 else scores
                results.append(both.reshape(len(valid), rows.views, -1).mean(axis=1))
        return results

    def _estimator(self, size: int | None, rounds: int) -> BoostedTrees:
        options: dict[str, Any] = _ALONE if size is None else {}
        return BoostedTrees(
            size,
            n_rounds=rounds,
            class_weight=self.options.class_weight,
            random_state=self.options.random_state,
            **options,
        )

    def fit(self, rows: TrainingRows, params: Params) -> list[Step]:
        """Grow the trees on all rows."""
        estimator = self._estimator(params.get("n_components"), params["rounds"])
        found: list[Step] = fit_estimator(estimator, rows).steps_
        return found


@dataclass(frozen=True)
class ForestHead(HeadKind):
    """Random forest or extra trees, on columns as they are or on principal components.

    The kinds are compared with 60 trees a fold (of 10,000 rows, where there are more), and the
    better one with itself on components. Only the best is grown in full: to 300 trees, and above
    20,000 rows to fewer, but not less than 100.
    """

    name: ClassVar[str] = "forest"

    def explore(self, rows: TrainingRows, search: Search) -> None:
        """Try both kinds with two sizes of leaves, then components."""
        for splits, leaf in itertools.product(("random", "extra"), (1, 3)):
            params = {"splits": splits, "min_samples_leaf": leaf, "trees": _FIRST_TREES}
            self._try(rows, search, params)
        best = search.best.params
        for count in component_counts(rows, _FOREST_COMPONENTS):
            for treatment in ("standard", "power"):
                self._try(rows, search, {"treatment": treatment, "n_components": count, **best})

    def _try(self, rows: TrainingRows, search: Search, params: Params) -> None:
        search.tried(params, refitted(self, params, search), rough=True)

    def enough_images(self, rows: TrainingRows) -> int:
        """Return fewer: there are six forests to grow on each fold."""
        return _ENOUGH_ROWS // rows.views

    def final(self, rows: TrainingRows, params: Params) -> Params:
        """Return the same forest with all of its trees: the fewer, the more rows each grows on."""
        most = _TREE_ROWS // (len(rows) * rows.views)
        return {**params, "trees": min(_TREES, max(_FEWEST_TREES, most))}

    def fit(self, rows: TrainingRows, params: Params) -> list[Step]:
        """Grow the forest on all rows."""
        # Not from sklearn.ensemble, where scikit-learn-intelex puts a forest of other trees.
        from sklearn.ensemble._forest import ExtraTreesClassifier, RandomForestClassifier

        kind = RandomForestClassifier if params["splits"] == "random" else ExtraTreesClassifier
        forest = kind(
            params["trees"],
            min_samples_leaf=params["min_samples_leaf"],
            class_weight=self.options.class_weight,
            random_state=self.options.random_state,
            n_jobs=self.options.n_jobs,
        )
        preparation = Preparation.of(params, self.options.random_state, scaled=False)
        return preparation.fit_head(rows, forest)
