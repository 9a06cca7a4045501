"""`audit`: images of a store whose label, copies or features look wrong.

Four kinds of findings, in the order in which they are worth a look:

``label``
    A head trained on the other folds finds another class ten times as probable as the label, by its
    calibrated probabilities. Score: the probability of the label. So many are also the estimate of
    how many labels are wrong. Where 8 or 20 % of the labels of scikit-learn's digits, of crops of
    photographs and of synthetic classes were moved at random, it was 0.3 to 1.2 times their number;
    where 3 % were moved, 0.9 to 3 times; where 1 %, up to 8 times for heads that are often wrong,
    which the odds of ten to one mislead in a few per cent of all images. Of mistakes that lie
    between classes that look alike it finds fewer. The count of confident learning (Northcutt,
    Jiang and Chuang, JAIR 70, 2021), which takes an image for mislabelled where another class
    exceeds that class's mean probability, was up to 18 times too high at 3 %; it is not used.
``copy``
    Two images of the same bytes. Score: 1.
``near-duplicate``
    Two images that resemble each other more than chance explains. Resemblance is the cosine of
    whitened principal components, less the mean of both images' cosines with their neighbours 11 to
    50 (after CSLS, Conneau et al., *Word translation without parallel data*, 2018): among images
    that all look alike it takes more, and a burst of ten is no reason to take less. Chance is what
    the store says itself: in a set without twins, an image's resemblance to its nearest is the
    largest of many, whose distribution is Gumbel's. It is fitted to the quartiles, which twins of
    fewer than a quarter of the images move little, and the threshold is where it explains a tenth
    of what is found. Nothing else is tuned. Where a store's own tail is heavier than that, nothing
    is found so. Joined with these are all pairs whose plain cosine is at least 0.98, after the mean
    of all features was taken off: features behind a ReLU all point the same way. Score: that
    cosine, which comes first; else the resemblance, up to 1.
``outlier``
    An image far from all others: the mean cosine distance to its ten nearest neighbours lies more
    than three interquartile ranges above the upper quartile ("far out" in Tukey, *Exploratory Data
    Analysis*, 1977). Score: that distance. Ten or more that resemble each other are neighbours, and
    so no outliers, however unlike the rest they are.

Copies and near-duplicates with different labels, or on both sides of a predefined split, are
marked: the first are mistakes, the second flatter every test.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import TrainingError
from featcache.heads.table import HEADS
from featcache.results.evaluation import Evaluation
from featcache.store import splitting
from featcache.store.store import FeatureStore
from featcache.study.evaluate import out_of_fold
from featcache.study.maps import centred, pooled
from featcache.study.options import TrainingOptions
from featcache.study.parts import folds_of
from featcache.study.train import head_names
from featcache.system.files import csv_writer, is_table, replacing
from featcache.system.nearest import lengths_of, nearest, without
from featcache.system.tables import counted, first_names, text_table

__all__ = ["Finding", "Findings", "audit", "suspicious_labels"]

_SHOWN = 5  # of each kind, for people
_NEIGHBORS = 10  # whose mean distance makes an outlier
_AROUND = 50  # neighbours: those from the 11th on say how near the others usually are
_COMPONENTS = 256
_FALSE = 0.1  # of the pairs, expected to be chance
_ODDS = 0.1  # of a label against the most probable class, below which it is doubted
_BLOCK = 64  # images compared with their neighbours at a time


@dataclass(frozen=True)
class Finding:
    """One image that looks wrong.

    Attributes
    ----------
    kind : {"label", "copy", "near-duplicate", "outlier"}
        What looks wrong.
    id, label, split : str
        The image, its label and its part of a predefined split; empty where there is none.
    score : float
        See the module's text.
    suggested : str
        For labels: the most probable class.
    other_id, other_label, other_split : str
        For copies and near-duplicates: the other image.
    note : str
        ``other label``, ``across splits``, or both.
    """

    kind: str
    id: str
    label: str
    split: str
    score: float
    suggested: str = ""
    other_id: str = ""
    other_label: str = ""
    other_split: str = ""
    note: str = ""


_HEADER = [field.name for field in fields(Finding)]


@dataclass(frozen=True)
class Findings(Sequence[Finding]):
    """The findings of `audit`, kind by kind, the clearest cases of each first.

    Attributes
    ----------
    items : tuple of Finding
        The findings.
    n_images : int
        Images looked at.
    notes : tuple of str
        What could not be looked at, and why.
    head : str
        The head that judged the labels.
    accuracy, accuracy_without_twins : float
        Its share of labels out of fold; then without the images of copies and near-duplicates,
        which are easy to get right. NaN: no label was judged.
    """

    items: tuple[Finding, ...]
    n_images: int
    notes: tuple[str, ...] = ()
    head: str = ""
    accuracy: float = math.nan
    accuracy_without_twins: float = math.nan

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def of(self, kind: str) -> list[Finding]:
        """Return the findings of one kind."""
        return [one for one in self.items if one.kind == kind]

    def to_csv(self, path: str | Path, *, force: bool = False, excel: bool = False) -> None:
        """Write one line a finding, with a header.

        Parameters
        ----------
        path : path
            The file. Replaced if it is such a table, in every cell; ``-`` is standard output.
        force : bool
            Replace a file of any kind.
        excel : bool
            For spreadsheets: see `featcache.system.files.csv_writer`.

        Raises
        ------
        OutputError
            The path holds something else, or cannot be written.
        """
        what = "a file of findings"
        with replacing(Path(path), _is_findings, what, force=force, text=True) as file:
            write = csv_writer(file, excel=excel)
            write(_HEADER)
            for one in self.items:
                write((vars(one) | {"score": f"{one.score:.6f}"}).values())

    @property
    def wrong_labels(self) -> int:
        """About how many labels are wrong; the module's text says how honest that is."""
        return len(self.of("label"))

    def __str__(self) -> str:
        count = Counter(one.kind for one in self.items)
        notes = Counter(note for one in self.items for note in one.note.split(", ") if note)
        marked = "".join(f", {n} {note}" for note, n in sorted(notes.items()))
        pairs = count["copy"] + count["near-duplicate"]
        lines = [
            f"{counted(self.n_images, 'image')}: {counted(count['label'], 'suspicious label')}, "
            f"{counted(pairs, 'pair')} of copies or near-duplicates{marked}, "
            f"{counted(count['outlier'], 'outlier')}"
        ]
        if not math.isnan(self.accuracy):
            lines.append(
                f"about {counted(self.wrong_labels, 'label')} wrong; {self.head} is right out of "
                f"fold in {self.accuracy:.3f}, without the images of those pairs in "
                f"{self.accuracy_without_twins:.3f}"
            )
        shown = [one for kind in count for one in self.of(kind)[:_SHOWN]]
        rows = [
            [x.kind, f"{x.score:.3g}", x.id, x.label, x.other_id or x.suggested, x.note]
            for x in shown
        ]
        header = ["kind", "score", "id", "label", "suggested or other", "note"]
        table = ["the strongest of each kind:", text_table(header, rows, [1])] if rows else []
        return "\n".join([*lines, *self.notes, *table])


def _is_findings(path: Path) -> bool:
    kinds = "label|copy|near-duplicate|outlier"
    return is_table(path, _HEADER.__eq__, {"kind": kinds, "score": r"-?\d+\.\d{6}"})


def audit(
    store: FeatureStore,
    *,
    head: str = "linear",
    layers: str | Sequence[str] | None = None,
    cv: int = 5,
    near: float = 0.98,
    random_state: int = 0,
) -> Findings:
    """Look for wrong labels, copies, near-duplicates and outliers.

    Parameters
    ----------
    store : FeatureStore
        Labelled or not. All its parts are looked at, whatever its split column says. What judges a
        label has seen no image of its group, where there are groups. The time grows with the
        square of the images: two minutes for 100,000 on two cores.
    head : str
        The head whose out-of-fold probabilities judge the labels.
    layers : str or list of str, optional
        Taps to use; None: all. Of maps, the mean of each channel.
    cv : int
        Folds.
    near : float
        Cosine from which on two images are near-duplicates.
    random_state : int
        Seed.

    Returns
    -------
    Findings

    Raises
    ------
    TrainingError
        There are fewer than three images, or there is no such head.
    """
    options = TrainingOptions(cv=cv, group=True, random_state=random_state)
    name = head_names(head)[0]
    if name not in HEADS:
        raise TrainingError(f"An audit has no head {head!r}. Heads: {', '.join(HEADS)}.")
    if len(store) < 3:
        raise TrainingError(f"An audit needs at least 3 images, {store.paths[0]} has {len(store)}.")
    X, names = pooled(store, layers), _Names(store)
    rows, notes = _judgeable(store)
    items, accuracies = _near_and_far(X, near, names), {}
    if len(rows):
        judged = _judged(store.select(rows), X if len(rows) == len(X) else X[rows], name, options)
        right = judged.y_true == judged.y_pred
        if len(judged) < len(rows):
            notes.append(
                f"the labels of {len(judged):,} of {len(rows):,} images are judged by {name}"
            )
        twins = {id for one in items if one.other_id for id in (one.id, one.other_id)}
        alone = ~np.isin(judged.ids, list(twins))
        accuracies = {
            "accuracy": float(right.mean()),
            "accuracy_without_twins": float(right[alone].mean()) if alone.any() else math.nan,
        }
        split_of = {} if store.splits is None else dict(zip(store.ids, store.splits, strict=True))
        items = suspicious_labels(judged, split_of) + items
    return Findings(tuple(items), len(store), tuple(notes), name, **accuracies)


class _Names:
    """Ids, labels, splits and contents of a store's rows."""

    def __init__(self, store: FeatureStore) -> None:
        self.ids, self.labels = store.ids, store.labels
        self.splits = np.full(len(store), "") if store.splits is None else store.splits
        hashes = splitting.hash_keys(store.sha256)
        _, first, content = np.unique(hashes, return_index=True, return_inverse=True)
        self.original = first[content]  # the first row of the same bytes

    def of(self, row: Any) -> tuple[str, str, str]:
        return str(self.ids[row]), str(self.labels[row]), str(self.splits[row])

    def pair(self, kind: str, row: Any, other: Any, score: float) -> Finding:
        id, label, split = self.of(row)
        other_id, other_label, other_split = self.of(other)
        notes = []
        if label and other_label and label != other_label:
            notes.append("other label")
        if split != other_split:
            notes.append("across splits")
        return Finding(
            kind, id, label, split, score, "", other_id, other_label, other_split, ", ".join(notes)
        )


def _judged(
    store: FeatureStore, X: npt.NDArray[Any], head: str, options: TrainingOptions
) -> Evaluation:
    """Return what a head says out of fold; some heads judge a part of many images."""
    folds = folds_of(store, options)
    found = HEADS[head].search(X, store.labels, folds, random_state=options.random_state)
    return out_of_fold(store, found.classes, found.logits, found.calibration.proba(found.logits))


def suspicious_labels(
    evaluation: Evaluation, split_of: Mapping[str, str] | None = None
) -> list[Finding]:
    """Return the labels that look wrong, the least probable first; see the module's text.

    Parameters
    ----------
    evaluation : Evaluation
        Labels and probabilities.
    split_of : dict of str to str, optional
        Part of a predefined split of each image, by id.
    """
    y, names, proba = evaluation.y_true, evaluation.classes, evaluation.proba
    own = proba[np.arange(len(y)), y]
    doubted = np.flatnonzero(own < _ODDS * proba.max(axis=1, initial=0))
    ranked = doubted[np.argsort(own[doubted], kind="stable")]
    return [
        Finding(
            "label",
            str(evaluation.ids[i]),
            names[y[i]],
            str((split_of or {}).get(evaluation.ids[i], "")),
            float(own[i]),
            suggested=names[proba[i].argmax()],
        )
        for i in ranked
    ]


def _judgeable(store: FeatureStore) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return the rows whose labels folds can judge, and notes on the others."""
    notes = []
    unlabelled = splitting.n_unlabelled(store.labels)
    if unlabelled:
        notes.append(f"{counted(unlabelled, 'image has', 'images have')} no label to judge")
    unit = splitting.units(len(store), groups=store.groups, sha256=store.sha256)
    pairs = {(str(label), int(u)) for label, u in zip(store.labels, unit, strict=True) if label}
    members = Counter(label for label, _ in pairs)
    rare = sorted(label for label, count in members.items() if count < 2)
    if rare:
        shown = first_names(rare, 5)
        one = "one image" if store.groups is None else "one image or one group"
        classes = counted(len(rare), "class", "classes")
        notes.append(f"{classes} of {one} cannot be judged: {shown}")
    common = [label for label in members if label not in rare]
    if len(common) < 2:
        two = "two images" if store.groups is None else "two groups"
        notes.append(f"labels cannot be judged: fewer than two classes of {two}")
        return np.empty(0, np.int64), notes
    return np.flatnonzero(np.isin(store.labels, common)), notes


def _near_and_far(X: npt.NDArray[Any], near: float, names: _Names) -> list[Finding]:
    """Find copies, and near-duplicates and outliers by the nearest others of each image."""
    number, original = np.arange(len(X)), names.original
    items = [
        names.pair("copy", original[row], row, 1.0) for row in np.flatnonzero(original != number)
    ]
    own = np.flatnonzero(original == number)  # without equal bytes, which all have a twin
    if len(own) < 3:
        return items
    scaled, plain, rows = _similarities(centred(X if len(own) == len(X) else X[own]))
    threshold = _chance(scaled.max(axis=1))
    score = np.where(plain >= near, 1 + plain, scaled)  # what is nearly equal comes first
    first, best = score.argmax(axis=1), score.max(axis=1)
    # Of a burst of photographs, each is listed with its nearest, not with all the others.
    pairs = {
        tuple(sorted((int(row), int(rows[row, first[row]])))): float(best[row])
        for row in np.flatnonzero((best >= 1 + near) | (best >= threshold))
    }
    items += [
        names.pair("near-duplicate", own[a], own[b], value - (value >= 1 + near))
        for (a, b), value in sorted(pairs.items(), key=lambda pair: -pair[1])
    ]
    distance = 1 - np.sort(plain, axis=1)[:, -_NEIGHBORS:].mean(axis=1)
    low, high = np.percentile(distance, [25, 75])
    far = np.flatnonzero(distance > high + 3 * (high - low))
    for row in far[np.argsort(-distance[far], kind="stable")]:
        items.append(Finding("outlier", *names.of(own[row]), float(distance[row])))
    return items


def _similarities(
    X: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return two similarities to, and the rows of, up to 50 nearest others: (n, k) each.

    The nearest are those by the cosine of whitened principal components. The first similarity is
    that cosine, less the mean of both images' with their neighbours 11 to 50; the second the
    cosine of the features themselves, which are centred.
    """
    count = min(_COMPONENTS, max(2, len(X) // 8))
    size, axes = np.linalg.eigh((X.T @ X).astype(np.float64))  # (d,), rising, and (d, d)
    axes = axes[:, size > 1e-6 * size[-1]][:, -count:]
    spread = np.sqrt(size[size > 1e-6 * size[-1]][-count:])
    Z = X @ (axes / spread).astype(np.float32)
    Z /= lengths_of(Z)[:, None]
    found, rows = without(*nearest(Z, Z, min(_AROUND, len(X) - 1) + 1), np.arange(len(X)))
    usual = found[:, min(_NEIGHBORS, found.shape[1] - 1) :].mean(axis=1)
    plain, length = np.empty_like(found), lengths_of(X)
    for start in range(0, len(X), _BLOCK):
        part = slice(start, start + _BLOCK)
        plain[part] = np.einsum("id,ikd->ik", X[part], X[rows[part]])
        plain[part] /= length[part, None] * length[rows[part]]
    return found - (usual[:, None] + usual[rows]) / 2, plain, rows


def _chance(best: npt.NDArray[np.float32]) -> float:
    """Return from which value on a tenth of the nearest similarities (n,) are expected by chance.

    Chance is Gumbel's distribution, that of the largest of many values, with the quartiles of
    these: twins move them little as long as fewer than a quarter of the images have one.
    """
    best = np.sort(best)[::-1].astype(np.float64)
    low, high = np.percentile(best, [25, 75])
    steps = -np.log(-np.log([0.25, 0.75]))
    scale = (high - low) / (steps[1] - steps[0])
    if not scale > 0:
        return np.inf
    above = -np.expm1(-np.exp(-(best - low) / scale - steps[0]))  # (n,) chance of as much
    fitting = np.flatnonzero(above * len(best) <= _FALSE * np.arange(1, len(best) + 1))
    return float(best[fitting[-1]]) if len(fitting) else np.inf
