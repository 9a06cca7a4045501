"""Learning curves: how accurate a head is, against how many labelled images it was trained on."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import TrainingError
from featcache.results.evaluation import few_groups, with_own_groups
from featcache.results.intervals import Score
from featcache.store import splitting
from featcache.store.store import FeatureStore
from featcache.study.evaluate import evaluate, left_out
from featcache.study.options import TrainingOptions, is_number
from featcache.study.parts import hold_out, remarks, untested, without_crossing
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
    notes : tuple of str
        What the reader should know: images left out, and why.
    """

    points: tuple[CurvePoint, ...]
    n_test: int
    notes: tuple[str, ...] = ()

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
        return "\n".join([text_table(header, rows, right={1}), *self.notes])


def learning_curve(
    store: FeatureStore,
    test: FeatureStore | None = None,
    *,
    head: str | Sequence[str] = "linear",
    sizes: Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
    cv: int = 5,
    group: bool = True,
    drop_crossing_groups: bool = False,
    random_state: int = 0,
    progress: bool | None = None,
) -> LearningCurve:
    """Train heads on more and more images, and score each on the same others.

    Each set of images holds the ones before it, and the classes in the shares that they have. Its
    first images are of as many groups as there are.

    Parameters
    ----------
    store : FeatureStore
        Labelled images to train on.
    test : FeatureStore, optional
        Images to score on, but for those that are in `store` too, or of groups that are. None: the
        test part of the split column of `store`, where it has one, else a quarter of its images.
    head : str or list of str
        As in `train`.
    sizes : list of int, optional
        Numbers of images. None: five, in equal ratios, up to all.
    layers : str or list of str, optional
        Taps to use; None: all.
    cv : int
        Folds; fewer where a class has fewer images.
    group : bool
        Keep the images of a group together, where `store` has groups: in the folds, and on one side
        of what is trained on and what is scored.
    drop_crossing_groups : bool
        Leave images out of training whose group is among the validation or the scored images too.
        Left out, groups that are in the split column's validation part and in others are refused.
    random_state : int
        Seed.
    progress : bool, optional
        Show a progress bar on standard error; left out, in a terminal or a notebook.

    Raises
    ------
    TrainingError
        A size is larger than the images there are, or leaves a class with fewer than two.
    """
    grouped = store.groups is not None
    options = TrainingOptions(
        cv=cv,
        group=group and grouped,
        drop_crossing_groups=drop_crossing_groups and grouped,
        random_state=random_state,
    )
    names = head_names(head)
    if test is None:
        store, test = hold_out(store, None, options)
    # Under `group`, images to score on are left out, unless those to train on are to be.
    judging = test if options.drop_crossing_groups or not options.group else None
    store, notes = without_crossing(store, judging, options)
    scored, out = _others(test, store, options)
    notes += [*out, *few_groups(with_own_groups(scored.groups))]
    notes += remarks(store, store.resolve(layers))
    notes += untested(store, scored, "image to score on")
    order = _nested_order(store, options)
    chosen = _sizes(store.labels) if sizes is None else sorted({*np.atleast_1d(sizes).tolist()})
    if not chosen or not all(is_number(Integral, one, 0, len(order) + 1) for one in chosen):
        raise TrainingError(
            f"sizes are numbers of images, from 1 to the {len(order):,} labelled ones that there "
            f"are to train on, not {sizes!r}."
        )
    points = []
    steps = list(itertools.product(names, chosen))
    with progress_bar(progress, steps, unit="fit", leave=False) as bar:
        for name, size in bar:
            bar.set_description(f"{name}, {size:,} images")
            part = store.select(np.sort(order[:size]))
            predictor = train(
                part,
                head=name,
                layers=layers,
                cv=cv,
                group=options.group,
                random_state=random_state,
                progress=False,
            )
            accuracy = evaluate(predictor, scored, other_groups=True).accuracy
            points.append(CurvePoint(name, size, accuracy))
    return LearningCurve(tuple(points), len(scored), tuple(notes))


def _others(
    test: FeatureStore, store: FeatureStore, options: TrainingOptions
) -> tuple[FeatureStore, list[str]]:
    """Return the labelled images of `test` that no set to train on can hold, the same for all."""
    known = np.isin(splitting.hash_keys(test.sha256), splitting.hash_keys(store.sha256))
    akin = np.zeros_like(known)
    if options.group and test.groups is not None:
        akin = splitting.crossing(test.groups, store.groups) & ~known
    notes = [
        left_out(rows, f"{which} the images to train on")
        for rows, which in ((known, "that are among"), (akin, "of the groups of"))
        if rows.any()
    ]
    rows = (test.labels != "") & ~known & ~akin
    if not rows.any():
        raise TrainingError(
            f"None of the {len(test):,} images to score on can be scored: "
            f"{'; '.join(notes) or 'none has a label'}. Name other images."
            + ", or give drop_crossing_groups=True to train on other groups."
            * bool(akin.any())
        )
    return test.select(rows), notes


def _nested_order(store: FeatureStore, options: TrainingOptions) -> npt.NDArray[np.int64]:
    """Return the labelled rows so that every beginning has the classes' shares, and many groups."""
    rows = np.flatnonzero(store.labels != "")
    rows = np.random.default_rng(options.random_state).permutation(rows)
    labels, groups = store.labels[rows], store.groups if options.group else None
    unit = splitting.units(len(rows), groups=None if groups is None else groups[rows])
    place = np.empty(len(rows))
    for name in np.unique(labels):
        own = np.flatnonzero(labels == name)
        before: dict[int, Iterator[int]] = defaultdict(itertools.count)  # images of each unit
        turn = [next(before[one]) for one in unit[own].tolist()]
        place[own[np.argsort(turn, kind="stable")]] = (np.arange(len(own)) + 0.5) / len(own)
    order: npt.NDArray[np.int64] = rows[np.argsort(place, kind="stable")]
    return order


def _sizes(labels: npt.NDArray[Any]) -> list[int]:
    counts = np.unique(labels[labels != ""], return_counts=True)[1]
    n = int(counts.sum())
    # So many that the rarest class has three.
    least = min(n, max(n // 16, int(np.ceil(3 * n / counts.min()))))
    return sorted({int(size) for size in np.geomspace(least, n, 5).round()})
