"""Plots, and what they draw: maps, neighbours, class distances, learning curves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import MissingExtra, TrainingError
from featcache.report.plots import (
    plot_confusion,
    plot_embedding,
    plot_leaderboard,
    plot_learning_curve,
    plot_reliability,
)
from featcache.results.evaluation import Evaluation
from featcache.store.store import FeatureStore
from featcache.study.learning_curve import learning_curve
from featcache.study.maps import embed
from tests.labelled import clusters, make_store
from tests.reported import case, leaderboard

matplotlib = pytest.importorskip("matplotlib", reason="pip install 'featcache[notebook]'")


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Return two taps: one in which the classes lie apart, one of noise."""
    y = ["daisy", "rose", "tulip"] * 30
    taps = {
        "early:output:flatten": np.random.default_rng(1).normal(size=(90, 5)).astype(np.float32),
        "late:output:flatten": clusters(y, spread=0.4),
    }
    return make_store(tmp_path_factory.mktemp("plots") / "s.h5", taps, y)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return case(tmp_path_factory.mktemp("evaluation")).evaluation


# --- maps and neighbours ---------------------------------------------------------------------


def test_pca_is_the_two_directions_of_largest_variance() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 6)) * [9, 5, 1, 0.5, 0.1, 0.1] + 100
    placed = embed(X)
    centred = X - X.mean(axis=0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * size[:2]
    for k in range(2):
        cosine = (
            placed[:, k]
            @ expected[:, k]
            / (np.linalg.norm(placed[:, k]) * np.linalg.norm(expected[:, k]))
        )
        assert abs(cosine) == pytest.approx(1, abs=1e-5)
    assert placed.std(axis=0) == pytest.approx(expected.std(axis=0), rel=1e-3)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_keeps_classes_together_and_is_repeatable(store: FeatureStore, method: Any) -> None:
    placed = embed(store, method, layers="late")
    assert placed.shape == (90, 2) and placed.dtype == np.float32
    assert np.array_equal(placed, embed(store, method, layers="late"))
    centres = np.array([placed[store.labels == name].mean(axis=0) for name in store.classes])
    nearest_centre = np.linalg.norm(placed[:, None] - centres[None], axis=2).argmin(axis=1)
    assert [store.classes[k] for k in nearest_centre] == store.labels.tolist()


@pytest.mark.campaign
def test_umap_keeps_classes_together(store: FeatureStore) -> None:
    pytest.importorskip("umap", reason="pip install 'featcache[report]'")
    placed = embed(store, "umap", layers="late")
    centres = np.array([placed[store.labels == name].mean(axis=0) for name in store.classes])
    nearest_centre = np.linalg.norm(placed[:, None] - centres[None], axis=2).argmin(axis=1)
    assert [store.classes[k] for k in nearest_centre] == store.labels.tolist()


def test_maps_of_little(tmp_path: Path) -> None:
    assert embed(np.arange(6.0).reshape(6, 1)).shape == (6, 2)
    assert embed(np.random.default_rng(0).normal(size=(4, 2, 3))).shape == (4, 2)  # views
    with pytest.raises(TrainingError, match="at least 3 images"):
        embed(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="'mds' came"):
        embed(np.zeros((5, 4)), "mds")  # type: ignore[arg-type]


def test_umap_missing_says_what_to_install(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(MissingExtra, match=r"featcache\[report\]"):
        embed(store, "umap")


# --- learning curves -------------------------------------------------------------------------


def test_a_learning_curve_is_nested_and_stratified(store: FeatureStore) -> None:
    curve = learning_curve(store, head=["linear", "svm"], sizes=[9, 60], layers="late")
    assert [(point.head, point.images) for point in curve] == [
        ("linear", 9), ("linear", 60), ("svm", 9), ("svm", 60),
    ]  # fmt: skip
    assert all(point.accuracy > 0.9 for point in curve)
    assert curve.n_test == 23
    assert "svm" in str(curve)
    with pytest.raises(TrainingError, match=r"from 1 to the 67 labelled ones.*not \[100\]"):
        learning_curve(store, sizes=[100])


def test_sizes_are_chosen(store: FeatureStore) -> None:
    curve = learning_curve(store, head=["svm"], layers="late")
    sizes = [point.images for point in curve]
    assert sizes[0] == 10 and sizes[-1] == 67 and len(sizes) == 5


# --- plots -----------------------------------------------------------------------------------


def test_plots_draw_on_the_axes_they_are_given(store: FeatureStore, evaluation: Evaluation) -> None:
    import matplotlib.pyplot as plt

    _, ax = plt.subplots()
    assert plot_embedding(store, ax=ax) is ax
    assert plot_confusion(evaluation, ax=ax) is ax
    assert plot_leaderboard(leaderboard(), ax=ax) is ax
    assert plot_reliability(evaluation, ax=ax) is ax
    assert len(plt.get_fignums()) == 1
    assert plot_embedding(store) is not ax


def test_an_embedding_has_a_colour_a_class(store: FeatureStore) -> None:
    ax = plot_embedding(store, layers="late", s=3)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["daisy", "rose", "tulip"]
    drawn = np.concatenate([one.get_offsets() for one in ax.collections])
    assert len(drawn) == 90
    np.testing.assert_allclose(np.sort(drawn[:, 0]), np.sort(embed(store, layers="late")[:, 0]))
    ax = plot_embedding(np.zeros((4, 2)), color=["a", "a", "b", ""])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["no label", "a", "b"]
    with pytest.raises(ValueError, match="3 colours do not fit"):
        plot_embedding(np.zeros((4, 2)), color=["a", "a", "b"])


def test_a_confusion_matrix_writes_counts_or_shares(evaluation: Evaluation) -> None:
    texts = [text.get_text() for text in plot_confusion(evaluation).texts]
    assert texts == [str(n) for n in evaluation.confusion.ravel()]
    shares = [text.get_text() for text in plot_confusion(evaluation, normalize="true").texts]
    assert shares[0] == f"{evaluation.confusion[0, 0] / evaluation.confusion[0].sum():.2f}"


def test_a_leaderboard_has_the_best_on_top() -> None:
    ax = plot_leaderboard(leaderboard())
    assert [text.get_text() for text in ax.get_yticklabels()] == ["svm", "linear"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]


def test_evaluations_are_compared_by_name(evaluation: Evaluation) -> None:
    ax = plot_leaderboard({"layer3": evaluation, "avgpool": evaluation})
    assert [text.get_text() for text in ax.get_yticklabels()] == ["layer3", "avgpool"]


def test_a_learning_curve_is_drawn(store: FeatureStore) -> None:
    curve = learning_curve(store, head=["svm"], sizes=[9, 30], layers="late")
    ax = plot_learning_curve(curve)
    assert list(ax.lines[0].get_xdata()) == [9, 30]
    assert ax.get_xscale() == "log"
    assert ax.get_ylabel() == "accuracy on 23 others"


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingExtra, match=r"pip install 'featcache\[notebook\]'"):
        plot_leaderboard(leaderboard())
