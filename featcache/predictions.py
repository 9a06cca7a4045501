"""`Prediction`: what a predictor says of one image, and files of predictions.

Also here, because every file that featcache writes for its user follows it: the rule that an
output never replaces a file of another kind (`refuse_foreign`), and appears whole or not at all
(`replacing`).
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from featcache.errors import PredictorError


@dataclass(frozen=True)
class Prediction:
    """What a predictor says of one image.

    Attributes
    ----------
    id : str
        The image, relative to the folder that was given.
    label : str
        The most probable class; empty where there is an error.
    probability : float
        Its calibrated probability; NaN where there is an error.
    top : tuple of (str, float)
        The most probable classes, as many as were asked for, the first of them being `label`.
    error : str
        Why the image could not be read; empty where it could.
    """

    id: str
    label: str
    probability: float
    top: tuple[tuple[str, float], ...] = ()
    error: str = ""

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
            "error": self.error,
        }


def write_predictions(
    predictions: Iterable[Prediction],
    output: Path | None,
    *,
    file_format: str = "csv",
    top_k: int = 1,
) -> int:
    """Write predictions as they come, to a file or to standard output.

    Parameters
    ----------
    predictions : iterable of Prediction
        For instance from `Predictor.stream`; nothing but the current one is kept.
    output : Path or None
        None: standard output. A file is replaced when all is written, and only if it is a file of
        predictions.
    file_format : {"csv", "json"}
        CSV has the columns ``id,label,probability[,label_2,probability_2...],error``, JSON is one
        list of objects.
    top_k : int
        Number of pairs of columns.

    Returns
    -------
    int
        How many were written.

    Raises
    ------
    PredictorError
        The output is a file of another kind, or cannot be written.
    """
    write = _write_csv if file_format == "csv" else _write_json
    if output is None:
        return write(predictions, sys.stdout, top_k)
    refuse_foreign(output, _is_predictions, "a file of predictions")
    with replacing(output, text=True) as file:
        return write(predictions, file, top_k)


def _header(top_k: int) -> list[str]:
    more = [name for k in range(2, top_k + 1) for name in (f"label_{k}", f"probability_{k}")]
    return ["id", "label", "probability", *more, "error"]


def _write_csv(predictions: Iterable[Prediction], file: IO[str], top_k: int) -> int:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_header(top_k))
    count = 0
    for one in predictions:
        cells: list[str] = []
        for label, probability in one.top[:top_k]:
            cells += [label, f"{probability:.6f}"]
        cells += [""] * (2 * top_k - len(cells))
        writer.writerow([one.id, *cells, one.error])
        count += 1
    return count


def _write_json(predictions: Iterable[Prediction], file: IO[str], top_k: int) -> int:
    count = 0
    file.write("[")
    for count, one in enumerate(predictions, start=1):
        file.write(",\n " if count > 1 else "\n ")
        file.write(json.dumps(one.to_dict(), ensure_ascii=False))
    file.write("\n]\n" if count else "]\n")
    return count


def _is_predictions(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(64)
    return start.startswith((b"id,label,probability", b'[\n {"id": ', b"[]\n"))


def refuse_foreign(path: Path, is_own: Callable[[Path], bool], what: str) -> None:
    """Raise where a path cannot be written, or holds something of another kind.

    Raises
    ------
    PredictorError
        The message says what is there.
    """
    if path.is_dir():
        raise PredictorError(f"{path} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise PredictorError(f"There is no folder {path.parent} to write {path.name} in.")
    try:
        foreign = path.exists() and path.stat().st_size > 0 and not is_own(path)
    except OSError as error:
        raise PredictorError(f"{path} is there and cannot be read: {error.strerror}.") from error
    if foreign:
        raise PredictorError(
            f"{path} is there already and is not {what}. It is left as it is: name another file, "
            "or move it away."
        )


@contextmanager
def replacing(path: Path, *, text: bool = False) -> Iterator[IO[Any]]:
    """Open a file beside `path` for writing, and put it in its place when all went well.

    Raises
    ------
    PredictorError
        It cannot be written; what was there is still there.
    """
    target = path.resolve()  # a link keeps pointing at the file that is replaced
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with (
            temporary.open("w", encoding="utf-8", newline="") if text else temporary.open("wb")
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise PredictorError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
