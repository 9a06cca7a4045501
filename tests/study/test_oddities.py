"""Features, names and lists that are odd, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from sklearn.linear_model import LogisticRegression

import featcache as fc
from featcache.cli.main import main
from featcache.errors import PredictorError, TrainingError
from featcache.heads.table import HEADS
from featcache.report.data import write_report
from featcache.study.audit import audit
from featcache.study.maps import embed
from featcache.system.tables import first_names, text_table
from tests.labelled import clusters, make_store

LABELS = ["ant", "bee"] * 20


@pytest.mark.parametrize("value", [0.0, 3.3])
def test_features_that_are_all_the_same_are_said_mapped_and_found(
    tmp_path: Path, value: float
) -> None:
    pytest.importorskip("bokeh", reason="pip install 'featcache[report]'")
    store = make_store(tmp_path / "a.h5", np.full((40, 8), value, np.float32), LABELS)
    fit, test = store.split(0.25)
    predictor = fc.train(fit, test)
    assert "all images have the same features" in "\n".join(predictor.leaderboard.notes)
    write_report(fc.evaluate(predictor, store), tmp_path / "r.html", store=store)
    assert (tmp_path / "r.html").exists()
    found = audit(store).of("near-duplicate")
    assert {one.id for one in found} | {one.other_id for one in found} == set(store.ids.tolist())


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_of_one_point_is_one_point(method: str) -> None:
    for X in (np.full((40, 8), 3.3), 1e-30 * np.eye(40, 8)):
        assert not embed(X.astype(np.float32), method).any()  # type: ignore[arg-type]


def test_what_features_are_of_is_what_the_predictor_saw(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(40, 3, 5, 5)).astype(np.float32)
    taps = {"avgpool:output:flatten": clusters(LABELS), "layer4:output:map": maps}
    store = make_store(tmp_path / "a.h5", taps, LABELS)
    predictor = fc.train(store.select(np.arange(30)), layers="avgpool")
    assert fc.evaluate(predictor, store).layers == ("avgpool:output:flatten",)
    flat = store.matrix("layer4").reshape(40, 3, 25).mean(axis=2)
    np.testing.assert_allclose(embed(store, layers="layer4"), embed(flat), atol=1e-4)


def test_classes_that_look_alike_are_noted(tmp_path: Path) -> None:
    names = ["Caf\u00e9", "Cafe\u0301", "dog", "Dog ", "owl", "eel"]
    labels = names * 8
    store = make_store(tmp_path / "a.h5", clusters(labels), labels)
    notes = [one for one in fc.train(store, cv=2).leaderboard.notes if "differ only" in one]
    assert len(notes) == 2
    assert any(r"'Caf\xe9'" in one and r"'Cafe\u0301'" in one for one in notes)
    known = make_store(tmp_path / "b.h5", clusters(["dog", "owl"] * 9), ["dog", "owl"] * 9)
    asked = make_store(tmp_path / "c.h5", clusters(["DOG"] * 9), ["DOG"] * 9, ids=[*"abcdefghi"])
    with pytest.raises(PredictorError, match="'DOG' and 'dog' differ only in case"):
        fc.evaluate(fc.train(known, cv=2), asked)


def test_names_do_not_steer_a_terminal(tmp_path: Path) -> None:
    evil = "\x1b[2Jcat\nfish\x9b1m"
    labels = [evil, "dog"] * 20
    store = make_store(tmp_path / "a.h5", clusters(labels, spread=9.0), labels)
    predictor = fc.train(store.select(np.arange(30)), cv=2)
    shown = [str(fc.evaluate(predictor, store)), predictor.to_text(), store.to_text()]
    shown += [text_table(["name"], [[evil]]), first_names([evil])]
    for text in shown:
        assert "\x1b" not in text and "\x9b" not in text
        assert r"\x1b[2Jcat\nfish\x9b1m" in text
    shown_json = CliRunner().invoke(main, ["info", store.paths[0], "--json"]).stdout
    assert "\x9b" not in shown_json
    assert evil in json.loads(shown_json)["classes"]


def test_features_that_are_none_are_refused_with_their_row(tmp_path: Path) -> None:
    X = clusters(LABELS)
    predictor = fc.train(make_store(tmp_path / "a.h5", X, LABELS))
    assert predictor.predict_features(X.tolist()).tolist() == (  # type: ignore[arg-type]
        predictor.predict_features(X).tolist()
    )
    X[7, 3] = np.nan
    for wrong, said in ((X, "first: row 7"), ([["a"] * 12], "array of numbers"), ([1], "shape")):
        with pytest.raises(PredictorError, match=said):
            predictor.predict_features(wrong)  # type: ignore[arg-type]
    X[7, 3] = 0
    with pytest.raises(PredictorError, match=r"got rows of other lengths \(first: row 1\)"):
        predictor.predict_features([[1.0] * 12, [2.0] * 11])  # type: ignore[arg-type]
    large = np.where(np.arange(40)[:, None] == 5, 1e300, X.astype(np.float64))
    with pytest.raises(PredictorError, match=r"too large for float32 \(first: row 5\)"):
        predictor.predict_features(large)


def test_an_option_that_there_is_not_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="There is no option 'heads'"):
        fc.train_files("a.h5", tmp_path / "p.featcache", heads="linear")


# --- classes that are numbers --------------------------------------------------------------------

NUMBERS = ["10", "2", "1"] * 16


@pytest.mark.parametrize("head", [*HEADS, LogisticRegression()])
def test_classes_that_are_numbers_stand_in_their_order(head: Any, tmp_path: Path) -> None:
    y = NUMBERS * (5 if head == "boosting" else 1)  # whose leaves have twenty images
    store = make_store(tmp_path / "n.h5", clusters(y), y)
    fit, test = store.split()
    weights = None if isinstance(head, LogisticRegression) else {"10": 3.0, "2": 1.0}
    predictor = fc.train(fit, test, head=head, cv=2, class_weight=weights)
    assert predictor.classes == ("1", "2", "10") == tuple(store.classes)
    assert predictor.leaderboard is not None
    row = predictor.leaderboard[0]
    assert min(row.cv.balanced_accuracy, row.held_out.balanced_accuracy) > 0.9
    said = np.array(predictor.classes)[predictor.logits_of(test).argmax(axis=1)]
    assert (said == test.labels).mean() == row.held_out.accuracy
    assert [one.label for one in fc.evaluate(predictor, test).per_class] == ["1", "2", "10"]


def test_numbers_are_listed_and_saved_in_their_order(tmp_path: Path) -> None:
    store = make_store(tmp_path / "n.h5", clusters(NUMBERS), [*NUMBERS[:-1], ""])
    assert "1 15, 2 16, 10 16" in store.to_text()
    assert [*store.describe()["classes"]] == ["", "1", "2", "10"]
    predictor = fc.train(store, head="ridge", cv=2)
    predictor.save(tmp_path / "p.featcache")
    again = fc.Predictor.load(tmp_path / "p.featcache")
    assert again.classes == ("1", "2", "10")
    assert (again.logits_of(store) == predictor.logits_of(store)).all()
    images = fc.ImageSet.from_arrays(np.zeros((3, 8, 8), np.uint8), labels=["2.5", "-1", "12"])
    assert images.classes == ["-1", "2.5", "12"] and "(-1 1, 2.5 1, 12 1)" in str(images)
    texts = make_store(tmp_path / "t.h5", clusters(["10", "2", "b"]), ["10", "2", "b"])
    assert texts.classes == ["10", "2", "b"]
