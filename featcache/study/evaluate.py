"""Score a predictor on the images of a store that it was not trained on."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from featcache.errors import MissingFeatures, PredictorError, TrainingError
from featcache.results.evaluation import Evaluation, with_own_groups
from featcache.system.tables import counted, first_names, in_order

if TYPE_CHECKING:
    from featcache.predictor.predictor import Predictor
    from featcache.store.store import FeatureStore

__all__ = ["evaluate", "left_out", "look_alikes", "out_of_fold"]

ATYPICAL = 0.01  # typicality below which an image is unlike those that were trained on
_MOST_ATYPICAL = 0.05  # share of such images that is not said
_FEWEST_TRAINED = 100  # images; of fewer, such a share cannot be told


def evaluate(
    predictor: Predictor,
    store: FeatureStore,
    *,
    other_groups: bool = False,
    by: str | Sequence[str] = (),
    unknown: Literal["refuse", "skip", "wrong"] = "refuse",
) -> Evaluation:
    """Score a predictor on the labelled images of a store that it was not trained on.

    Which images it was trained on is known by their content hashes, which the predictor keeps: a
    renamed copy of a training image is left out too. Where the store has groups, so are images of
    a group that images which it was trained on were of: what it knows of these flatters.

    Parameters
    ----------
    predictor : Predictor
        From `train` or `Predictor.load`.
    store : FeatureStore
        Features of the same network, taps and preprocessing.
    other_groups : bool
        A group of this store is another than one of the same name that it was trained on: patient
        "1" of another hospital.
    by : str or list of str
        Columns to tell apart in `Evaluation.by`: names in `FeatureStore.columns`, or ``group`` or
        ``split``.
    unknown : {"refuse", "skip", "wrong"}
        What becomes of images of a class that the predictor was not trained on: an error; left out
        and counted in a note; or counted as wrong, the class with its own line in the table.

    Raises
    ------
    FingerprintMismatch
        The features are of another origin; the message prints the difference field by field.
    PredictorError
        Labels that the predictor does not know, unless `unknown` says what to do with them.
    TrainingError
        No labelled image is left to score.
    MissingFeatures
        The store keeps no such column.

    Examples
    --------
    >>> import featcache as fc
    >>> import csv
    >>> rows = [("id", "label", "camera")]
    >>> for label in ("dahlia", "palace"):
    ...     for n in range(0, 40, 4):
    ...         rows.append((f"{label}/{n:02d}.jpg", label, "new" if n % 8 else "old"))
    >>> with open("cameras.csv", "w") as file:
    ...     csv.writer(file).writerows(rows)
    >>> images = fc.ImageSet.from_csv("cameras.csv", "flowers", keep_columns=["camera"])
    >>> store = fc.extract(images, fc.Backbone("resnet18", weights=None), "cameras.h5")
    >>> fit, test = store.split(random_state=0)
    >>> evaluation = fc.evaluate(fc.train(fit, cv=3), test, by="camera")
    >>> sorted(evaluation.by["camera"]), sum(map(len, evaluation.by["camera"].values()))
    (['new', 'old'], 5)
    """
    layers = predictor.layers_of(store)  # refuses features of another origin
    labelled = store.labels != ""
    seen = predictor.trained_on(store.sha256)
    akin = np.zeros_like(seen)
    if store.groups is not None and not other_groups:
        akin = predictor.trained_on_groups(store.groups) & ~seen
    rows = np.flatnonzero(labelled & ~seen & ~akin)
    columns = {name: i for i, name in enumerate(predictor.classes)}
    others = in_order(set(store.labels[rows].tolist()) - columns.keys())
    strange = np.isin(store.labels, others)
    strange[np.delete(np.arange(len(store)), rows)] = False
    if others and unknown == "refuse":
        of = f"of {', '.join(store.paths)}"
        have = counted(int(strange.sum()), f"image {of} has", f"images {of} have")
        raise PredictorError(
            f"{have} labels that the predictor does not know "
            f"({first_names([*map(repr, others)], 5)}); it knows "
            f"{first_names([*map(repr, predictor.classes)], 5)}. "
            + "".join(f"Note: {text}. " for text in look_alikes([*others, *columns]))
            + "Train again with these classes, leave such images out with --unknown skip, or count "
            "them as wrong with --unknown wrong (in Python unknown='skip' or 'wrong')."
        )
    if unknown == "skip":
        rows, others = rows[~strange[rows]], []
    notes = []
    if seen.any():
        notes.append(left_out(seen, "that it was trained on"))
    if akin.any():
        which = "of groups that it was trained on"
        keep = "--other-groups, in Python other_groups=True, keeps them"
        notes.append(f"{left_out(akin, which)} ({keep})")
    if not labelled.all():
        notes.append(left_out(~labelled, "without a label"))
    if strange.any():
        which = f"of {first_names(sorted({*store.labels[strange].tolist()}), 5)}"
        said = left_out(strange, which)
        if others:
            count = counted(int(strange.sum()), f"image {which} counts", f"images {which} count")
            said = f"{count} as wrong, with a probability of 0"
        notes.append(f"{said}: the predictor was not trained on such")
    if not len(rows):
        cure = "--group to hold out whole groups" if akin.any() else "--test-size to hold some out"
        raise TrainingError(
            f"None of the {len(store):,} images of {', '.join(store.paths)} can be scored: "
            f"{'; '.join(notes) or 'it is empty'}. Evaluate on other images, or train with {cure}."
        )
    chosen = store.select(rows)
    known = {"group": chosen.groups, "split": chosen.splits, **chosen.columns}
    columns_by = {}
    for name in [by] if isinstance(by, str) else by:
        if (values := known.get(name)) is None:
            raise MissingFeatures(
                f"{', '.join(store.paths)} keeps no column {name!r}; it keeps "
                f"{', '.join(chosen.columns) or 'none'}. Extract again with --keep-columns NAME, "
                "beside --labels (nothing is computed again)."
            )
        columns_by[name] = values
    columns |= {name: len(columns) + i for i, name in enumerate(others)}
    logits, low = (
        np.empty((len(chosen), len(predictor.classes)), np.float32),
        np.zeros(len(chosen), bool),
    )
    for part, block in chosen.blocks(layers):
        logits[part] = predictor.logits(block)
        if predictor.typicality is not None:
            low[part] = predictor.typicality(block) < ATYPICAL
    atypical = None
    if predictor.typicality is not None:
        atypical = float(low.mean())
        enough = predictor.typicality.distances.n >= _FEWEST_TRAINED
        if enough and atypical > _MOST_ATYPICAL and low.sum() > 1:
            are = counted(int(low.sum()), "image is", "images are")
            notes.append(
                f"{are} unlike those that it was trained on ({atypical:.1%} have a typicality "
                f"below {ATYPICAL}; of images like those, about {ATYPICAL:.0%} would)"
            )
    return Evaluation(
        ids=chosen.ids,
        y_true=np.array([columns[name] for name in chosen.labels], dtype=np.int64),
        proba=np.pad(predictor.calibration.proba(logits), ((0, 0), (0, len(others)))),
        predicted=logits.argmax(axis=1),
        classes=tuple(columns),
        groups=with_own_groups(chosen.groups),
        notes=tuple(notes),
        layers=tuple(layers),
        columns=columns_by,
        atypical=atypical,
    )


def out_of_fold(
    store: FeatureStore,
    classes: npt.NDArray[Any],
    logits: npt.NDArray[Any],
    proba: npt.NDArray[np.float64],
    groups: npt.NDArray[Any] | None = None,
) -> Evaluation:
    """Return the metrics of out-of-fold scores and probabilities (n, k); NaN where none judges."""
    known, order = ~np.isnan(logits).any(axis=1), np.argsort(classes)
    return Evaluation(
        ids=store.ids[known],
        y_true=order[np.searchsorted(classes, store.labels[known], sorter=order)],
        proba=proba[known],
        predicted=logits[known].argmax(axis=1),
        classes=tuple(classes.tolist()),
        groups=None if groups is None else groups[known],
    )


def look_alikes(names: Sequence[str]) -> list[str]:
    """Return a sentence for each set of classes whose names people take for one."""
    alike: dict[str, list[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", name).casefold().replace("_", " ")
        alike.setdefault(" ".join(plain.split()), []).append(name)
    return [
        f"the classes {' and '.join(map(ascii, each))} differ only in case, blanks or Unicode form"
        for each in alike.values()
        if len(each) > 1
    ]


def left_out(rows: npt.NDArray[np.bool_], which: str) -> str:
    """Return how many images are left out, and which they are."""
    return f"{counted(int(rows.sum()), f'image {which} is', f'images {which} are')} left out"
