from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics

from featcache import train, train_files
from featcache.errors import FingerprintMismatch, PredictorError, TrainingError
from featcache.results.evaluation import Evaluation
from featcache.results.intervals import Score, wilson
from featcache.store.store import FeatureStore
from featcache.study.evaluate import evaluate
from tests.labelled import clusters, make_store

NAMES = ("ant", "bee", "cod", "dab")


def scores(n: int = 400, k: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return true classes of uneven frequency and probabilities that are right more than not."""
    rng = np.random.default_rng(seed)
    y = rng.choice(k, n, p=np.arange(1, k + 1) / np.arange(1, k + 1).sum())
    proba = rng.dirichlet(np.ones(k), n)
    proba[np.arange(n), y] += 0.6
    return y, proba / proba.sum(axis=1, keepdims=True)


def evaluation(y: np.ndarray, proba: np.ndarray, groups: np.ndarray | None = None) -> Evaluation:
    ids = np.array([f"{i:04d}.jpg" for i in range(len(y))])
    return Evaluation(ids, y, proba, NAMES[: proba.shape[1]], groups)


def test_figures_are_those_of_scikit_learn() -> None:
    y, proba = scores()
    got, guess = evaluation(y, proba), proba.argmax(axis=1)
    assert got.accuracy == pytest.approx(metrics.accuracy_score(y, guess))
    assert got.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(y, guess))
    assert got.macro_f1 == pytest.approx(metrics.f1_score(y, guess, average="macro"))
    assert got.log_loss == pytest.approx(metrics.log_loss(y, proba))
    assert got.confusion.tolist() == metrics.confusion_matrix(y, guess).tolist()
    assert got.top_k.keys() == {1, 2, 3}
    assert got.top_k[1] == pytest.approx(got.accuracy)
    assert got.top_k[2] == pytest.approx(metrics.top_k_accuracy_score(y, proba, k=2))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(y, guess)
    for i, one in enumerate(got.per_class):
        assert (one.label, one.support) == (NAMES[i], support[i])
        assert (one.precision, one.recall, one.f1) == pytest.approx(
            (precision[i], recall[i], f1[i])
        )


def test_calibration_error_is_the_mean_gap_of_fifteen_bins() -> None:
    y, proba = scores()
    top, right = proba.max(axis=1), proba.argmax(axis=1) == y
    gap = 0.0
    for low in np.arange(15) / 15:
        inside = (top > low) & (top <= low + 1 / 15)
        if inside.any():
            gap += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    got = evaluation(y, proba)
    assert got.ece == pytest.approx(gap)
    assert sum(one.count for one in got.calibration) == len(y)


def test_intervals_are_those_of_resampling_the_images() -> None:
    y, proba = scores(150, seed=1)  # a class without mistakes would be certain to resampling
    got, guess = evaluation(y, proba), proba.argmax(axis=1)
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(2000):
        rows = rng.integers(0, len(y), len(y))
        table = np.bincount(4 * y[rows] + guess[rows], minlength=16).reshape(4, 4)
        true, said = table.sum(axis=1), table.sum(axis=0)
        hits = table.diagonal()
        drawn.append([hits.sum() / len(y), (hits / true).mean(), (2 * hits / (true + said)).mean()])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    intervals = (got.accuracy.interval, got.balanced_accuracy.interval, got.macro_f1.interval)
    for i, interval in enumerate(intervals):
        assert interval == pytest.approx((low[i], high[i]), abs=0.015)


@pytest.mark.parametrize(("classes", "each"), [(200, 2), (100, 1), (30, 3), (2, 4)])
def test_intervals_hold_the_estimate_with_many_small_classes(classes: int, each: int) -> None:
    rng = np.random.default_rng(classes)
    for _ in range(5):
        y = np.repeat(np.arange(classes), each)
        guess = np.where(rng.random(len(y)) < 0.5, y, rng.integers(0, classes, len(y)))
        got = Evaluation(
            ids=np.arange(len(y)).astype(str),
            y_true=y,
            proba=np.eye(classes)[guess],
            classes=tuple(map(str, range(classes))),
        )
        for value, (low, high) in (
            (got.accuracy, got.accuracy.interval),
            (got.balanced_accuracy, got.balanced_accuracy.interval),
            (got.macro_f1, got.macro_f1.interval),
        ):
            assert 0 <= low <= value <= high <= 1
            # The estimate stands somewhere inside, not at an end that it was moved to.
            assert value in (0.0, 1.0) or low < value < high


def test_the_interval_of_macro_f1_covers_the_truth_with_many_small_classes() -> None:
    k, each, rng = 50, 4, np.random.default_rng(5)
    share = np.full((k, k), 0.4 / (k - 1))
    np.fill_diagonal(share, 0.6)
    truth = 0.6  # every class has this precision and recall
    covered = []
    for _ in range(20):
        y = rng.integers(0, k, k * each)
        guess = np.array([rng.choice(k, p=share[c]) for c in y])
        names = tuple(map(str, range(k)))
        got = Evaluation(np.arange(len(y)).astype(str), y, np.eye(k)[guess], names)
        low, high = got.macro_f1.interval
        covered.append(low <= truth <= high)
    assert np.mean(covered) >= 0.8


def test_intervals_do_not_change_from_call_to_call() -> None:
    y, proba = scores()
    assert evaluation(y, proba).accuracy.interval == evaluation(y, proba).accuracy.interval


def test_groups_are_resampled_as_a_whole() -> None:
    y, proba = scores(40)
    # Each image ten times over: 400 rows that carry what 40 images tell.
    groups = np.repeat(np.arange(40), 10).astype(str)
    many = evaluation(np.repeat(y, 10), np.repeat(proba, 10, axis=0))
    grouped = evaluation(np.repeat(y, 10), np.repeat(proba, 10, axis=0), groups)
    single = evaluation(y, proba)
    assert grouped.accuracy == many.accuracy

    def width(one: Evaluation) -> float:
        return one.accuracy.interval[1] - one.accuracy.interval[0]

    assert width(grouped) == pytest.approx(width(single), abs=0.03)
    assert width(many) < 0.5 * width(grouped)


def test_no_mistake_does_not_mean_certainty() -> None:
    y = np.arange(20) % 2
    got = evaluation(y, np.eye(2)[y])
    assert got.accuracy == 1.0
    assert got.accuracy.interval == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert got.mistakes == ()
    assert got.log_loss == 0.0
    assert "no mistakes" in str(got)
    wrong = evaluation(y, np.eye(2)[1 - y])
    assert wrong.accuracy.interval == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert np.isfinite(wrong.log_loss)


def test_a_score_is_a_number_that_keeps_its_interval() -> None:
    score = Score(0.87, 0.855, 0.885)
    assert score == 0.87
    assert (str(score), f"{score:.1f}", f"{score}") == ("0.870 [0.855, 0.885]", "0.9", str(score))
    for copied in (copy.copy(score), pickle.loads(pickle.dumps(score))):
        assert (copied, copied.interval) == (score, (0.855, 0.885))


def test_wilson_is_the_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_classes_that_do_not_occur_are_not_averaged_in() -> None:
    y = np.array([0, 0, 1, 1])
    proba = np.eye(4)[[0, 0, 1, 0]]
    got = evaluation(y, proba)
    assert got.balanced_accuracy == pytest.approx(0.75)
    assert got.macro_f1 == pytest.approx(metrics.f1_score(y, [0, 0, 1, 0], average="macro"))
    assert got.per_class[3].support == 0


def test_ties_are_ranked_in_the_order_of_the_classes() -> None:
    got = evaluation(np.array([0, 1]), np.array([[0.4, 0.4, 0.2], [0.4, 0.4, 0.2]]))
    assert [got.top_k_accuracy(k) for k in (1, 2, 3)] == [0.5, 1.0, 1.0]
    assert got.top_k_accuracy(1) == got.accuracy
    equal = evaluation(np.arange(4), np.full((4, 4), 0.25))
    assert [equal.top_k_accuracy(k) for k in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_label_that_was_decided_for_comes_first() -> None:
    proba = np.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
    ids, decided = np.array(["a.jpg", "b.jpg"]), np.array([2, 2])
    got = Evaluation(ids, np.array([0, 2]), proba, NAMES[:3], predicted=decided)
    assert got.accuracy == got.top_k_accuracy(1) == 0.5
    assert got.top_k_accuracy(2) == 1.0
    assert got.confidence.tolist() == [0.2, 0.5]
    assert got.mistakes[0].predicted == "cod" and got.mistakes[0].probability == 0.2
    assert "1 image has a label that is not the most probable class" in str(got)
    assert got.to_dict()["label_not_most_probable"] == 1
    assert "most probable" not in str(Evaluation(ids, np.array([0, 2]), proba, NAMES[:3]))


@pytest.mark.parametrize("k", [2, 4])
def test_brier_score_and_calibration_by_class(k: int) -> None:
    y, proba = scores(k=k)
    got = evaluation(y, proba)
    assert got.brier == pytest.approx(metrics.brier_score_loss(y, proba, labels=np.arange(k)))
    gaps = []
    for column in range(k):
        number = np.clip(np.ceil(proba[:, column] * 15) - 1, 0, 14)
        for one in range(15):
            own = number == one
            gaps.append(abs((proba[own, column] - (y[own] == column)).sum()))
    assert got.classwise_ece == pytest.approx(sum(gaps) / len(y) / k)
    assert got.to_dict()["brier"] == got.brier and f"by class {got.classwise_ece:.3f}" in str(got)


def test_mistakes_come_with_the_most_confident_first() -> None:
    y = np.array([0, 1, 1, 0])
    proba = np.array([[0.9, 0.1], [0.7, 0.3], [0.95, 0.05], [0.4, 0.6]])
    found = evaluation(y, proba).mistakes
    assert [(one.id, one.label, one.predicted) for one in found] == [
        ("0002.jpg", "bee", "ant"),
        ("0001.jpg", "bee", "ant"),
        ("0003.jpg", "ant", "bee"),
    ]
    assert found[0].probability == pytest.approx(0.95)


def test_text_and_json_say_the_same() -> None:
    y, proba = scores()
    got = evaluation(y, proba)
    low, high = got.accuracy.interval
    assert str(got).startswith(f"accuracy {got.accuracy:.3f} [{low:.3f}, {high:.3f}] on 400 images")
    assert f"{got.accuracy:.3f}" in repr(got)
    values = json.loads(json.dumps(got.to_dict()))
    assert values["accuracy"] == got.accuracy
    assert values["resampled"] == "images"
    assert len(values["per_class"]) == 4
    assert len(values["mistakes"]) == int((got.y_pred != y).sum())


def test_shapes_that_do_not_fit_are_refused() -> None:
    y, proba = scores(10)
    with pytest.raises(ValueError, match="do not fit"):
        Evaluation(np.array(["a"]), y, proba, NAMES)
    with pytest.raises(TrainingError, match="no labelled image"):
        Evaluation(np.array([]), y[:0], proba[:0], NAMES)


# --- evaluate ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels() -> list[str]:
    return ["ant", "bee", "cod"] * 30


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, labels: list[str]) -> FeatureStore:
    path = tmp_path_factory.mktemp("evaluation") / "a.h5"
    return make_store(path, clusters(labels, spread=2.0), labels)


def test_only_images_that_were_not_trained_on_are_scored(store: FeatureStore) -> None:
    fit, test = store.split(test_size=0.3)
    predictor = train(fit, cv=3)
    on_test, on_all = evaluate(predictor, test), evaluate(predictor, store)
    assert sorted(on_all.ids) == sorted(test.ids) == sorted(on_test.ids)
    assert on_all.accuracy == on_test.accuracy
    assert on_all.notes == (f"{len(fit)} images that it was trained on are left out",)
    with pytest.raises(TrainingError, match=r"None of the 63 images .* that it was trained on"):
        evaluate(predictor, fit)


def test_a_renamed_training_image_is_known_by_its_bytes(
    store: FeatureStore, labels: list[str], tmp_path: Path
) -> None:
    predictor = train(store.select(np.arange(60)), cv=3)
    X, _ = store.load()
    renamed = make_store(
        tmp_path / "b.h5",
        X[:70],
        labels[:70],
        ids=[f"copy/{i:04d}" for i in range(70)],
        hashes=store.sha256[:70],
    )
    assert sorted(evaluate(predictor, renamed).ids) == [f"copy/{i:04d}" for i in range(60, 70)]


def test_images_without_a_label_are_counted(
    store: FeatureStore, labels: list[str], tmp_path: Path
) -> None:
    predictor = train(store, cv=3)
    other = make_store(
        tmp_path / "b.h5",
        clusters(labels[:9], spread=2.0),
        ["ant", "", "bee"] * 3,
        ids=[f"new{i}" for i in range(9)],
    )
    found = evaluate(predictor, other)
    assert len(found) == 6
    assert found.notes == ("3 images without a label are left out",)
    few = evaluate(predictor, other.select(np.arange(3)))
    assert few.notes == ("1 image without a label is left out",)


def test_features_of_another_origin_are_refused_field_by_field(
    store: FeatureStore, labels: list[str], tmp_path: Path
) -> None:
    predictor = train(store, cv=3)
    other = make_store(
        tmp_path / "b.h5",
        clusters(labels),
        [label.upper() for label in labels],  # the origin is said first
        ids=[f"new{i:03d}" for i in range(90)],
        backbone="resnet50",
        preprocessing={"resize": 320},
    )
    with pytest.raises(FingerprintMismatch) as error:
        evaluate(predictor, other)
    message = str(error.value)
    assert "backbone: 'resnet18' (predictor), 'resnet50' (store)" in message
    assert "preprocessing.resize: 256 (predictor), 320 (store)" in message


def test_labels_that_the_predictor_does_not_know_are_refused(
    store: FeatureStore, labels: list[str], tmp_path: Path
) -> None:
    predictor = train(store, cv=3)
    other = make_store(
        tmp_path / "b.h5",
        clusters(labels[:9]),
        ["ant", "Bee", "cod"] * 3,
        ids=[f"new{i}" for i in range(9)],
    )
    with pytest.raises(
        PredictorError, match=r"3 images .* does not know \('Bee'\); it knows 'ant'"
    ):
        evaluate(predictor, other)


def test_groups_of_the_store_widen_the_interval(labels: list[str], tmp_path: Path) -> None:
    X = clusters(labels, spread=3.0)
    plain = make_store(tmp_path / "a.h5", X, labels)
    groups = [f"g{i // 15}" for i in range(90)]
    grouped = make_store(tmp_path / "b.h5", X, labels, groups=groups)
    predictor = train(plain.select(np.arange(0, 90, 2)), cv=3)
    one, other = evaluate(predictor, plain), evaluate(predictor, grouped)
    assert one.accuracy == other.accuracy
    assert other.to_dict()["resampled"] == "groups"
    assert one.accuracy.interval != other.accuracy.interval


def test_images_of_an_unknown_class_are_refused_left_out_or_wrong(tmp_path: Path) -> None:
    y = ["ant", "bee"] * 20
    store = make_store(tmp_path / "fit.h5", clusters(y), y)
    predictor = train(store, head="ridge", cv=2)
    labels = [*y[:10], "cow", "cow", ""]
    ids = [f"new{i}.jpg" for i in range(13)]
    X = np.concatenate([clusters(y)[:10], clusters(["a"] * 3, seed=1)])
    other = make_store(tmp_path / "other.h5", X, labels, ids=ids)
    with pytest.raises(PredictorError, match=r"2 images .* \('cow'\).* --unknown skip"):
        evaluate(predictor, other)
    skipped = evaluate(predictor, other, unknown="skip")
    assert len(skipped) == 10 and skipped.classes == ("ant", "bee")
    assert "2 images of cow are left out: the predictor was not trained on such" in skipped.notes
    wrong = evaluate(predictor, other, unknown="wrong")
    assert wrong.classes == ("ant", "bee", "cow") and len(wrong) == 12
    assert wrong.accuracy == pytest.approx(10 * skipped.accuracy / 12)
    assert (wrong.per_class[2].support, wrong.per_class[2].recall) == (2, 0)
    assert "2 images of cow count as wrong" in wrong.to_text()
    assert [one.label for one in wrong.mistakes].count("cow") == 2
    alone = other.select(np.array([10, 11]))
    with pytest.raises(TrainingError, match="2 images of cow are left out"):
        evaluate(predictor, alone, unknown="skip")


def test_without_a_test_size_all_images_are_trained_on_and_it_is_said(tmp_path: Path) -> None:
    y = ["ant", "bee"] * 20
    splits = ["train", "test"] * 10 + ["train"] * 20
    store = make_store(tmp_path / "a.h5", clusters(y), y, splits=splits)
    result = train_files(store.paths, tmp_path / "p", head="ridge", cv=2, test_size=0)
    assert result.leaderboard.n_fit == len(result.predictor.train_sha256) == 40
    assert "none held out" in result.to_text() and result.leaderboard.n_test == 0
    assert result.predictor.metrics["held_out"] is None
    with pytest.raises(TrainingError, match="40 images that it was trained on are left out"):
        evaluate(result.predictor, store)


def test_thresholds_of_two_classes_have_recall_and_precision() -> None:
    y, proba = scores(300, 2)
    got = evaluation(y, proba)
    assert got.to_dict()["positive"] == "bee"
    for row in got.thresholds:
        said = proba[:, 1] >= row["threshold"]
        assert row["recall"] == pytest.approx(metrics.recall_score(y, said))
        assert row["precision"] == pytest.approx(metrics.precision_score(y, said))
    assert "if bee (the second class) were said" in got.to_text()
    assert evaluation(*scores(60, 3)).thresholds == ()
    sure = evaluation(np.array([0, 0]), np.array([[1.0, 0.0]] * 2))
    assert sure.to_dict()["thresholds"][0] == {"threshold": 0.05, "recall": None, "precision": None}
