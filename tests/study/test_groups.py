"""Groups, split columns, hold-outs, nested folds and views: what is decided where two of them meet.

The table is in the docstring of `featcache.study.train`; each of its lines has a test here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import featcache as fc
from featcache.cli.main import main
from featcache.errors import TrainingError
from featcache.predictor.predictor import Predictor
from featcache.store.store import FeatureStore
from featcache.study.audit import audit
from featcache.study.evaluate import evaluate
from tests.labelled import clusters, make_store
from tests.stores import sha256

DROP = "drop-crossing-groups"


def draw(n_groups: int = 40, each: int = 6, seed: int = 0) -> tuple[np.ndarray, list[str], Any]:
    """Return features near their group's, labels drawn by group (chance: .5), and groups."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"g{i:02d}" for i in range(n_groups)], each)
    of_group = rng.permutation(np.arange(n_groups) % 2)
    centres = rng.normal(size=(n_groups, 16)) * 3
    rows = np.repeat(np.arange(n_groups), each)
    X = centres[rows] + rng.normal(size=(len(rows), 16)) * 0.3
    return X.astype(np.float32), ["ab"[of_group[i]] for i in rows], groups


def splits(*parts: str, n: int = 240) -> list[str]:
    """Return a split column that crosses all groups: each has images of all the parts."""
    return [parts[i % len(parts)] for i in range(n)]


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    X, y, groups = draw()
    return make_store(tmp_path / "a.h5", X, y, groups=groups)


def split_store(path: Path, column: list[str]) -> FeatureStore:
    X, y, groups = draw()
    return make_store(path, X, y, groups=groups, splits=column)


# --- group and split column --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "where"),
    [
        (("train", "val"), "the validation images"),
        (("train", "test"), "the held-out images"),
        (("train", "train", "val", "test"), "the validation images and the held-out images"),
    ],
)
def test_parts_that_groups_cross_are_refused_under_group(
    tmp_path: Path, parts: tuple[str, ...], where: str
) -> None:
    store = split_store(tmp_path / "a.h5", splits(*parts))
    fit, test = store.split(None) if "test" in parts else (store, None)
    with pytest.raises(TrainingError, match=f"of 40 groups that {where}.*--{DROP}"):
        fc.train(fit, test, group=True)
    with pytest.raises(TrainingError, match="No image is left to train on"):
        fc.train(fit, test, group=True, drop_crossing_groups=True)
    notes = fc.train(fit, test).leaderboard.notes
    (note,) = [note for note in notes if where in note]
    assert "which flatters: give --group" in note


def test_a_column_that_groups_cross_is_no_hold_out_by_groups(tmp_path: Path) -> None:
    store = split_store(tmp_path / "a.h5", splits("train", "test"))
    with pytest.raises(TrainingError, match="120 images to train on are of 40 groups") as error:
        store.split(None, group=True)
    assert "with store.split(None), then drop_crossing_groups=True." in str(error.value)


def test_crossing_groups_are_left_out_of_training_and_counted(tmp_path: Path) -> None:
    # Of 40 groups, 10 are in train and val, 10 in train and test, 4 in val and test.
    _, _, groups = draw()
    number = np.array([int(name[1:]) for name in groups])
    odd = np.arange(240) % 2 == 0
    column = np.where(number < 10, np.where(odd, "train", "val"), "train")
    column[(number >= 10) & (number < 20) & odd] = "test"
    column[(number >= 20) & (number < 24)] = "val"
    column[(number >= 20) & (number < 24) & odd] = "test"
    column[number >= 36] = "val"
    store = split_store(tmp_path / "a.h5", column.tolist())
    out = tmp_path / "p.featcache"
    with pytest.raises(TrainingError, match="72 images to train on are of 24 groups"):
        fc.train_files(store.paths, out, head="linear", group=True)
    made = fc.train_files(store.paths, out, head="linear", group=True, drop_crossing_groups=True)
    board = made.leaderboard
    assert "72 images to train on are left out: of 24 groups that" in "\n".join(board.notes)
    # Train: 12 groups of 6; val: 10 groups of 3, 4 groups of 6; and 14 of 3 are held out.
    assert (board.n_fit, board.n_test, board.folds) == (72 + 30 + 24, 42, "validation split")
    assert board[0].cv.images == 54
    kept, _ = store.split(None)
    trained = kept.select(made.predictor.trained_on(kept.sha256))
    roles, names = np.array(trained.splits), np.array(trained.groups)
    assert not set(names[roles == "train"]) & set(names[roles == "val"])
    assert not set(names) & set(store.groups[store.splits == "test"])
    assert abs(board[0].cv.accuracy - 0.5) < 0.25


def test_a_column_by_groups_is_taken_as_it_is(tmp_path: Path) -> None:
    column = np.repeat(splits("train", "train", "val", "test", n=40), 6).tolist()
    store = split_store(tmp_path / "a.h5", column)
    made = fc.train_files(store.paths, tmp_path / "p.featcache", head="linear", group=True)
    assert (made.leaderboard.n_fit, made.leaderboard.folds) == (180, "validation split")
    assert not [note for note in made.leaderboard.notes if "group" in note]
    assert not [n for n in fc.train(store.split(None)[0]).leaderboard.notes if "group" in n]


def test_few_groups_that_judge_give_no_interval_and_the_reason(tmp_path: Path) -> None:
    number = np.arange(40).repeat(6)
    column = np.where(number < 4, "val", np.where(number < 7, "test", "train"))
    store, test = split_store(tmp_path / "a.h5", column.tolist()).split(None)
    board = fc.train(store, test, head="knn", group=True).leaderboard
    assert board[0].cv.accuracy.interval == board[0].held_out.accuracy.interval == (None, None)
    for judge, groups in (("by cross-validation", 4), ("for the held-out images", 3)):
        assert f"no intervals {judge}, because the images are of {groups} groups" in str(board)


def test_dropping_goes_with_group(store: FeatureStore) -> None:
    with pytest.raises(TrainingError, match="drop_crossing_groups goes with group"):
        fc.train(store, drop_crossing_groups=True)


# --- a test size -------------------------------------------------------------------------------


def test_a_hold_out_by_groups_is_honest_and_one_of_images_has_a_note(tmp_path: Path) -> None:
    X, y, groups = draw()
    path = make_store(tmp_path / "a.h5", X, y, groups=groups).paths
    flat, honest = (
        fc.train_files(path, tmp_path / f"{by}.featcache", head="knn", test_size=0.25, group=by)
        for by in (False, True)
    )
    assert flat.leaderboard[0].held_out.accuracy > 0.95
    assert "that the held-out images have too" in flat.leaderboard.notes[1]
    assert honest.leaderboard[0].held_out.accuracy < 0.8
    assert honest.leaderboard[0].cv.accuracy < 0.8
    assert not honest.leaderboard.notes


def test_a_test_size_takes_the_place_of_the_test_part_and_says_so(tmp_path: Path) -> None:
    column = np.repeat(splits("train", "train", "val", "test", n=40), 6).tolist()
    store = split_store(tmp_path / "a.h5", column)
    made = fc.train_files(
        store.paths, tmp_path / "p.featcache", head="linear", group=True, test_size=0.25
    )
    board = made.leaderboard
    fit, _ = store.split(0.25, group=True)
    known = int((fit.splits == "test").sum())
    assert known > 0
    assert f"{known} images of the split column's test part are trained on" in board.notes[-1]
    assert board.folds == "validation split"
    assert abs(board.n_test - 60) <= 6


def test_a_store_that_was_not_split_says_that_its_test_part_is_trained_on(tmp_path: Path) -> None:
    store = split_store(tmp_path / "a.h5", np.repeat(["train", "test"], 120).tolist())
    assert "120 images of the split column's test part" in fc.train(store).leaderboard.notes[-1]
    assert not fc.train(store.split(None)[0], group=True).leaderboard.notes


# --- nested folds, views -----------------------------------------------------------------------


def test_nested_folds_keep_groups_inside_and_out(store: FeatureStore) -> None:
    board = fc.train(store, head="knn", group=True, nested=True, cv=3).leaderboard
    assert board.folds == "3 grouped nested folds"
    assert board[0].cv.accuracy < 0.75


def test_nested_with_a_validation_part_chooses_inside_the_training_part(tmp_path: Path) -> None:
    column = np.repeat(splits("train", "train", "val", n=40), 6).tolist()
    store = split_store(tmp_path / "a.h5", column)
    board = fc.train(store, head="knn", group=True, nested=True).leaderboard
    assert board.folds == "validation split"
    assert board[0].cv.images == column.count("val")
    assert board[0].cv.accuracy < 0.85


def test_views_are_rows_of_their_image_in_every_split(tmp_path: Path) -> None:
    X, y, groups = draw()
    column = np.repeat(splits("train", "train", "val", "test", n=40), 6).tolist()
    views = np.repeat(X[:, None], 3, axis=1) + np.arange(3, dtype=np.float32)[:, None] * 0.01
    store = make_store(tmp_path / "a.h5", views, y, groups=groups, splits=column, views=3)
    for options in ({}, {"test_size": 0.25}, {"nested": True}):
        made = fc.train_files(
            store.paths, tmp_path / "p.featcache", head="linear", group=True, **options
        )
        assert made.leaderboard.n_fit + made.leaderboard.n_test == 240
        assert made.leaderboard[0].cv.accuracy < 0.9


# --- before any head is trained ----------------------------------------------------------------


def test_a_class_that_only_the_test_part_has_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = ["a", "b"] * 20
    fit = make_store(tmp_path / "a.h5", clusters(labels), labels)
    other = make_store(tmp_path / "b.h5", clusters(["a", "c"] * 2), ["a", "c"] * 2, ids=[*"wxyz"])
    monkeypatch.setattr("featcache.study.train._train_head", lambda *_: pytest.fail("trained"))
    with pytest.raises(TrainingError, match=r"2 held-out images have labels that no image.*'c'"):
        fc.train(fit, other)


# --- evaluate ----------------------------------------------------------------------------------


@pytest.fixture
def halves(tmp_path: Path) -> tuple[Predictor, FeatureStore]:
    """Return a predictor of groups 0 to 29, one image each left out, and a store of all groups."""
    X, y, groups = draw()
    store = make_store(tmp_path / "a.h5", X, y, groups=groups)
    first = [i for i in range(180) if i % 6]
    return fc.train(store.select(first), group=True), store


def test_images_of_trained_groups_are_left_out_and_counted(
    halves: tuple[Predictor, FeatureStore], tmp_path: Path
) -> None:
    predictor, store = halves
    predictor.save(tmp_path / "p.featcache")
    loaded = Predictor.load(tmp_path / "p.featcache")
    assert b"g07" not in (tmp_path / "p.featcache").read_bytes()  # a patient's name stays at home
    for one in (predictor, loaded):
        found = evaluate(one, store)
        assert len(found) == 60
        assert set(store.groups[np.isin(store.ids, found.ids)]) == {f"g{i}" for i in range(30, 40)}
        assert found.notes == (
            "150 images that it was trained on are left out",
            "30 images of groups that it was trained on are left out (--other-groups, in Python "
            "other_groups=True, keeps them)",
        )
    assert len(evaluate(predictor, store, other_groups=True)) == 90
    with pytest.raises(TrainingError, match=r"180 images.*--other-groups.*train with --group "):
        evaluate(predictor, store.select(np.arange(180)))


def test_other_groups_are_kept_on_the_command_line(
    halves: tuple[Predictor, FeatureStore], tmp_path: Path
) -> None:
    predictor, store = halves
    predictor.save(tmp_path / "p.featcache")
    for more, images in ((), 60), (("--other-groups",), 90):
        command = ["evaluate", str(tmp_path / "p.featcache"), store.paths[0], "--json", *more]
        result = CliRunner().invoke(main, command)
        assert json.loads(result.stdout)["images"] == images


def test_images_without_a_group_are_of_no_trained_group(tmp_path: Path) -> None:
    X, y, groups = draw()
    groups = np.where(np.arange(240) % 2, groups, "")
    store = make_store(tmp_path / "a.h5", X, y, groups=groups)
    predictor = fc.train(store.select(np.arange(180)), group=True)
    assert len(evaluate(predictor, store)) == 60


def test_the_command_line_drops_and_refuses(tmp_path: Path) -> None:
    store = split_store(tmp_path / "a.h5", splits("train", "train", "train", "val", n=240))
    command = ["train", store.paths[0], "-o", str(tmp_path / "p.featcache"), "--head", "linear"]
    result = CliRunner().invoke(main, [*command, "--group"])
    assert result.exit_code != 0
    assert f"--{DROP}" in result.stderr
    assert "Traceback" not in result.stderr
    assert "give --group" in CliRunner().invoke(main, command).stdout


def test_nested_folds_are_asked_for_on_the_command_line(
    store: FeatureStore, tmp_path: Path
) -> None:
    out = str(tmp_path / "p.featcache")
    command = ["train", store.paths[0], "-o", out, "--head", "knn", "--cv", "2", "--nested"]
    assert "2 nested folds" in CliRunner().invoke(main, command).stdout
    again = CliRunner().invoke(main, [*command, "--json"])
    assert json.loads(again.stdout)["leaderboard"]["folds"] == "2 nested folds"
    assert "2 folds" in CliRunner().invoke(main, command[:-1]).stdout


# --- learning curves ---------------------------------------------------------------------------


def test_a_learning_curve_keeps_groups_together(store: FeatureStore) -> None:
    honest = fc.learning_curve(store, head="knn", cv=3)
    assert all(point.accuracy < 0.8 for point in honest)
    assert fc.learning_curve(store, head="knn", cv=3, group=False)[-1].accuracy > 0.95


def test_a_learning_curve_is_scored_on_the_same_images_at_every_size(tmp_path: Path) -> None:
    labels = ["a", "b", "c"] * 40
    store = make_store(tmp_path / "a.h5", clusters(labels), labels)
    curve = fc.learning_curve(store.select(np.arange(100)), store.select(np.arange(60, 120)))
    assert curve.n_test == 20
    assert "40 images that are among the images to train on are left out" in str(curve)
    # An accuracy of so many images is a whole number of twentieths.
    assert all(float(point.accuracy * 20).is_integer() for point in curve)
    # At these sizes, no more than 15 of the 60 are trained on.
    known = "None of the 60 images .*: 60 images that are among the images to train on"
    with pytest.raises(TrainingError, match=known):
        fc.learning_curve(store, store.select(np.arange(60)), sizes=[10, 15])


def test_a_learning_curve_says_what_it_does_with_groups_and_parts(tmp_path: Path) -> None:
    # Of 40 groups, 10 are in train and val, and 10 others in train and test.
    number, odd = np.repeat(np.arange(40), 6), np.arange(240) % 2 == 0
    column = np.where(number < 10, np.where(odd, "train", "val"), "train")
    column[(number >= 10) & (number < 20) & odd] = "test"
    store = split_store(tmp_path / "a.h5", column.tolist())
    cure = rf"--{DROP} \(library: drop_crossing_groups=True\)\."
    with pytest.raises(TrainingError, match=f"of 10 groups that the validation.*{cure}"):
        fc.learning_curve(store, head="knn", sizes=[30])
    dropped = fc.learning_curve(store, head="knn", sizes=[30], drop_crossing_groups=True)
    assert dropped.n_test == 30 and all(point.accuracy < 0.85 for point in dropped)
    crossed = split_store(tmp_path / "b.h5", splits("train", "test"))
    with pytest.raises(TrainingError, match=r"120 images of the groups.* drop_crossing_groups"):
        fc.learning_curve(crossed)
    (note,) = dropped.notes
    assert "60 images to train on are left out: of 20 groups that the validation images" in note
    flat = fc.learning_curve(store, head="knn", sizes=[30], group=False)
    assert flat.n_test == 30
    assert "which flatters: give --group" in flat.notes[0]
    with pytest.raises(TrainingError, match=r"sizes .* 150 labelled"):
        fc.learning_curve(store, sizes=[151], drop_crossing_groups=True)


def test_a_learning_curve_is_scored_on_the_test_part(tmp_path: Path) -> None:
    labels = ["a", "b"] * 40
    column = ["train"] * 50 + ["test"] * 30
    store = make_store(tmp_path / "a.h5", clusters(labels), labels, splits=column)
    curve = fc.learning_curve(store, head="knn", sizes=[20])
    assert (curve.n_test, curve.notes) == (30, ())
    other = fc.learning_curve(store.select(np.arange(20, 70)), store, head="knn", sizes=[20])
    assert "20 images of the split column's test part are trained on" in "\n".join(other.notes)
    with pytest.raises(TrainingError, match="goes with group"):
        fc.learning_curve(
            make_store(tmp_path / "b.h5", clusters(labels), labels, groups=labels),
            group=False,
            drop_crossing_groups=True,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": []}, "sizes"),
        ({"sizes": [0, 10]}, "sizes"),
        ({"sizes": [10.5]}, "sizes"),
        ({"cv": None}, "cv"),
        ({"random_state": -1}, "random_state"),
        ({"head": "linaer"}, "linear"),
    ],
)
def test_what_a_learning_curve_cannot_do_is_one_sentence(
    store: FeatureStore, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        fc.learning_curve(store, **options)


# --- audit -------------------------------------------------------------------------------------


def test_an_audit_keeps_groups_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth = np.repeat(["a", "b"] * 20, 6)
    groups = np.repeat([f"g{i}" for i in range(40)], 6)
    X = clusters(truth.tolist(), d=16, spread=0.2)
    X += np.repeat(rng.normal(size=(40, 16)), 6, axis=0).astype(np.float32)
    y = truth.copy()
    wrong = np.isin(groups, ["g3", "g8", "g21"])
    y[wrong] = np.where(truth[wrong] == "a", "b", "a")  # all images of three groups
    store = make_store(tmp_path / "a.h5", X, y.tolist(), groups=groups)
    found = {one.id for one in audit(store, head="knn").of("label")}
    assert len(found & set(store.ids[wrong])) >= 12


def test_a_class_of_one_group_cannot_be_judged(tmp_path: Path) -> None:
    X, y, groups = draw()
    y = ["one" if name == "g00" else label for name, label in zip(groups, y, strict=True)]
    found = audit(make_store(tmp_path / "a.h5", X, y, groups=groups))
    assert found.notes == ("1 class of one image or one group cannot be judged: one",)


def test_an_audit_by_a_head_that_judges_a_part_judges_that_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.heads.neighbors._WORK", 1.0)
    monkeypatch.setattr("featcache.heads.neighbors._FEWEST_QUERIES", 600)
    truth = ["ant", "bee", "cod"] * 900
    y = list(truth)
    wrong = list(range(5, 2700, 90))
    for row in wrong:
        y[row] = {"ant": "bee", "bee": "cod", "cod": "ant"}[y[row]]
    store = make_store(tmp_path / "a.h5", clusters(truth, spread=0.8), y)
    found = audit(store, head="knn")
    caught = {int(one.id[:5]) for one in found.of("label")} & set(wrong)
    assert len(caught) >= 5
    assert "images are judged by knn" in found.notes[0]
    with pytest.raises(TrainingError, match="no head 'nosuch'"):
        audit(store, head="nosuch")
    assert sha256(["a"]).shape == (1, 32)
