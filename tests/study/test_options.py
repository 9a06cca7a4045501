"""What a comparison is asked for is checked before anything is trained, and is part of its file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featcache as fc
from featcache.errors import TrainingError
from featcache.store.store import FeatureStore
from featcache.study.run import train_files
from tests.labelled import clusters, make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    labels = ["ant", "bee", "cat"] * 20
    return make_store(tmp_path_factory.mktemp("options") / "a.h5", clusters(labels), labels)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("cv", "5"),
        ("cv", 2.5),
        ("cv", 1),
        ("cv", None),
        ("memory", "1GB"),
        ("memory", 0),
        ("n_jobs", 0),
        ("nested", "yes"),
        ("n_jobs", 1.5),
        ("n_jobs", -7),
        ("random_state", -1),
        ("random_state", None),
        ("class_weight", "balance"),
        ("class_weight", {"ant": -1.0}),
        ("class_weight", {"nosuch": 2.0}),
        ("class_weight", {"ant": float("nan")}),
        ("class_weight", {"ant": float("inf")}),
        ("scoring", "acuracy"),
        ("scoring", 3),
        ("scoring", "r2"),
        ("scoring", "f1"),
        ("scoring", "precision"),
        ("head", "linaer"),
        ("head", None),
        ("head", []),
        ("head", ()),
        ("suffix", fc.SuffixSettings()),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(store: FeatureStore, option: str, value: Any) -> None:
    with pytest.raises(TrainingError, match=option):
        fc.train(store, **{option: value})


@pytest.mark.parametrize(
    ("scoring", "said"),
    [
        ("r2", "'r2' compares numbers, and classes are none. Try accuracy"),
        ("neg_mean_squared_error", "compares numbers"),
        ("roc_auc", r"'roc_auc' cannot score 3 classes .*: it is for two. Try roc_auc_ovr\.$"),
        ("f1", r"'f1' cannot score 3 classes .*: it is for two. Try f1_macro\.$"),
    ],
)
def test_a_scoring_that_does_not_fit_names_one_that_does(
    store: FeatureStore, scoring: str, said: str
) -> None:
    with pytest.raises(TrainingError, match=said) as caught:
        fc.train(store, scoring=scoring)
    assert not re.search("could not convert|multi_class|average=", str(caught.value))


def test_a_scoring_of_numbers_is_refused_where_labels_are_digits(tmp_path: Path) -> None:
    labels = ["1", "2"] * 20
    with pytest.raises(TrainingError, match="compares numbers"):
        fc.train(make_store(tmp_path / "a.h5", clusters(labels), labels), scoring="r2")


def test_a_path_is_no_store_and_no_layers_are_all(store: FeatureStore) -> None:
    with pytest.raises(TrainingError, match=r"FeatureStore.open\('x.h5'\)"):
        fc.train("x.h5")  # type: ignore[arg-type]
    assert fc.train(store, layers=[]).n_features == store.width()


@pytest.mark.parametrize(
    "scoring", ["f1_macro", "neg_log_loss", "roc_auc_ovr", "balanced_accuracy", "top_k_accuracy"]
)
def test_scorings_of_classes_are_taken(store: FeatureStore, scoring: str) -> None:
    assert np.isfinite(fc.train(store, scoring=scoring).leaderboard.rows[0].cv_score)


def test_heads_may_be_all_and_others() -> None:
    from featcache.study.train import head_names

    assert head_names(["all", "suffix", "linear"]) == [*head_names("all"), "suffix"]


def test_memory_is_part_of_the_request(store: FeatureStore, tmp_path: Path) -> None:
    path, out = store.paths[0], tmp_path / "p.featcache"
    first = train_files(path, out, head="knn", memory=4_000)
    assert "of 45 images" in first.to_text()
    assert train_files(path, out, head="knn", memory=4_000).up_to_date
    again = train_files(path, out, head="knn")
    assert not again.up_to_date and "of 45 images" not in again.to_text()
