from __future__ import annotations

import re

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import (
    ExtraTreesClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.heads.rows import FeatureBlocks, TrainingRows
from featcache.heads.steps import Trees
from featcache.heads.table import HEADS
from featcache.heads.trees import BoostedTrees, ForestHead, discriminants
from tests.benchmarks.synthetic import features

UNEQUAL = {
    "check_sample_weight_equivalence_on_dense_data": "leaves count rows, bins their values",
    "check_sample_weight_equivalence_on_sparse_data": "leaves count rows, bins their values",
}


@parametrize_with_checks(
    [BoostedTrees(n_rounds=10, min_samples_leaf=3)],
    expected_failed_checks=lambda estimator: UNEQUAL,
)
def test_it_is_a_scikit_learn_classifier(estimator, check):
    check(estimator)


@pytest.fixture(autouse=True, scope="module")
def small_searches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.heads.trees._TREES", 30)
        patch.setattr("featcache.heads.trees._FIRST_TREES", 15)
        patch.setattr("featcache.heads.trees._ROUNDS", (5, 15))
        patch.setattr("featcache.heads.trees._SIZES", (16, 32))
        yield


def network_like(n=600, classes=3, seed=0):
    X, codes = features(n, 64, classes, rank=16, random_state=seed)
    return X, np.array([f"class {c}" for c in codes])


def folds_of(y, cv=3):
    split = StratifiedKFold(cv, shuffle=True, random_state=0)
    return list(split.split(np.zeros(len(y)), y))


@pytest.mark.parametrize("classes", [2, 3])
def test_arrays_predict_what_scikit_learn_predicts(classes):
    """The only test that a private attribute of scikit-learn is still what we read it as."""
    X, y = network_like(classes=classes)
    model = BoostedTrees(32, n_rounds=7).fit(X, y)
    centre, projection = model.steps_[:2]
    own = HistGradientBoostingClassifier(
        learning_rate=0.15,
        max_iter=7,
        max_leaf_nodes=8,
        min_samples_leaf=10,
        max_bins=63,
        l2_regularization=5.0,
        early_stopping=False,
    ).fit(projection(centre(X)), y)
    # On training rows: between them, our thresholds stand elsewhere.
    expected = own.predict_proba(projection(centre(X)))
    np.testing.assert_allclose(model.predict_proba(X), expected, atol=1e-5)
    moved = X * (1 + 1e-6 * np.random.default_rng(0).choice([-1, 1], X.shape)).astype(np.float32)
    np.testing.assert_allclose(model.predict_proba(moved), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [RandomForestClassifier, ExtraTreesClassifier])
@pytest.mark.parametrize("classes", [2, 4])
def test_forests_as_arrays_predict_what_scikit_learn_predicts(kind, classes):
    X, y = network_like(classes=classes)
    forest = kind(20, random_state=0, class_weight="balanced").fit(X, y)
    trees = Trees.of_forest(forest)
    assert trees.check(X.shape[1]) == classes
    new = X + np.float32(0.01)
    np.testing.assert_allclose(trees(new), forest.predict_proba(new), atol=1e-6)
    parts = [trees(new[i : i + 1]) for i in range(40)]
    np.testing.assert_array_equal(np.concatenate(parts), trees(new)[:40])


def test_it_learns_curved_boundaries():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(1200, 6)).astype(np.float32)
    y = (X[:, 0] * X[:, 1] > 0).astype(int)
    fitted = BoostedTrees(max_leaf_nodes=16).fit(X[:800], y[:800])
    assert (fitted.predict(X[800:]) == y[800:]).mean() > 0.85


def test_many_classes_do_not_diverge():
    X, y = features(2000, 64, 50, rank=16, separation=12.0)
    fitted = BoostedTrees(64, n_rounds=20).fit(X[:1500], y[:1500])
    assert fitted.score(X[1500:], y[1500:]) > 0.4


def test_discriminants_are_fishers():
    X, y = network_like()
    codes = np.unique(y, return_inverse=True)[1]
    Z = X[:, :10]
    turn = discriminants(Z, codes, np.ones(len(Z)), 3)
    assert turn.shape == (10, 2 + 10)
    reference = LinearDiscriminantAnalysis(solver="eigen", shrinkage=0.05)
    reference.fit(Z.astype(np.float64), codes)
    ours, theirs = (Z @ turn)[:, :2], reference.transform(Z)
    # The same plane, up to how scikit-learn shrinks standardised columns.
    ours, theirs = (np.linalg.qr(a - a.mean(axis=0))[0] for a in (ours, theirs))
    assert np.linalg.svd(ours.T @ theirs)[1].min() > 0.95


def test_weights_of_rows_and_classes_count():
    X, y = network_like()
    wrong = np.random.default_rng(0).random(len(y)) < 0.5
    given, weight = np.where(wrong, "class 0", y), np.where(wrong, 0.0, 1.0)
    plain = BoostedTrees(32).fit(X[~wrong], y[~wrong])
    weighted = BoostedTrees(32).fit(X, given, weight)
    np.testing.assert_array_equal(weighted.predict(X), plain.predict(X))
    heavy = BoostedTrees(32, n_rounds=5, class_weight={"class 1": 50.0}).fit(X, y)
    assert (heavy.predict(X) == "class 1").mean() > (plain.predict(X) == "class 1").mean() + 0.2


@pytest.mark.parametrize("wrong", [{"n_rounds": 0}, {"max_leaf_nodes": 1}, {"n_components": 0}])
def test_impossible_parameters_are_refused(wrong):
    X, y = network_like(60)
    with pytest.raises(ValueError, match="positive"):
        BoostedTrees(**wrong).fit(X, y)


def test_boosting_out_of_fold_is_a_fit_on_the_other_folds(monkeypatch):
    monkeypatch.setattr("featcache.heads.trees._SIZES", (32,))
    X, y = network_like()
    found = HEADS["boosting"].search(X, y, folds_of(y))
    for train, valid in folds_of(y):
        fitted = BoostedTrees(32, n_rounds=found.params["rounds"]).fit(X[train], y[train])
        losses = [
            log_loss(y[valid], proba)
            for proba in (
                fitted.predict_proba(X[valid]),
                np.exp(found.logits[valid])
                / np.exp(found.logits[valid]).sum(axis=1, keepdims=True),
            )
        ]
        assert losses[0] == pytest.approx(losses[1], abs=0.05)


def test_forests_try_both_kinds():
    X, y = network_like(200)
    found = HEADS["forest"].search(X, y, folds_of(y), class_weight="balanced")
    assert {one.params["splits"] for one in found.trials} == {"random", "extra"}
    assert found.params["trees"] == len(found.estimator.steps[-2].roots)


def test_boosting_with_little_memory_says_that_it_took_a_part():
    X, y = network_like(3000)
    found = HEADS["boosting"].search(FeatureBlocks.of(X), y, folds_of(y), memory=400_000)
    assert found.score > 0.55
    said = re.match(r"boosting was trained on (\d+) of 3,000 images", found.notes[0])
    assert said and (~np.isnan(found.logits).any(axis=1)).sum() == int(said[1])


def test_of_many_rows_a_part_chooses_the_kind_and_all_grow_fewer_trees(monkeypatch):
    monkeypatch.setattr("featcache.heads.trees._ENOUGH_ROWS", 90)
    monkeypatch.setattr("featcache.heads.trees._FEWEST_TREES", 5)
    monkeypatch.setattr("featcache.heads.trees._TREE_ROWS", 200 * 12)
    X, y = network_like(200)
    fits = []
    found = HEADS["forest"].search(X, y, folds_of(y), progress=fits.append)
    said = re.fullmatch(
        r"forest chose its settings on (\d+) of 200 images, a random part of each class, and was "
        r"fitted on all 200\.",
        found.notes[0],
    )
    assert said and (~np.isnan(found.logits).any(axis=1)).sum() == int(said[1]) < 110
    assert found.params["trees"] == 12 and found.estimator.steps[-2].roots.size == 12
    assert [one.rough for one in found.trials] == [True] * (len(found.trials) - 1) + [False]
    assert sum(fits) == len(found.trials) * len(folds_of(y)) + 1


def test_few_columns_are_also_tried_as_they_are(monkeypatch) -> None:
    monkeypatch.setattr("featcache.heads.trees._SIZES", (128, 512))
    monkeypatch.setattr("featcache.heads.trees._ROUNDS", (20, 60))
    X, y = load_digits(return_X_y=True)
    scores = []
    for seed in range(2):
        A, B, a, b = train_test_split(
            X.astype(np.float32), y, test_size=0.5, stratify=y, random_state=seed
        )
        found = HEADS["boosting"].search(A, a, folds_of(a))
        assert "n_components" not in found.params
        plain = HistGradientBoostingClassifier(random_state=0).fit(A, a)
        right = found.estimator.logits(B).argmax(axis=1) == b
        scores.append([right.mean(), plain.score(B, b)])
    ours, theirs = np.mean(scores, axis=0)
    assert ours > theirs - 0.006


@pytest.mark.parametrize("name", ["RandomForestClassifier", "ExtraTreesClassifier"])
def test_a_patched_scikit_learn_grows_the_same_forest(name, monkeypatch):
    X, y = network_like(120)
    rows = TrainingRows.check(X, y, folds_of(y), None)
    splits = "random" if name.startswith("Random") else "extra"
    params = {"splits": splits, "min_samples_leaf": 1, "trees": 5}
    plain, _ = ForestHead().fit(rows, params)
    # As scikit-learn-intelex puts its own there.
    monkeypatch.setattr(f"sklearn.ensemble.{name}", None)
    patched, _ = ForestHead().fit(rows, params)
    np.testing.assert_array_equal(patched.value, plain.value)
