"""`audit`: images of a store whose label, copies or features look wrong.

Four kinds of findings, in the order in which they are worth a look:

``label``
    The label disagrees with what a head trained on the other folds says. cleanlab's confident
    learning (Northcutt, Jiang and Chuang, *Journal of Artificial Intelligence Research* 70, 2021)
    decides from calibrated out-of-fold probabilities. Score: the probability of the label.
``copy``
    Two images of the same bytes. Score: 1.
``near-duplicate``
    Two images whose features point into nearly the same direction, measured by the cosine after
    the mean of all features was taken off: features behind a ReLU all point the same way, so that
    the plain cosine of two unrelated images is often over 0.9. Score: the cosine.
``outlier``
    An image far from all others: the mean cosine distance to its ten nearest neighbours lies more
    than three interquartile ranges above the upper quartile ("far out" in Tukey, *Exploratory Data
    Analysis*, 1977). Score: that distance. Ten or more that resemble each other are neighbours, and
    so no outliers, however unlike the rest they are.

Copies and near-duplicates with different labels, or on both sides of a predefined split, are
marked: the first are mistakes, the second flatter every test.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import MissingExtra, TrainingError
from featcache.heads.table import HEADS
from featcache.results.evaluation import Evaluation
from featcache.store import splitting
from featcache.store.store import FeatureStore
from featcache.study.evaluate import out_of_fold
from featcache.study.maps import centred, pooled
from featcache.study.options import TrainingOptions
from featcache.study.parts import folds_of
from featcache.study.train import head_names
from featcache.system.files import atomic_write, check_overwrite, csv_writer, is_table
from featcache.system.nearest import nearest, unit, without
from featcache.system.tables import counted, first_names

__all__ = ["Finding", "Findings", "audit", "suspicious_labels"]

_NEIGHBORS = 10  # whose mean distance makes an outlier


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
    """

    items: tuple[Finding, ...]
    n_images: int
    notes: tuple[str, ...] = ()

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
        target = Path(path)
        check_overwrite(target, _is_findings, "a file of findings", force=force)
        with atomic_write(target, text=True) as file:
            write = csv_writer(file, excel=excel)
            write(_HEADER)
            for one in self.items:
                write((vars(one) | {"score": f"{one.score:.6f}"}).values())

    def __str__(self) -> str:
        count = Counter(one.kind for one in self.items)
        notes = Counter(note for one in self.items for note in one.note.split(", ") if note)
        marked = "".join(f", {n} {note}" for note, n in sorted(notes.items()))
        pairs = count["copy"] + count["near-duplicate"]
        text = (
            f"{counted(self.n_images, 'image')}: {counted(count['label'], 'suspicious label')}, "
            f"{counted(pairs, 'pair')} of copies or near-duplicates{marked}, "
            f"{counted(count['outlier'], 'outlier')}"
        )
        return "\n".join([text, *self.notes])


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
    MissingExtra
        cleanlab is not installed.
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
    items: list[Finding] = []
    if len(rows):
        items, judged = _misjudged(store.select(rows), X[rows], name, options)
        if judged < len(rows):
            notes.append(f"the labels of {judged:,} of {len(rows):,} images are judged by {name}")
    items += _near_and_far(X, near, min(_NEIGHBORS, len(X) - 1), names)
    return Findings(tuple(items), len(store), tuple(notes))


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


def _misjudged(
    store: FeatureStore, X: npt.NDArray[Any], head: str, options: TrainingOptions
) -> tuple[list[Finding], int]:
    """Find suspicious labels by what a head says out of fold; also return of how many images."""
    y, folds = store.labels, folds_of(store, options)
    found = HEADS[head].search(X, y, folds, random_state=options.random_state)
    # Some heads judge a part of many images.
    judged = out_of_fold(store, found.classes, found.logits, found.calibration.proba(found.logits))
    known = ~np.isnan(found.logits).any(axis=1)
    splits = None if store.splits is None else store.splits[known]
    return suspicious_labels(judged, splits), len(judged)


def suspicious_labels(
    evaluation: Evaluation, splits: npt.NDArray[Any] | None = None
) -> list[Finding]:
    """Return the labels that look wrong by confident learning, the least probable first.

    Northcutt, Jiang and Chuang, *Journal of Artificial Intelligence Research* 70, 2021.

    Parameters
    ----------
    evaluation : Evaluation
        Labels and probabilities. Classes that no image has are left out.
    splits : ndarray of str, shape (n,), optional
        Part of a predefined split of each image.

    Raises
    ------
    MissingExtra
        cleanlab is not installed.
    """
    y, names = evaluation.y_true, evaluation.classes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own optional packages
        try:
            from cleanlab.filter import find_label_issues
        except ImportError as error:
            raise MissingExtra("cleanlab", "report", "Looking for wrong labels") from error
        present, codes = np.unique(y, return_inverse=True)
        if len(present) < 2:
            return []
        proba = evaluation.proba[:, present]
        total = proba.sum(axis=1, keepdims=True)
        proba = np.where(total > 0, proba / np.maximum(total, 1e-300), 1 / len(present))
        ranked = find_label_issues(
            codes, proba, return_indices_ranked_by="self_confidence", n_jobs=1, verbose=False
        )
    return [
        Finding(
            "label",
            str(evaluation.ids[i]),
            names[y[i]],
            "" if splits is None else str(splits[i]),
            float(evaluation.proba[i, y[i]]),
            suggested=names[evaluation.y_pred[i]],
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


def _near_and_far(X: npt.NDArray[Any], near: float, k: int, names: _Names) -> list[Finding]:
    """Find copies, and near-duplicates and outliers by the k nearest others of each image."""
    number, original = np.arange(len(X)), names.original
    items = [
        names.pair("copy", original[row], row, 1.0) for row in np.flatnonzero(original != number)
    ]
    similar, rows = _nearest_others(X, k)
    unlike = original[rows] != original[:, None]  # (n, k): of other bytes
    first = unlike.argmax(axis=1)
    score = np.where(unlike.any(axis=1), similar[number, first], -1.0)
    # Of a burst of photographs, each is listed with its nearest, not with all the others.
    pairs = {
        tuple(sorted((row, rows[row, first[row]]))): float(score[row])
        for row in np.flatnonzero(score >= near)
    }
    items += [
        names.pair("near-duplicate", a, b, cosine)
        for (a, b), cosine in sorted(pairs.items(), key=lambda pair: -pair[1])
    ]
    distance = 1 - similar.mean(axis=1)
    low, high = np.percentile(distance, [25, 75])
    far = np.flatnonzero(distance > high + 3 * (high - low))
    for row in far[np.argsort(-distance[far], kind="stable")]:
        items.append(Finding("outlier", *names.of(row), float(distance[row])))
    return items


def _nearest_others(
    X: npt.NDArray[Any], k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return cosines and rows of the k nearest other images, the nearest first: (n, k) each."""
    X = unit(centred(X))
    return without(*nearest(X, X, k + 1), np.arange(len(X)))
