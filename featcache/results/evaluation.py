"""How good a predictor is on images that it was not trained on, and how sure we are of that.

Intervals are 95 % percentile bootstrap intervals (Efron and Tibshirani, *An Introduction to the
Bootstrap*, 1993, chapter 13) over images, or over groups where the store has them: photographs
of one patient or one module are not independent, and resampling them one by one would give
intervals that are too narrow. Accuracy, balanced accuracy and macro F1 depend on the images only
through the confusion matrix, so resampling n images is one multinomial draw over its cells; no
resample is ever laid out.

Macro F1 is biased in a resample: a class that has few images loses some and is left with none in
part of the resamples, so that with many small classes nearly all of them lie below the estimate,
and plain percentiles would exclude it. The resamples' mean says by how much they are off (chapter
10 of the same book). The interval reaches from the percentiles moved back by that bias, which hold
the estimate, to those moved back twice, which hold the estimate freed of the same bias of its own.
Where there is no bias (accuracy always, the others with some dozens of images a class) both are the
percentiles themselves. Simulated, 50 classes of 4 images: the percentiles cover the true macro F1
with a probability of 0.5, this interval with one of 0.9.

Where every image is right (or every one wrong) each resample is too, and the bootstrap's interval
shrinks to a point, which overstates what n images can show. There the ends are Wilson's (Wilson,
*Journal of the American Statistical Association* 22, 1927; recommended by Brown, Cai and DasGupta,
*Statistical Science* 16, 2001). The bootstrap serves everywhere else because Wilson's formula
exists for shares only, and accuracy and balanced accuracy should stand on the same footing. So
made, the interval covers the true accuracy with a probability of 0.94 to 1.00 (computed exactly
for 30 to 2,000 images and accuracies from 0.5 to 0.99); Wilson's alone, with 0.92 to 0.97.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import TrainingError
from featcache.system.tables import SHOWN, table

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]

_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 100  # bounds the memory of a draw: 100 x cells
_Z = 1.959963984540054  # 97.5 % point of the normal distribution
_BINS = 15  # of the calibration error, as in Guo et al. 2017
_TOP = (1, 2, 3, 5, 10)


@dataclass(frozen=True)
class ClassScore:
    """How one class fared.

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

    Attributes
    ----------
    accuracy, balanced_accuracy, macro_f1 : float
        Over the classes that occur in `y_true`, as in scikit-learn's ``balanced_accuracy_score``;
        macro F1 also over those that were predicted.
    accuracy_interval, balanced_accuracy_interval, macro_f1_interval : (float, float)
        95 % intervals; see the module's text for how.
    log_loss : float
        Mean of -log(probability of the true class), natural logarithm.
    ece : float
        Expected calibration error: mean over the images of |accuracy - confidence| of their bin,
        15 equally wide bins (Naeini et al. 2015; Guo et al. 2017).
    confusion : ndarray of int64, shape (k, k)
        Row: true class. Column: predicted class.
    """

    ids: npt.NDArray[Any]
    y_true: npt.NDArray[np.int64]
    proba: Floats
    classes: tuple[str, ...]
    groups: npt.NDArray[Any] | None = None
    notes: tuple[str, ...] = ()

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
        """Column of the most probable class: int64, shape (n,)."""
        column: npt.NDArray[np.int64] = self.proba.argmax(axis=1)
        return column

    @cached_property
    def confidence(self) -> Floats:
        """Probability of the most probable class: float64, shape (n,)."""
        top: Floats = self.proba.max(axis=1)
        return top

    @cached_property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Images by true class (row) and predicted class (column): int64, shape (k, k)."""
        k = len(self.classes)
        cells = np.bincount(self.y_true * k + self.y_pred, minlength=k * k)
        table: npt.NDArray[np.int64] = cells.astype(np.int64).reshape(k, k)
        return table

    @cached_property
    def _values(self) -> Floats:
        """Accuracy, balanced accuracy and macro F1."""
        counts = np.concatenate(
            [self.confusion.diagonal(), self.confusion.sum(axis=1), self.confusion.sum(axis=0)]
        )
        values: Floats = _rates(counts[None].astype(np.float64))[0]
        return values

    @property
    def accuracy(self) -> float:
        """Share of the images that are right."""
        return float(self._values[0])

    @property
    def balanced_accuracy(self) -> float:
        """Mean over the classes of the share that is right."""
        return float(self._values[1])

    @property
    def macro_f1(self) -> float:
        """Mean over the classes of the harmonic mean of precision and recall."""
        return float(self._values[2])

    @cached_property
    def _intervals(self) -> tuple[Interval, Interval, Interval]:
        drawn = _resample(self.y_true, self.y_pred, len(self.classes), self.groups)
        low, high = _unbiased(drawn, self._values)
        n = len(self) if self.groups is None else len(np.unique(self.groups))
        accuracy, balanced, f1 = (
            wilson(float(value), n) if value in (0.0, 1.0) else (float(a), float(b))
            for value, a, b in zip(self._values, low, high, strict=True)
        )
        return accuracy, balanced, f1

    @property
    def accuracy_interval(self) -> Interval:
        """95 % interval of the accuracy."""
        return self._intervals[0]

    @property
    def balanced_accuracy_interval(self) -> Interval:
        """95 % interval of the balanced accuracy."""
        return self._intervals[1]

    @property
    def macro_f1_interval(self) -> Interval:
        """95 % interval of the macro F1."""
        return self._intervals[2]

    @cached_property
    def log_loss(self) -> float:
        """Mean of -log(probability of the true class)."""
        likelihood = self.proba[np.arange(len(self)), self.y_true]
        return float(-np.log(np.maximum(likelihood, np.finfo(np.float64).tiny)).mean())

    @cached_property
    def calibration(self) -> tuple[Bin, ...]:
        """The bins of the calibration error, for a reliability diagram."""
        edges = np.linspace(0, 1, _BINS + 1)
        number = np.clip(np.ceil(self.confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
        count = np.bincount(number, minlength=_BINS)
        right = np.bincount(number, weights=self.y_pred == self.y_true, minlength=_BINS)
        sure = np.bincount(number, weights=self.confidence, minlength=_BINS)
        return tuple(
            Bin(
                float(edges[i]),
                float(edges[i + 1]),
                int(count[i]),
                float(sure[i] / count[i]) if count[i] else math.nan,
                float(right[i] / count[i]) if count[i] else math.nan,
            )
            for i in range(_BINS)
        )

    @cached_property
    def ece(self) -> float:
        """Expected calibration error: 0 is perfect."""
        off = sum(b.count * abs(b.accuracy - b.confidence) for b in self.calibration if b.count)
        return float(off / len(self))

    def top_k_accuracy(self, k: int) -> float:
        """Return the share of images whose label is among the `k` most probable ones.

        Ties count against the predictor: a class that others equal is ranked behind them.
        """
        mine = self.proba[np.arange(len(self)), self.y_true][:, None]
        rank = (self.proba >= mine).sum(axis=1)
        return float((rank <= k).mean())

    @cached_property
    def top_k(self) -> dict[int, float]:
        """Top-k accuracy for those of k = 1, 2, 3, 5, 10 that are smaller than the classes."""
        return {k: self.top_k_accuracy(k) for k in _TOP if k < len(self.classes)}

    @cached_property
    def per_class(self) -> tuple[ClassScore, ...]:
        """Precision, recall, F1 and support of every class, in the order of `classes`."""
        right = self.confusion.diagonal()
        support, predicted = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        return tuple(
            ClassScore(
                label,
                float(right[i] / predicted[i]) if predicted[i] else 0.0,
                float(right[i] / support[i]) if support[i] else 0.0,
                float(2 * right[i] / max(support[i] + predicted[i], 1)),
                int(support[i]),
                int(predicted[i]),
            )
            for i, label in enumerate(self.classes)
        )

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

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the images' probabilities, as JSON values."""
        return {
            "images": len(self),
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.accuracy_interval),
            "balanced_accuracy": self.balanced_accuracy,
            "balanced_accuracy_interval": list(self.balanced_accuracy_interval),
            "macro_f1": self.macro_f1,
            "macro_f1_interval": list(self.macro_f1_interval),
            "log_loss": self.log_loss,
            "ece": self.ece,
            "top_k": {str(k): value for k, value in self.top_k.items()},
            "resampled": "images" if self.groups is None else "groups",
            "classes": list(self.classes),
            "confusion": self.confusion.tolist(),
            "per_class": [vars(score) for score in self.per_class],
            "mistakes": [vars(mistake) for mistake in self.mistakes],
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """Return the metrics, the classes, and the most confident mistakes, for people."""
        return "\n".join(
            [
                f"accuracy {_with_interval(self.accuracy, self.accuracy_interval)} on "
                f"{len(self):,} images",
                "balanced accuracy "
                + _with_interval(self.balanced_accuracy, self.balanced_accuracy_interval)
                + f", macro F1 {_with_interval(self.macro_f1, self.macro_f1_interval)}",
                f"log loss {self.log_loss:.3f}, calibration error {self.ece:.3f}"
                + "".join(f", top-{k} {value:.3f}" for k, value in self.top_k.items() if k > 1),
                *self.notes,
                "",
                *self._class_lines(),
                *self._confusion_lines(),
                *self._mistake_lines(),
            ]
        )

    def _class_lines(self) -> list[str]:
        width = max(len("class"), *(len(name) for name in self.classes))
        lines = [f"{'class':{width}}  precision  recall     F1  images"]
        # With many classes, the worst ones are what a reader looks for.
        shown = self.per_class
        if len(shown) > 20:
            shown = tuple(sorted(shown, key=lambda score: score.f1)[:20])
        lines += [
            f"{s.label:{width}}  {s.precision:9.3f}  {s.recall:6.3f}  {s.f1:5.3f}  {s.support:6,}"
            for s in shown
        ]
        if len(shown) < len(self.classes):
            lines.append(f"(the 20 of {len(self.classes)} classes with the lowest F1)")
        return lines

    def _confusion_lines(self) -> list[str]:
        if len(self.classes) > 12:
            return []
        names = [f"{name}" for name in self.classes]
        width = max(9, *(len(name) for name in names))
        cells = [[f"{value:,}" for value in row] for row in self.confusion.tolist()]
        wide = [max(len(names[j]), *(len(row[j]) for row in cells)) for j in range(len(names))]
        head = "  ".join(name.rjust(w) for name, w in zip(names, wide, strict=True))
        return [
            "",
            f"{'true':{width}}  {head}  (columns: predicted)",
            *(
                f"{name:{width}}  "
                + "  ".join(cell.rjust(w) for cell, w in zip(row, wide, strict=True))
                for name, row in zip(names, cells, strict=True)
            ),
        ]

    def _mistake_lines(self) -> list[str]:
        if not self.mistakes:
            return ["", "no mistakes"]
        return [
            "",
            f"most confident of {len(self.mistakes):,} mistakes:",
            *(
                f"  {m.id}: {m.label}, predicted {m.predicted} ({m.probability:.3f})"
                for m in self.mistakes[:5]
            ),
        ]

    def _repr_html_(self) -> str:
        def line(name: str, value: float, ends: tuple[float, float]) -> tuple[str, str, str]:
            return name, f"{value:.3f}", f"{ends[0]:.3f} to {ends[1]:.3f}"

        figures = [
            line("accuracy", self.accuracy, self.accuracy_interval),
            line("balanced accuracy", self.balanced_accuracy, self.balanced_accuracy_interval),
            line("macro F1", self.macro_f1, self.macro_f1_interval),
            ("log loss", f"{self.log_loss:.3f}", ""),
            ("calibration error", f"{self.ece:.3f}", ""),
        ]
        worst = sorted(self.per_class, key=lambda score: score.f1)[:SHOWN]
        classes = [
            (s.label, f"{s.precision:.3f}", f"{s.recall:.3f}", f"{s.f1:.3f}", f"{s.support:,}")
            for s in (self.per_class if len(self.per_class) <= SHOWN else worst)
        ]
        return (
            table([f"{len(self):,} images", "", "95 % interval"], figures)
            + table(["class", "precision", "recall", "F1", "images"], classes)
            + "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        )

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return (
            f"<Evaluation: accuracy {_with_interval(self.accuracy, self.accuracy_interval)}, "
            f"{len(self):,} images, {len(self.classes)} classes>"
        )


def wilson(share: float, n: int) -> Interval:
    """Return Wilson's 95 % interval of a share seen in `n` independent trials."""
    z2 = _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    low = 0.0 if share == 0 else middle - half
    return low, 1.0 if share == 1 else middle + half


def _rates(counts: Floats) -> Floats:
    """Turn counts into rates.

    Parameters
    ----------
    counts : ndarray of shape (m, 3 k)
        For each resample: right images, images, and predictions of each class.

    Returns
    -------
    ndarray of shape (m, 3)
        Accuracy, balanced accuracy, macro F1.
    """
    right, true, predicted = np.split(counts, 3, axis=1)
    there, named = true > 0, (true + predicted) > 0
    recall = np.divide(right, true, out=np.zeros_like(right), where=there)
    f1 = np.divide(2 * right, true + predicted, out=np.zeros_like(right), where=named)
    return np.stack(
        [
            right.sum(axis=1) / true.sum(axis=1),
            recall.sum(axis=1) / there.sum(axis=1),
            f1.sum(axis=1) / named.sum(axis=1),
        ],
        axis=1,
    )


def _resample(
    y_true: npt.NDArray[np.int64],
    y_pred: npt.NDArray[np.int64],
    k: int,
    groups: npt.NDArray[Any] | None,
) -> Floats:
    """Return the rates of `_RESAMPLES` bootstrap resamples: shape (resamples, 3)."""
    from scipy.sparse import coo_array

    cell, cell_of, weight = _units(y_true * k + y_pred, groups)
    true, predicted = np.divmod(cell, k)
    # table[u, c]: what drawing unit u once adds to each count; units are cells or groups.
    hit = true == predicted
    rows = np.concatenate([cell_of[hit], cell_of, cell_of])
    columns = np.concatenate([true[hit], k + true, 2 * k + predicted])
    values = np.concatenate([weight[hit], weight, weight])
    n_units = int(cell_of.max()) + 1
    table = coo_array((values, (rows, columns)), shape=(n_units, 3 * k)).tocsr()
    if groups is None:
        draws = len(y_true)
        share = np.bincount(cell_of, weights=_cell_counts(y_true * k + y_pred)) / draws
    else:
        draws, share = n_units, np.full(n_units, 1 / n_units)
    rng = np.random.default_rng(0)  # the same predictions give the same interval
    parts = []
    for start in range(0, _RESAMPLES, _RESAMPLES_AT_ONCE):
        size = min(_RESAMPLES_AT_ONCE, _RESAMPLES - start)
        counts = rng.multinomial(draws, share, size=size) @ table
        parts.append(_rates(np.asarray(counts, dtype=np.float64)))
    return np.concatenate(parts)


def _unbiased(drawn: Floats, estimates: Floats) -> Floats:
    """Return interval ends (2, 3) of resampled rates (resamples, 3) that hold their estimates."""
    ends = np.percentile(drawn, [2.5, 97.5], axis=0)
    bias = drawn.mean(axis=0) - estimates
    low = np.minimum(ends[0] - bias, ends[0] - 2 * bias)
    high = np.maximum(ends[1] - bias, ends[1] - 2 * bias)
    # What is at the middle of many resamples lies between their percentiles, but for rounding.
    held: Floats = np.stack([np.minimum(low, estimates), np.maximum(high, estimates)])
    return held.clip(0.0, 1.0)


def _cell_counts(cells: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.unique(cells, return_counts=True)[1]


def _units(
    cells: npt.NDArray[np.int64], groups: npt.NDArray[Any] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
    """Return (cell, unit, weight): a unit drawn once adds `weight` images to that cell."""
    if groups is None:
        names = np.unique(cells)
        return names, np.arange(len(names)), np.ones(len(names))
    group = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    pairs, counts = np.unique(np.stack([cells, group], axis=1), axis=0, return_counts=True)
    return pairs[:, 0], pairs[:, 1], counts.astype(np.float64)


def _with_interval(value: float, interval: Interval) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def groups_of(groups: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the groups, images without one each in a group of its own."""
    alone = np.char.add("\0", np.arange(len(groups)).astype(str))
    return np.where(groups == "", alone, groups)
