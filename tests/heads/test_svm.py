from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from sklearn.svm import SVC
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.heads import base, svm
from featcache.heads.steps import Power
from featcache.heads.svm import GaussianSVM
from featcache.heads.table import HEADS
from tests.scores import logits


def as_in_scikit_learn(_):
    return {
        "check_sample_weight_equivalence_on_dense_data": (
            "libsvm's weights are not repetitions: SVC is exempt in scikit-learn, too"
        )
    }


@parametrize_with_checks([GaussianSVM()], expected_failed_checks=as_in_scikit_learn)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def rings(n=240, d=6, classes=3, seed=0):
    """Classes by distance from the origin, which no linear head can tell apart."""
    rng = np.random.default_rng(seed)
    codes = rng.permutation(np.arange(n) % classes)
    X = rng.normal(size=(n, d))
    X *= ((1 + codes) / np.linalg.norm(X, axis=1) * rng.uniform(0.85, 1.15, n))[:, None]
    return X.astype(np.float32), np.array(["in", "mid", "out", "far"])[codes]


def folds_of(y, cv=3):
    split = StratifiedKFold(cv, shuffle=True, random_state=0)
    return list(split.split(np.zeros(len(y)), y))


def votes(machine, X):
    """Smooth votes, tanh(4 f), of an SVC's decisions between each two classes, by hand."""
    values = machine.set_params(decision_function_shape="ovo").decision_function(X)
    k = len(machine.classes_)
    if k == 2:
        return values
    scores = np.zeros((len(X), k))
    for (i, j), f in zip(combinations(range(k), 2), values.T, strict=True):
        scores[:, i] += np.tanh(4 * f)
        scores[:, j] -= np.tanh(4 * f)
    return scores


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("class_weight", [None, "balanced", {"in": 3.0}])
def test_it_decides_as_svc(classes, class_weight):
    X, y = rings(classes=classes)
    X, y = X[40:], y[40:]
    weight = np.random.default_rng(0).uniform(0.5, 2, len(y))
    ours = GaussianSVM(5.0, class_weight=class_weight).fit(X, y, weight)
    theirs = SVC(C=5.0, gamma=ours.gamma_, class_weight=class_weight).fit(X, y, weight)
    new, _ = rings(100, classes=classes, seed=1)
    np.testing.assert_allclose(ours.decision_function(new), votes(theirs, new), atol=2e-3)
    theirs.set_params(decision_function_shape="ovr", break_ties=True)
    np.testing.assert_array_equal(ours.predict(new), theirs.predict(new))
    np.testing.assert_array_equal(ours.support_, theirs.support_)


def test_an_offset_cancels_nothing():
    X, y = rings(300)
    X += np.float32(1e3)
    assert GaussianSVM(5.0).fit(X, y).score(X, y) >= SVC(C=5.0).fit(X.astype(float), y).score(X, y)


def test_gamma_is_in_units_of_scikit_learns_scale():
    X, y = rings()
    ours, theirs = GaussianSVM(gamma=1.0).fit(X, y), SVC(gamma="scale").fit(X, y)
    assert ours.gamma_ == pytest.approx(theirs._gamma, rel=1e-5)
    assert GaussianSVM(gamma=0.5).fit(X, y).gamma_ == pytest.approx(ours.gamma_ / 2)


def test_long_predictions_are_cut_into_blocks(monkeypatch):
    X, y = rings()
    model = GaussianSVM().fit(X, y)
    whole = model.decision_function(X)
    monkeypatch.setattr(base, "_CELLS", 1000)
    np.testing.assert_allclose(model.decision_function(X), whole, rtol=1e-5)


def test_the_search_finds_what_is_not_linear():
    X, y = rings()
    found = HEADS["rbf-svm"].search(X, y, folds_of(y))
    assert found.score > 0.9 > 0.6 > HEADS["linear"].search(X, y, folds_of(y)).score
    assert found.notes == ()
    assert set(found.params) == {"treatment", "C", "gamma"}


@pytest.mark.parametrize("classes", [2, 3])
def test_out_of_fold_scores_are_those_of_svc_on_each_fold(classes):
    X, y = rings(classes=classes)
    folds = folds_of(y)
    found = HEADS["rbf-svm"].search(X, y, folds, class_weight="balanced")
    steps = {"l2": [Normalizer()], "power": [FunctionTransformer(Power())], "standard": []}
    for train, valid in folds:
        # Standardised columns have unit variance: scikit-learn's scale is 1 / d.
        gamma = found.params["gamma"] / X.shape[1]
        rival = SVC(C=found.params["C"], gamma=gamma, class_weight="balanced")
        alone = make_pipeline(*steps[found.params["treatment"]], StandardScaler(), rival)
        alone.fit(X[train], y[train])
        theirs = votes(rival, alone[:-1].transform(X[valid]))
        if classes == 2:
            theirs = np.stack([-theirs / 2, theirs / 2], axis=1)
        np.testing.assert_allclose(found.logits[valid], theirs, atol=5e-3)


@pytest.mark.parametrize("limit", ["rows", "memory"])
def test_of_many_rows_a_part_is_trained_on_and_a_part_chooses(limit, monkeypatch):
    X, y = rings(400)
    options = {}
    if limit == "rows":
        monkeypatch.setattr(svm, "_MOST_ROWS", 300)
        monkeypatch.setattr(svm, "_ENOUGH_ROWS", 150)
        said = (
            r"chose its settings on 15\d of 400 images, .* of each class, and was fitted on 30\d\."
        )
    else:
        options["memory"] = 24 * 300**2
        said = r"was trained on 30\d of 400 images, a random part of each class\."
    found = HEADS["rbf-svm"].search(X, y, folds_of(y), **options)
    assert len(found.notes) == 1 and re.fullmatch(f"rbf-svm {said}", found.notes[0])
    judged = ~np.isnan(found.logits).any(axis=1)
    assert judged.sum() == int(re.search(r"\d+", found.notes[0])[0])
    assert (found.best.predicted >= 0).tolist() == judged.tolist()
    assert found.score > 0.9
    right = found.classes[logits(found.estimator, X).argmax(axis=1)] == y
    assert right.mean() > 0.9
    again = HEADS["rbf-svm"].search(X, y, folds_of(y), **options)
    np.testing.assert_array_equal(again.logits, found.logits)


def test_parameters_out_of_range_are_refused():
    X, y = rings(40)
    with pytest.raises(ValueError, match="must be positive"):
        GaussianSVM(gamma=0.0).fit(X, y)
    with pytest.raises(ValueError, match="one class"):
        GaussianSVM().fit(X, np.full(40, "a"))
