from __future__ import annotations

import re

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.model_selection import GridSearchCV, StratifiedKFold, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.heads.neighbors import CosineNeighbors
from featcache.heads.rows import FeatureBlocks, stratified
from featcache.heads.table import HEADS
from featcache.store.splitting import folds
from featcache.system.nearest import nearest
from tests.scores import logits


@parametrize_with_checks([CosineNeighbors(5)])
def test_it_is_a_scikit_learn_classifier(estimator, check):
    check(estimator)


def mixture(n=300, d=16, classes=4, seed=0, spread=1.0):
    """Directions with noise; lengths say nothing, as after no pooling layer they do."""
    rng = np.random.default_rng(seed)
    centres = 2.5 * rng.normal(size=(classes, d)) / np.sqrt(d)
    codes = rng.permutation(np.arange(n) % classes)
    X = centres[codes] + spread * rng.normal(size=(n, d)) / np.sqrt(d) * 2
    X *= rng.uniform(0.1, 10.0, size=(n, 1))
    return X.astype(np.float32), np.array([f"class {c}" for c in codes])


def folds_of(y, cv=4):
    split = StratifiedKFold(cv, shuffle=True, random_state=0)
    return list(split.split(np.zeros(len(y)), y))


def by_hand(X, y, queries, k, temperature):
    """The definition, one query at a time."""
    classes = np.unique(y)
    similarity = cosine_similarity(queries.astype(np.float64), X.astype(np.float64))
    proba = np.zeros((len(queries), len(classes)))
    for i, row in enumerate(similarity):
        near = np.argsort(-row)[:k]
        for j in near:
            proba[i, np.searchsorted(classes, y[j])] += np.exp(row[j] / temperature)
    return proba / proba.sum(axis=1, keepdims=True)


def test_votes_follow_the_definition():
    X, y = mixture()
    new, _ = mixture(20, seed=1)
    found = CosineNeighbors(15, temperature=0.1).fit(X, y).predict_proba(new)
    np.testing.assert_allclose(found, by_hand(X, y, new, 15, 0.1), rtol=1e-3, atol=1e-6)


def test_nearest_is_the_same_in_one_block_and_in_many(monkeypatch):
    X, _ = mixture(500)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    whole = nearest(unit[:30], unit, 25)
    monkeypatch.setattr("featcache.system.nearest.BLOCK", 37)
    pieces = nearest(unit[:30], unit, 25)
    np.testing.assert_array_equal(whole[1], pieces[1])
    np.testing.assert_allclose(whole[0], pieces[0], rtol=1e-5)


def test_the_lengths_of_rows_do_not_matter():
    X, y = mixture()
    fitted = CosineNeighbors(10).fit(X, y)
    np.testing.assert_allclose(
        fitted.predict_proba(X), fitted.predict_proba(X * 7.5), rtol=1e-3, atol=1e-5
    )


def test_class_weights_move_votes():
    X, y = mixture(spread=2.0)
    plain = CosineNeighbors(50, temperature=1.0).fit(X, y).predict(X)
    heavy = CosineNeighbors(50, temperature=1.0, class_weight={"class 1": 10.0}).fit(X, y)
    assert (heavy.predict(X) == "class 1").sum() > 2 * (plain == "class 1").sum()


@pytest.mark.parametrize("wrong", [{"n_neighbors": 0}, {"temperature": 0.0}])
def test_impossible_parameters_are_refused(wrong):
    X, y = mixture(40)
    with pytest.raises(ValueError, match="positive"):
        CosineNeighbors(**wrong).fit(X, y)


def test_out_of_fold_scores_are_those_of_a_fit_on_the_other_folds():
    X, y = mixture()
    folds = folds_of(y)
    found = HEADS["knn"].search(X, y, folds)
    k, temperature = found.params["k"], found.params["temperature"]
    for train, valid in folds:
        treated = {
            "l2": X,
            "power": np.sign(X) * np.sqrt(np.abs(X)),
            "standard": StandardScaler().fit(X[train]).transform(X),
        }[found.params["treatment"]]
        fitted = CosineNeighbors(k, temperature=temperature).fit(treated[train], y[train])
        expected = logits(fitted, treated[valid])
        np.testing.assert_allclose(found.logits[valid], expected, rtol=1e-3, atol=1e-3)
    assert found.score > 0.7
    assert found.score == max(one.score for one in found.trials)
    labels = found.classes[logits(found.estimator, X).argmax(axis=1)]
    np.testing.assert_array_equal(labels, found.classes[logits(found.estimator, X).argmax(axis=1)])


def test_columns_of_any_scale_are_compared():
    X, y = load_breast_cancer(return_X_y=True)
    found = HEADS["knn"].search(X.astype(np.float32), y, folds(y.astype(str), cv=5))
    assert found.score > 0.955
    assert found.params["treatment"] == "standard" and found.params["k"] <= 10


def test_rows_without_weight_do_not_vote():
    X, y = mixture()
    wrong = np.random.default_rng(0).random(len(y)) < 0.4
    given = np.where(wrong, "class 0", y)
    weight = np.where(wrong, 0.0, 1.0)
    folds = [(train, valid[~wrong[valid]]) for train, valid in folds_of(y)]
    assert HEADS["knn"].search(X, given, folds, sample_weight=weight).score > 0.7
    clean = [(train[~wrong[train]], valid) for train, valid in folds]
    found = HEADS["knn"].search(X, given, folds, sample_weight=weight)
    assert found.score == pytest.approx(HEADS["knn"].search(X, given, clean).score)


def test_with_little_memory_it_keeps_a_part_of_each_class_and_says_so():
    X, y = mixture(4000, d=64)
    memory = 200_000  # bytes
    found = HEADS["knn"].search(FeatureBlocks.of(X), y, folds_of(y), memory=memory)
    kept = found.estimator.steps[-2]
    assert kept.rows.nbytes <= memory // 3 + 20 * 64 * 4  # one row of each class in each fold
    assert np.ptp(np.bincount(kept.codes)) <= 5
    assert re.match(r"knn was trained on 2\d\d of 4,000 images", found.notes[0])
    assert found.score > 0.7


def test_a_sample_leaves_no_class_out():
    codes = np.array([0] * 1000 + [1])
    assert set(codes[stratified(codes, 10, 0)]) == {0, 1}


def test_few_images_choose_a_treatment_that_holds_on_others() -> None:
    X, y = load_wine(return_X_y=True)
    scores = []
    for seed in range(12):
        A, B, a, b = train_test_split(
            X.astype(np.float32), y, test_size=0.5, stratify=y, random_state=seed
        )
        found = HEADS["knn"].search(A, a, folds(a.astype(str), cv=5))
        search = GridSearchCV(KNeighborsClassifier(), {"n_neighbors": [1, 3, 5, 10, 20]}, cv=5)
        rival = make_pipeline(StandardScaler(), search).fit(A, a)
        right = found.estimator.logits(B).argmax(axis=1) == b
        scores.append([right.mean(), rival.score(B, b)])
    ours, theirs = np.mean(scores, axis=0)
    assert ours > theirs - 0.01
