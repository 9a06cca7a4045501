"""What notebooks show: the figures, and no name as markup."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import featcache as fc
from featcache.errors import TrainingError
from featcache.results.intervals import Score
from tests.labelled import clusters, make_store
from tests.reported import CLASSES, Case, case


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return case(tmp_path_factory.mktemp("html"))


def test_of_a_store(made: Case) -> None:
    text = made.store._repr_html_()
    assert "<script" not in text and "a &amp; b&#x27;s 20" in text
    assert "(12,) float32" in text and "resnet18" in text


def test_of_an_evaluation(made: Case) -> None:
    text = made.evaluation._repr_html_()
    assert "<script" not in text and "&lt;script&gt;" in text
    assert f"{made.evaluation.accuracy:.3f}" in text
    assert "30 images are left out" in text
    assert text.count("<tr>") == 2 + 7 + 3


def test_of_a_leaderboard(made: Case) -> None:
    text = made.leaderboard._repr_html_()
    assert text.count("<tr>") == 3 and "best by cross-validation: svm" in text
    assert text.endswith(
        "<p>as a whole</p><p>svm was trained on &lt;20&gt; of 30 images.</p><p>svm: few images</p>"
    )


def test_of_a_console(made: Case) -> None:
    said = "<LeaderboardRow: svm, CV accuracy 0.900 [0.880, 0.920]>"
    assert repr(made.leaderboard[0]) == said
    assert repr(made.leaderboard) == f"<Leaderboard: 2 heads, the best: {said}>"
    assert repr(Score(1.0, 0.5, 1.0)) == "Score(1.0, 0.5, 1.0)"
    assert "accuracy=Score(0.9, 0.88, 0.92)" in repr(made.leaderboard[0].cv)


def test_of_a_predictor(made: Case) -> None:
    text = fc.train(made.store, head="svm")._repr_html_()
    assert "<script" not in text
    assert "svm" in text and "60 images" in text and CLASSES[2] in text


def test_many_classes_are_cut_short(tmp_path: Path) -> None:
    y = [f"class {k:02d}" for k in range(25) for _ in range(2)]
    text = make_store(tmp_path / "s.h5", clusters(y), y)._repr_html_()
    assert "and 5 more" in text


def test_a_score_that_few_folds_have_is_counted_and_json_has_no_nan(tmp_path: Path) -> None:
    # Each class is in three groups, but no three folds keep all of them apart.
    of_group = ["abc", "ab", "ac", "bc"]
    y = [name for names in of_group for name in names for _ in range(8)]
    groups = [str(k) for k, names in enumerate(of_group) for _ in range(8 * len(names))]
    store = make_store(tmp_path / "s.h5", clusters(y, spread=4), y, groups=groups)
    board = fc.train(store, head="ridge", group=True, cv=3, scoring="roc_auc_ovr").leaderboard
    assert board is not None and np.isfinite(board[0].cv_score)
    assert "the score is the mean of 2 of 3 folds: the others lack a class" in board.notes
    assert "NaN" not in board.to_json()
    (row,) = json.loads(board.to_json())["rows"]
    assert all(one["fold_scores"].count(None) == 1 for one in row["candidates"])


def test_a_validation_part_of_one_class_has_no_auc(tmp_path: Path) -> None:
    y = ["ill", "well"] * 20
    splits = ["val" if i % 4 == 0 else "train" for i in range(40)]
    store = make_store(tmp_path / "s.h5", clusters(y, spread=4), y, splits=splits)
    with pytest.raises(TrainingError, match="no fold has validation images of every class"):
        fc.train(store, head=["ridge", "linear"], scoring="roc_auc")
