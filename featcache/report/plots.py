"""Pictures for notebooks and papers: functions that draw on matplotlib axes and return them.

All take ``ax``, axes to draw on (None: new ones), and set no global state, as scikit-learn's
displays do. ``pip install 'featcache[notebook]'`` brings matplotlib.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from featcache.errors import MissingExtra
from featcache.results.evaluation import Evaluation
from featcache.results.intervals import Score
from featcache.results.leaderboard import Leaderboard
from featcache.store.store import FeatureStore
from featcache.study.learning_curve import LearningCurve
from featcache.study.maps import METHODS, Method, embed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_confusion",
    "plot_embedding",
    "plot_leaderboard",
    "plot_learning_curve",
    "plot_reliability",
]

_CELLS_WITH_FIGURES = 20  # classes up to which the figures in a matrix can be read


def plot_embedding(
    features: FeatureStore | npt.NDArray[Any],
    *,
    method: Method = "pca",
    color: Sequence[str] | npt.NDArray[Any] | None = None,
    layers: str | Sequence[str] | None = None,
    random_state: int = 0,
    ax: Axes | None = None,
    **scatter: Any,
) -> Axes:
    """Draw a map of the images, a colour a class.

    Parameters
    ----------
    features : FeatureStore, or ndarray of shape (n, 2)
        A store is laid out by `embed`; an array is drawn as it is.
    method, layers, random_state
        As in `embed`.
    color : list of str, shape (n,), optional
        What the colours stand for. None: a store's labels.
    ax : matplotlib Axes, optional
        Where to draw.
    **scatter
        For ``Axes.scatter``.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    MissingExtra
        matplotlib is not installed, or umap-learn where it is asked for.
    """
    ax = _axes(ax)
    if isinstance(features, FeatureStore):
        points = embed(features, method, layers=layers, random_state=random_state)
        groups = features.labels if color is None else np.asarray(color)
        ax.set_title(METHODS[method])
    else:
        points = np.asarray(features)
        groups = np.full(len(points), "") if color is None else np.asarray(color)
    if points.shape != (len(groups), 2):
        raise ValueError(f"{len(groups)} colours do not fit points of shape {points.shape}.")
    names = np.unique(groups)
    style = {"s": 12.0, "alpha": 0.7, "linewidths": 0.0} | scatter
    for k, name in enumerate(names):
        own = points[groups == name]
        colour = f"C{k % 10}"
        ax.scatter(own[:, 0], own[:, 1], color=colour, label=str(name) or "no label", **style)
    if 1 < len(names) <= 20:
        ax.legend(markerscale=1.5, frameon=False)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def plot_confusion(
    evaluation: Evaluation,
    *,
    normalize: Literal["true"] | None = None,
    cmap: str = "Blues",
    ax: Axes | None = None,
) -> Axes:
    """Draw the confusion matrix: rows are labels, columns are predictions.

    Parameters
    ----------
    evaluation : Evaluation
        From `evaluate`.
    normalize : "true", optional
        Write shares of the row instead of counts. The shade is the share in both cases.
    cmap : str
        Name of a matplotlib colour map.
    ax : matplotlib Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    MissingExtra
        matplotlib is not installed.
    """
    ax = _axes(ax)
    counts = evaluation.confusion
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(share, cmap=cmap, vmin=0, vmax=1)
    k = len(evaluation.classes)
    if k <= _CELLS_WITH_FIGURES:
        for i, j in np.ndindex(k, k):
            text = f"{share[i, j]:.2f}" if normalize == "true" else f"{counts[i, j]:,}"
            shade = "white" if share[i, j] > 0.5 else "black"
            ax.text(j, i, text, ha="center", va="center", color=shade)
    places = range(k)
    ax.set_xticks(places, evaluation.classes, rotation=45 if k > 4 else 0)
    ax.set_yticks(places, evaluation.classes)
    ax.set_xlabel("predicted")
    ax.set_ylabel("label")
    return ax


def plot_reliability(evaluation: Evaluation, *, ax: Axes | None = None) -> Axes:
    """Draw how often the predictor is right against how sure it is.

    Parameters
    ----------
    evaluation : Evaluation
        From `evaluate`.
    ax : matplotlib Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    MissingExtra
        matplotlib is not installed.
    """
    ax = _axes(ax)
    bins = [one for one in evaluation.calibration if one.count]
    ax.plot([0, 1], [0, 1], "--", color="grey", label="as sure as right")
    ax.plot(
        [one.confidence for one in bins],
        [one.accuracy for one in bins],
        "o-",
        label=f"calibration error {evaluation.ece:.3f}",
    )
    ax.set_xlabel("confidence")
    ax.set_ylabel("accuracy")
    ax.set_aspect("equal")
    ax.legend(frameon=False)
    return ax


def plot_learning_curve(curve: LearningCurve, *, ax: Axes | None = None) -> Axes:
    """Draw accuracy against the number of labelled images, a line a head.

    Parameters
    ----------
    curve : LearningCurve
        From `learning_curve`.
    ax : matplotlib Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib Axes
        The bands are 95 % intervals.

    Raises
    ------
    MissingExtra
        matplotlib is not installed.
    """
    ax = _axes(ax)
    for k, head in enumerate(curve.heads):
        points = curve.of(head)
        images = [point.images for point in points]
        ends = np.array([point.accuracy.interval for point in points], dtype=float)  # NaN: none
        ax.plot(images, [p.accuracy for p in points], "o-", color=f"C{k % 10}", label=head)
        ax.fill_between(images, ends[:, 0], ends[:, 1], color=f"C{k % 10}", alpha=0.15, linewidth=0)
    ax.set_xscale("log")
    sizes = sorted({point.images for point in curve})
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.minorticks_off()
    ax.set_xlabel("labelled images")
    ax.set_ylabel(f"accuracy on {curve.n_test:,} others")
    ax.legend(frameon=False)
    return ax


def plot_leaderboard(
    leaderboard: Leaderboard | Mapping[str, Evaluation], *, ax: Axes | None = None
) -> Axes:
    """Draw the accuracy of each head with its 95 % interval, the best on top.

    Parameters
    ----------
    leaderboard : Leaderboard, or dict of str to Evaluation
        From `train`; or evaluations by any name, as of several layers or backbones.
    ax : matplotlib Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    MissingExtra
        matplotlib is not installed.
    """
    ax = _axes(ax)
    if isinstance(leaderboard, Leaderboard):
        names = [row.head for row in leaderboard]
        cv = [row.cv.accuracy for row in leaderboard]
        _whiskers(ax, cv, "cross-validation", "grey", -0.12)
        held = [row.held_out.accuracy for row in leaderboard if row.held_out is not None]
        if held:
            _whiskers(ax, held, f"{leaderboard.n_test:,} held-out images", "C0", 0.12)
        ax.legend(frameon=False)
    else:
        ranked = sorted(leaderboard.items(), key=lambda item: -item[1].accuracy)
        names = [name for name, _ in ranked]
        _whiskers(ax, [e.accuracy for _, e in ranked], "", "C0", 0.0)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel("accuracy")
    ax.grid(axis="x", alpha=0.3)
    return ax


def _whiskers(ax: Axes, scores: Sequence[Score], label: str, colour: str, shift: float) -> None:
    values = np.array(scores)
    ends = np.array([score.interval for score in scores], dtype=float)  # NaN where there is none
    error = np.abs(ends.T - values)
    places = np.arange(len(values)) + shift
    ax.errorbar(values, places, xerr=error, fmt="o", color=colour, capsize=3, label=label)


def _axes(ax: Axes | None) -> Axes:
    """Return the axes, or those of a new figure."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise MissingExtra("matplotlib", "notebook", "A plot") from error
    return plt.subplots(layout="constrained")[1] if ax is None else ax
