from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import TrainingError
from featcache.store.splitting import (
    folds,
    holdout,
    n_unlabelled,
    predefined,
    units,
    validation_fold,
)


def hashes(keys: list[int]) -> np.ndarray:
    """Return 32-byte hashes, equal where the keys are equal."""
    table = np.random.default_rng(7).integers(0, 256, (max(keys) + 1, 32), dtype=np.uint8)
    return table[keys]


def test_units_chain_groups_and_hashes() -> None:
    # 0 and 1 share a group, 1 and 3 share bytes, 4 has no group: {0, 1, 3}, {2}, {4}.
    unit = units(5, groups=["a", "a", "b", "c", ""], sha256=hashes([0, 1, 2, 1, 3]))
    assert unit.tolist() == [0, 0, 1, 0, 2]


def test_rows_without_a_group_are_their_own_group() -> None:
    assert units(3, groups=["", "", "x"]).tolist() == [0, 1, 2]


def test_folds_are_stratified_and_cover_every_row_once() -> None:
    y = np.repeat(["cat", "dog", "eel"], [50, 23, 11])
    made = folds(y, cv=5, random_state=3)
    assert sorted(np.concatenate([valid for _, valid in made])) == list(range(84))
    for train, valid in made:
        assert not set(train) & set(valid)
        assert len(train) + len(valid) == 84
        counts = [int((y[valid] == c).sum()) for c in ("cat", "dog", "eel")]
        assert counts[0] == 10
        assert counts[1] in (4, 5)
        assert counts[2] in (2, 3)
        assert sum(counts) in (16, 17)


def test_seed_decides_the_split() -> None:
    y = np.repeat(["a", "b"], 30)
    one, same, other = (holdout(y, random_state=s)[1].tolist() for s in (0, 0, 1))
    assert one == same
    assert one != other


def test_holdout_gives_each_class_its_share() -> None:
    y = np.repeat(["a", "b", "rare"], [400, 100, 3])
    fit, test = holdout(y, test_size=0.1)
    assert [int((y[test] == c).sum()) for c in ("a", "b", "rare")] == [40, 10, 1]
    assert len(fit) + len(test) == len(y)


def test_unstratified_holdout_ignores_classes() -> None:
    y = np.repeat(["a", "b"], [99, 1])
    fit, test = holdout(y, test_size=0.2, stratify=False)
    assert (len(fit), len(test)) == (80, 20)


def test_same_bytes_under_two_labels_stay_on_one_side() -> None:
    y = np.repeat(["a", "b"], 20)
    key = [*range(20), *range(20)]  # every image appears once as "a" and once as "b"
    fit, test = holdout(y, sha256=hashes(key), test_size=0.25)
    assert not {key[i] for i in fit} & {key[i] for i in test}
    for train, valid in folds(y, sha256=hashes(key), cv=4):
        assert not {key[i] for i in train} & {key[i] for i in valid}


@settings(max_examples=60)
@given(st.data())
def test_units_are_never_cut(data: st.DataObject) -> None:
    n = data.draw(st.integers(12, 60))
    y = np.array(data.draw(st.lists(st.sampled_from("ab"), min_size=n, max_size=n)))
    groups = data.draw(st.lists(st.sampled_from([*"uvwxyz", ""]), min_size=n, max_size=n))
    sha = hashes(data.draw(st.lists(st.integers(0, n), min_size=n, max_size=n)))
    unit = units(n, groups=groups, sha256=sha)
    try:
        parts = [*folds(y, groups=groups, sha256=sha, cv=3), holdout(y, groups=groups, sha256=sha)]
    except TrainingError:
        return
    for fit, valid in parts:
        assert not set(unit[fit]) & set(unit[valid])
        assert set(y[fit]) == {"a", "b"}
        assert sorted([*fit, *valid]) == list(range(n))


def test_grouped_folds_share_the_classes_evenly() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat([f"g{i}" for i in range(60)], rng.integers(2, 9, 60))
    of_group = {g: rng.choice(["a", "b"], p=[0.8, 0.2]) for g in set(groups)}
    y = np.array([of_group[g] for g in groups])
    share = (y == "b").mean()
    for _, valid in folds(y, groups=groups, cv=5):
        assert abs(len(valid) - len(y) / 5) < 12
        assert abs((y[valid] == "b").mean() - share) < 0.1


def divisions(y: np.ndarray, groups: np.ndarray) -> int:
    """Count the divisions of groups into two sides, both of which hold every class."""
    names, count = np.unique(groups), 0
    for sides in itertools.product([False, True], repeat=len(names)):
        tested = np.isin(groups, names[np.array(sides)])
        count += set(y[tested]) == set(y[~tested]) == set(y)
    return count


def test_a_hold_out_has_every_class_on_both_sides_wherever_a_division_of_the_groups_does() -> None:
    rng, kinds = np.random.default_rng(0), {"made": 0, "refused": 0}
    for case in range(1200):
        n_groups, k = int(rng.integers(3, 9)), int(rng.integers(2, 6))
        size = rng.integers(1, 12, n_groups)
        groups = np.repeat([f"g{i}" for i in range(n_groups)], size)
        mixes = rng.dirichlet(np.full(k, 0.4), n_groups)
        y = np.array([str(rng.choice(k, p=mixes[int(g[1:])])) for g in groups])
        if min(len(set(groups[y == name])) for name in set(y)) < 2 or len(set(y)) < 2:
            continue  # a class of one group is trained on alone
        share = float(rng.choice([0.1, 0.25, 0.5]))
        possible = divisions(y, groups)
        try:
            fit, test = holdout(y, groups=groups, test_size=share, random_state=case)
        except TrainingError:
            assert not possible, (case, y, groups)
            kinds["refused"] += 1
            continue
        assert set(y[fit]) == set(y[test]) == set(y), (case, possible)
        assert not set(groups[fit]) & set(groups[test])
        kinds["made"] += 1
    assert min(kinds.values()) >= 10


def test_folds_of_groups_train_on_every_class_wherever_they_can() -> None:
    # Class c is in the two largest groups alone, which the dealing puts into one fold.
    rng = np.random.default_rng(1)
    for case in range(200):
        groups = np.repeat(np.arange(12).astype(str), rng.integers(1, 12, 12))
        y = rng.choice(["a", "b"], len(groups))
        rare = rng.choice(12, 2, replace=False).astype(str)
        y[np.isin(groups, rare) & (rng.random(len(y)) < 0.5)] = "c"
        if any(len(set(groups[y == name])) < 2 for name in "abc"):
            continue
        for train, _ in folds(y, groups=groups, cv=2, random_state=case):
            assert set(y[train]) == {"a", "b", "c"}


def test_what_no_division_can_give_both_sides_is_said() -> None:
    # Three classes, each in two of three groups: two of the groups are on one side.
    y, groups = [*"aabbcc"], ["1", "2", "2", "3", "3", "1"]
    with pytest.raises(TrainingError, match="would be in one part alone"):
        holdout(y, groups=groups)


def test_unlabelled_rows_are_in_no_part() -> None:
    y = np.array(["a", "", "b"] * 10)
    assert n_unlabelled(y) == 10
    fit, test = holdout(y)
    assert "" not in set(y[fit]) | set(y[test])
    assert len(fit) + len(test) == 20
    assert sum(len(valid) for _, valid in folds(y, cv=2)) == 20


def test_a_class_of_fewer_units_than_folds_is_in_fewer_of_them() -> None:
    y = np.repeat(["common", "rare", "single"], [20, 3, 1])
    made = folds(y, cv=5)
    assert sorted((y[valid] == "rare").sum() for _, valid in made) == [0, 0, 1, 1, 1]
    for train, valid in made:
        assert "single" in y[train] and "single" not in y[valid]
        assert (y[valid] == "common").sum() == 4
    groups = [f"g{i % 10}" for i in range(20)] + ["one", "two", "two", "three"]
    assert sum(len(valid) for _, valid in folds(y[:24], groups=groups, cv=5)) == 23
    small = np.repeat(["a", "b"], [4, 3])
    assert [len(valid) for _, valid in folds(small, cv=5)] == [2, 2, 2, 1]


def test_what_groups_tie_to_a_class_of_one_group_is_trained_on_too() -> None:
    y, groups = [*"aaaabbbbcb"], [*"1234567899"]
    fit, test = holdout(y, groups=groups)
    assert {8, 9} <= {*fit.tolist()} and len(test) == 2


def test_copies_of_one_image_do_not_count_as_members() -> None:
    y = np.repeat(["a", "b"], [10, 6])
    key = [*range(10), *[20] * 6]
    assert all((y[valid] == "a").all() for _, valid in folds(y, sha256=hashes(key), cv=5))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (["a"] * 9, "one class 'a'"),
        ([""] * 9, "None of the 9 rows has a label"),
        (["b", "a"], "No class has two images of different content.*'a' has 1 image"),
    ],
)
def test_labels_that_cannot_be_split(y: list[str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        holdout(y)


@pytest.mark.parametrize("test_size", [0.0, 1.0, -0.2, 3])
def test_test_size_must_be_a_share(test_size: float) -> None:
    with pytest.raises(TrainingError, match="between 0 and 1"):
        holdout(["a", "b"] * 5, test_size=test_size)


def test_one_fold_is_refused() -> None:
    with pytest.raises(TrainingError, match="at least 2 folds"):
        folds(["a", "b"] * 5, cv=1)


def test_predefined_split_obeys_the_column() -> None:
    y = ["a", "b", "a", "b", "a", ""]
    fit, test = predefined(["Train", "val", "TEST", "test", "", "train"], y)
    assert fit.tolist() == [0, 1]
    assert test.tolist() == [2, 3]


def test_predefined_split_leaves_leaked_rows_out_of_training() -> None:
    splits, y = ["train", "train", "test", "test"], ["a", "b", "a", "b"]
    with pytest.warns(UserWarning, match="1 training images are byte for byte in the test"):
        fit, test = predefined(splits, y, sha256=hashes([0, 1, 0, 2]))
    assert fit.tolist() == [1]
    assert test.tolist() == [2, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predefined(splits, y, sha256=hashes([0, 1, 2, 3]))


def test_predefined_split_refuses_other_words_and_empty_sides() -> None:
    with pytest.raises(TrainingError, match="'fold3'; the words it may hold are train, val"):
        predefined(["train", "fold3"], ["a", "b"])
    with pytest.raises(TrainingError, match="no labelled row 'test'"):
        predefined(["train", "train"], ["a", "b"])


def test_validation_part_is_the_only_fold() -> None:
    made = validation_fold(["train", "val", "train", "test"], ["a", "b", "b", "a"])
    assert made is not None
    assert [part.tolist() for part in made[0]] == [[0, 2], [1]]
    assert validation_fold(["train", "test"], ["a", "b"]) is None
    assert validation_fold(None, ["a", "b"]) is None
