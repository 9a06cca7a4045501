"""What a predictor keeps of the folds: sets of labels, and how typical an image is."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache import train
from featcache.errors import OutputError, PredictorError
from featcache.predictor import measured
from featcache.predictor.measured import Quantiles, in_set
from featcache.predictor.predictions import Prediction, write_predictions
from featcache.predictor.predictor import Predictor
from featcache.store.store import FeatureStore
from featcache.study.evaluate import evaluate
from tests.labelled import clusters, make_store
from tests.predictor_files import Arrays, rewritten

LABELS = ["ant", "bee", "cod"] * 100


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    path = tmp_path_factory.mktemp("measured") / "a.h5"
    return make_store(path, clusters(LABELS, d=3, spread=2.0), LABELS)


@pytest.fixture(scope="module")
def predictor(store: FeatureStore) -> Predictor:
    return train(store, head="ridge", cv=3)


def test_the_examples() -> None:
    assert doctest.testmod(measured, extraglobs={"np": np}).failed == 0


@pytest.mark.parametrize("n", [1, 19, 20, 999, 1000, 1001, 4321])
def test_the_threshold_is_the_score_of_the_conformal_rank(n: int) -> None:
    scores = np.random.default_rng(n).random(n)
    kept = Quantiles.of(scores)
    assert kept.n == n and len(kept.values) == min(n, 1000)
    for coverage in (0.5, 0.9, 0.95, 0.99):
        rank = math.ceil(round((n + 1) * coverage, 9))
        if rank > n:
            with pytest.raises(PredictorError, match=f"this predictor has {n:,}: ask for 0"):
                in_set(kept, scores[:, None], coverage)
            continue
        exact = np.sort(scores)[rank - 1]
        within = np.sort(scores)[min(rank - 1 + n // 1000 + 1, n) - 1]
        assert exact <= kept.smallest(rank) <= (exact if n <= 1000 else within)
        held = in_set(kept, 1 - scores[:, None], coverage)
        assert held.sum() >= rank and held.mean() <= coverage + 1 / n + 0.001


def test_sets_are_as_large_as_their_coverage_says_and_hold_the_label(
    predictor: Predictor, store: FeatureStore
) -> None:
    X = store.matrix()
    sizes = []
    for coverage in (0.5, 0.9, 0.99):
        sets = predictor.label_sets(X, coverage)
        labels = predictor.predict_features(X)
        assert [one[0] for one in sets] == labels.tolist()
        held = np.mean([name in one for name, one in zip(LABELS, sets, strict=True)])
        assert held >= coverage - 0.03  # of the training images, by the refitted head
        sizes.append(np.mean([len(one) for one in sets]))
    assert sizes[0] < sizes[1] < sizes[2] < 3


def test_a_coverage_that_so_few_images_cannot_show_is_refused(
    predictor: Predictor, store: FeatureStore
) -> None:
    with pytest.raises(PredictorError, match=r"from 999 images on .* has 300: ask for 0.996 or"):
        predictor.label_sets(store.matrix(), 0.999)
    for wrong in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(PredictorError, match="between 0 and 1"):
            predictor.predict("nothing", coverage=wrong)


def test_the_text_says_of_which_images_a_coverage_was_measured(
    predictor: Predictor, tmp_path: Path
) -> None:
    said = predictor.coverage_text(0.9)
    assert "90.0% of 300 images when" in said and "measured, not guaranteed" in said
    groups = [f"site {i % 30}" for i in range(300)]
    of_groups = make_store(tmp_path / "g.h5", clusters(LABELS, d=3), LABELS, groups=groups)
    grouped = train(of_groups, head="ridge", cv=3, group=True)
    assert "for images of these groups" in grouped.coverage_text(0.9)


SETS = [
    Prediction(
        "a.jpg", "x|y", 0.5, (("x|y", 0.5), ("b\\", 0.4)), labels=("x|y", "b\\"), typicality=0.25
    ),
    Prediction(
        "b.jpg", "", 0.5, (("x|y", 0.5), ("b\\", 0.4)), labels=("x|y", "b\\"), typicality=0.25
    ),
    Prediction("c.jpg", "", math.nan, (), "not an image", labels=()),
]


@pytest.mark.parametrize("file_format", ["csv", "json"])
def test_files_with_sets_are_written_and_known_again(tmp_path: Path, file_format: str) -> None:
    target = tmp_path / "p"
    for top_k in (1, 2):
        options = {"file_format": file_format, "top_k": top_k, "labels": True}
        write_predictions(SETS, target, **options)  # type: ignore[arg-type]
    text = target.read_text()
    if file_format == "json":
        assert [one["labels"] for one in json.loads(text)] == [["x|y", "b\\"], ["x|y", "b\\"], []]
        changes = [('"labels": ["x|y", ', '"labels": ['), ('"label": ""', '"label": "cat"')]
    else:
        assert text.startswith(
            "id,label,probability,label_2,probability_2,labels,typicality,error\n"
        )
        assert "a.jpg,x|y,0.500000,b\\,0.400000,x\\|y|b\\\\,0.250000,\n" in text
        assert "b.jpg,,0.500000,b\\,0.400000,x\\|y|b\\\\,0.250000,\n" in text
        changes = [("x\\|y|b", "b|x\\|y"), ("b.jpg,,", "b.jpg,cat,"), (",x\\|y|b\\\\,", ",x\\|y,")]
    for old, new in changes:
        target.write_text(text.replace(old, new))
        with pytest.raises(OutputError, match="not a file of predictions"):
            write_predictions(SETS, target)


def test_typicality_is_the_share_of_training_images_that_lie_farther_out(
    predictor: Predictor, store: FeatureStore, tmp_path: Path
) -> None:
    predictor.save(tmp_path / "p")
    back = Predictor.load(tmp_path / "p")
    new = clusters(LABELS * 10, d=3, spread=2.0)[300:]  # other noise around the same centres
    assert back.typicality is not None and predictor.typicality is not None
    share = back.typicality(new)
    np.testing.assert_array_equal(share, predictor.typicality(new))
    for p in (0.05, 0.2, 0.5):
        assert abs((share < p).mean() - p) < 0.08  # of one draw of 300
    middle = store.matrix().mean(axis=0)
    along = back.typicality(middle + np.outer([0, 10, 1e3, 1e15], np.ones(3)))
    assert along[0] > 0.5 and (np.diff(along) <= 0).all() and (along[1:] == 0).all()
    other = make_store(tmp_path / "a.h5", new[:40] + 30, (LABELS * 10)[300:340])
    typical = back.typicality(other.matrix(back.layers_of(other)))
    assert typical is not None and typical.shape == (40,) and not typical.any()


def test_typicality_heeds_views_groups_and_joined_taps(tmp_path: Path) -> None:
    y = LABELS[:60]
    X = clusters(y, d=3, views=2)
    groups = [f"g{i // 3}" for i in range(60)]
    taps = {"layer3:avg": X, "avgpool:output:flatten": X + 1}
    store = make_store(tmp_path / "a.h5", taps, y, groups=groups, views=2)
    predictor = train(store, head="ridge", cv=3, group=True)
    assert predictor.typicality is not None
    both = predictor.typicality(store.matrix())
    assert both.shape == (60,) and both.mean() > 0.4
    np.testing.assert_array_equal(predictor.typicality(store.matrix().mean(axis=1)), both)


def test_evaluate_warns_of_images_of_another_kind(predictor: Predictor, tmp_path: Path) -> None:
    y = LABELS[:40]
    ids = [f"new{i}" for i in range(40)]
    X = clusters(LABELS, d=3, spread=2.0)[:40] + np.float32(0.01)
    like = evaluate(predictor, make_store(tmp_path / "a.h5", X, y, ids=ids))
    assert not [note for note in like.notes if "unlike" in note] and like.atypical is not None
    X[:10] += 30
    unlike = evaluate(predictor, make_store(tmp_path / "b.h5", X, y, ids=ids))
    assert unlike.to_dict()["atypical"] == pytest.approx(like.atypical + 10 / 40, abs=0.03)
    assert "images are unlike those that it was trained on" in unlike.to_text()
    few = make_store(tmp_path / "c.h5", clusters(y, d=3), y)
    assert evaluate(train(few, head="ridge", cv=2), unlike_store(tmp_path, y)).notes == ()


def unlike_store(folder: Path, y: list[str]) -> FeatureStore:
    return make_store(folder / "d.h5", clusters(y, d=3) + 90, y, ids=[f"far{i}" for i in range(40)])


def test_a_damaged_typicality_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    predictor.save(tmp_path / "p")

    def shorter(_: dict[str, Any], arrays: Arrays) -> None:
        arrays["typical_sample"] = arrays["typical_sample"][:, :1]

    def unsorted(_: dict[str, Any], arrays: Arrays) -> None:
        arrays["label_scores"] = arrays["label_scores"][::-1]

    def absent(text: dict[str, Any], _: Arrays) -> None:
        text["typicality"] = None

    for change in (shorter, unsorted, absent):
        with pytest.raises(PredictorError, match=r"mistake in its|of no part"):
            Predictor.load(rewritten(tmp_path / "p", tmp_path / "q", change))
