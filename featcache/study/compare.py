"""`compare`: networks, layers and heads apart, under the same folds and on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featcache.errors import MissingFeatures, TrainingError
from featcache.finetuning.search import SUFFIX
from featcache.results.intervals import Score
from featcache.results.leaderboard import LeaderboardRow, difference_text, difference_values
from featcache.store import splitting
from featcache.store.store import FeatureStore
from featcache.study.options import TrainingOptions
from featcache.study.parts import hold_out, without_small
from featcache.study.train import TrainedHead, TrainingData, heads_of, ranked, train_heads
from featcache.system.files import csv_writer, is_table, replacing
from featcache.system.tables import counted, first_names, html_table, text_table

__all__ = ["ComparedRow", "Comparison", "compare"]

KIND = "a comparison of featcache"  # of file
_HEADER = ["store", "layer", "head"]
_NUMBERS = [
    *("accuracy", "accuracy_low", "accuracy_high"),
    *("difference", "difference_low", "difference_high"),
]


@dataclass(frozen=True)
class ComparedRow:
    """One head on one layer of one store.

    Attributes
    ----------
    store, layer, head : str
        The file, the name of the tap there, and the head.
    result : LeaderboardRow
        All figures of it, out of fold; `LeaderboardRow.difference` is to the best of all rows.
    """

    store: str
    layer: str
    head: str
    result: LeaderboardRow

    @property
    def accuracy(self) -> Score:
        """Accuracy of the predictions of all folds, with its interval."""
        return self.result.cv.accuracy

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        low, high = self.accuracy.interval
        return {
            **{name: getattr(self, name) for name in _HEADER},
            **dict(zip(_NUMBERS, (float(self.accuracy), low, high), strict=False)),
            **difference_values(self.result.difference),
            "cv_score": self.result.cv_score,
            "params": dict(self.result.params),
        }


@dataclass(frozen=True)
class Comparison(Sequence[ComparedRow]):
    """The rows of `compare`, the best by cross-validation first; ``print`` shows them as a table.

    Attributes
    ----------
    rows : tuple of ComparedRow
        By falling `LeaderboardRow.cv_score`.
    scoring, difference_of : str
        What decides, and what the differences are of: accuracy, or balanced accuracy.
    images : int
        Images that all rows were scored on.
    folds : str
        How the folds were made.
    notes : tuple of str
        What the reader should know: images left out, and why.
    """

    rows: tuple[ComparedRow, ...]
    scoring: str
    difference_of: str
    images: int
    folds: str
    notes: tuple[str, ...] = ()

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        rows = [row.to_dict() for row in self.rows]
        return {**vars(self), "rows": rows, "notes": list(self.notes)}

    def to_csv(self, path: str | Path, *, force: bool = False, excel: bool = False) -> None:
        """Write one line a row, with a header.

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
        with replacing(Path(path), is_comparison, KIND, force=force, text=True) as file:
            write = csv_writer(file, excel=excel)
            write([*_HEADER, *_NUMBERS])
            for row in self.rows:
                values = row.to_dict()
                numbers = [values[name] for name in _NUMBERS]
                texts = ["" if one is None else f"{one:.6f}" for one in numbers]
                write([values[name] for name in _HEADER], texts)

    def _cells(self) -> list[list[str]]:
        score = [] if self.scoring == "accuracy" else [f"CV {self.scoring}"]
        rows = [[*_HEADER, *score, "CV accuracy", "difference"]]
        for row in self.rows:
            cells = [row.store, row.layer, row.head]
            cells += [f"{row.result.cv_of(self.scoring):.4f}"] * len(score)
            off = "" if row is self.rows[0] else str(row.result.difference)
            rows.append([*cells, str(row.accuracy), off])
        return rows

    def __str__(self) -> str:
        header, *rows = self._cells()
        said = f"{counted(self.images, 'image')}, {self.folds}, the same for all rows"
        of = difference_text(self.difference_of, self.rows[0].result.difference)
        return "\n".join([text_table(header, rows), "", said, of, *self.notes])

    def _repr_html_(self) -> str:
        header, *rows = self._cells()
        return html_table(header, rows)


def is_comparison(path: Path) -> bool:
    """Return whether a file is exactly what `Comparison.to_csv` writes."""
    number = r"-?\d+\.\d{6}"
    cells = {"accuracy|difference": number, ".*_(low|high)": f"({number})?"}
    return is_table(path, [*_HEADER, *_NUMBERS].__eq__, cells)


def compare(
    stores: str | Path | FeatureStore | Sequence[str | Path | FeatureStore],
    *,
    layers: str | Sequence[str] | None = None,
    head: Any = "linear",
    test_size: float | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Comparison:
    """Compare networks, layers and heads: each layer of each store is trained on alone.

    `train` joins stores and layers side by side into one classifier; this takes them apart, under
    the same folds and on the images that all stores have.

    Parameters
    ----------
    stores : path, FeatureStore, or list of these
        Features of the same images by different networks. Labels, groups and splits are the first
        store's.
    layers : str or list of str, optional
        Taps, of each store those that it has. None: all.
    head : str, classifier, or list of these
        As in `train`, but for ``suffix``.
    test_size : float, optional
        Share to leave out, the images that ``featcache train`` holds out with the same seed. None:
        what the split column holds out, else none. They choose nothing.
    progress : bool, optional
        Show a progress bar on standard error; left out, in a terminal or a notebook.
    **options
        cv, group, drop_crossing_groups, scoring, class_weight, nested, min_images, memory, n_jobs
        and random_state, as in `train`.

    Returns
    -------
    Comparison

    Raises
    ------
    StoreError
        The stores disagree on a label, or one was given twice.
    MissingFeatures
        A layer that no store has, or a store that has none of the layers.
    TrainingError
        No image is in all stores, or as in `train`.

    Examples
    --------
    >>> import featcache as fc
    >>> images = fc.ImageSet.open("flowers").select(range(0, 80, 4))
    >>> network = fc.Backbone("resnet18", weights=None, layers=["layer3", "avgpool"])
    >>> found = fc.compare(fc.extract(images, network, "layers.h5"), head="ridge", cv=3)
    >>> sorted(row.layer for row in found)
    ['avgpool:output:flatten', 'layer3:output:mean']
    >>> found[1].result.difference <= 0
    True
    """
    settings = TrainingOptions.of(**options)
    names, own = heads_of(head)
    if SUFFIX in names:
        raise TrainingError(f"compare trains on features, and {SUFFIX!r} on maps: use train.")
    given = [stores] if isinstance(stores, str | Path | FeatureStore) else list(stores)
    opened = [one if isinstance(one, FeatureStore) else FeatureStore.open(one) for one in given]
    wanted = _layers(opened, layers)
    joined, notes = _joined(opened)
    store, _, small = without_small(joined, None, settings)
    if test_size is not None or splitting.has_test(store.splits):
        store, test = hold_out(store, test_size, settings)
        notes.append(f"{counted(len(test), 'image is', 'images are')} held out, and choose nothing")
    found: list[TrainedHead] = []
    of: dict[str, tuple[str, str]] = {}
    places = [(one, tap) for one in opened for tap in one.taps]
    for (one, tap), name in zip(places, joined.taps, strict=True):
        if tap not in wanted[opened.index(one)]:
            continue
        data = replace(TrainingData.of(store, None, [name], settings), own=own)
        notes += data.notes
        for each in train_heads(data, names, None, progress=progress):
            # What else it holds may be as large as the features.
            found.append(replace(each, predictor=None, tried=[]))
            of[each.row.features] = ", ".join(one.paths), tap
    for one in opened:
        one.checked_files()  # features that are mapped were read until now
    ordered = ranked(data, found)[:-1]  # without the baseline
    rows = [ComparedRow(*of[row.features], row.head, row) for row in ordered]
    notes += [f"{row.layer}, {row.head}: {note}" for row in rows for note in row.result.notes]
    return Comparison(
        rows=tuple(rows),
        scoring=settings.decides_name,
        difference_of=settings.difference_of,
        images=len(data.store),
        folds=data.folds_text,
        notes=tuple(dict.fromkeys([*small, *notes])),
    )


def _layers(stores: Sequence[FeatureStore], layers: str | Sequence[str] | None) -> list[list[str]]:
    """Return the taps of each store that are compared."""
    asked = [layers] if isinstance(layers, str) else list(layers or ())
    found: list[list[str]] = [[] if asked else list(store.taps) for store in stores]
    for layer in asked:
        missing = []
        for store, own in zip(stores, found, strict=True):
            try:
                own += store.resolve(layer)
            except MissingFeatures as error:
                missing.append(error)
        if len(missing) == len(stores):
            raise missing[0]
    for store, own in zip(stores, found, strict=True):
        if not own:
            raise MissingFeatures(
                f"{', '.join(store.paths)} has none of the layers {first_names(asked)}; name one "
                f"of its own too: {first_names(list(store.taps))}."
            )
    return found


def _joined(stores: Sequence[FeatureStore]) -> tuple[FeatureStore, list[str]]:
    """Return the images that all stores have, by id and content, side by side."""
    rows = []
    for store in stores:
        keys = zip(store.ids.tolist(), splitting.hash_keys(store.sha256).tolist(), strict=True)
        rows.append({key: row for row, key in enumerate(keys)})
    shared = [key for key in rows[0] if all(key in own for own in rows)]
    if not shared:
        raise TrainingError(
            f"No image is in all of {first_names([', '.join(one.paths) for one in stores])}, by id "
            "and content. Extract the same images with each network."
        )
    left = [
        f"{', '.join(store.paths)}: {len(own) - len(shared):,}"
        for store, own in zip(stores, rows, strict=True)
        if len(own) > len(shared)
    ]
    notes = [f"images that not all stores have are left out ({'; '.join(left)})"] * bool(left)
    parts = [
        store.select([own[key] for key in shared]) for store, own in zip(stores, rows, strict=True)
    ]
    return FeatureStore.join(parts), notes
