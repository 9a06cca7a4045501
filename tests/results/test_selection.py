"""Differences of predictions, image by image."""

from __future__ import annotations

import numpy as np
import pytest

from featcache.results.selection import paired_differences

Y = np.arange(200) % 4


def wrong(*images: int) -> np.ndarray:
    """Return predictions that are right but for some images."""
    said = Y.copy()
    said[list(images)] = (said[list(images)] + 1) % 4
    return said


def test_a_difference_is_of_the_images_that_only_one_has_right() -> None:
    few, same, many = wrong(0, 1), wrong(0, 1), wrong(*range(0, 80, 2))
    best, twin, worse = paired_differences(Y, [few, same, many])
    assert best == 0 and best.interval == (0, 0)
    assert twin == 0 and twin.low < 0 < twin.high < 0.05  # the next image may tell them apart
    assert worse == pytest.approx(-38 / 200) and worse.low < worse < worse.high < 0


def test_images_that_one_did_not_score_are_left_out() -> None:
    part = np.where(np.arange(200) < 100, wrong(*range(10)), -1)
    _, difference = paired_differences(Y, [wrong(0), part])
    assert difference == pytest.approx(-9 / 100)


def test_balanced_differences_weigh_classes_alike() -> None:
    y = np.repeat([0, 1], [180, 20])
    said = y.copy()
    said[-10:] = 0
    assert paired_differences(y, [y, said], balanced=True)[1] == pytest.approx(-0.25)


def test_groups_are_drawn_as_a_whole() -> None:
    lucky = wrong(*range(20, 40))  # all of one group
    of = np.arange(200) // 20
    alone, grouped = (paired_differences(Y, [Y, lucky], one)[1] for one in (None, of))
    assert alone.high < 0 < grouped.high
    assert paired_differences(Y, [Y, lucky], of // 3)[1].low is None  # four groups


@pytest.mark.parametrize("groups", [None, 10])
def test_intervals_hold_0_at_once_where_eight_are_equally_good(groups: int | None) -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(40):
        y, of = np.zeros(150, np.int64), None if groups is None else rng.integers(0, groups, 150)
        said = (rng.normal(size=(8, 150)) + rng.normal(size=150) > 1.5).astype(np.int64)
        ranked = sorted(said, key=np.count_nonzero)  # the fewest mistakes first
        held += all(one.low <= 0 <= one.high for one in paired_differences(y, ranked, of))
    assert held >= 36
