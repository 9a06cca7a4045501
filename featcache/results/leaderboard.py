"""The leaderboard: heads compared under the same folds, as text, CSV, JSON and HTML."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Generic, TypeVar

from featcache.errors import PredictorError
from featcache.system.tables import table

P = TypeVar("P")  # `Predictor`, which keeps a leaderboard itself and so imports this module

Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One head.

    Attributes
    ----------
    head : str
        Name of the head.
    params : dict
        The hyper-parameters that were chosen.
    cv_score : float
        Mean over the folds of the score that decided; the chosen hyper-parameters' own, or, where
        the cross-validation was nested, that of choosing anew in each outer fold.
    cv_accuracy, cv_accuracy_interval : float, (float, float)
        Out-of-fold accuracy with its 95 % interval.
    cv_balanced_accuracy, cv_macro_f1, cv_log_loss : float
        Out of fold.
    accuracy, accuracy_interval : float, (float, float), or None
        On the held-out images; None where there are none.
    balanced_accuracy, balanced_accuracy_interval, macro_f1 : float or None
        On the held-out images.
    search_seconds, fit_seconds : float
        Of the whole search, and of the last fit on all training images.
    predict_us : float
        Microseconds to predict one image from its features.
    peak_mb : float
        Highest resident memory of the process while the head was searched and fitted, in 10^6
        bytes, beyond what it was before.
    notes : tuple of str
        What the head's search has to say.
    """

    head: str
    params: Mapping[str, Any]
    cv_score: float
    cv_accuracy: float
    cv_accuracy_interval: Interval
    cv_balanced_accuracy: float
    cv_macro_f1: float
    cv_log_loss: float
    accuracy: float | None
    accuracy_interval: Interval | None
    balanced_accuracy: float | None
    balanced_accuracy_interval: Interval | None
    macro_f1: float | None
    search_seconds: float
    fit_seconds: float
    predict_us: float
    peak_mb: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leaderboard(Sequence[Row], Generic[P]):
    """Heads, the best by cross-validation first. ``print(leaderboard)`` shows it as a table.

    Attributes
    ----------
    rows : tuple of Row
        By falling `Row.cv_score`; equal scores in the order in which they were compared.
    scoring : str
        What `Row.cv_score` is.
    n_fit, n_test, n_unlabelled : int
        Images trained on, held out, and left out for lack of a label.
    folds : str
        How the folds were made: "5 folds", "5 nested folds", "validation split".
    notes : tuple of str
        What the reader should know of the comparison as a whole.
    left_out : dict
        Heads that were not trained, and why.
    predictors : dict
        By head. Empty in a leaderboard that was read from a file, but for the best one.
    """

    rows: tuple[Row, ...]
    scoring: str
    n_fit: int
    n_test: int
    n_unlabelled: int
    folds: str
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    predictors: Mapping[str, P] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def best(self) -> P:
        """The predictor of the first row: the best by cross-validation, never by the test set."""
        head = self.rows[0].head
        if head not in self.predictors:
            raise PredictorError(
                f"This leaderboard came from a file and has no predictor of {head!r}; train again."
            )
        return self.predictors[head]

    def to_dict(self) -> dict[str, Any]:
        """Return the leaderboard as JSON values."""
        return {
            "scoring": self.scoring,
            "n_fit": self.n_fit,
            "n_test": self.n_test,
            "n_unlabelled": self.n_unlabelled,
            "folds": self.folds,
            "notes": list(self.notes),
            "left_out": dict(self.left_out),
            "rows": [asdict(row) for row in self.rows],
        }

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], predictors: Mapping[str, P] | None = None
    ) -> Leaderboard[P]:
        """Return the leaderboard that `to_dict` wrote.

        Raises
        ------
        PredictorError
            It is none.
        """
        try:
            rest = {name: values[name] for name in _PLAIN_FIELDS}
            rest["notes"] = tuple(str(note) for note in values["notes"])
            rows = tuple(_row(row) for row in values["rows"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise PredictorError(f"The leaderboard in the predictor is damaged: {error}") from error
        return cls(rows=rows, predictors=dict(predictors or {}), **rest)

    def to_json(self) -> str:
        """Return the leaderboard as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_csv(self) -> str:
        """Return one line a head, with a header; intervals take two columns."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        table = [_flat(row) for row in self.rows]
        writer.writerow(table[0])
        writer.writerows(row.values() for row in table)
        return buffer.getvalue()

    def to_text(self) -> str:
        """Return the table, the best head and how its hyper-parameters were chosen, for people."""
        header, *cells = self._cells()
        widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, *cells)
        ]
        lines.append("")
        lines += [self._caption(), *self.notes]
        for row in self.rows:
            for note in row.notes:
                lines.append(note if note.startswith(row.head) else f"{row.head}: {note}")
        lines += [f"{head} was left out: {why}" for head, why in self.left_out.items()]
        return "\n".join(lines)

    def _caption(self) -> str:
        best = self.rows[0]
        params = ", ".join(f"{name} {_short(value)}" for name, value in best.params.items())
        counts = f"{self.n_fit:,} images to train on, {self.folds}"
        if self.n_test:
            counts += f", {self.n_test:,} held out"
        if self.n_unlabelled:
            counts += f", {self.n_unlabelled:,} without a label left out"
        return (
            f"best by cross-validation: {best.head}"
            + (f" ({params})" if params else "")
            + (f"; {counts}")
        )

    def _cells(self) -> list[list[str]]:
        score = [] if self.scoring == "accuracy" else [f"CV {self.scoring}"]
        test = ["held-out accuracy", "balanced", "macro F1"] if self.n_test else []
        header = ["head", *score, "CV accuracy", *test, "fit s", "predict us", "peak MB"]
        rows = [header]
        for row in self.rows:
            cells = [row.head]
            if score:
                cells.append(f"{row.cv_score:.4f}")
            cells.append(_with_interval(row.cv_accuracy, row.cv_accuracy_interval))
            if test:
                cells.append(_with_interval(row.accuracy, row.accuracy_interval))
                cells += [_number(row.balanced_accuracy), _number(row.macro_f1)]
            cells += [
                f"{row.search_seconds + row.fit_seconds:.1f}",
                f"{row.predict_us:.0f}",
                f"{row.peak_mb:,.0f}",
            ]
            rows.append(cells)
        return rows

    def _repr_html_(self) -> str:
        header, *cells = self._cells()
        return f"{table(header, cells)}<p>{html.escape(self._caption())}</p>"

    def __str__(self) -> str:
        return self.to_text()


_PLAIN_FIELDS = ("scoring", "n_fit", "n_test", "n_unlabelled", "folds", "left_out")
_INTERVALS = ("cv_accuracy_interval", "accuracy_interval", "balanced_accuracy_interval")


def _row(values: Mapping[str, Any]) -> Row:
    """Return the row that `dataclasses.asdict` and JSON made of one."""
    known: dict[str, Any] = {}
    for name in (f.name for f in fields(Row)):
        value = values[name]
        if name in _INTERVALS:
            known[name] = None if value is None else (float(value[0]), float(value[1]))
        elif name == "head":
            known[name] = str(value)
        elif name == "params":
            known[name] = dict(value)
        elif name == "notes":
            known[name] = tuple(str(note) for note in value)
        else:
            known[name] = None if value is None else float(value)
    return Row(**known)


def _flat(row: Row) -> dict[str, Any]:
    """Return the columns of the CSV."""
    flat: dict[str, Any] = {}
    for name, value in asdict(row).items():
        if name in _INTERVALS:
            low, high = value or (None, None)
            flat[name.replace("interval", "low")] = low
            flat[name.replace("interval", "high")] = high
        elif name in ("params", "notes"):
            flat[name] = json.dumps(value, ensure_ascii=False)
        else:
            flat[name] = value
    return flat


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _with_interval(value: float | None, interval: Interval | None) -> str:
    if value is None or interval is None:
        return ""
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
