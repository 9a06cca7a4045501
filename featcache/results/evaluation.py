"""Metrics on held-out images, with 95 % intervals (:mod:`featcache.results.intervals`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import TrainingError
from featcache.results.intervals import FEWEST_GROUPS, Score, rate_scores
from featcache.system.tables import SHOWN, counted, first_names, html_table, printable, text_table

Floats = npt.NDArray[np.float64]

_BINS = 15  # of the calibration error, as in Guo et al. 2017
_TOP = (1, 2, 3, 5, 10)
_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and F1 of one class.

    Attributes
    ----------
    label : str
        Name of the class.
    precision, recall, f1 : float
        0 where nothing was predicted, or nothing was there.
    support : int
        Images that have the label.
    predicted : int
        Images that were given it.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclass(frozen=True)
class Mistake:
    """One image that was given another label than it has.

    Attributes
    ----------
    id : str
        Image.
    label : str
        Its label.
    predicted : str
        What the predictor says.
    probability : float
        How sure the predictor is of that.
    """

    id: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class Bin:
    """Images of similar confidence, for a reliability diagram.

    Attributes
    ----------
    low, high : float
        Confidences that fall into the bin: (low, high].
    count : int
        Images.
    confidence, accuracy : float
        Their mean confidence, and the share that is right; NaN in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Figures:
    """The figures of an `Evaluation`, without the images.

    Attributes
    ----------
    images : int
        Number of images.
    accuracy, balanced_accuracy, macro_f1 : Score
        See `Evaluation`.
    log_loss, ece, classwise_ece, brier : float
        See `Evaluation`.
    """

    images: int
    accuracy: Score
    balanced_accuracy: Score
    macro_f1: Score
    log_loss: float
    ece: float
    classwise_ece: float
    brier: float

    def to_dict(self, prefix: str = "") -> dict[str, Any]:
        """Return the figures as JSON values, an interval under its figure's name."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            values |= (
                value.to_dict(prefix + name) if isinstance(value, Score) else {prefix + name: value}
            )
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], prefix: str = "") -> Figures:
        """Return the figures that `to_dict` wrote, in `values` of the types `FIGURES`."""
        kept = {name: values[prefix + name] for name in ("images", *_PLAIN)}
        return cls(**kept | {name: Score.from_dict(values, prefix + name) for name in _SCORES})


_PLAIN = ("log_loss", "ece", "classwise_ece", "brier")
_SCORES = ("accuracy", "balanced_accuracy", "macro_f1")
FIGURES: Mapping[str, Any] = {
    "images": int,
    **dict.fromkeys(_PLAIN, float),
    **{key: kind for name in _SCORES for key, kind in Score.types(name).items()},
}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Metrics of predictions on labelled images. ``print(evaluation)`` shows them.

    Parameters
    ----------
    ids : ndarray of str, shape (n,)
        Images.
    y_true : ndarray of int64, shape (n,)
        Column of the true class.
    proba : ndarray of float64, shape (n, k)
        Predicted probabilities.
    classes : tuple of str
        Names of the columns.
    groups : ndarray of str, shape (n,), optional
        Groups that are resampled as a whole.
    notes : tuple of str
        What the reader should know: rows left out, and why.
    predicted : ndarray of int64, shape (n,), optional
        Column of each label that was decided for; left out, that of the most probable class.
    layers : tuple of str
        Taps of the store that the predictor saw; none: not known.
    columns : mapping of str to ndarray of str, shape (n,)
        What the images are told apart by in `by`, such as the camera.
    atypical : float, optional
        Share of the images whose typicality is below 0.01.

    Attributes
    ----------
    accuracy, balanced_accuracy, macro_f1 : Score
        Numbers with their 95 % intervals, over the classes that occur in `y_true`, as in
        scikit-learn's ``balanced_accuracy_score``; macro F1 also over those that were predicted.
    log_loss : float
        Mean of -log(probability of the true class), natural logarithm.
    ece : float
        Expected calibration error: mean over the images of |accuracy - confidence| of their bin,
        15 equally wide bins (Naeini et al. 2015; Guo et al. 2017).
    classwise_ece : float
        Mean over the classes of the same of each class's probability, whether it is the label or
        not (Kull et al. 2019): what is wrong with a rare class shows.
    brier : float
        Brier score, as scikit-learn's ``brier_score_loss``: the mean sum over the classes of the
        squared difference of their probability from 0 or 1; half of it with two classes.
    confusion : ndarray of int64, shape (k, k)
        Row: true class. Column: predicted class.
    """

    ids: npt.NDArray[Any]
    y_true: npt.NDArray[np.int64]
    proba: Floats
    classes: tuple[str, ...]
    groups: npt.NDArray[Any] | None = None
    notes: tuple[str, ...] = ()
    predicted: npt.NDArray[np.int64] | None = None
    layers: tuple[str, ...] = ()
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    atypical: float | None = None

    def __post_init__(self) -> None:
        n, k = self.proba.shape
        if not (n == len(self.ids) == len(self.y_true) and k == len(self.classes)):
            raise ValueError(
                f"{len(self.ids)} ids, {len(self.y_true)} labels and {len(self.classes)} classes "
                f"do not fit probabilities of shape {self.proba.shape}"
            )
        if not n:
            raise TrainingError("There is no labelled image to evaluate on.")

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def y_pred(self) -> npt.NDArray[np.int64]:
        """Column of the label that was decided for: int64, shape (n,)."""
        column: npt.NDArray[np.int64] = self.proba.argmax(axis=1)
        return column if self.predicted is None else self.predicted

    @cached_property
    def confidence(self) -> Floats:
        """Probability of that label: float64, shape (n,)."""
        own: Floats = self.proba[np.arange(len(self)), self.y_pred]
        return own

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Images by true class (row) and predicted class (column): int64, shape (k, k)."""
        k = len(self.classes)
        cells = np.bincount(self.y_true * k + self.y_pred, minlength=k * k)
        table: npt.NDArray[np.int64] = cells.astype(np.int64).reshape(k, k)
        return table

    @cached_property
    def _scores(self) -> tuple[Score, Score, Score]:
        return rate_scores(self.y_true, self.y_pred, len(self.classes), self.groups)

    @property
    def accuracy(self) -> Score:
        """Share of the images that are right."""
        return self._scores[0]

    @property
    def balanced_accuracy(self) -> Score:
        """Mean over the classes of the share that is right."""
        return self._scores[1]

    @property
    def macro_f1(self) -> Score:
        """Mean over the classes of the harmonic mean of precision and recall."""
        return self._scores[2]

    @cached_property
    def log_loss(self) -> float:
        """Mean of -log(probability of the true class)."""
        likelihood = self.proba[np.arange(len(self)), self.y_true]
        return float(-np.log(np.maximum(likelihood, np.finfo(np.float64).tiny)).mean())

    @cached_property
    def calibration(self) -> tuple[Bin, ...]:
        """The bins of the calibration error, for a reliability diagram."""
        edges = np.linspace(0, 1, _BINS + 1)
        number = _bin(self.confidence)
        count = np.bincount(number, minlength=_BINS)
        right = np.bincount(number, weights=self.y_pred == self.y_true, minlength=_BINS)
        sure = np.bincount(number, weights=self.confidence, minlength=_BINS)
        with np.errstate(invalid="ignore"):  # an empty bin's mean is NaN
            columns = (edges[:-1], edges[1:], count, sure / count, right / count)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return tuple(Bin(*row) for row in rows)

    @cached_property
    def ece(self) -> float:
        """Expected calibration error: 0 is perfect."""
        off = sum(b.count * abs(b.accuracy - b.confidence) for b in self.calibration if b.count)
        return float(off / len(self))

    @cached_property
    def classwise_ece(self) -> float:
        """Calibration error of each class's probability, mean over the classes."""
        gaps = [
            np.bincount(_bin(own), weights=own - (self.y_true == k))
            for k, own in enumerate(self.proba.T)
        ]
        return float(sum(np.abs(gap).sum() for gap in gaps) / self.proba.size)

    @cached_property
    def brier(self) -> float:
        """Brier score: 0 is perfect."""
        own = self.proba[np.arange(len(self)), self.y_true]
        squares = np.einsum("ij,ij->i", self.proba, self.proba) - 2 * own + 1
        return float(squares.mean() / (2 if len(self.classes) == 2 else 1))

    def top_k_accuracy(self, k: int) -> float:
        """Return the share of images whose label is among the first `k` classes.

        The first is the one that was decided for, so that top-1 is the accuracy; the others follow
        by probability, those of equal ones in the order of `classes`.
        """
        return float((self._rank < k).mean())

    @cached_property
    def _rank(self) -> npt.NDArray[np.int64]:
        """How many classes are before the true one: shape (n,)."""
        ranked, y = label_first(self.proba, self.y_pred), self.y_true[:, None]
        mine = np.take_along_axis(ranked, y, axis=1)
        before = (ranked > mine) | ((ranked == mine) & (np.arange(len(self.classes)) < y))
        rank: npt.NDArray[np.int64] = before.sum(axis=1)
        return rank

    @cached_property
    def top_k(self) -> dict[int, float]:
        """Top-k accuracy for those of k = 1, 2, 3, 5, 10 that are smaller than the classes."""
        return {k: self.top_k_accuracy(k) for k in _TOP if k < len(self.classes)}

    @cached_property
    def per_class(self) -> tuple[ClassScore, ...]:
        """Precision, recall, F1 and support of every class, in the order of `classes`."""
        right = self.confusion.diagonal()
        support, predicted = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        columns = (
            right / np.maximum(predicted, 1),
            right / np.maximum(support, 1),
            2 * right / np.maximum(support + predicted, 1),
            support,
            predicted,
        )
        rows = zip(self.classes, *(column.tolist() for column in columns), strict=True)
        return tuple(ClassScore(*row) for row in rows)

    @cached_property
    def mistakes(self) -> tuple[Mistake, ...]:
        """All images with another label than predicted, the most confident mistake first."""
        wrong = np.flatnonzero(self.y_pred != self.y_true)
        wrong = wrong[np.argsort(-self.confidence[wrong], kind="stable")]
        return tuple(
            Mistake(
                str(self.ids[i]),
                self.classes[self.y_true[i]],
                self.classes[self.y_pred[i]],
                float(self.confidence[i]),
            )
            for i in wrong
        )

    @cached_property
    def by(self) -> dict[str, dict[str, Evaluation]]:
        """For each of `columns` the images of each of its values, the lowest accuracy first.

        An interval is of its value alone: of many values, one is the lowest by chance.
        """
        found: dict[str, dict[str, Evaluation]] = {}
        for name, values in self.columns.items():
            parts = {str(x): self._part(values == x) for x in np.unique(values)}
            ranked = sorted(parts, key=lambda x: (float(parts[x].accuracy), x))
            found[name] = {x: parts[x] for x in ranked}
        return found

    def _part(self, chosen: npt.NDArray[np.bool_]) -> Evaluation:
        """Return the evaluation on some of the images."""
        return replace(
            self,
            ids=self.ids[chosen],
            y_true=self.y_true[chosen],
            proba=self.proba[chosen],
            groups=None if self.groups is None else self.groups[chosen],
            predicted=self.y_pred[chosen],
            columns={},
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and what the intervals rest on where that is not plain."""
        said = few_groups(self.groups)
        if not said and not self.mistakes:
            many = len(self) if self.groups is None else len(np.unique(self.groups))
            units = "images" if self.groups is None else "groups"
            said = (f"no image is wrong: the intervals are what {many:,} {units} can show",)
        return self.notes + self.moved + said

    @property
    def moved(self) -> tuple[str, ...]:
        """The note on images whose label is not their most probable class, if there are any."""
        count = counted(self.n_moved, "image has", "images have")
        why = "a label that is not the most probable class: the label is the head's own decision"
        return (f"{count} {why}",) if self.n_moved else ()

    @cached_property
    def n_moved(self) -> int:
        """Number of images whose label is not their most probable class."""
        return int((self.confidence < self.proba.max(axis=1)).sum())

    @cached_property
    def thresholds(self) -> tuple[dict[str, float], ...]:
        """Recall and precision of the second of two classes, over thresholds of its probability.

        An image is given that class where its probability is at least the threshold. A precision is
        NaN where no image is given it. Of more than two classes there are none. Nothing is chosen
        here: a threshold that is chosen on these images would flatter on them.
        """
        if len(self.classes) != 2:
            return ()
        own, true, rows = self.proba[:, 1], self.y_true == 1, []
        for threshold in _THRESHOLDS:
            given = own >= threshold
            right, called = int((given & true).sum()), int(given.sum())
            recall = right / true.sum() if true.any() else np.nan
            precision = right / called if called else np.nan
            rows.append({"threshold": threshold, "recall": recall, "precision": precision})
        return tuple(rows)

    @property
    def figures(self) -> Figures:
        """The figures that a leaderboard and a predictor keep."""
        return Figures(
            len(self), *self._scores, self.log_loss, self.ece, self.classwise_ece, self.brier
        )

    def summary(self) -> dict[str, Any]:
        """Return the figures, the top-k accuracies and the confusion matrix as JSON values."""
        return {
            **self.figures.to_dict(),
            "top_k": {str(k): value for k, value in self.top_k.items()},
            "confusion": self.confusion.tolist(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the images' probabilities, as JSON values."""
        return {
            **self.summary(),
            "label_not_most_probable": self.n_moved,
            "atypical": self.atypical,
            "positive": self.classes[1] if self.thresholds else None,
            "thresholds": [
                {name: None if np.isnan(value) else float(value) for name, value in row.items()}
                for row in self.thresholds
            ],
            "resampled": "images" if self.groups is None else "groups",
            "classes": list(self.classes),
            "per_class": [vars(score) for score in self.per_class],
            "by": {
                name: [{"value": x, **one.figures.to_dict()} for x, one in parts.items()]
                for name, parts in self.by.items()
            },
            "mistakes": [vars(mistake) for mistake in self.mistakes],
            "notes": list(self.remarks),
        }

    def to_text(self) -> str:
        """Return the metrics, the classes, and the most confident mistakes, for people."""
        return "\n".join(
            [
                f"accuracy {self.accuracy} on {counted(len(self), 'image')}",
                f"balanced accuracy {self.balanced_accuracy}, macro F1 {self.macro_f1}",
                f"log loss {self.log_loss:.3f}, Brier score {self.brier:.3f}, calibration error "
                f"{self.ece:.3f}, by class {self.classwise_ece:.3f}"
                + "".join(f", top-{k} {value:.3f}" for k, value in self.top_k.items() if k > 1),
                *self.remarks,
                "",
                *self._class_lines(),
                *self._by_lines(),
                *self._confusion_lines(),
                *self._threshold_lines(),
                *self._mistake_lines(),
            ]
        )

    def _shown_classes(self) -> tuple[list[str], list[tuple[str, ...]]]:
        """Return the table of the classes; of many, those with the lowest F1."""
        # With many classes, the worst ones are what a reader looks for.
        shown = self.per_class
        if len(shown) > SHOWN:
            shown = tuple(sorted(shown, key=lambda score: score.f1)[:SHOWN])
        return ["class", "precision", "recall", "F1", "images"], [
            (s.label, f"{s.precision:.3f}", f"{s.recall:.3f}", f"{s.f1:.3f}", f"{s.support:,}")
            for s in shown
        ]

    def _class_lines(self) -> list[str]:
        header, rows = self._shown_classes()
        lines = [text_table(header, rows, right=range(1, 5))]
        if len(rows) < len(self.classes):
            lines.append(f"(the {SHOWN} of {len(self.classes)} classes with the lowest F1)")
        return lines

    def _by_tables(self) -> Iterator[tuple[list[str], list[list[str]], list[str]]]:
        """Yield header and rows of the table of each column, and what is not shown of it."""
        for name, parts in self.by.items():
            rows = [
                [x or "(none)", str(one.accuracy), str(one.balanced_accuracy), f"{len(one):,}"]
                for x, one in parts.items()
            ]
            rest = [f"(the {SHOWN} of {len(rows):,} values with the lowest accuracy)"]
            rest *= len(rows) > SHOWN
            if few := [x or "(none)" for x, one in parts.items() if few_groups(one.groups)]:
                of = f"images of fewer than {FEWEST_GROUPS} groups"
                rest += [f"(no intervals for {first_names(few, 3)}: {of})"]
            yield [name, "accuracy", "balanced accuracy", "images"], rows[:SHOWN], rest

    def _by_lines(self) -> list[str]:
        lines = []
        for header, rows, rest in self._by_tables():
            lines += ["", text_table(header, rows, right=[3]), *rest]
        return lines

    def _confusion_lines(self) -> list[str]:
        k = len(self.classes)
        if k > 12:
            return []
        rows = [
            (name, *(f"{count:,}" for count in row))
            for name, row in zip(self.classes, self.confusion.tolist(), strict=True)
        ]
        table = text_table(["true", *self.classes], rows, right=range(1, k + 1))
        header, rest = table.split("\n", 1)
        return ["", f"{header}  (columns: predicted)", rest]

    def _threshold_lines(self) -> list[str]:
        if not self.thresholds:
            return []
        cells = [
            (f"{row['threshold']:.2f}", f"{row['recall']:.3f}", f"{row['precision']:.3f}")
            for row in self.thresholds
        ]
        of = printable(self.classes[1])
        said = f"if {of} (the second class) were said from this probability of it on:"
        return ["", said, text_table(["threshold", "recall", "precision"], cells, right=range(3))]

    def _mistake_lines(self) -> list[str]:
        if not self.mistakes:
            return ["", "no mistakes"]
        return [
            "",
            f"most confident of {len(self.mistakes):,} mistakes:",
            *(
                printable(f"  {m.id}: {m.label}, predicted {m.predicted} ({m.probability:.3f})")
                for m in self.mistakes[:5]
            ),
        ]

    def _repr_html_(self) -> str:
        scores = {
            "accuracy": self.accuracy,
            "balanced accuracy": self.balanced_accuracy,
            "macro F1": self.macro_f1,
        }
        figures = [
            *((name, f"{s:.3f}", str(s).partition(" ")[2]) for name, s in scores.items()),
            ("log loss", f"{self.log_loss:.3f}", ""),
            ("Brier score", f"{self.brier:.3f}", ""),
            ("calibration error", f"{self.ece:.3f}", ""),
            ("calibration error by class", f"{self.classwise_ece:.3f}", ""),
        ]
        return (
            html_table([counted(len(self), "image"), "", "95 % interval"], figures)
            + html_table(*self._shown_classes())
            + "".join(html_table(header, rows) for header, rows, _ in self._by_tables())
            + "".join(f"<p>{escape(note)}</p>" for note in self.remarks)
        )

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return (
            f"<Evaluation: accuracy {self.accuracy}, {counted(len(self), 'image')}, "
            f"{len(self.classes)} classes>"
        )


def _bin(probability: Floats) -> npt.NDArray[np.int64]:
    """Return the number of the bin of each probability."""
    number: npt.NDArray[np.int64] = np.ceil(probability * _BINS).astype(np.int64) - 1
    return number.clip(0, _BINS - 1)


def label_first(proba: Floats, predicted: npt.NDArray[np.int64]) -> Floats:
    """Return what classes are ranked by, (n, k): the label comes first, then the most probable."""
    ranked = proba.copy()
    ranked[np.arange(len(proba)), predicted] = np.inf
    return ranked


def with_own_groups(groups: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
    """Give each ungrouped image a group of its own; None where no image has one."""
    if groups is None or (groups == "").all():
        return None
    alone = np.char.add("\0", np.arange(len(groups)).astype(str))
    return np.where(groups == "", alone, groups)


def few_groups(groups: npt.NDArray[Any] | None, of: str = "") -> tuple[str, ...]:
    """Return the note that there are no intervals, where there are too few groups for them."""
    many = FEWEST_GROUPS if groups is None else len(np.unique(groups))
    if many >= FEWEST_GROUPS:
        return ()
    return (
        f"there are no intervals{of}, because the images are of {counted(many, 'group')} only: "
        f"how much groups differ can be told from {FEWEST_GROUPS} on",
    )
