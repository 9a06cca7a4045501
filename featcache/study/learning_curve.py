"""Learning curves: how accurate a head is, against how many labelled images it was trained on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import TrainingError
from featcache.results.intervals import Score
from featcache.store import splitting
from featcache.store.store import FeatureStore
from featcache.study.evaluate import evaluate
from featcache.study.train import head_names, train
from featcache.system.console import progress_bar
from featcache.system.tables import text_table

__all__ = ["CurvePoint", "LearningCurve", "learning_curve"]


@dataclass(frozen=True)
class CurvePoint:
    """One head, trained on some of the images.

    Attributes
    ----------
    head : str
        Name of the head.
    images : int
        Images it was trained on.
    accuracy : Score
        On the test images, with its 95 % interval.
    """

    head: str
    images: int
    accuracy: Score


@dataclass(frozen=True)
class LearningCurve(Sequence[CurvePoint]):
    """Points by head, then by images. ``print(curve)`` shows them.

    Attributes
    ----------
    points : tuple of CurvePoint
        The curve.
    n_test : int
        Images that all were scored on.
    """

    points: tuple[CurvePoint, ...]
    n_test: int

    def __getitem__(self, index: Any) -> Any:
        return self.points[index]

    def __len__(self) -> int:
        return len(self.points)

    @property
    def heads(self) -> list[str]:
        """Heads, in the order in which they were asked for."""
        return list(dict.fromkeys(point.head for point in self.points))

    def of(self, head: str) -> list[CurvePoint]:
        """Return the points of one head, the fewest images first."""
        return [point for point in self.points if point.head == head]

    def __str__(self) -> str:
        header = ["head", "images", f"accuracy on {self.n_test:,} others"]
        rows = [(p.head, f"{p.images:,}", str(p.accuracy)) for p in self.points]
        return text_table(header, rows, right={1})


def learning_curve(
    store: FeatureStore,
    test: FeatureStore | None = None,
    *,
    head: str | Sequence[str] = "linear",
    sizes: Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
    cv: int = 5,
    random_state: int = 0,
    progress: bool | None = None,
) -> LearningCurve:
    """Train heads on more and more images, and score each on the same others.

    Each set of images holds the ones before it, and the classes in the shares that they have.

    Parameters
    ----------
    store : FeatureStore
        Labelled images to train on.
    test : FeatureStore, optional
        Images to score on. None: a quarter of `store` is held out.
    head : str or list of str
        As in `train`.
    sizes : list of int, optional
        Numbers of images. None: five, in equal ratios, up to all.
    layers : str or list of str, optional
        Taps to use; None: all.
    cv : int
        Folds; fewer where a class has fewer images.
    random_state : int
        Seed.
    progress : bool, optional
        Show a progress bar on standard error; left out, in a terminal or a notebook.

    Raises
    ------
    TrainingError
        A size is larger than the images there are, or leaves a class with fewer than two.
    """
    if test is None:
        store, test = store.split(random_state=random_state)
    order = _nested_order(store.labels, random_state)
    points = []
    chosen = sorted(set(sizes)) if sizes is not None else _sizes(store.labels)
    if chosen[-1] > len(order):
        raise TrainingError(
            f"A learning curve up to {chosen[-1]:,} images was asked for; there are "
            f"{len(order):,} labelled ones to train on."
        )
    steps = list(itertools.product(head_names(head), chosen))
    with progress_bar(progress, steps, unit="fit", leave=False) as bar:
        for name, size in bar:
            bar.set_description(f"{name}, {size:,} images")
            part = store.select(np.sort(order[:size]))
            predictor = train(
                part,
                head=name,
                layers=layers,
                cv=splitting.possible_folds(cv, part.labels, sha256=part.sha256),
                random_state=random_state,
                progress=False,
            )
            scored = evaluate(predictor, test)
            points.append(CurvePoint(name, size, scored.accuracy))
    return LearningCurve(tuple(points), len(scored))


def _nested_order(labels: npt.NDArray[Any], random_state: int) -> npt.NDArray[np.int64]:
    """Return the labelled rows so that every beginning has the classes' shares."""
    rows = np.random.default_rng(random_state).permutation(np.flatnonzero(labels != ""))
    place = np.empty(len(rows))
    for name in np.unique(labels[rows]):
        own = np.flatnonzero(labels[rows] == name)
        place[own] = (np.arange(len(own)) + 0.5) / len(own)
    order: npt.NDArray[np.int64] = rows[np.argsort(place, kind="stable")]
    return order


def _sizes(labels: npt.NDArray[Any]) -> list[int]:
    counts = np.unique(labels[labels != ""], return_counts=True)[1]
    n = int(counts.sum())
    # So many that the rarest class has three.
    least = min(n, max(n // 16, int(np.ceil(3 * n / counts.min()))))
    return sorted({int(size) for size in np.geomspace(least, n, 5).round()})
