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
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from scipy.linalg import eigh
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.extmath import randomized_svd

from featcache.heads.base import ClassWeight, FittedHead, Head
from featcache.heads.calibration import fit_temperature
from featcache.heads.preparation import Preparation, component_counts
from featcache.heads.rows import FeatureBlocks, TrainingRows, stratified
from featcache.heads.search import (
    Scoring,
    SearchResult,
    Trial,
    choose,
    fit_estimator,
    gather,
    logits,
    score_folds,
)
from featcache.heads.steps import Matrix, Scale, Step, Trees

_TREES = 300
_FIRST_TREES = 60  # of each kind of forest, to choose the kind by
_FOREST_COMPONENTS = (64,)  # more dilute what each split chooses from
_SAMPLE = 8192  # rows that principal components are computed from
_LEADING = 32  # components that stand beside the discriminants
_SHRINKAGE = 0.05  # of the covariance within classes, towards a sphere
_ROUNDS = (10, 20, 40, 60)  # at which a search looks
_SIZES = (128, 512)
_RIDGE = 5.0  # on the values of leaves: without it, many classes (small Hessians) diverge
_CELLS = 1 << 22  # numbers that trees are walked with at a time: 32 MB
_BLOCK = 8192
_MANY_CLASSES = 20
_SIDES = ("left", "right")
_BOTH = Matrix(np.array([[-0.5], [0.5]]), np.zeros(2))  # one score for two classes: -f/2 and f/2


class BoostedTrees(Head):
    """Gradient-boosted trees on discriminants and principal components.

    Parameters
    ----------
    n_components : int
        Principal components that the discriminants are looked for in; with more columns than
        this they are computed, with fewer the columns stay as they are.
    n_rounds : int
        Rounds of boosting; each grows a tree a class (one for two classes).
    learning_rate : float
        Part of each tree that is added.
    max_leaf_nodes : int
        Leaves of a tree.
    min_samples_leaf : int
        Training rows of a leaf.
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
        n_components: int = 512,
        *,
        n_rounds: int = 60,
        learning_rate: float = 0.15,
        max_leaf_nodes: int = 8,
        min_samples_leaf: int = 10,
        class_weight: ClassWeight = None,
        random_state: int = 0,
    ) -> None:
        self.n_components = n_components
        self.n_rounds = n_rounds
        self.learning_rate = learning_rate
        self.max_leaf_nodes = max_leaf_nodes
        self.min_samples_leaf = min_samples_leaf
        self.class_weight = class_weight
        self.random_state = random_state

    def _check_parameters(self) -> None:
        positive = (self.n_components, self.n_rounds, self.learning_rate, self.min_samples_leaf)
        if not all(value > 0 for value in positive) or self.max_leaf_nodes < 2:
            raise ValueError(
                "n_components, n_rounds, learning_rate and min_samples_leaf must be positive and "
                f"max_leaf_nodes at least 2, got {positive}, {self.max_leaf_nodes}."
            )

    def _fit(self, X: np.ndarray, codes: np.ndarray, weight: np.ndarray) -> list[Step]:
        counts = weight > 0
        X, codes, weight = X[counts], codes[counts], weight[counts]
        chosen = stratified(codes, _SAMPLE, self.random_state)
        basis = Basis.principal(X[chosen], weight[chosen], self.n_components, self.random_state)
        return basis.steps(*self.grow(basis.project(X), codes, weight, self.classes_))

    def grow(
        self, Z: np.ndarray, codes: np.ndarray, weight: np.ndarray, classes: np.ndarray
    ) -> tuple[np.ndarray, Trees]:
        """Return the discriminants (r, m) in principal components Z (n, r), and trees on them."""
        from sklearn.ensemble import HistGradientBoostingClassifier

        factors = compute_class_weight(
            self.class_weight, classes=classes, y=classes[codes], sample_weight=weight
        )
        turn = discriminants(Z, codes, weight, len(classes))
        model = HistGradientBoostingClassifier(
            learning_rate=self.learning_rate,
            max_iter=self.n_rounds,
            max_leaf_nodes=self.max_leaf_nodes,
            min_samples_leaf=self.min_samples_leaf,
            l2_regularization=_RIDGE,
            max_bins=63,
            early_stopping=False,
            random_state=self.random_state,
        )
        columns = Z @ turn
        model.fit(columns, codes, sample_weight=weight * factors[codes])
        return turn, _between(_trees_of(model), columns)


@dataclass(frozen=True)
class Basis:
    """A centre and directions that rows are projected on.

    Attributes
    ----------
    mean : ndarray of shape (d,), float32
        The centre.
    components : ndarray of shape (r, d)
        The directions.
    """

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def principal(cls, X: np.ndarray, weight: np.ndarray, size: int, seed: int) -> Basis:
        """Return the leading principal components of rows (n, d); all columns if they are few."""
        mean = np.average(X, axis=0, weights=weight)
        if X.shape[1] <= size:
            return cls(mean.astype(np.float32), np.eye(X.shape[1], dtype=np.float32))
        centred = (X - mean) * np.sqrt(weight / weight.mean())[:, None]
        centred = centred.astype(np.float32)
        rank = min(size, *centred.shape)
        _, _, components = randomized_svd(centred, rank, n_iter=2, random_state=seed)
        return cls(mean.astype(np.float32), components)

    def steps(self, turn: np.ndarray, trees: Trees) -> list[Step]:
        """Return the steps of trees on `turn`ed coordinates (r, m)."""
        weight = turn.T @ self.components
        found = [Scale(self.mean, np.ones_like(self.mean)), Matrix(weight, np.zeros(len(weight)))]
        return [*found, trees, _BOTH] if len(trees.baseline) == 1 else [*found, trees]

    def project(self, X: np.ndarray) -> np.ndarray:
        """Return coordinates (n, r), float32, of rows (n, d)."""
        Z: np.ndarray = np.empty((len(X), len(self.components)), dtype=np.float32)
        for start in range(0, len(X), _BLOCK):
            block = X[start : start + _BLOCK].astype(np.float32, copy=False)
            Z[start : start + _BLOCK] = (block - self.mean) @ self.components.T
        return Z


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


def search_boosting(
    rows: TrainingRows,
    *,
    class_weight: ClassWeight = None,
    scoring: Scoring = "accuracy",
    random_state: int = 0,
    n_jobs: int = 1,
    memory: int | None = None,
    **_: Any,
) -> SearchResult:
    """Choose the size of the projection and the number of rounds by cross-validation.

    Features on disk are read once to take a sample for the principal components, and once for
    each fold and for the last fit, of which only the components stay in memory; where those are
    more than a quarter of it, trees are grown on a random part of each class.

    Parameters
    ----------
    rows : TrainingRows
        Training rows with their folds.
    class_weight : "balanced", dict or None
        Weights of the classes.
    scoring : str or callable
        See `featcache.heads.search.score_folds`.
    random_state : int
        Seed.
    n_jobs : int
        Folds at a time.
    memory : int, optional
        Bytes to stay under when features are on disk.
    """
    start = time.perf_counter()
    search = _Boosting(rows, class_weight, random_state, memory)
    per_fold = Parallel(n_jobs=n_jobs, prefer="threads")(
        delayed(search.fold)(fold) for fold in range(len(rows.folds))
    )
    tried = []
    for number, (size, rounds) in enumerate(search.settings):
        values = gather(rows, [one[number] for one in per_fold])
        scores = score_folds(values, rows.codes, rows.classes, rows.folds, scoring)
        tried.append((Trial({"n_components": size, "rounds": rounds}, scores), values))
    best, values = choose(tried)
    middle = time.perf_counter()
    steps = search.last(best.params["n_components"], best.params["rounds"])
    return SearchResult(
        head="boosting",
        estimator=FittedHead(steps, rows.classes),
        best=best,
        trials=tuple(one for one, _ in tried),
        classes=rows.classes,
        logits=values,
        temperature=fit_temperature(values, rows.codes, rows.weight),
        search_seconds=middle - start,
        fit_seconds=time.perf_counter() - middle,
        notes=search.notes,
    )


class _Boosting:
    """What the folds of a search share."""

    def __init__(
        self, rows: TrainingRows, class_weight: ClassWeight, random_state: int, memory: int | None
    ) -> None:
        self.rows, self.class_weight, self.random_state = rows, class_weight, random_state
        self.d = rows.X.shape[-1]
        self.codes = np.repeat(rows.codes, rows.views)
        weight = np.ones(len(rows.codes)) if rows.weight is None else rows.weight
        self.weight = np.repeat(weight / rows.views, rows.views)
        self.sizes = [size for size in _SIZES if size < self.d] or [min(_SIZES[0], self.d)]
        few = len(rows.classes) <= _MANY_CLASSES
        self.rounds = _ROUNDS if few else _ROUNDS[:-1]
        self.settings = [(size, rounds) for size in self.sizes for rounds in self.rounds]
        n = len(rows.codes)
        room, sample = n, _SAMPLE
        if isinstance(rows.X, FeatureBlocks):
            memory = memory or 1 << 30
            room = max(1, memory // 4 // (4 * max(self.sizes) * rows.views))
            sample = max(1, min(sample, memory // 8 // (4 * self.d * rows.views)))
        self.used = stratified(rows.codes, room, random_state)
        self.sampled = rows.rows(stratified(rows.codes, sample, random_state + 1))
        self.sample = self._read(self.sampled, None)
        self.notes = (
            ()
            if len(self.used) == n
            else (
                f"boosting grew its trees on {len(self.used)} of {n} images, a random part of "
                "each class: as many as a quarter of the memory holds.",
            )
        )

    def _read(self, numbers: np.ndarray, basis: Basis | None) -> np.ndarray:
        """Return some rows, projected on a basis if there is one."""
        X = self.rows.X
        project = None if basis is None else basis.project
        if isinstance(X, FeatureBlocks):
            return X.take(numbers, project)
        taken: np.ndarray = X[numbers]
        return taken if project is None else project(taken)

    def _basis(self, train: np.ndarray, size: int) -> Basis:
        own = np.isin(self.sampled, self.rows.rows(train)) & (self.weight[self.sampled] > 0)
        return Basis.principal(
            self.sample[own], self.weight[self.sampled[own]], size, self.random_state
        )

    def _estimator(self, size: int, rounds: int) -> BoostedTrees:
        return BoostedTrees(
            size, n_rounds=rounds, class_weight=self.class_weight, random_state=self.random_state
        )

    def _train_rows(self, train: np.ndarray) -> np.ndarray:
        numbers = self.rows.rows(np.intersect1d(train, self.used))
        counted: np.ndarray = numbers[self.weight[numbers] > 0]
        return counted

    def fold(self, fold: int) -> list[np.ndarray]:
        """Return the scores of the fold's validation rows for all settings, in their order."""
        rows = self.rows
        train, valid = (np.asarray(part) for part in rows.folds[fold])
        numbers, judged = self._train_rows(train), rows.rows(valid)
        largest = self._basis(train, max(self.sizes))
        wanted = np.union1d(numbers, judged)
        Z = self._read(wanted, largest)
        fitting, judging = np.searchsorted(wanted, numbers), np.searchsorted(wanted, judged)
        results = []
        for size in self.sizes:
            r = min(size, Z.shape[1])
            turn, trees = self._estimator(size, self.rounds[-1]).grow(
                Z[fitting, :r], self.codes[numbers], self.weight[numbers], rows.classes
            )
            for scores in _staged(trees, Z[judging, :r] @ turn, self.rounds):
                both = _BOTH(scores) if scores.shape[1] == 1 else scores
                results.append(both.reshape(len(valid), rows.views, -1).mean(axis=1))
        return results

    def last(self, size: int, rounds: int) -> list[Step]:
        """Fit on all rows."""
        everything = np.arange(len(self.rows.codes))
        numbers = self._train_rows(everything)
        basis = self._basis(everything, size)
        grown = self._estimator(size, rounds).grow(
            self._read(numbers, basis),
            self.codes[numbers],
            self.weight[numbers],
            self.rows.classes,
        )
        return basis.steps(*grown)


@dataclass(frozen=True)
class _Forest:
    """What a forest is grown on, and how."""

    preparation: Preparation
    splits: str
    min_samples_leaf: int


def search_forest(
    rows: TrainingRows,
    *,
    class_weight: ClassWeight = None,
    scoring: Scoring = "accuracy",
    random_state: int = 0,
    n_jobs: int = 1,
    **_: Any,
) -> SearchResult:
    """Choose between random forests and extra trees, and grow the better to 300 trees.

    The kinds are compared with 60 trees a fold, and the better one with itself on principal
    components; only the best is grown in full.

    Parameters
    ----------
    rows : TrainingRows
        Training rows with their folds, in memory.
    class_weight : "balanced", dict or None
        Weights of the classes.
    scoring : str or callable
        See `featcache.heads.search.score_folds`.
    random_state : int
        Seed.
    n_jobs : int
        Trees at a time.
    """
    from sklearn.ensemble import ExtraTreesClassifier, RandomForestClassifier

    start = time.perf_counter()
    shared = {"class_weight": class_weight, "random_state": random_state, "n_jobs": n_jobs}
    kinds = {"random": RandomForestClassifier, "extra": ExtraTreesClassifier}
    plain = Preparation(scaled=False)
    tried: dict[_Forest, tuple[Trial, np.ndarray]] = {}

    def judge(forests: Sequence[_Forest], count: int) -> _Forest:
        for one in forests:
            forest = kinds[one.splits](count, min_samples_leaf=one.min_samples_leaf, **shared)
            tried[one] = _judge_forest(rows, one, forest, scoring)
        return max(tried, key=lambda one: tried[one][0].score)

    best = judge([_Forest(plain, kind, leaf) for kind in kinds for leaf in (1, 3)], _FIRST_TREES)
    on_components = [
        replace(best, preparation=Preparation(treatment, count, random_state=random_state))
        for count in component_counts(rows, _FOREST_COMPONENTS)
        for treatment in ("standard", "power")
    ]
    best = judge(on_components, _FIRST_TREES)
    candidates = [one for one, _ in tried.values()]
    judge([best], _TREES)
    chosen, values = tried[best]
    middle = time.perf_counter()
    forest = kinds[best.splits](_TREES, min_samples_leaf=best.min_samples_leaf, **shared)
    estimator = FittedHead(best.preparation.fit_head(rows, forest), rows.classes)
    return SearchResult(
        head="forest",
        estimator=estimator,
        best=chosen,
        trials=(*candidates, chosen),
        classes=rows.classes,
        logits=values,
        temperature=fit_temperature(values, rows.codes, rows.weight),
        search_seconds=middle - start,
        fit_seconds=time.perf_counter() - middle,
    )


def _judge_forest(
    rows: TrainingRows, how: _Forest, forest: Any, scoring: Scoring
) -> tuple[Trial, np.ndarray]:
    """Grow a forest for each fold and score it on the fold's validation rows."""
    per_fold = []
    for fold, (train, valid) in enumerate(rows.folds):
        inside = replace(rows, X=how.preparation.on_fold(rows, fold))
        fit_estimator(forest, inside, np.asarray(train))
        X = inside.features(np.asarray(valid))
        per_fold.append(logits(forest, X.reshape(len(valid), rows.views, -1)))
    values = gather(rows, per_fold)
    scores = score_folds(values, rows.codes, rows.classes, rows.folds, scoring)
    params = {
        **({} if how.preparation.n_components is None else how.preparation.params),
        "splits": how.splits,
        "min_samples_leaf": how.min_samples_leaf,
        "trees": forest.n_estimators,
    }
    return Trial(params, scores), values
