from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import make_classification
from sklearn.metrics import accuracy_score, make_scorer

from featcache import learning_curve, train, train_files
from featcache.errors import (
    MissingFeatures,
    OutputError,
    PredictorError,
    StoreError,
    TrainingError,
)
from featcache.heads.linear import LinearHead
from featcache.heads.rows import TrainingRows
from featcache.heads.steps import Matrix, Step
from featcache.predictor.predictor import Predictor
from featcache.results.leaderboard import Leaderboard
from featcache.store.store import FeatureStore
from featcache.study.evaluate import evaluate
from tests.labelled import POOL, clusters, make_store
from tests.stores import sha256

LABELS = ["ant", "bee", "cod"] * 30
OTHER = "features:output:mean"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def store(folder: Path) -> FeatureStore:
    return make_store(folder / "a.h5", clusters(LABELS, spread=3.0), LABELS)


@pytest.fixture(scope="module")
def best(store: FeatureStore) -> Predictor:
    fit, test = store.split(random_state=1)
    return train(fit, test, head=["svm", "linear"], cv=3)


@pytest.fixture(scope="module")
def board(best: Predictor) -> Leaderboard:
    return best.leaderboard


# --- protocol ----------------------------------------------------------------------------------


def test_heads_are_ranked_by_cross_validation(best: Predictor, board: Leaderboard) -> None:
    assert [row.cv_score for row in board] == sorted((row.cv_score for row in board), reverse=True)
    assert (best.head, best.params) == (board[0].head, board[0].params)
    for row in board:
        assert 0.5 < row.cv.accuracy < 1
        assert row.cv.accuracy.interval[0] < row.cv.accuracy < row.cv.accuracy.interval[1]
        assert row.held_out is not None
        accuracy = row.held_out.accuracy
        assert accuracy.low < accuracy < accuracy.high
        assert row.fit_seconds > 0
        assert row.predict_us > 0
        assert row.params


def test_every_head_has_its_difference_to_the_best(board: Leaderboard, folder: Path) -> None:
    first, second = board
    assert (first.difference, first.difference.interval) == (0, (0, 0))
    difference = second.cv.accuracy - first.cv.accuracy
    assert second.difference == pytest.approx(difference)
    low, high = second.difference.interval
    assert low < difference < high and low < 0 < high
    assert board.simplest == "linear"  # simpler than svm, and not clearly worse
    assert "not clearly worse than the best: linear" in board.to_text()
    values = json.loads(board.to_json())
    assert values["simplest"] == "linear" and values["difference_of"] == "accuracy"
    row = values["rows"][1]
    assert (row["difference_low"], row["difference_high"]) == (low, high)
    table = list(csv.DictReader(io.StringIO(board.to_csv())))
    assert float(table[1]["difference_low"]) == low
    y = ["ant", "bee", "cod"] * 8
    groups = ["a", "b", "c"] * 8
    few = make_store(folder / "few.h5", clusters(y), y, groups=groups)
    board = train(few, head=["ridge", "linear"], cv=2).leaderboard
    assert board[1].difference is not None and board[1].difference.low is None
    assert board.simplest is None and "simplest" not in board.to_text()


def test_the_baseline_is_the_commonest_class_and_no_head(folder: Path) -> None:
    y = ["ant"] * 30 + ["bee"] * 60
    store = make_store(folder / "uneven.h5", np.zeros((90, 3), np.float32), y)
    fit, test = store.split(random_state=1)
    predictor = train(fit, test, head="ridge", cv=3, class_weight="balanced")
    board = predictor.leaderboard
    assert [row.head for row in board] == ["ridge"]
    base = board.baseline
    assert base is not None and base.params == {"label": "bee"}
    assert base.cv.accuracy == pytest.approx(2 / 3, abs=0.01)
    assert base.cv.balanced_accuracy == base.cv_score == 0.5
    assert base.held_out is not None and base.held_out.accuracy == pytest.approx(2 / 3, abs=0.05)
    assert board.difference_of == "balanced accuracy"
    predictor.save(folder / "base.featcache")
    assert Predictor.load(folder / "base.featcache").leaderboard == board
    assert [row["head"] for row in csv.DictReader(io.StringIO(board.to_csv()))] == ["ridge"]
    assert "calling every image 'bee', the commonest class" in board.to_text()


def test_the_held_out_images_choose_nothing(store: FeatureStore, folder: Path) -> None:
    fit, test = store.split(random_state=1)
    X, y = test.load()
    turned = make_store(
        folder / "turned.h5", X, [{"ant": "bee", "bee": "cod", "cod": "ant"}[one] for one in y]
    )
    with_test, without = (
        train(fit, test, head=["svm", "linear"], cv=3).leaderboard for test in (turned, None)
    )
    for row, other in zip(with_test, without, strict=True):
        assert (row.head, row.params, row.cv_score) == (other.head, other.params, other.cv_score)
        assert row.held_out is not None
        assert row.held_out.accuracy < 0.5
        assert other.held_out is None


def test_held_out_figures_are_those_of_evaluate(store: FeatureStore, best: Predictor) -> None:
    _, test = store.split(random_state=1)
    found, board = evaluate(best, test), best.leaderboard
    assert board[0].held_out == found.figures
    assert board[0].held_out is not None
    assert board[0].held_out.accuracy.interval == found.accuracy.interval
    assert board.n_test == len(test)
    assert best.metrics["held_out"]["accuracy"] == found.accuracy


def test_copies_do_not_leak_from_fold_to_fold(folder: Path) -> None:
    # Random labels: whoever beats chance has seen the validation images. Every image is there
    # twice, and a forest remembers what it has seen.
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(60, 6)), 2, axis=0).astype(np.float32)
    y = np.repeat(rng.choice(["a", "b"], 60), 2).tolist()
    hashes = np.repeat(sha256([f"{i}" for i in range(60)]), 2, axis=0)
    known = make_store(folder / "known.h5", X, y, hashes=hashes)
    unknown = make_store(folder / "unknown.h5", X, y)
    honest, leaking = (
        train(one, head=["rbf-svm"], cv=4).leaderboard[0] for one in (known, unknown)
    )
    assert honest.cv.accuracy < 0.72  # a search over many settings finds a lucky one
    assert leaking.cv.accuracy > 0.85


def test_views_of_one_image_stay_in_one_fold(folder: Path) -> None:
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(200, 1, 6)), 3, axis=1).astype(np.float32)
    y = rng.choice(["a", "b"], 200).tolist()
    views = make_store(folder / "random-views.h5", X, y, views=3)
    assert train(views, head=["rbf-svm"], cv=4).leaderboard[0].cv.accuracy < 0.62


def test_groups_stay_in_one_fold_and_widen_the_interval(folder: Path) -> None:
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(30, 6)), 4, axis=0).astype(np.float32)
    y = np.repeat(rng.choice(["a", "b"], 30), 4).tolist()
    groups = np.repeat([f"g{i}" for i in range(30)], 4).tolist()
    grouped = make_store(folder / "grouped.h5", X, y, groups=groups)
    honest = train(grouped, head=["rbf-svm"], cv=4, group=True).leaderboard
    leaking = train(grouped, head=["rbf-svm"], cv=4).leaderboard
    assert honest[0].cv.accuracy < 0.7 < 0.85 < leaking[0].cv.accuracy
    assert honest.folds == "4 grouped folds"
    assert "give --group" in leaking.notes[0]
    assert honest.notes == ()
    low, high = honest[0].cv.accuracy.interval
    assert high - low > 0.2


def test_group_without_groups_says_what_to_do(store: FeatureStore) -> None:
    with pytest.raises(TrainingError, match=r"has no groups\. Extract with --group-column"):
        train(store, group=True)


def test_a_validation_part_takes_the_place_of_folds(folder: Path) -> None:
    splits = (["train"] * 4 + ["val"] * 2) * 15
    split = make_store(folder / "val.h5", clusters(LABELS, spread=3.0), LABELS, splits=splits)
    found = train(split)
    assert found.leaderboard.folds == "validation split"
    assert found.metrics["out_of_fold"]["images"] == 30
    assert len(found.train_sha256) == 90  # the last fit takes all of them


def test_nested_cross_validation_judges_the_choosing(store: FeatureStore) -> None:
    nested, plain = (train(store, cv=3, nested=which) for which in (True, False))
    board = nested.leaderboard
    assert board.folds == "3 nested folds"
    assert 0.5 < board[0].cv_score < 1
    assert nested.params == plain.params  # the predictor is the same, the figure is another
    np.testing.assert_array_equal(nested.canaries.logits, plain.canaries.logits)


def test_nested_folds_make_do_with_small_classes(folder: Path) -> None:
    y = ["ant"] * 20 + ["bee"] * 20 + ["rare"] * 3
    small = make_store(folder / "small.h5", clusters(y), y)
    assert train(small, head=["linear"], cv=3, nested=True).leaderboard[0].cv.accuracy > 0.5


def test_the_same_call_gives_the_same_predictor(store: FeatureStore) -> None:
    one, other = (train(store, head="linear", cv=2) for _ in range(2))
    np.testing.assert_array_equal(one.predict_proba_of(store), other.predict_proba_of(store))


def test_probabilities_are_calibrated_for_heads_that_have_none(folder: Path) -> None:
    y = np.random.default_rng(1).choice(["a", "b"], 400).tolist()
    both = make_store(folder / "cal.h5", clusters(y, d=3, spread=2.5), y)
    fit, test = both.split(0.5)
    # Logistic regression has probabilities of its own; the others come as close.
    best = evaluate(train(fit, head="linear", cv=3), test).log_loss
    for head in ("svm", "rbf-svm"):
        found = evaluate(train(fit, head=head, cv=3), test)
        assert found.ece < 0.12
        assert found.log_loss < best + 0.03


# --- what can be trained on --------------------------------------------------------------------


def test_rows_without_a_label_are_left_out_and_counted(folder: Path) -> None:
    y = ["", *LABELS[1:-1], ""]
    part = make_store(folder / "part.h5", clusters(LABELS, spread=3.0), y)
    found = train(part, cv=3)
    board = found.leaderboard
    assert (board.n_fit, board.n_unlabelled) == (88, 2)
    assert "2 without a label left out" in str(board)
    assert len(found.train_sha256) == 88
    assert not found.trained_on(part.sha256)[[0, 89]].any()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([""] * 12, "None of the 12 rows has a label"),
        (["ant"] * 12, "All 12 labelled rows have the one class 'ant'"),
        ([*"abcdefghijkl"], "No class has two images of different content.*'a' has 1 image"),
    ],
)
def test_labels_that_cannot_be_trained_on(labels: list[str], message: str, tmp_path: Path) -> None:
    bad = make_store(tmp_path / "bad.h5", np.zeros((12, 4), np.float32), labels)
    with pytest.raises(TrainingError, match=message):
        train(bad)


@pytest.mark.parametrize("options", [{"memory": 0}, {"memory": -5}, {"n_jobs": 0}])
def test_impossible_amounts_are_refused(store: FeatureStore, options: dict[str, int]) -> None:
    with pytest.raises(TrainingError, match=next(iter(options))):
        train(store, **options)  # type: ignore[arg-type]


def test_unknown_heads_get_near_names(store: FeatureStore) -> None:
    with pytest.raises(TrainingError, match=r"no head 'forrest'\. Did you mean forest\?"):
        train(store, head="forrest")


def test_layers_are_chosen_by_name(folder: Path) -> None:
    X = {POOL: np.zeros((90, 4), np.float32), OTHER: clusters(LABELS, d=6)}
    two = make_store(folder / "two.h5", X, LABELS)
    both, one = train(two, cv=2), train(two, layers="features", cv=2)
    assert [column.tap for column in both.columns] == [POOL, OTHER]
    assert both.n_features == 10
    assert [(column.tap, column.width) for column in one.columns] == [(OTHER, 6)]
    assert one.fingerprints[0].taps == (OTHER,)
    assert one.predict_proba_of(two).shape == (90, 3)
    with pytest.raises(MissingFeatures, match="avgpool"):
        train(two, layers="avgpol")


def test_maps_are_flattened(folder: Path) -> None:
    X = clusters(LABELS, d=12).reshape(90, 3, 2, 2)
    maps = make_store(folder / "maps.h5", {"layer4:output:map": X}, LABELS)
    assert train(maps, cv=2).n_features == 12


def test_views_are_trained_on_and_averaged(folder: Path) -> None:
    X = clusters(LABELS, spread=4.0, views=5)
    views = make_store(folder / "views.h5", X, LABELS, views=5)
    first = make_store(folder / "first.h5", X[:, 0], LABELS)
    predictor = train(views, cv=3)
    assert predictor.metrics["out_of_fold"]["images"] == 90
    out_of_fold = predictor.metrics["out_of_fold"]["accuracy"]
    assert out_of_fold > train(first, cv=3).metrics["out_of_fold"]["accuracy"] + 0.05
    scores = np.stack([np.log(predictor.predict_proba(X[:, v])) for v in range(5)])
    mean = np.exp(scores.mean(axis=0))
    mean /= mean.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predictor.predict_proba_of(views), mean, atol=1e-5)


def test_float16_features_are_trained_on_as_float32(folder: Path) -> None:
    X = clusters(LABELS, spread=3.0).astype(np.float16)
    half = make_store(folder / "half.h5", X, LABELS, store_dtype="float16")
    full = make_store(folder / "full.h5", X.astype(np.float32), LABELS)
    one, other = train(half, cv=3), train(full, cv=3)
    np.testing.assert_array_equal(one.predict_proba_of(half), other.predict_proba_of(full))
    # The storage type is no difference of origin.
    np.testing.assert_array_equal(one.predict_proba_of(half), one.predict_proba_of(full))


def test_scoring_decides(folder: Path) -> None:
    y = ["ant"] * 80 + ["bee"] * 10
    uneven = make_store(folder / "uneven.h5", clusters(y, d=3, spread=4.0), y)
    board = train(
        uneven, head=["svm"], scoring="balanced_accuracy", class_weight="balanced"
    ).leaderboard
    assert board.scoring == "balanced_accuracy"
    assert "CV balanced_accuracy" in str(board)
    # One figure under one name: that of all folds' images, not the mean over the folds.
    apart = np.r_[np.full(80, 0.0), np.full(10, 3.0)] + np.random.default_rng(0).normal(size=90)
    store = make_store(folder / "f1.h5", apart[:, None].astype(np.float32), y)
    f1 = train(store, head=["ridge"], scoring="f1_macro").leaderboard
    pooled = f1[0].cv.macro_f1
    assert f"{pooled:.4f}" != f"{f1[0].cv_score:.4f}"
    assert str(f1).splitlines()[1].split()[:2] == ["ridge", f"{pooled:.4f}"]
    assert re.search(r"\(treatment \w+, alpha [\d.]{1,6}\)", str(f1))
    plain = train(uneven, head=["svm"]).leaderboard
    assert board[0].cv.balanced_accuracy > plain[0].cv.balanced_accuracy


@pytest.mark.parametrize(
    "scoring", ["roc_auc", make_scorer(accuracy_score, greater_is_better=False)]
)
def test_a_corrected_accuracy_is_of_what_the_scoring_chose(folder: Path, scoring: Any) -> None:
    X, y = make_classification(
        800, 12, n_informative=4, weights=[0.916], class_sep=0.7, random_state=3
    )
    names = np.array(["no", "yes"])[y[:500]].tolist()
    rare = make_store(folder / "rare.h5", X[:500].astype(np.float32), names)
    board = train(
        rare, head=["ridge", "knn"], scoring=scoring, class_weight="balanced", progress=False
    ).leaderboard
    found = [(row.cv.accuracy, row.cv_corrected) for row in board]
    for plain, corrected in (*found, (board[0].cv.accuracy, board.best_corrected)):
        assert corrected.low < plain < corrected.high
    assert "ridge: " in str(board) and "not the most probable class" in str(board)


def test_no_accuracy_is_corrected_where_one_score_of_all_images_chose(folder: Path) -> None:
    splits = (["train"] * 3 + ["val"] * 3) * 15
    one = make_store(folder / "one.h5", clusters(LABELS, spread=3.0), LABELS, splits=splits)
    predictor = train(one, scoring="f1_macro", progress=False)
    predictor.save(folder / "one.featcache")
    board = Predictor.load(folder / "one.featcache").leaderboard
    assert board.best_corrected is None and board[0].cv_corrected is None
    assert "corrected" not in board.to_text().replace("is corrected for the choice", "")
    assert "no accuracy is corrected for the choice: " in str(board)
    values = json.loads(board.to_json())
    assert values["best_corrected"] is None and values["rows"][0]["cv_accuracy_corrected"] is None
    assert board == predictor.leaderboard
    assert train(one, progress=False).leaderboard.best_corrected is not None


@pytest.mark.parametrize("scoring", ["accuracy", "f1_macro"])
def test_a_class_that_judges_nowhere_is_noted(scoring: str, folder: Path) -> None:
    splits = ["val" if i % 6 < 2 else "train" for i in range(90)]  # of "ant" and "bee" alone
    part = make_store(folder / f"{scoring}.h5", clusters(LABELS, spread=3.0), LABELS, splits=splits)
    board = train(part, head="ridge", scoring=scoring, progress=False).leaderboard
    assert "no validation image is of 'cod': the scores tell nothing of such" in str(board)
    two = part.select((part.labels != "cod") & (part.splits == "val"))
    curve = learning_curve(part.select(part.splits == "train"), two, sizes=[40], head="ridge")
    assert "no image to score on is of 'cod': " in str(curve)


# --- larger than memory ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "views"),
    [("linear", 1), ("linear", 3), ("svm", 1), ("ridge", 1)],
)
def test_features_that_do_not_fit_are_read_in_blocks(folder: Path, head: str, views: int) -> None:
    X = clusters(LABELS, d=64, spread=6.0, views=views)
    wide = make_store(folder / f"wide-{head}{views}.h5", X, LABELS, views=views)
    size = X.nbytes
    one, other = (train(wide, head=head, cv=3, memory=memory) for memory in (100 * size, 2 * size))
    assert one.params == other.params
    scores = [found.leaderboard[0].cv.accuracy for found in (one, other)]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)
    np.testing.assert_allclose(one.predict_proba_of(wide), other.predict_proba_of(wide), atol=0.02)


@pytest.mark.parametrize("head", ["rbf-svm", "forest", "boosting", "knn", "mlp"])
def test_heads_that_cannot_read_blocks_take_what_fits_and_say_so(folder: Path, head: str) -> None:
    X = clusters(LABELS, d=64, spread=6.0)
    wide = make_store(folder / f"wide-{head}.h5", X, LABELS)
    found = train(wide, head=head, cv=3, memory=2 * X.nbytes)
    said = rf"{head} was trained on [46]\d of 90 images, a random part of each class\."
    assert re.search(said, str(found.leaderboard))
    assert 43 <= found.metrics["out_of_fold"]["images"] < 70
    whole = train(wide, head=head, cv=3).leaderboard
    assert whole[0].notes == ()
    assert found.leaderboard[0].cv.accuracy == pytest.approx(whole[0].cv.accuracy, abs=0.2)


@pytest.mark.parametrize("memory", [None, 20_000])
def test_a_head_that_does_not_compute_what_was_cross_validated_is_not_saved(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int | None
) -> None:
    def broken(self: LinearHead, rows: TrainingRows, params: object) -> list[Step]:
        return [*fit(self, rows, params), Matrix(-np.eye(3), np.zeros(3))]

    fit = LinearHead.fit
    monkeypatch.setattr(LinearHead, "fit", broken)
    with pytest.raises(TrainingError, match=r"labels 0\.\d+ of its own training images right"):
        train_files(store.paths, tmp_path / "p.featcache", head="linear", memory=memory)
    assert not list(tmp_path.iterdir())


def test_nested_needs_memory(folder: Path) -> None:
    wide = make_store(folder / "wide-nested.h5", clusters(LABELS, d=64), LABELS)
    with pytest.raises(TrainingError, match="nested"):
        train(wide, head="linear", nested=True, memory=90 * 64 * 4)


# --- several networks --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined(folder: Path) -> tuple[FeatureStore, FeatureStore]:
    """Return features of two networks for the same images; neither alone tells all classes."""
    X = clusters(LABELS, spread=2.0)
    one, other = X.copy(), X.copy()
    one[np.array(LABELS) != "ant"] = X[1]
    other[np.array(LABELS) != "bee"] = X[0]
    return (
        make_store(folder / "one.h5", one, LABELS),
        make_store(folder / "other.h5", other, LABELS, backbone="resnet50", state_sha256="cd" * 32),
    )


def test_joined_stores_beat_each_alone(joined: tuple[FeatureStore, FeatureStore]) -> None:
    both = FeatureStore.join(list(joined))
    predictor = train(both, cv=3)
    alone = [train(one, cv=3).metrics["out_of_fold"]["accuracy"] for one in joined]
    assert predictor.metrics["out_of_fold"]["accuracy"] > max(alone) + 0.1
    assert [one.backbone for one in predictor.fingerprints] == ["resnet18", "resnet50"]
    assert [(column.source, column.tap) for column in predictor.columns] == [(0, POOL), (1, POOL)]


def test_a_comparison_names_the_features_and_of_joined_stores_the_files(
    joined: tuple[FeatureStore, FeatureStore],
) -> None:
    one, both = train(joined[0], cv=3), train(FeatureStore.join(list(joined)), cv=3)
    assert f"\nfeatures: {POOL} (12 columns)" in str(one.leaderboard)
    named = f"resnet18/{POOL} of one.h5 + resnet50/{POOL} of other.h5 (24 columns)"
    assert f"\nfeatures: {named}" in str(both.leaderboard)
    assert both.leaderboard.to_dict()["rows"][0]["features"] == named


def test_joined_stores_may_come_in_another_order(
    joined: tuple[FeatureStore, FeatureStore],
) -> None:
    one, other = FeatureStore.join(list(joined)), FeatureStore.join(list(joined[::-1]))
    predictor = train(one, cv=3)
    np.testing.assert_array_equal(
        predictor.predict_proba_of(one), predictor.predict_proba_of(other)
    )


def test_a_predictor_of_two_networks_refuses_the_features_of_one(
    joined: tuple[FeatureStore, FeatureStore],
) -> None:
    predictor = train(FeatureStore.join(list(joined)), cv=3)
    with pytest.raises(StoreError, match=r"needs features of 2 networks, .*FeatureStore\.join"):
        evaluate(predictor, joined[0])


def test_one_network_of_a_join_can_be_used_alone(
    joined: tuple[FeatureStore, FeatureStore],
) -> None:
    both = FeatureStore.join(list(joined))
    predictor = train(both, layers=[f"resnet50/{POOL}"], cv=3)
    assert [one.backbone for one in predictor.fingerprints] == ["resnet50"]
    np.testing.assert_array_equal(
        predictor.predict_proba_of(both), predictor.predict_proba_of(joined[1])
    )


# --- the leaderboard ---------------------------------------------------------------------------


def test_leaderboard_as_text_csv_json_and_html(board: Leaderboard) -> None:
    text = str(board)
    assert text.splitlines()[0].split()[:3] == ["head", "CV", "accuracy"]
    assert "held-out accuracy" in text
    assert f"best by cross-validation: {board[0].head}" in text
    assert f"{board.n_fit} images to train on, 3 folds, {board.n_test} held out" in text

    lines = list(csv.DictReader(io.StringIO(board.to_csv())))
    assert [line["head"] for line in lines] == [row.head for row in board]
    assert float(lines[0]["cv_accuracy_low"]) == board[0].cv.accuracy.interval[0]
    assert json.loads(lines[0]["params"]) == board[0].params

    values = json.loads(board.to_json())
    assert Leaderboard.from_dict(values) == board
    assert board._repr_html_().count("<tr>") == 4  # the header and the baseline among them


def test_html_is_escaped(board: Leaderboard) -> None:
    values = board.to_dict()
    values["rows"][0]["head"] = "<script>"
    assert "<script>" not in Leaderboard.from_dict(values)._repr_html_()


@pytest.mark.parametrize("change", [{"rows": 3}, {"rows": [{}]}, {"rows": None}, {"scoring": None}])
def test_a_damaged_leaderboard_is_refused(board: Leaderboard, change: dict[str, object]) -> None:
    values = board.to_dict() | change
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(PredictorError, match="leaderboard"):
        Leaderboard.from_dict(values)


# --- study -------------------------------------------------------------------------------------


def test_a_study_saves_the_best_and_runs_once(store: FeatureStore, tmp_path: Path) -> None:
    target = tmp_path / "p.featcache"
    options = {"head": ["svm"], "cv": 3}
    first = train_files(store.paths, target, **options)  # type: ignore[arg-type]
    assert not first.up_to_date
    assert f"saved: {target}" in first.to_text()
    content = target.read_bytes()

    again = train_files(store.paths, target, **options)  # type: ignore[arg-type]
    assert again.up_to_date
    assert "nothing to do" in again.to_text()
    assert again.leaderboard == first.leaderboard
    assert target.read_bytes() == content
    values = json.loads(json.dumps(again.to_dict()))
    assert values["up_to_date"] is True
    (row,) = values["leaderboard"]["rows"]
    tried = row["candidates"]
    assert len(tried) > 5 and all(len(one["fold_scores"]) == 3 for one in tried)
    chosen = [one for one in tried if one["params"] == row["params"]]
    assert max(one["score"] for one in tried) == chosen[0]["score"] == row["cv_score"]
    assert all(one["seconds"] > 0 for one in tried)

    other = train_files(store.paths, target, **options | {"random_state": 1})  # type: ignore[arg-type]
    assert not other.up_to_date
    assert other.leaderboard != first.leaderboard


def test_another_scikit_learn_makes_a_study_run_again(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "p.featcache"
    train_files(store.paths, target, head=["ridge"], cv=3)
    monkeypatch.setattr("featcache.study.run.version", lambda package: "99.0")
    assert not train_files(store.paths, target, head=["ridge"], cv=3).up_to_date


def test_other_labels_make_a_study_run_again(tmp_path: Path) -> None:
    target = tmp_path / "p.featcache"
    X = clusters(LABELS, spread=3.0)
    for labels in (LABELS, [*LABELS[:-1], "ant"]):
        path = tmp_path / "a.h5"
        path.unlink(missing_ok=True)
        make_store(path, X, labels)
        assert not train_files([path], target, head=["linear"], cv=3).up_to_date


def test_a_study_holds_out_a_quarter_or_what_the_column_says(
    store: FeatureStore, tmp_path: Path
) -> None:
    found = train_files(store.paths, tmp_path / "p.featcache", head=["linear"], cv=3)
    assert found.leaderboard.n_test in (22, 23)
    splits = ["train"] * 80 + ["test"] * 10
    split = make_store(tmp_path / "b.h5", clusters(LABELS), LABELS, splits=splits)
    by_column = train_files(split.paths, tmp_path / "q.featcache", head=["linear"], cv=3)
    assert (by_column.leaderboard.n_fit, by_column.leaderboard.n_test) == (80, 10)
    by_share = train_files(
        split.paths, tmp_path / "r.featcache", head=["linear"], cv=3, test_size=0.5
    )
    assert by_share.leaderboard.n_test == 45


def test_a_study_joins_stores(joined: tuple[FeatureStore, FeatureStore], tmp_path: Path) -> None:
    paths = [one.paths[0] for one in joined]
    found = train_files(paths, tmp_path / "p.featcache", head=["linear"], cv=3)
    assert len(found.predictor.fingerprints) == 2
    assert Predictor.load(tmp_path / "p.featcache").n_features == 24


def test_a_study_never_replaces_another_file(store: FeatureStore, tmp_path: Path) -> None:
    target = tmp_path / "thesis.zip"
    target.write_bytes(b"precious")
    with pytest.raises(OutputError, match="is not a featcache predictor"):
        train_files(store.paths, target, head=["linear"])
    assert target.read_bytes() == b"precious"
    with pytest.raises(OutputError, match="no folder"):
        train_files(store.paths, tmp_path / "nowhere" / "p.featcache", head=["linear"])


def test_a_damaged_predictor_is_made_again(store: FeatureStore, tmp_path: Path) -> None:
    target = tmp_path / "p.featcache"
    train_files(store.paths, target, head=["linear"], cv=3)
    content = bytearray(target.read_bytes())
    position = content.find(b"schema.json") + 400
    content[position : position + 4] = b"####"
    target.write_bytes(content)
    assert not train_files(store.paths, target, head=["linear"], cv=3).up_to_date
    assert Predictor.load(target).head == "linear"


# --- the demo ----------------------------------------------------------------------------------


@pytest.mark.campaign
def test_the_demo_reaches_what_is_promised(elpv_root: Path, tmp_path: Path) -> None:
    # 0.85 out of fold on the training part of a 25 % hold-out, by one small network, untuned.
    from featcache import Backbone, extract
    from pipelines.demo import demo_images

    backbone = Backbone("mobilenet_v2", weights="IMAGENET1K_V1")
    store = extract(demo_images(tmp_path), backbone, tmp_path / "elpv.h5", progress=False)
    fit, test = store.split(0.25)
    best = train(fit, test, head=["linear", "rbf-svm"]).leaderboard[0]
    assert (len(fit), len(test)) == (1968, 656)
    assert best.cv.accuracy >= 0.85
    assert best.held_out is not None
    assert best.held_out.accuracy >= 0.82


# --- rare classes ------------------------------------------------------------------------------


def test_five_images_of_each_class_need_no_flag(tmp_path: Path) -> None:
    y = ["ant", "bee", "cod"] * 5
    make_store(tmp_path / "small.h5", clusters(y), y)
    board = train_files(tmp_path / "small.h5", tmp_path / "p", head="ridge").leaderboard
    assert (board.folds, board.n_fit, board.n_test) == ("4 folds", 12, 3)
    assert "4 folds and not 5: no class has more images" in board.notes


def test_a_rare_class_is_in_fewer_folds_and_a_single_image_is_not_tested(tmp_path: Path) -> None:
    y = ["ant"] * 20 + ["bee"] * 20 + ["cod"] * 3 + ["dab"]
    store = make_store(tmp_path / "rare.h5", clusters(y), y)
    fit, test = store.split()
    assert "dab" in fit.labels and "dab" not in test.labels
    predictor = train(store, head=["ridge", "knn", "svm", "linear", "rbf-svm"], nested=True)
    board = predictor.leaderboard
    assert predictor.classes == ("ant", "bee", "cod", "dab")
    assert board.folds == "5 nested folds"
    assert "1 class is in fewer than 5 folds, having fewer images: 'cod' (3)" in board.notes
    assert any("no validation image is of 'dab'" in note for note in board.notes)
    assert board[0].cv.images == 43
    said = train(fit, test, head="forest").leaderboard.notes
    assert "no held-out image is of 'dab': the accuracies tell nothing of such" in said


def test_small_classes_are_left_out_and_listed(tmp_path: Path) -> None:
    y = ["ant"] * 8 + ["bee"] * 8 + ["cod"] * 4 + ["dab"]
    groups = [str(i % 4) for i in range(16)] + ["5"] * 5
    path = tmp_path / "rare.h5"
    store = make_store(path, clusters(y), y, groups=groups)
    saved = train_files(path, tmp_path / "p", head="ridge", cv=2, min_images=5)
    assert saved.predictor.classes == ("ant", "bee") and len(saved.predictor.train_sha256) == 12
    note = "2 classes of fewer than 5 images are left out: 'cod' (4), 'dab' (1)"
    assert saved.leaderboard.notes[0] == note
    board = train(store, head="ridge", cv=2, min_images=2, group=True).leaderboard
    of = "2 classes of fewer than 2 groups are left out: 'cod' (1), 'dab' (1)"
    assert board.notes[0] == of
    with pytest.raises(TrainingError, match=r"leaves 0 of 4 classes.*The largest: 8 images"):
        train(store, min_images=9)


# --- progress ----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [train, learning_curve])
@pytest.mark.parametrize(
    ("progress", "terminal"), [(None, True), (None, False), (True, False), (False, True)]
)
def test_progress_is_shown_on_a_terminal_or_as_asked(
    store: FeatureStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., object],
    progress: bool | None,
    terminal: bool,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    options = {"sizes": [60]} if function is learning_curve else {}
    options |= {} if progress is None else {"progress": progress}
    function(store, head=["knn"], cv=2, **options)
    captured = capsys.readouterr()
    assert ("knn" in captured.err) is (terminal if progress is None else progress)
    assert captured.out == ""


def test_the_bar_moves_with_the_fits_of_nested_folds_too(
    store: FeatureStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fits(**options: bool) -> int:
        moved: list[int] = []
        monkeypatch.setattr("tqdm.tqdm.update", lambda bar, n=1: moved.append(n))
        train(store, head="ridge", cv=3, progress=True, **options)
        return sum(moved)

    assert fits(nested=True) > 3 * fits()
    assert "ridge (head 1 of 1): " in capsys.readouterr().err


def test_the_study_shows_progress_on_a_terminal(
    store: FeatureStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train_files(store.paths, tmp_path / "a.featcache", head=["knn"], cv=2)
    assert "knn" in capsys.readouterr().err


def test_balanced_weights_are_no_reason_to_refuse_a_head(tmp_path: Path) -> None:
    from sklearn.datasets import make_classification

    X, codes = make_classification(
        800, 12, n_informative=4, weights=[0.916], class_sep=0.7, random_state=3
    )
    y = ["yes" if code else "no" for code in codes[:500]]
    store = make_store(tmp_path / "s.h5", X[:500].astype(np.float32), y)
    fit, _ = store.split(0.25, random_state=0)
    given = {"head": "linear", "class_weight": "balanced", "progress": False}
    board, named = (
        train(fit, scoring=one, **given).leaderboard for one in (None, "balanced_accuracy")
    )
    assert board is not None and named is not None
    assert board.scoring == board.to_dict()["scoring"] == "balanced_accuracy"
    assert "best by cross-validated balanced_accuracy: linear" in board.to_text()
    assert board[0].candidates[0]["fold_scores"] == named[0].candidates[0]["fold_scores"]
    assert board[0].params == named[0].params and board[0].cv.balanced_accuracy > 0.7
    named = train(fit, scoring="accuracy", **given).leaderboard
    assert named is not None and named.scoring == "accuracy"
    assert board[0].cv.balanced_accuracy >= named[0].cv.balanced_accuracy
    assert train(fit, head="linear", progress=False).leaderboard.scoring == "accuracy"
