"""`Prediction`: what a predictor says of one image, and files of predictions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from featcache.system.files import csv_writer, is_table, replacing
from featcache.system.tables import printable


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of one image.

    Attributes
    ----------
    id : str
        The image, relative to the folder that was given; of several, with that folder.
    label : str
        The class that was decided for; empty where there is an error, and where the predictor
        abstains.
    probability : float
        Its calibrated probability (where the predictor abstains, that of the first of `top`), which
        need not be the largest: class weights may decide for a class that is less probable. NaN
        where there is an error.
    top : tuple of (str, float)
        As many classes as were asked for: `label`, then the others from the most probable one.
    labels : tuple of str or None
        The set of labels, the one that was decided for first; none where there is an error. None
        where no coverage was asked for.
    typicality : float or None
        Share of the training images that lie farther out than it, from 0 to 1; see
        `featcache.predictor.typicality.Typicality`. None where there is an error, and where the
        predictor does not know.
    error : str
        Why the image could not be read; empty where it could.
    """

    id: str
    label: str
    probability: float
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""
    labels: tuple[str, ...] | None = None
    typicality: float | None = None

    @classmethod
    def failed(cls, id: str, error: str) -> Prediction:
        """Return the prediction for an image that cannot be read."""
        return cls(id, "", math.nan, (), error)

    def __repr__(self) -> str:
        if self.error:
            return f"Prediction(id={self.id!r}, error={self.error!r})"
        rest = "".join(f", then {label!r} {p:.2f}" for label, p in self.top[1:])
        return (
            f"Prediction(id={self.id!r}, label={self.label!r}, "
            f"probability={self.probability:.2f}{rest})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; there is no probability where there is an error."""
        return {
            "id": self.id,
            "label": self.label,
            "probability": None if self.error else self.probability,
            "top": [{"label": label, "probability": p} for label, p in self.top],
            **({} if self.labels is None else {"labels": list(self.labels)}),
            "typicality": self.typicality,
            "error": self.error,
        }


def write_predictions(
    predictions: Iterable[Prediction],
    output: Path,
    *,
    file_format: str = "csv",
    top_k: int = 1,
    labels: bool = False,
    force: bool = False,
    excel: bool = False,
) -> int:
    """Write predictions as they come, to a file or to standard output.

    Parameters
    ----------
    predictions : iterable of Prediction
        For instance from `Predictor.stream`; nothing but the current one is kept.
    output : Path
        ``-`` is standard output. A file is replaced when all is written, and only if it is a file
        of predictions, in every cell.
    file_format : {"csv", "json"}
        CSV has the columns ``id,label,probability[,label_2,probability_2...][,labels],typicality,
        error``, JSON is one list of objects.
    top_k : int
        Number of pairs of columns.
    labels : bool
        Whether there is the column ``labels``: sets of labels, joined by ``|``. In the name of a
        class, a backslash stands before ``|`` and before a backslash.
    force : bool
        Replace a file of any kind.
    excel : bool
        CSV for spreadsheets: see `featcache.system.files.csv_writer`.

    Returns
    -------
    int
        How many were written.

    Raises
    ------
    OutputError
        The output is a file of another kind, or cannot be written.
    """
    what = "a file of predictions"
    with replacing(output, _is_predictions, what, force=force, text=True) as file:
        if file_format == "json":
            return _write_json(predictions, file)
        return _write_csv(predictions, file, top_k, labels, excel)


def _header(top_k: int, labels: bool) -> list[str]:
    more = [name for k in range(2, top_k + 1) for name in (f"label_{k}", f"probability_{k}")]
    return ["id", "label", "probability", *more, *["labels"] * labels, "typicality", "error"]


def _write_csv(
    predictions: Iterable[Prediction], file: IO[str], top_k: int, labels: bool, excel: bool
) -> int:
    write = csv_writer(file, excel=excel)
    write(_header(top_k, labels))
    count = 0
    for one in predictions:
        cells: list[str] = []
        for label, probability in one.top[:top_k]:
            cells += [label if cells else one.label, f"{probability:.6f}"]
        cells += [""] * (2 * top_k - len(cells))
        if labels:
            cells.append("|".join(re.sub(r"[\\|]", r"\\\g<0>", name) for name in one.labels or ()))
        typical = "" if one.typicality is None else f"{one.typicality:.6f}"
        write([one.id, *cells, typical, one.error])
        count += 1
    return count


def _write_json(predictions: Iterable[Prediction], file: IO[str]) -> int:
    count = 0
    file.write("[")
    for count, one in enumerate(predictions, start=1):
        file.write(",\n " if count > 1 else "\n ")
        file.write(printable(json.dumps(one.to_dict(), ensure_ascii=False), json.dumps))
    file.write("\n]\n" if count else "]\n")
    return count


def _is_predictions(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        if file.read(1) != "[":
            return is_table(
                path,
                lambda names: names == _header((len(names) - 3) // 2, len(names) % 2 == 0),
                {r"probability(_\d+)?|typicality": r"([01]\.\d{6})?"},
                _is_row,
            )
        *lines, last = file.read().splitlines()
    found = [json.loads(line.removesuffix(",")) for line in lines[1:]]
    keys = [Prediction("", "", 0.0, labels=one).to_dict().keys() for one in (None, ())]
    return last == "]" and all(
        one.keys() in keys
        and bool(one["error"]) == (one["probability"] is None)
        and not (one["error"] and one["typicality"])
        and _is_whole(one["label"], one.get("labels"), one["error"])
        for one in found
    )


def _is_row(row: list[str]) -> bool:
    """Return whether a row says pairs of label and probability, or else an error."""
    sets = None
    if len(row) % 2 == 0:
        names = re.findall(r"(?:[^|\\]|\\.)+", row[-3])
        sets = [re.sub(r"\\(.)", r"\1", name) for name in names]
    pairs = row[1 : -3 if len(row) % 2 == 0 else -2]
    said = sum(map(bool, pairs[1:]))
    return (
        said % 2 == bool(said)
        and all(pairs[1 : 1 + said])
        and bool(row[-1]) == (said == 0)
        and not (row[-1] and row[-2])
        and _is_whole(row[1], sets, row[-1])
    )


def _is_whole(label: str, labels: list[str] | None, error: str) -> bool:
    """Return whether a label, a set of labels and an error can be those of one prediction."""
    if error:
        return not label and not labels
    if not label:  # it abstained
        return labels is not None and len(labels) > 1
    return labels is None or labels[:1] == [label]
