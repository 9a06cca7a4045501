"""The nearest-neighbour head: cosine similarity, votes weighted by a softmax.

The votes are those of Wu, Xiong, Yu and Lin (Unsupervised feature learning via non-parametric
instance discrimination, 2018): a neighbour of similarity s has the weight exp(s / temperature).
All neighbourhood sizes and temperatures are judged from one pass over the similarities: each
image is compared with all rows of the other folds once, and the nearest are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from sklearn.utils.class_weight import compute_class_weight

from featcache.heads.base import ClassWeight, FittedHead, Head
from featcache.heads.calibration import fit_temperature
from featcache.heads.preparation import Preparation, component_counts
from featcache.heads.rows import FeatureBlocks, TrainingRows, stratified
from featcache.heads.search import Scoring, SearchResult, Trial, choose, gather, score_folds
from featcache.heads.steps import (
    Log,
    Neighbors,
    Power,
    Step,
    Unit,
    nearest,
    needed_neighbors,
)

NEIGHBORS = (10, 20, 100, 200)
TEMPERATURES = (0.02, 0.05, 0.15)

_COUNTS = (128, 256)  # of principal components
_QUERIES = 1024  # rows compared at a time
_VOTES = 1 << 22  # neighbours whose votes are counted at a time
_WORK = 2e13  # multiplications and additions that each treatment may take: two minutes
_FEWEST_QUERIES = 10_000
_SOME_QUERIES = 1000  # however little memory there is: every fold must have some


class CosineNeighbors(Head):
    """Vote of the nearest training rows by cosine similarity.

    Parameters
    ----------
    n_neighbors : int
        Total sample weight of the neighbours that vote: their number where no weights are given,
        so that a weight of two is the same as a row twice.
    temperature : float
        A neighbour of similarity s votes with the weight ``exp(s / temperature)``.
    class_weight : "balanced", dict or None
        Factors of the votes.

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
        Labels.
    steps_ : list of Step
        Rows of length 1, the `Neighbors` that vote, and the logarithm of their votes.
    n_features_in_ : int
        Number of columns.
    """

    def __init__(
        self,
        n_neighbors: int = 20,
        *,
        temperature: float = 0.05,
        class_weight: ClassWeight = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.temperature = temperature
        self.class_weight = class_weight

    def _check_parameters(self) -> None:
        if not self.n_neighbors >= 1 or not self.temperature > 0:
            raise ValueError(
                "n_neighbors must be at least 1 and temperature positive, got "
                f"{self.n_neighbors}, {self.temperature}."
            )

    def _fit(self, X: np.ndarray, codes: np.ndarray, weight: np.ndarray) -> list[Step]:
        return self.keep(Unit()(X), codes, weight, self.classes_)

    def keep(
        self, unit: np.ndarray, codes: np.ndarray, weight: np.ndarray, classes: np.ndarray
    ) -> list[Step]:
        """Return the steps for rows of length 1, those of no weight left out."""
        factors = compute_class_weight(self.class_weight, classes=classes, y=classes[codes])
        counts = weight > 0
        if not counts.all():
            unit, codes, weight = unit[counts], codes[counts], weight[counts]
        numbers = float(self.n_neighbors), float(self.temperature)
        neighbors = Neighbors(unit, codes.astype(np.int32), weight, factors, *numbers)
        return [Unit(), neighbors, Log()]


@dataclass(frozen=True)
class _Plan:
    """Which images are kept and which are judged, and what the user should know about it."""

    references: np.ndarray
    queries: np.ndarray
    dtype: type
    notes: tuple[str, ...]

    @classmethod
    def make(cls, rows: TrainingRows, memory: int | None, random_state: int) -> _Plan:
        n, views, d = len(rows.codes), rows.views, rows.X.shape[-1]
        on_disk = isinstance(rows.X, FeatureBlocks)
        kept = judged = n
        if on_disk:
            room = memory or 1 << 30
            kept = min(n, room // 2 // (2 * d * views) - len(rows.classes))
            judged = room // 4 // (16 * max(NEIGHBORS) * views * views)
            judged = min(n, max(judged, _SOME_QUERIES))
        judged = int(min(judged, max(_FEWEST_QUERIES, _WORK / (2.0 * kept * d * views**2))))
        notes = []
        if kept < n:
            notes.append(
                f"knn keeps {kept} of {n} images, a random part of each class: as many as half of "
                "the memory holds."
            )
        if judged < n:
            notes.append(
                f"knn chose its parameters on {judged} of {n} images, a random part of each class."
            )
        return cls(
            stratified(rows.codes, kept, random_state),
            stratified(rows.codes, judged, random_state + 1),
            np.float16 if on_disk else np.float32,
            tuple(notes),
        )


def _unit_blocks(
    rows: TrainingRows, treat: Callable[[np.ndarray], np.ndarray] | None
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (row numbers, rows of length 1 after the treatment)."""
    source = rows.X if isinstance(rows.X, FeatureBlocks) else FeatureBlocks.of(rows.X)
    for images, block in source.blocks(_QUERIES):
        yield source.rows_of(images), Unit()(block if treat is None else treat(block))


@dataclass(frozen=True)
class _Allowed:
    """Which references each query may find: the training rows of the fold that judges it."""

    in_train: np.ndarray  # (folds, references)
    fold: np.ndarray  # (queries,)

    def __call__(self, part: slice) -> np.ndarray:
        allowed: np.ndarray = self.in_train[:, part][self.fold]
        return allowed


# The images judged in each fold, and their neighbours' similarities and rows.
_Neighbors: TypeAlias = tuple[list[np.ndarray], np.ndarray, np.ndarray]


class _Search:
    """One treatment: which rows are nearest, and how all settings of the vote do."""

    def __init__(
        self, rows: TrainingRows, plan: _Plan, treat: Callable[[np.ndarray], np.ndarray] | None
    ) -> None:
        self.rows, self.plan, self.treat = rows, plan, treat
        self.codes = np.repeat(rows.codes, rows.views)
        weight = np.ones(len(rows.codes)) if rows.weight is None else rows.weight
        self.weights = np.repeat(weight / rows.views, rows.views)
        counted = plan.references[weight[plan.references] > 0]
        self.kept = rows.rows(counted)
        self.unit: np.ndarray = np.empty((len(self.kept), rows.X.shape[-1]), dtype=plan.dtype)
        for part, block in _unit_blocks(rows, treat):
            a, b = np.searchsorted(self.kept, [part.start, part.stop])
            self.unit[a:b] = block[self.kept[a:b] - part.start]

    def neighbors(self) -> _Neighbors:
        """Find the nearest rows of the other folds, reading the features once."""
        rows, views = self.rows, self.rows.views
        weight = self.weights[self.kept]
        count = needed_neighbors(weight, max(NEIGHBORS))
        judged = [np.intersect1d(valid, self.plan.queries) for _, valid in rows.folds]
        starts = np.concatenate([[0], np.cumsum([len(one) * views for one in judged])])
        similarities = np.empty((starts[-1], count), dtype=np.float32)
        found = np.empty((starts[-1], count), dtype=np.int32)
        in_train = np.zeros((len(rows.folds), len(rows.codes)), dtype=bool)
        for fold, (train, _) in enumerate(rows.folds):
            in_train[fold, train] = True
        in_train = in_train[:, self.kept // views]
        numbers = [rows.rows(images) for images in judged]
        for part, block in _unit_blocks(rows, self.treat):
            where, own, place = [], [], []
            for fold, one in enumerate(numbers):
                a, b = np.searchsorted(one, [part.start, part.stop])
                where.append(one[a:b] - part.start)
                own.append(np.full(b - a, fold))
                place.append(starts[fold] + np.arange(a, b))
            fold_of, at = np.concatenate(own), np.concatenate(place)
            if not len(at):
                continue
            similarities[at], found[at] = nearest(
                block[np.concatenate(where)],
                self.unit,
                count,
                allowed=_Allowed(in_train, fold_of),
            )
        return judged, similarities, found

    def candidates(
        self,
        params: Mapping[str, Any],
        neighbors: _Neighbors,
        scoring: Scoring,
        class_weight: Any,
    ) -> list[tuple[Trial, np.ndarray]]:
        """Judge all settings of the vote."""
        rows = self.rows
        judged, similarities, found = neighbors
        folds = [(train, one) for (train, _), one in zip(rows.folds, judged, strict=True)]
        codes, weights = self.codes[self.kept], self.weights[self.kept]
        per_class = [
            compute_class_weight(class_weight, classes=rows.classes, y=rows.labels[train])
            for train, _ in folds
        ]
        tried = []
        for n_neighbors in NEIGHBORS:
            for temperature in TEMPERATURES:
                per_fold, stop = [], 0
                for (_, one), factors in zip(folds, per_class, strict=True):
                    start, stop = stop, stop + len(one) * rows.views
                    vote = Neighbors(self.unit, codes, weights, factors, n_neighbors, temperature)
                    logs = Log()(_counted(vote, similarities[start:stop], found[start:stop]))
                    per_fold.append(logs.reshape(len(one), rows.views, len(factors)).mean(axis=1))
                values = gather(_judged_rows(rows, folds), per_fold)
                scores = score_folds(values, rows.codes, rows.classes, folds, scoring)
                chosen = {"k": n_neighbors, "temperature": temperature}
                tried.append((Trial({**params, **chosen}, scores), values))
        return tried


def _among_components(rows: TrainingRows, plan: _Plan, preparation: Preparation) -> _Neighbors:
    """Find the nearest rows by principal components, which each fold has of its own."""
    judged, similarities, found = [], [], []
    for fold, pair in enumerate(rows.folds):
        inside = replace(rows, X=preparation.on_fold(rows, fold), folds=[pair])
        some = _Search(inside, plan, None).neighbors()
        judged += some[0]
        similarities.append(some[1])
        found.append(some[2])
    return judged, np.concatenate(similarities), np.concatenate(found)


def _judged_rows(rows: TrainingRows, folds: Any) -> TrainingRows:
    return TrainingRows(rows.X, rows.codes, rows.classes, rows.weight, folds, rows.views)


def _counted(neighbors: Neighbors, similarities: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return the votes, block by block: it needs several arrays of the size of its input."""
    step = max(1, _VOTES // similarities.shape[1])
    parts = [
        neighbors.votes(similarities[i : i + step], found[i : i + step])
        for i in range(0, len(similarities), step)
    ]
    return np.concatenate(parts) if parts else np.empty((0, len(neighbors.factors)))


def search_knn(
    rows: TrainingRows,
    *,
    class_weight: ClassWeight = None,
    scoring: Scoring = "accuracy",
    random_state: int = 0,
    memory: int | None = None,
    **_: Any,
) -> SearchResult:
    """Choose treatment, components, neighbourhood and temperature, and keep the rows that vote.

    Principal components are tried where features are in memory.

    Features on disk are read once for each treatment to be kept (as float16, in half of the
    memory, a stratified part of them if they are more than that) and once to be compared.

    Parameters
    ----------
    rows : TrainingRows
        Training rows with their folds.
    class_weight : "balanced", dict or None
        Factors of the votes.
    scoring : str or callable
        See `featcache.heads.search.score_folds`.
    random_state : int
        Seed of what is kept where not everything can be.
    memory : int, optional
        Bytes to stay under when features are on disk.
    """
    start = time.perf_counter()
    plan = _Plan.make(rows, memory, random_state)
    treatments: dict[str, Step | None] = {"l2": None, "power": Power()}
    tried: list[tuple[Trial, np.ndarray]] = []
    for name, treat in treatments.items():
        search = _Search(rows, plan, treat)
        params = {"treatment": name}
        tried += search.candidates(params, search.neighbors(), scoring, class_weight)
    if not isinstance(rows.X, FeatureBlocks):
        treatment = choose(tried)[0].params["treatment"]
        for count in component_counts(rows, _COUNTS):
            some = Preparation(treatment, count, random_state=random_state)
            neighbors = _among_components(rows, plan, some)
            tried += search.candidates(some.params, neighbors, scoring, class_weight)
    best, values = choose(tried)
    middle = time.perf_counter()
    estimator = CosineNeighbors(
        best.params["k"], temperature=best.params["temperature"], class_weight=class_weight
    )
    treatment = best.params["treatment"]
    if "n_components" in best.params:
        some = Preparation(treatment, best.params["n_components"], random_state=random_state)
        steps = some.fit_head(rows, estimator)
    else:
        treat = treatments[treatment]
        last = _Search(rows, plan, treat)
        steps = estimator.keep(
            last.unit, last.codes[last.kept], last.weights[last.kept], rows.classes
        )
        steps = steps if treat is None else [treat, *steps]
    return SearchResult(
        head="knn",
        estimator=FittedHead(steps, rows.classes),
        best=best,
        trials=tuple(one for one, _ in tried),
        classes=rows.classes,
        logits=values,
        temperature=fit_temperature(values, rows.codes, rows.weight),
        search_seconds=middle - start,
        fit_seconds=time.perf_counter() - middle,
        notes=plan.notes,
    )
