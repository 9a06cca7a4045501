"""The leaderboard: heads compared under the same folds, as text, CSV, JSON and HTML."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from featcache.errors import PredictorError
from featcache.results.evaluation import FIGURES, Figures
from featcache.results.intervals import Score
from featcache.results.json_types import check_types
from featcache.system.tables import html_table, settings_text, text_table


@dataclass(frozen=True)
class LeaderboardRow:
    """One head.

    Attributes
    ----------
    head : str
        Name of the head.
    params : dict
        The hyper-parameters that were chosen.
    features : str
        What it was trained on: taps, with their files where stores are joined, and the number of
        columns.
    cv_score : float
        Mean over the folds of the score that decided; the chosen hyper-parameters' own, or, where
        the cross-validation was nested, that of choosing anew in each outer fold.
    cv : Figures
        Of the out-of-fold predictions, those of all folds together: what is printed as CV accuracy,
        balanced accuracy and macro F1 is this, and not the mean over the folds.
    cv_corrected : Score or None
        Accuracy of the out-of-fold predictions, without what the choice among the settings of this
        head adds to it; see `featcache.results.selection`. None where a note says why.
    held_out : Figures or None
        On the held-out images; None where there are none.
    search_seconds, fit_seconds : float
        Of the whole search, and of the last fit on all training images.
    predict_us : float
        Microseconds to predict one image from its features.
    peak_mb : float
        Highest resident memory of the process while the head was searched and fitted, in 10^6
        bytes, beyond what it was before.
    notes : tuple of str
        Notes of the search.
    candidates : tuple of dict
        Every setting that was tried, in order: "params", "score", "fold_scores" (None in a fold
        that does not count), "seconds".
    difference : Score or None
        Out-of-fold accuracy less that of the best head, over the images that both scored; see
        `featcache.results.selection.paired_differences`. Of balanced accuracy where
        `Leaderboard.difference_of` says so.
    """

    head: str
    params: Mapping[str, Any]
    features: str
    cv_score: float
    cv: Figures
    cv_corrected: Score | None
    held_out: Figures | None
    search_seconds: float
    fit_seconds: float
    predict_us: float
    peak_mb: float
    notes: tuple[str, ...] = ()
    candidates: tuple[Mapping[str, Any], ...] = ()
    difference: Score | None = None

    def __repr__(self) -> str:
        return f"<LeaderboardRow: {self.head}, CV accuracy {self.cv.accuracy}>"

    def cv_of(self, scoring: str) -> float:
        """Return what is printed beside the name of a scoring: of `cv` where that has it."""
        own = {"balanced_accuracy": self.cv.balanced_accuracy, "f1_macro": self.cv.macro_f1}
        return own.get(scoring, self.cv_score)

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values: "cv_accuracy" is out of fold, "accuracy" held out."""
        nothing = dict.fromkeys(self.cv.to_dict())
        return {
            "head": self.head,
            "params": dict(self.params),
            "features": self.features,
            "cv_score": self.cv_score,
            **self.cv.to_dict("cv_"),
            **_values(self.cv_corrected, "cv_accuracy_corrected"),
            **difference_values(self.difference),
            **(nothing if self.held_out is None else self.held_out.to_dict()),
            **{name: getattr(self, name) for name in _MEASURED},
            "notes": list(self.notes),
            "candidates": list(self.candidates),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LeaderboardRow:
        """Return the row that `to_dict` wrote, in `values` of other types a PredictorError."""
        scored = values.get("accuracy") is not None
        kinds = {
            **get_type_hints(cls),
            **{f"cv_{name}": kind for name, kind in FIGURES.items()},
            **_types("cv_accuracy_corrected"),
            **(FIGURES if scored else dict.fromkeys(FIGURES, type(None))),
            **dict.fromkeys(_DIFFERENCE, float | None),
        }
        del kinds["cv"], kinds["cv_corrected"], kinds["held_out"]
        check_types("leaderboard", values, kinds)
        return cls(
            cv=Figures.from_dict(values, "cv_"),
            cv_corrected=_score(values, "cv_accuracy_corrected"),
            held_out=Figures.from_dict(values) if scored else None,
            notes=tuple(values["notes"]),
            candidates=tuple(values["candidates"]),
            difference=None
            if values["difference"] is None
            else Score(*(values[name] for name in _DIFFERENCE)),
            **{name: values[name] for name in _GIVEN},
        )

    def to_flat(self) -> dict[str, Any]:
        """Return the columns of a CSV: an interval takes two, lists but candidates are JSON."""
        flat: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if name.endswith("_interval"):
                low, high = value or (None, None)
                flat[name.replace("interval", "low")] = low
                flat[name.replace("interval", "high")] = high
            elif name != "candidates":
                plain = not isinstance(value, dict | list)
                flat[name] = value if plain else json.dumps(value, ensure_ascii=False)
        return flat


_MEASURED = ("search_seconds", "fit_seconds", "predict_us", "peak_mb")
_GIVEN = ("head", "params", "features", "cv_score", *_MEASURED)
_DIFFERENCE = ("difference", "difference_low", "difference_high")
_SIMPLEST_FIRST = (
    *("ridge", "linear", "svm", "knn", "rbf-svm", "mlp", "forest", "boosting"),
    "suffix",
)


@dataclass(frozen=True)
class Leaderboard(Sequence[LeaderboardRow]):
    """Heads, the best by cross-validation first. ``print(leaderboard)`` shows it as a table.

    Attributes
    ----------
    rows : tuple of LeaderboardRow
        By falling `LeaderboardRow.cv_score`; of equal scores, that of the lower log loss first.
    best_corrected : Score or None
        Accuracy of the best of all settings of all heads, without what that choice adds to it.
    scoring : str
        What `LeaderboardRow.cv_score` is.
    n_fit, n_test, n_unlabelled : int
        Images trained on, held out, and left out for lack of a label.
    folds : str
        How the folds were made: "5 folds", "5 nested folds", "validation split".
    notes : tuple of str
        What the reader should know of the comparison as a whole.
    baseline : LeaderboardRow or None
        What calling every image by the commonest class (``params["label"]``) gives. It is no head,
        and not among the rows.
    difference_of : {"accuracy", "balanced accuracy"}
        What `LeaderboardRow.difference` is of: the second under class weights, and where it
        decides.

    Examples
    --------
    >>> import featcache as fc
    >>> images = fc.ImageSet.open("flowers").select(range(0, 80, 4))
    >>> store = fc.extract(images, fc.Backbone("resnet18", weights=None), "board.h5")
    >>> board = fc.train(store, head=["svm", "ridge"], cv=3).leaderboard
    >>> board.simplest, board.baseline.params
    ('ridge', {'label': 'dahlia'})
    >>> board[1].difference.low < 0 < board[1].difference.high
    True
    """

    rows: tuple[LeaderboardRow, ...]
    best_corrected: Score | None
    scoring: str
    n_fit: int
    n_test: int
    n_unlabelled: int
    folds: str
    notes: tuple[str, ...] = ()
    baseline: LeaderboardRow | None = None
    difference_of: str = "accuracy"

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def simplest(self) -> str | None:
        """The simplest head that is not clearly worse than the best; None without intervals.

        The order is ridge, linear, svm, knn, rbf-svm, mlp, forest, boosting, suffix.
        """
        order = {name: place for place, name in enumerate(_SIMPLEST_FIRST)}
        close = [
            row.head
            for row in self.rows
            if row.difference is not None
            and row.difference.high is not None
            and row.difference.high >= 0
        ]
        return min(close, key=lambda head: order.get(head, len(order)), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the leaderboard as JSON values."""
        return {
            **vars(self),
            **_values(self.best_corrected, "best_corrected"),
            "notes": list(self.notes),
            "rows": [row.to_dict() for row in self.rows],
            "baseline": None if self.baseline is None else self.baseline.to_dict(),
            "simplest": self.simplest,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Leaderboard:
        """Return the leaderboard that `to_dict` wrote.

        Raises
        ------
        PredictorError
            It is none.
        """
        kinds = get_type_hints(cls) | _types("best_corrected")
        kinds |= {"rows": tuple[Mapping[str, Any], ...], "simplest": str | None}
        check_types("leaderboard", values, kinds | {"baseline": Mapping[str, Any] | None})
        if not values["rows"]:
            raise PredictorError("Its leaderboard has no rows.")
        left = ("best_corrected_interval", "simplest")
        others = {name: values[name] for name in values if name not in left}
        base = values["baseline"]
        read = {
            "baseline": None if base is None else LeaderboardRow.from_dict(base),
            "rows": tuple(map(LeaderboardRow.from_dict, values["rows"])),
            "best_corrected": _score(values, "best_corrected"),
            "notes": tuple(values["notes"]),
        }
        return cls(**others | read)

    def to_json(self) -> str:
        """Return the leaderboard as JSON."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_csv(self) -> str:
        """Return one line a head, with a header; intervals take two columns."""
        buffer = io.StringIO()
        table = [row.to_flat() for row in self.rows]
        writer = csv.DictWriter(buffer, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        return buffer.getvalue()

    def to_text(self) -> str:
        """Return the table, the best head, how it was chosen, and the features, for people."""
        header, *cells = self._cells()
        return "\n".join([text_table(header, cells), "", *self.caption, *self.remarks])

    @property
    def remarks(self) -> list[str]:
        """The notes of the comparison, then those of its heads, with their names."""
        return [*self.notes] + [
            note if note.startswith(row.head) else f"{row.head}: {note}"
            for row in self.rows
            for note in row.notes
        ]

    @property
    def caption(self) -> list[str]:
        """The best head and how it was chosen, its corrected accuracy, and the features."""
        best = self.rows[0]
        by = "cross-validation"
        if self.scoring != "accuracy":
            by = f"cross-validated {self.scoring}"
        counts = f"{self.n_fit:,} images to train on, {self.folds}"
        counts += f", {self.n_test:,} held out" if self.n_test else ", none held out"
        if self.n_unlabelled:
            counts += f", {self.n_unlabelled:,} without a label left out"
        heads: dict[str, list[str]] = {}
        for row in self.rows:
            heads.setdefault(row.features, []).append(row.head)
        lines = [f"best by {by}: {best.head} ({settings_text(best.params)}); {counts}"]
        if self.best_corrected is not None:
            said = "accuracy of the best, corrected for the choice among all"
            lines.append(f"{said}: {self.best_corrected}")
        if self.simplest is not None and len(self) > 1:
            lines.append(f"simplest head that is not clearly worse than the best: {self.simplest}")
        if best.difference is not None:
            lines.append(difference_text(self.difference_of, best.difference))
        if self.baseline is not None:
            label = self.baseline.params["label"]
            lines.append(f"baseline: calling every image {str(label)!r}, the commonest class")
        return lines + [
            f"features{' of ' + ', '.join(names) if len(heads) > 1 else ''}: {features}"
            for features, names in heads.items()
        ]

    def _cells(self) -> list[list[str]]:
        score = [] if self.scoring == "accuracy" else [f"CV {self.scoring}"]
        test = ["held-out accuracy", "balanced", "macro F1"] if self.n_test else []
        measured = ["fit s", "predict us", "peak MB"]
        freed = [] if self.best_corrected is None else ["corrected"]
        compared = [] if self.rows[0].difference is None else ["difference"]
        header = ["head", *score, "CV accuracy", *compared, *freed, *test, *measured]
        rows = [header]
        for row in filter(None, (*self.rows, self.baseline)):
            cells = [row.head]
            if score:
                cells.append(f"{row.cv_of(self.scoring):.4f}")
            best = "" if row is self.rows[0] else str(row.difference)
            corrected = "" if row.cv_corrected is None else str(row.cv_corrected)
            cells += [str(row.cv.accuracy), *[best] * len(compared), *[corrected] * len(freed)]
            if row.held_out is not None:
                balanced, f1 = row.held_out.balanced_accuracy, row.held_out.macro_f1
                cells += [str(row.held_out.accuracy), f"{balanced:.3f}", f"{f1:.3f}"]
            spent = f"{row.search_seconds + row.fit_seconds:.1f}", f"{row.predict_us:.0f}"
            trained = [*spent, f"{max(row.peak_mb, 0):,.0f}"]
            rows.append(cells + (["", "", ""] if row is self.baseline else trained))
        return rows

    def _repr_html_(self) -> str:
        header, *cells = self._cells()
        lines = map(html.escape, (*self.caption, *self.remarks))
        return html_table(header, cells) + "".join(f"<p>{line}</p>" for line in lines)

    def __str__(self) -> str:
        return self.to_text()

    def __repr__(self) -> str:
        return f"<Leaderboard: {len(self)} heads, the best: {self.rows[0]!r}>"


def difference_text(of: str, best: Score | None) -> str:
    """Return what differences to the best are of, and whether they have intervals, as its own."""
    every = "" if best is None or best.low is None else "; the 95 % intervals hold all at once"
    return f"difference: CV {of} less that of the best{every}"


def difference_values(score: Score | None) -> dict[str, float | None]:
    """Return a difference and the ends of its interval as JSON values."""
    ends = (None, None, None) if score is None else (float(score), *score.interval)
    return dict(zip(_DIFFERENCE, ends, strict=True))


def _values(score: Score | None, name: str) -> dict[str, Any]:
    return dict.fromkeys(Score.types(name)) if score is None else score.to_dict(name)


def _score(values: Mapping[str, Any], name: str) -> Score | None:
    return None if values[name] is None else Score.from_dict(values, name)


def _types(name: str) -> dict[str, Any]:
    return {key: kind | None for key, kind in Score.types(name).items()}
