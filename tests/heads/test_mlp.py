from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.estimator_checks import parametrize_with_checks

from featcache.heads.mlp import MLP
from featcache.heads.rows import FeatureBlocks
from featcache.heads.table import HEADS
from tests.scores import logits

UNEQUAL = {
    "check_sample_weight_equivalence_on_dense_data": "minibatches are drawn from other rows",
    "check_sample_weight_equivalence_on_sparse_data": "minibatches are drawn from other rows",
}


@parametrize_with_checks(
    [MLP(16, epochs=15, learning_rate=0.03, batch_size=16)],
    expected_failed_checks=lambda estimator: UNEQUAL,
)
def test_it_is_a_scikit_learn_classifier(estimator, check):
    check(estimator)


def shells(n=400, d=12, classes=3, seed=0):
    """Classes by distance from the centre: no linear head can tell them apart."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    X *= 1 / np.linalg.norm(X, axis=1, keepdims=True)
    codes = rng.permutation(np.arange(n) % classes)
    X *= (1.0 + 1.5 * codes)[:, None]
    scale = np.exp(np.linspace(-1.5, 1.5, d))
    return (X * scale + 3 * scale).astype(np.float32), np.array([f"class {c}" for c in codes])


def folds_of(y, cv=3):
    split = StratifiedKFold(cv, shuffle=True, random_state=0)
    return list(split.split(np.zeros(len(y)), y))


@pytest.fixture(autouse=True, scope="module")
def short_searches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.heads.mlp._CHECKPOINTS", (2, 10, 40))
        patch.setattr("featcache.heads.mlp._TREATMENTS", ("standard",))
        patch.setattr("featcache.heads.mlp._DROPOUTS", (0.1,))
        patch.setattr("featcache.heads.mlp._WEIGHT_DECAY", 0.1)
        yield


@pytest.fixture(scope="module")
def found(short_searches):
    X, y = shells()
    return HEADS["mlp"].search(X, y, folds_of(y))


def test_it_learns_what_a_linear_head_cannot(found):
    new, truth = shells(seed=1)
    assert found.score > 0.75
    assert (found.classes[logits(found.estimator, new).argmax(axis=1)] == truth).mean() > 0.75
    assert found.score == max(one.score for one in found.trials)


def test_another_seed_gives_another_network():
    X, y = shells()
    other = MLP(random_state=1, epochs=1).fit(X, y)
    assert not np.array_equal(other.steps_[1].weight, MLP(epochs=1).fit(X, y).steps_[1].weight)


@pytest.mark.parametrize("classes", [2, 3])
def test_its_layers_give_its_probabilities(classes):
    X, y = shells(classes=classes)
    fitted = MLP(32, epochs=5).fit(X, y)
    scale, first, _, second = fitted.steps_
    Z = (X.astype(np.float64) - scale.mean) / scale.scale
    scores = np.maximum(Z @ first.weight.T + first.bias, 0) @ second.weight.T + second.bias
    np.testing.assert_allclose(softmax(scores, axis=1), fitted.predict_proba(X), atol=1e-5)
    np.testing.assert_allclose(
        softmax(logits(fitted, X), axis=1), fitted.predict_proba(X), atol=1e-5
    )


def test_rows_without_weight_and_heavy_classes():
    X, y = shells()
    wrong = np.random.default_rng(0).random(len(y)) < 0.4
    given, weight = np.where(wrong, "class 0", y), np.where(wrong, 0.0, 1.0)
    fitted = MLP(epochs=60, learning_rate=0.01).fit(X, given, weight)
    assert (fitted.predict(X) == y).mean() > 0.75
    heavy = MLP(epochs=5, class_weight={"class 1": 1000.0}).fit(X, y)
    assert (heavy.predict(X) == "class 1").mean() > 0.8


@pytest.mark.parametrize("wrong", [{"hidden": 0}, {"dropout": 1.0}, {"epochs": 0}])
def test_impossible_parameters_are_refused(wrong):
    X, y = shells(30)
    with pytest.raises(ValueError, match=r"positive|\[0, 1\)"):
        MLP(**wrong).fit(X, y)


def test_of_features_on_disk_it_takes_what_fits():
    X, y = shells()
    found = HEADS["mlp"].search(FeatureBlocks.of(X), y, folds_of(y), memory=3 * X.nbytes // 2)
    assert re.fullmatch(r"mlp was trained on \d+ of \d+ images, .* each class\.", found.notes[0])
    assert 0.45 < (found.best.predicted >= 0).mean() < 0.55
    assert found.score > 0.5


def test_it_leaves_torch_alone():
    X, y = shells(60)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    MLP(epochs=2).fit(X, y)
    torch.testing.assert_close(torch.get_rng_state(), before, rtol=0, atol=0)
