"""The tree heads: forests on the features as they are, boosting on a projection of them.

Boosting looks at every column for every tree, which is what makes it slow on the thousands of
columns of a network. Here it sees the discriminants (Fisher's, inside the leading principal
components) and the leading components themselves: a few dozen columns that hold what separates
the classes. They are learnt inside each fold.

The trees are grown by LightGBM where it is installed, by scikit-learn where it is not, and kept
as plain arrays that numpy walks: a fitted head is the same thing either way, and no file of one
is ever parsed by LightGBM, whose reader trusts what it reads.

scikit-learn's ensembles are imported where trees are grown: loading a predictor needs none of them.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from scipy.linalg import eigh
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.extmath import randomized_svd
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from featcache.heads.base import FittedHead, fitted_head
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

ClassWeight = str | dict[Any, float] | None

_TREES = 300
_FIRST_TREES = 60  # of each kind of forest, to choose the kind by
_FOREST_COMPONENTS = (64,)  # more dilute what each split chooses from
_SAMPLE = 8192  # rows that principal components are computed from
_LEADING = 32  # components that stand beside the discriminants
_SHRINKAGE = 0.05  # of the covariance within classes, towards a sphere
_ROUNDS = (10, 20, 40, 60)  # at which a search looks
_SIZES = (128, 512)
_RIDGE = 5.0  # on the values of leaves: without it, many classes (small Hessians) diverge
_CELLS = 1 << 19  # (row, tree) pairs walked at a time: a few MB
_BLOCK = 8192
_MANY_CLASSES = 20


class BoostedTrees(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
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
    engine : "auto", "lightgbm" or "sklearn"
        What grows the trees. "auto" is LightGBM where it is installed.
    class_weight : "balanced", dict or None
        Weights of the classes.
    n_jobs : int or None
        Threads of LightGBM.
    random_state : int
        Seed of the randomised decomposition.

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
        Labels.
    mean_ : ndarray of shape (d,), float32
        Subtracted from features before they are projected.
    components_ : ndarray of shape (m, d), float32
        What rows are projected on.
    baseline_ : ndarray of shape (k,) or (1,), float32
        Scores before the first round.
    roots_ : ndarray of shape (rounds, k) or (rounds, 1), int32
        First node of each tree.
    feature_, left_, right_ : ndarray of shape (nodes,), int32
        Column of the projection that a node looks at, and the nodes that follow. A leaf is
        followed by itself.
    threshold_, value_ : ndarray of shape (nodes,), float32
        Values up to the threshold go left; what a leaf adds to the score.
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
        engine: str = "auto",
        class_weight: ClassWeight = None,
        n_jobs: int | None = 1,
        random_state: int = 0,
    ) -> None:
        self.n_components = n_components
        self.n_rounds = n_rounds
        self.learning_rate = learning_rate
        self.max_leaf_nodes = max_leaf_nodes
        self.min_samples_leaf = min_samples_leaf
        self.engine = engine
        self.class_weight = class_weight
        self.n_jobs = n_jobs
        self.random_state = random_state

    def fit(
        self, X: np.ndarray, y: np.ndarray, sample_weight: np.ndarray | None = None
    ) -> BoostedTrees:
        """Fit to features (n, d) and labels (n,).

        Parameters
        ----------
        X : array of shape (n, d)
            Features.
        y : array of shape (n,)
            Labels of at least two classes.
        sample_weight : array of shape (n,), optional
            Weights of the rows.

        Raises
        ------
        ValueError
            A parameter out of range, or data that scikit-learn refuses.
        """
        positive = (self.n_components, self.n_rounds, self.learning_rate, self.min_samples_leaf)
        if not all(value > 0 for value in positive) or self.max_leaf_nodes < 2:
            raise ValueError(
                "n_components, n_rounds, learning_rate and min_samples_leaf must be positive and "
                f"max_leaf_nodes at least 2, got {positive}, {self.max_leaf_nodes}."
            )
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"Expected at least two classes, got one class: {classes[0]!r}.")
        counts = weight > 0
        X, codes, weight = X[counts], codes[counts], weight[counts]
        chosen = stratified(codes, _SAMPLE, self.random_state)
        basis = Basis.principal(X[chosen], weight[chosen], self.n_components, self.random_state)
        Z = basis.project(X)
        return self._grow(basis, Z, codes, weight, classes)

    def _grow(
        self,
        basis: Basis,
        Z: np.ndarray,
        codes: np.ndarray,
        weight: np.ndarray,
        classes: np.ndarray,
    ) -> BoostedTrees:
        """Find the discriminants in principal components Z (n, r), and grow the trees."""
        factors = compute_class_weight(
            self.class_weight, classes=classes, y=classes[codes], sample_weight=weight
        )
        turn = discriminants(Z, codes, weight, len(classes))
        basis = Basis(basis.mean, turn.T @ basis.components)
        columns = np.ascontiguousarray(Z @ turn, dtype=np.float32)
        grow = _grow_lightgbm if self._engine() == "lightgbm" else _grow_sklearn
        trees = grow(self, columns, codes, weight * factors[codes], len(classes))
        self.classes_ = classes
        self.mean_, self.components_ = basis.mean, basis.components.astype(np.float32)
        self.baseline_, self.roots_ = trees.baseline, trees.roots
        self.feature_, self.left_, self.right_ = trees.feature, trees.left, trees.right
        self.threshold_, self.value_ = trees.threshold, trees.value
        self.n_features_in_ = len(basis.mean)
        return self

    def _engine(self) -> str:
        if self.engine not in ("auto", "lightgbm", "sklearn"):
            raise ValueError(f"engine is 'auto', 'lightgbm' or 'sklearn', got {self.engine!r}.")
        if self.engine == "auto":
            return "lightgbm" if importlib.util.find_spec("lightgbm") else "sklearn"
        return self.engine

    def _trees(self) -> Trees:
        return Trees(
            self.baseline_,
            self.roots_,
            self.feature_,
            self.threshold_,
            self.left_,
            self.right_,
            self.value_,
        )

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Return scores: (n, k), or (n,) for two classes, positive for the second."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        scores = self._staged(X, (len(self.roots_),))[0]
        result: np.ndarray = scores[:, 0] if scores.shape[1] == 1 else scores
        return result

    def _staged(self, X: np.ndarray, rounds: tuple[int, ...]) -> list[np.ndarray]:
        Z = Basis(self.mean_, self.components_).project(X)
        return self._trees().scores(Z, rounds)

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Return probabilities of shape (n, k)."""
        scores = self.decision_function(X).astype(np.float64)
        if scores.ndim == 1:
            return np.stack([expit(-scores), expit(scores)], axis=1)
        proba: np.ndarray = softmax(scores, axis=1)
        return proba

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return the labels with the highest scores, of shape (n,)."""
        scores = self.decision_function(X)
        chosen = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        labels: np.ndarray = self.classes_[chosen]
        return labels


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


@dataclass(frozen=True)
class Trees:
    """Boosted trees as arrays; `BoostedTrees` says what they are."""

    baseline: np.ndarray
    roots: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    value: np.ndarray

    def scores(self, Z: np.ndarray, rounds: tuple[int, ...]) -> list[np.ndarray]:
        """Return scores (n, k) after each of `rounds` (rising) of rows (n, m)."""
        n, k = len(Z), self.roots.shape[1]
        results = [np.empty((n, k), dtype=np.float32) for _ in rounds]
        step = max(1, _CELLS // k)
        for start in range(0, n, step):
            block = np.ascontiguousarray(Z[start : start + step])
            total, done = np.tile(self.baseline.astype(np.float64), (len(block), 1)), 0
            for result, until in zip(results, rounds, strict=True):
                for number in range(done, min(until, len(self.roots))):
                    total += self.value[self._leaves(block, self.roots[number])]
                done = until
                result[start : start + step] = total
        return results

    def _leaves(self, Z: np.ndarray, roots: np.ndarray) -> np.ndarray:
        """Walk rows down trees: the leaf of each, of shape (n, trees)."""
        first = np.arange(len(Z))[:, None] * Z.shape[1]
        flat, node = Z.ravel(), np.tile(roots, (len(Z), 1))
        for _ in range(len(self.feature)):
            goes_left = flat[first + self.feature[node]] <= self.threshold[node]
            after = np.where(goes_left, self.left[node], self.right[node])
            if np.array_equal(after, node):
                break
            node = after
        return node


class _Builder:
    """Collects the nodes of trees one after another."""

    def __init__(self) -> None:
        self.count = 0
        self.parts: list[tuple[np.ndarray, ...]] = []
        self.roots: list[int] = []

    def add(
        self,
        feature: np.ndarray,
        threshold: np.ndarray,
        left: np.ndarray,
        right: np.ndarray,
        value: np.ndarray,
    ) -> None:
        """Add a tree whose first node is its root; children are numbered within the tree."""
        self.roots.append(self.count)
        self.parts.append((feature, threshold, left + self.count, right + self.count, value))
        self.count += len(feature)

    def trees(self, baseline: np.ndarray, per_round: int) -> Trees:
        """Return all of them."""
        feature, threshold, left, right, value = map(np.concatenate, zip(*self.parts, strict=True))
        return Trees(
            np.asarray(baseline, dtype=np.float32),
            np.array(self.roots, dtype=np.int32).reshape(-1, per_round),
            feature.astype(np.int32),
            _down(threshold),
            left.astype(np.int32),
            right.astype(np.int32),
            value.astype(np.float32),
        )


def _down(threshold: np.ndarray) -> np.ndarray:
    """Round to float32 downwards: float32 values compare with it as with the float64."""
    near = threshold.astype(np.float32)
    return np.where(near > threshold, np.nextafter(near, np.float32(-np.inf)), near)


def _grow_lightgbm(
    settings: BoostedTrees, Z: np.ndarray, codes: np.ndarray, weight: np.ndarray, k: int
) -> Trees:
    """Grow trees with LightGBM and take them out of the text that it describes them with."""
    import lightgbm

    params: dict[str, Any] = {
        "objective": "binary" if k == 2 else "multiclass",
        "learning_rate": settings.learning_rate,
        "num_leaves": settings.max_leaf_nodes,
        "min_data_in_leaf": settings.min_samples_leaf,
        "lambda_l2": _RIDGE,
        "max_bin": 63,
        # More threads were measured to be slower by far where others use the machine too.
        "num_threads": settings.n_jobs or 1,
        "seed": settings.random_state,
        "deterministic": True,
        "force_col_wise": True,
        "verbosity": -1,
    }
    if k > 2:
        params["num_class"] = k
    data = lightgbm.Dataset(Z, codes, weight=weight, params=params)
    text = lightgbm.train(params, data, settings.n_rounds).model_to_string()
    builder = _Builder()
    for block in text.split("\nTree=")[1:]:
        fields = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        builder.add(*_lightgbm_tree(fields))
    per_round = 1 if k == 2 else k
    return builder.trees(np.zeros(per_round), per_round)


def _lightgbm_tree(fields: dict[str, str]) -> tuple[np.ndarray, ...]:
    """Return the nodes of one tree: inner ones, then leaves, which LightGBM counts from -1 down."""
    value = np.array(fields["leaf_value"].split(), dtype=np.float64)
    leaves = len(value)
    inner = leaves - 1
    left, right = (
        np.array(fields.get(side, "").split(), dtype=np.int64)
        for side in ("left_child", "right_child")
    )
    itself = np.arange(inner, inner + leaves)
    nothing = np.zeros(leaves)
    return (
        np.concatenate([np.array(fields.get("split_feature", "").split(), np.int64), nothing]),
        np.concatenate([np.array(fields.get("threshold", "").split(), np.float64), nothing]),
        np.concatenate([np.where(left < 0, inner - 1 - left, left), itself]),
        np.concatenate([np.where(right < 0, inner - 1 - right, right), itself]),
        np.concatenate([np.zeros(inner), value]),
    )


def _grow_sklearn(
    settings: BoostedTrees, Z: np.ndarray, codes: np.ndarray, weight: np.ndarray, k: int
) -> Trees:
    """Grow trees with scikit-learn's histogram gradient boosting."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    model = HistGradientBoostingClassifier(
        learning_rate=settings.learning_rate,
        max_iter=settings.n_rounds,
        max_leaf_nodes=settings.max_leaf_nodes,
        min_samples_leaf=settings.min_samples_leaf,
        l2_regularization=_RIDGE,
        max_bins=63,
        early_stopping=False,
        random_state=settings.random_state,
    ).fit(Z, codes, sample_weight=weight)
    builder = _Builder()
    for round_of_trees in model._predictors:
        for tree in round_of_trees:
            nodes = tree.nodes
            is_leaf = nodes["is_leaf"].astype(bool)
            itself = np.arange(len(nodes))
            builder.add(
                np.where(is_leaf, 0, nodes["feature_idx"]),
                np.where(is_leaf, 0.0, nodes["num_threshold"]),
                np.where(is_leaf, itself, nodes["left"]),
                np.where(is_leaf, itself, nodes["right"]),
                nodes["value"],
            )
    return builder.trees(model._baseline_prediction.ravel(), 1 if k == 2 else k)


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
    estimator = search.last(best.params["n_components"], best.params["rounds"])
    return SearchResult(
        head="boosting",
        estimator=fitted_head(estimator),
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
            basis = Basis(largest.mean, largest.components[:r])
            model = self._estimator(size, self.rounds[-1])
            model._grow(
                basis, Z[fitting, :r], self.codes[numbers], self.weight[numbers], rows.classes
            )
            turn = discriminants(
                Z[fitting, :r], self.codes[numbers], self.weight[numbers], len(rows.classes)
            )
            for scores in model._trees().scores(Z[judging, :r] @ turn, self.rounds):
                if scores.shape[1] == 1:  # as `featcache.heads.search.logits` gives them
                    scores = np.concatenate([-scores / 2, scores / 2], axis=1)
                results.append(scores.reshape(len(valid), rows.views, -1).mean(axis=1))
        return results

    def last(self, size: int, rounds: int) -> BoostedTrees:
        """Fit on all rows."""
        everything = np.arange(len(self.rows.codes))
        numbers = self._train_rows(everything)
        basis = self._basis(everything, size)
        return self._estimator(size, rounds)._grow(
            basis,
            self._read(numbers, basis),
            self.codes[numbers],
            self.weight[numbers],
            self.rows.classes,
        )


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
