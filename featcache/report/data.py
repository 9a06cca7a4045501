"""`report.html`: an evaluation as one page that opens from disk and needs no network.

`write_report` gathers what is to be shown; `featcache.report.page` turns it into HTML. The
embedding map is drawn by Bokeh on a canvas. Its WebGL backend would be faster, but compiles its
shaders with ``new Function``, which the page's content policy forbids; instead Bokeh draws every
tenth point while the map is dragged, which stays fluid at 20,000 points.
"""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from featcache.errors import MissingExtra
from featcache.images.image_set import ImageSet
from featcache.networks.identity import spec_of
from featcache.report import page as report_page
from featcache.report.pictures import sheets, thumbnail
from featcache.results.evaluation import Evaluation
from featcache.results.leaderboard import Leaderboard
from featcache.store.store import FeatureStore
from featcache.study.audit import Findings, suspicious_labels
from featcache.study.maps import METHODS, Method, centred, embed, pooled
from featcache.system.files import check_overwrite, replacing
from featcache.system.nearest import nearest, unit
from featcache.system.tables import in_order
from featcache.version import __version__

__all__ = ["write_report"]

_ITEMS = 20_000  # images that the page knows one by one
_PAGE_BYTES = 14_500_000
_CARDS = 24  # of each gallery
_PAIRS = 12
_NEAR = 0.95  # cosine of nearly equal images
_NEAR_LIMIT = 100_000  # images up to which near-duplicates are looked for
_TSNE_LIMIT = 5_000  # images above which UMAP is the faster map
_ID_LENGTH = 160


def write_report(
    evaluation: Evaluation,
    path: str | Path,
    *,
    store: FeatureStore | None = None,
    images: ImageSet | None = None,
    leaderboard: Leaderboard | None = None,
    findings: Findings | None = None,
    maps: Sequence[Method] | None = None,
    title: str = "featcache report",
    random_state: int = 0,
    force: bool = False,
) -> None:
    """Write an evaluation as one self-contained HTML page, under 15 MB.

    Parameters
    ----------
    evaluation : Evaluation
        What is shown; all other arguments add to it.
    path : path
        The page. Replaced if it is a report of featcache, else left.
    store : FeatureStore, optional
        The features, of the evaluated images and of those that were trained on: for the map, the
        near-duplicates across the split, and what was run.
    images : ImageSet, optional
        Where the pictures are: for the thumbnails. Images that it does not have go without.
    leaderboard : Leaderboard, optional
        The comparison, as in ``predictor.leaderboard``.
    findings : Findings, optional
        From `audit`: its suspicious labels are shown. Without, those among the evaluated images
        are looked for, which needs no training.
    maps : list of {"pca", "tsne", "umap"}, optional
        None: PCA, with t-SNE up to 5,000 images and UMAP above. The largest share of the time.
    title : str
        Title of the page.
    random_state : int
        Seed of the maps, and of the choice of images where there are over 20,000.
    force : bool
        Replace a file of any kind.

    Raises
    ------
    MissingExtra
        Bokeh is not installed, or umap-learn where UMAP was asked for.
    OutputError
        The path holds something else, or cannot be written.
    """
    _require_bokeh()
    target = Path(path)
    what = "a report of featcache"
    check_overwrite(target, _is_report, what, force=force)
    ids, stored, columns = _page_images(evaluation, store, random_state)
    pictures = _Thumbnails(images)
    data: dict[str, Any] = {
        "title": title,
        "version": __version__,
        "evaluation": _figures(evaluation),
        "leaderboard": None if leaderboard is None else leaderboard.to_dict(),
        "remarks": [*leaderboard.caption[1:], *leaderboard.remarks] if leaderboard else [],
        "mistakes": _mistakes(evaluation, pictures),
        "suspects": _suspects(evaluation, findings, pictures),
        "duplicates": _duplicates(evaluation, store, pictures),
        "facts": _facts(store),
        "commands": _commands(store, leaderboard, target),
        **columns,
    }
    figure: tuple[dict[str, Any] | None, list[str]] = (None, [])
    if store is not None and len(ids) >= 3:
        data["maps"] = _maps(store, evaluation.layers, stored, maps, random_state)
        figure = _bokeh_parts()
    if images is not None:
        spent = len(report_page.render(data, *figure))
        rows = [pictures.row_of.get(name, -1) for name in ids.tolist()]
        made = sheets(images, rows, budget=_PAGE_BYTES - spent)
        data["tiles"] = made.tiles
        data["sheets"] = {"edge": made.edge, "columns": made.columns, "pictures": made.pictures}
    page = report_page.render(data, *figure)
    with replacing(target, _is_report, what, force=force) as file:  # it may be there by now
        file.write(page.encode("utf-8", "replace"))


def _require_bokeh() -> None:
    try:
        importlib.import_module("bokeh.plotting")
    except ImportError as error:
        raise MissingExtra("bokeh", "report", "The report") from error


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return report_page.GENERATOR.encode() in file.read(500)


# --- which images ----------------------------------------------------------------------------


def _page_images(
    evaluation: Evaluation, store: FeatureStore | None, random_state: int
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64], dict[str, Any]]:
    """Return the images that the page knows one by one: evaluated ones first, mistakes before all.

    Returns
    -------
    ids : ndarray of str, shape (m,)
        Images.
    stored : ndarray of int64, shape (m,)
        Row in the store, -1 where there is none.
    columns : dict
        What the page's script reads of them, as JSON values.
    """
    rng = np.random.default_rng(random_state)
    order = rng.permutation(len(evaluation))
    right = (evaluation.y_pred == evaluation.y_true)[order]
    order = np.concatenate([order[~right], order[right]])[:_ITEMS]
    # What a row of the store has; the last, -1, is for images that are not in it.
    names, labels, splits = (
        np.append([] if column is None else column, "").astype(str)
        for column in ((store.ids, store.labels, store.splits) if store else (None,) * 3)
    )
    own = _lookup(names[:-1], evaluation.ids)
    others = rng.permutation(np.setdiff1d(np.arange(len(names) - 1), own))
    others = others[: _ITEMS - len(order)]
    stored = np.concatenate([own[order], others])
    evaluated = np.concatenate([order, np.full(len(others), -1)])  # row in the evaluation
    known = evaluated >= 0
    ids = np.where(known, evaluation.ids[evaluated], names[stored])
    true = np.array(evaluation.classes)[evaluation.y_true[evaluated]]
    label = np.where(known, true, labels[stored]).tolist()
    classes = [*evaluation.classes, *in_order({*label} - {*evaluation.classes, ""})]
    code = {name: k for k, name in enumerate(classes)} | {"": -1}
    split = splits[stored] if (splits != "").any() else np.where(known, "held out", "training")
    parts, part = np.unique(split, return_inverse=True)
    sure = np.append(evaluation.confidence, 0.0)[evaluated]
    cells = np.argwhere(evaluation.confusion)
    return (
        ids,
        stored,
        {
            "classes": classes,
            "ids": [_shorten(name) for name in ids.tolist()],
            "label": [code[name] for name in label],
            "predicted": np.append(evaluation.y_pred, -1)[evaluated].tolist(),
            "sure": [round(value, 3) for value in sure.tolist()],
            "splits": [name or "none" for name in parts.tolist()],
            "split": part.tolist(),
            "confusion": [[int(i), int(j), int(evaluation.confusion[i, j])] for i, j in cells],
            "scored": len(evaluation.classes),
        },
    )


def _lookup(known: npt.NDArray[Any], names: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the position in `known` of each name, -1 where there is none."""
    place = {name: k for k, name in enumerate(known.tolist())}
    return np.array([place.get(name, -1) for name in names.tolist()], dtype=np.int64)


def _shorten(name: str) -> str:
    return name if len(name) <= _ID_LENGTH else "…" + name[1 - _ID_LENGTH :]


class _Thumbnails:
    """Thumbnails by image id."""

    def __init__(self, images: ImageSet | None) -> None:
        self.images = images
        names = [] if images is None else images.ids.tolist()
        self.row_of = {name: row for row, name in enumerate(names)}

    def card(self, id: str, label: str, second: str = "") -> Card:
        row = self.row_of.get(id)
        picture = None if row is None or self.images is None else thumbnail(self.images, row)
        return {"id": id, "label": label or "no label", "second": second, "picture": picture}


# --- figures and galleries -------------------------------------------------------------------

Card: TypeAlias = dict[str, str | None]  # id, label, second line, picture (WebP, base64)


def _figures(evaluation: Evaluation) -> dict[str, Any]:
    """Return what `Evaluation.to_dict` has, but for images and matrix, and the calibration."""
    values = evaluation.to_dict()
    for name in ("classes", "confusion", "mistakes"):
        del values[name]
    bins = [vars(one) for one in evaluation.calibration if one.count]
    return {**values, "mistakes": len(evaluation.mistakes), "calibration": bins}


def _gallery(note: str, cards: Sequence[Card] = ()) -> dict[str, Any]:
    return {"note": note, "cards": list(cards)}


def _mistakes(evaluation: Evaluation, pictures: _Thumbnails) -> dict[str, Any]:
    total = len(evaluation.mistakes)
    cards = [
        pictures.card(one.id, one.label, f"predicted {one.predicted} {one.probability:.3f}")
        for one in evaluation.mistakes[:_CARDS]
    ]
    note = f"The {len(cards)} surest of {total:,}." if total else "None."
    if total and pictures.images is None:
        note += " Give the images to see them."
    return _gallery(note, cards)


def _suspects(
    evaluation: Evaluation, findings: Findings | None, pictures: _Thumbnails
) -> dict[str, Any]:
    """Return the images whose label looks wrong, and what to say of how they were found."""
    how = "by a head that finds another class ten times as probable. The figure is the probability "
    how += "of the label it has."
    if findings is not None:
        found = findings.of("label")
        note = f"{len(found):,} of {findings.n_images:,} images, judged out of fold {how}"
    else:
        # Of a class that it does not know, a predictor gives every image a probability of 0.
        found = [one for one in suspicious_labels(evaluation) if one.score]
        note = (
            f"{len(found):,} of the {len(evaluation):,} evaluated images, judged {how} "
            "The command featcache audit looks at the training images too."
        )
    cards = [
        pictures.card(one.id, f"{one.label} {one.score:.3f}", f"rather {one.suggested}?")
        for one in found[:_CARDS]
    ]
    return _gallery(note, cards)


def _duplicates(
    evaluation: Evaluation, store: FeatureStore | None, pictures: _Thumbnails
) -> dict[str, Any]:
    """Return evaluated images that nearly equal one that was not evaluated: they flatter."""
    if store is None:
        return {"note": "Needs the features: give the store.", "pairs": []}
    if len(store) > _NEAR_LIMIT:
        note = f"Not looked for among {len(store):,} images; featcache audit does."
        return {"note": note, "pairs": []}
    mine = _lookup(store.ids, evaluation.ids)
    mine = mine[mine >= 0]
    others = np.setdiff1d(np.arange(len(store)), mine)
    if not len(mine) or not len(others):
        note = "The store has no images on the other side of the split."
        return {"note": note, "pairs": []}
    X = unit(centred(store, evaluation.layers))
    similar, rows = nearest(X[mine], X[others], 1)
    near = np.flatnonzero(similar[:, 0] >= _NEAR)
    near = near[np.argsort(-similar[near, 0], kind="stable")]

    def pair(i: int) -> dict[str, Any]:
        both = mine[i], others[rows[i, 0]]
        cards = [pictures.card(str(store.ids[row]), str(store.labels[row])) for row in both]
        return {"cards": cards, "similarity": float(similar[i, 0])}

    note = (
        f"{len(near):,} of {len(mine):,} evaluated images have a nearly equal one (cosine of "
        f"centred features {_NEAR} or more) among the {len(others):,} others. What is known from "
        "training is easy to get right: many such pairs flatter the figures above."
    )
    return {"note": note, "pairs": [pair(i) for i in near[:_PAIRS].tolist()]}


# --- the map ---------------------------------------------------------------------------------


def _maps(
    store: FeatureStore,
    layers: Sequence[str],
    rows: npt.NDArray[np.int64],
    methods: Sequence[Method] | None,
    random_state: int,
) -> dict[str, list[list[float | None]]]:
    """Return x and y of the shown images by name of the map, each scaled to [-1, 1]."""
    second: Method = "tsne" if len(rows) <= _TSNE_LIMIT else "umap"
    chosen = ("pca", second) if methods is None else methods
    X = pooled(store.select(rows[rows >= 0]), layers)
    maps: dict[str, list[list[float | None]]] = {}
    for method in chosen:
        placed = np.full((len(rows), 2), np.nan)
        placed[rows >= 0] = embed(X, method, random_state=random_state)
        middle = (np.nanmax(placed, axis=0) + np.nanmin(placed, axis=0)) / 2
        placed = (placed - middle) / np.maximum(np.nanmax(np.abs(placed - middle), axis=0), 1e-12)
        maps[METHODS[method]] = [
            [None if np.isnan(v) else round(float(v), 4) for v in column] for column in placed.T
        ]
    return maps


def _bokeh_parts() -> tuple[dict[str, Any], list[str]]:
    """Return the map without its points, and Bokeh's own scripts."""
    from bokeh.core.types import ID
    from bokeh.embed import json_item
    from bokeh.models import ColumnDataSource, HoverTool, Range1d, Scatter
    from bokeh.plotting import figure
    from bokeh.resources import Resources

    source = ColumnDataSource({"x": [], "y": [], "color": [], "alpha": []}, name="points")
    plot = figure(
        name="map",
        sizing_mode="stretch_both",
        tools="pan,wheel_zoom,box_zoom,zoom_in,zoom_out,reset,tap",
        toolbar_location="above",
        x_axis_location=None,
        y_axis_location=None,
        x_range=Range1d(start=-1.08, end=1.08),
        y_range=Range1d(start=-1.08, end=1.08),
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_alpha=0,
    )
    plot.grid.visible = False
    plot.toolbar.logo = None
    plot.toolbar.active_scroll = None  # the wheel scrolls the page until it is asked to zoom
    dots = plot.scatter(
        "x", "y", source=source, size=6, fill_color="color", line_color=None, fill_alpha="alpha"
    )
    # What is picked gets a ring; the others stay as they are.
    ring = Scatter(x="x", y="y", size=11, fill_color="color", line_color="#808080", line_width=4)
    dots.selection_glyph, dots.nonselection_glyph = ring, dots.glyph
    # The page's own script shows what is under the pointer: file names never become markup.
    plot.add_tools(HoverTool(tooltips=None, renderers=[dots]))
    resources = Resources(mode="inline", components=["bokeh"], log_level="warn")
    return dict(json_item(plot, ID("map-plot"))), list(resources.js_raw)


# --- what was run ----------------------------------------------------------------------------


def _facts(store: FeatureStore | None) -> list[tuple[str, str]]:
    """Return what is known of how the features were made, as names and values."""
    if store is None:
        return []
    facts = [("features", f"{', '.join(store.paths)}: {len(store):,} images")]
    for one in store.fingerprints:
        facts += [
            ("backbone", f"{one.source}/{one.backbone}, weights {one.weights}"),
            ("taps", ", ".join(one.taps)),
            ("precision", f"{one.precision}, stored as {one.store_dtype}, {one.views} view(s)"),
            ("preprocessing", _pairs(one.preprocessing)),
            ("fingerprint", one.digest),
        ]
    seconds = (store.meta.get("run") or {}).get("seconds") or {}
    known = {
        "extraction": {name: f"{value:.1f} s" for name, value in seconds.items()},
        "settings": store.meta.get("settings"),
        "versions": store.meta.get("versions"),
    }
    return facts + [(name, _pairs(values)) for name, values in known.items() if values]


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _commands(
    store: FeatureStore | None, leaderboard: Leaderboard | None, target: Path
) -> list[str]:
    """Return the three commands; capitals stand for what is not known here."""
    if store is None:
        return []
    path, one, extracted = store.paths[0], store.fingerprints[0], store.meta.get("command")
    if not isinstance(extracted, str):
        options = ["-o", path, "--backbone", spec_of(one), "--weights", one.weights]
        extracted = f"featcache extract IMAGES {shlex.join(options)}"
    heads = "".join(f" --head {row.head}" for row in leaderboard or ())
    return [
        extracted,
        f"featcache train {shlex.join(store.paths)} -o PREDICTOR.featcache{heads}",
        f"featcache evaluate PREDICTOR.featcache {shlex.join([path, '--report', str(target)])}",
    ]
