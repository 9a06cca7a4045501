"""Intervals cover what they say, on simulated predictions whose true figures are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from featcache.results.evaluation import Evaluation
from featcache.results.intervals import Score
from featcache.results.selection import corrected_accuracy


def judged(
    y: np.ndarray, guess: np.ndarray, k: int, groups: np.ndarray | None = None
) -> Evaluation:
    names = tuple(f"class {i}" for i in range(k))
    return Evaluation(np.arange(len(y)).astype(str), y, np.eye(k)[guess], names, groups)


def covers(score: Score, truth: float) -> bool:
    return score.low <= truth <= score.high


def guessed(rng: np.random.Generator, y: np.ndarray, share: np.ndarray, k: int) -> np.ndarray:
    """Return right guesses of each image with a probability, and otherwise another class."""
    return np.where(rng.random(len(y)) < share, y, (y + rng.integers(1, k, len(y))) % k)


@pytest.mark.parametrize(
    ("counts", "recall", "least"),
    [
        ([15, 15], [0.9, 0.9], 0.92),
        ([500, 500], [0.97, 0.97], 0.92),
        ([20] * 10, [0.8] * 10, 0.92),
        ([4] * 50, [0.6] * 50, 0.92),
    ],
)
def test_intervals_cover_the_truth(counts: list[int], recall: list[float], least: float) -> None:
    rng, k = np.random.default_rng(0), len(counts)
    y = np.repeat(np.arange(k), counts)
    truth = recall[0]  # of all three figures, as all classes are alike
    seen = []
    for _ in range(200):
        got = judged(y, guessed(rng, y, np.array(recall)[y], k), k)
        scores = got.accuracy, got.balanced_accuracy, got.macro_f1
        seen.append([covers(one, truth) for one in scores])
    assert np.mean(seen, axis=0).min() >= least


def test_a_class_of_two_images_is_known_no_better_than_two_images_tell() -> None:
    y = np.repeat([0, 1], [998, 2])
    right = judged(y, y, 2)
    assert right.balanced_accuracy.low < 0.7 < 0.99 < right.accuracy.low
    assert "no image is wrong: the intervals are what 1,000 images can show" in str(right)
    rng, recall = np.random.default_rng(0), np.array([1.0, 0.8])
    found = [judged(y, guessed(rng, y, recall[y], 2), 2).balanced_accuracy for _ in range(300)]
    assert np.mean([covers(one, 0.9) for one in found]) >= 0.9


@pytest.mark.parametrize(
    ("counts", "recall"),
    [([998, 2], [0.99, 0.8]), ([200, 4], [0.99, 0.9]), ([200, 10], [0.99, 0.9])],
)
def test_a_mistake_in_a_frequent_class_makes_no_rare_one_certain(
    counts: list[int], recall: list[float]
) -> None:
    y, rng, share = np.repeat([0, 1], counts), np.random.default_rng(0), np.array(recall)
    found = [judged(y, guessed(rng, y, share[y], 2), 2) for _ in range(300)]
    assert np.mean([covers(one.balanced_accuracy, share.mean()) for one in found]) >= 0.92
    # F1 of a third class, whose images and predictions are its own, is as little known.
    three = np.append(y, [2, 2])
    macro = judged(three, np.append(1 - y[:1], three[1:]), 3).macro_f1
    assert macro.low < 0.9 < macro < macro.high


def test_many_small_classes_that_are_all_right_keep_a_narrow_interval() -> None:
    y = np.repeat(np.arange(100), 5)
    low, high = judged(y, y, 100).balanced_accuracy.interval
    assert 0.945 < low < 0.97 and high == 1.0


@pytest.mark.parametrize("groups", [5, 10])
@pytest.mark.parametrize(("mean", "spread"), [(0.5, 2.0), (0.9, 10.0), (0.95, 10.0)])
def test_intervals_over_groups_cover_the_truth(groups: int, mean: float, spread: float) -> None:
    rng = np.random.default_rng(groups)
    found = []
    for _ in range(200):
        sizes = rng.integers(5, 60, groups)
        of = np.repeat(np.arange(groups), sizes)
        share = rng.beta(mean * spread, (1 - mean) * spread, groups)[of]
        y = rng.integers(0, 2, len(of))
        found.append(judged(y, guessed(rng, y, share, 2), 2, of).accuracy)
    assert np.mean([covers(one, mean) for one in found]) >= 0.9


@pytest.mark.parametrize(("groups", "recall"), [((30, 2), (0.95, 0.9)), ((20, 3), (0.97, 0.8))])
def test_a_class_of_few_groups_is_known_no_better_than_they_tell(
    groups: tuple[int, int], recall: tuple[float, float]
) -> None:
    rng, found = np.random.default_rng(1), []
    for _ in range(100):
        of = np.repeat(np.arange(sum(groups)), 10)
        y = np.repeat([0, 1], groups)[of]
        each = np.array(recall)[np.repeat([0, 1], groups)]
        share = rng.beta(4 * each, 4 * (1 - each))[of]
        found.append(judged(y, guessed(rng, y, share, 2), 2, of).balanced_accuracy)
    assert np.mean([covers(one, np.mean(recall)) for one in found]) >= 0.9


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_few_groups_give_no_interval(groups: int) -> None:
    y = np.arange(40) % 2
    got = judged(y, np.where(np.arange(40) < 4, 1 - y, y), 2, np.arange(40) % groups)
    assert str(got.accuracy) == "0.900" and got.accuracy.interval == (None, None)
    assert "there are no intervals, because the images are of" in str(got)
    values = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert values["accuracy_interval"] == [None, None]
    assert "from 5 on" in values["notes"][-1]


def test_the_best_of_many_settings_of_chance_is_corrected_to_chance() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 50)
    found, plain = [], []
    for _ in range(100):
        alike = rng.random(100)
        share = np.where(rng.random((30, 100)) < 0.5, alike, rng.random((30, 100)))
        predicted = [np.where(one < 0.5, y, 1 - y).astype(np.int32) for one in share]
        found.append(corrected_accuracy(y, predicted))
        plain.append(max((one == y).mean() for one in predicted))
    assert np.mean(plain) > 0.57
    assert np.mean(found) == pytest.approx(0.5, abs=0.02)
    assert np.mean([covers(one, 0.5) for one in found]) >= 0.92


def test_settings_that_agree_are_left_as_they_are() -> None:
    y = np.arange(200) % 4
    predicted = np.where(np.arange(200) % 10 == 0, (y + 1) % 4, y).astype(np.int32)
    groups = np.arange(200) // 50  # four groups
    got = corrected_accuracy(y, [predicted] * 3, groups)
    assert got == pytest.approx(0.9) and got.interval == (None, None)
    assert corrected_accuracy(y, [predicted]) == pytest.approx(0.9, abs=0.005)


def test_settings_that_are_all_right_are_not_certain() -> None:
    y = np.arange(60) % 2
    got = corrected_accuracy(y, [y.astype(np.int32)] * 2)
    assert got == 1 and got.interval == pytest.approx((0.940, 1.0), abs=1e-3)


def test_a_correction_over_groups_is_never_surer_than_the_score_itself() -> None:
    y, groups = np.arange(100) % 2, np.arange(100) // 10
    right, wrong = y.astype(np.int32), np.where(np.arange(100) < 5, 1 - y, y).astype(np.int32)
    for predicted in ([right, wrong], [wrong, wrong], [wrong, right, right]):
        got = corrected_accuracy(y, predicted, groups)
        best = max(predicted, key=lambda one: (one == y).mean())
        plain = judged(y, best, 2, groups).accuracy
        assert got - got.low >= plain - plain.low - 1e-9
        assert got.low < 0.95
