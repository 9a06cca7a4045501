"""Treatments and principal components before heads that compare rows or columns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_wine
from sklearn.preprocessing import StandardScaler

from featcache.heads.base import transformed
from featcache.heads.preparation import Preparation, component_counts
from featcache.heads.rows import TrainingRows
from featcache.heads.search import SearchResult
from featcache.heads.table import HEADS
from featcache.store.splitting import folds


def buried(n: int = 700, d: int = 280, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two classes that differ in many directions of little variance, beside a few of much.

    A few directions that say nothing hold nearly all of the variance, so that distances between
    rows, and columns, are all noise until the components are whitened.
    """
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % 2
    loud = 30 * rng.normal(size=(n, 8))
    soft = rng.normal(size=(n, 60)) + 0.35 * np.where(codes == 1, 1, -1)[:, None]
    turn = np.linalg.qr(np.random.default_rng(7).normal(size=(d, 68)))[0]
    X = np.concatenate([loud, soft], axis=1) @ turn.T + 0.02 * rng.normal(size=(n, d))
    return X.astype(np.float32), np.array(["cat", "dog"])[codes]


def rows_of(X: np.ndarray, y: np.ndarray) -> TrainingRows:
    return TrainingRows.check(X, y, folds(y, cv=3, random_state=0), None)


@pytest.fixture(scope="module", params=["rbf-svm", "knn", "forest"])
def found(request: pytest.FixtureRequest) -> SearchResult:
    X, y = buried()
    return HEADS[request.param].search(X, y, folds(y, cv=3, random_state=0))


def test_components_are_found_where_they_help(found: SearchResult) -> None:
    new, truth = buried(seed=1)
    assert "n_components" in found.params
    without = max(one.score for one in found.trials if "n_components" not in one.params)
    assert found.score > without + 0.03
    assert (found.classes[found.estimator.logits(new).argmax(axis=1)] == truth).mean() > without


def test_the_last_fit_has_the_steps_of_the_folds(found: SearchResult) -> None:
    steps = [step for step in found.estimator.steps if step.kind in ("power", "scale", "matrix")]
    assert [step.kind for step in steps][-2:] == ["scale", "matrix"]
    # Of the 68 directions none is left out; of the noise, what is a millionth of the largest.
    count = found.params["n_components"]
    assert min(count, 68) <= len(steps[-1].arrays()["bias"]) <= count


@pytest.mark.parametrize("columns", [280, 3100])
def test_components_are_learnt_from_training_rows_alone(columns: int) -> None:
    X, y = buried(120, columns)
    rows = rows_of(X, y)
    train, valid = rows.folds[1]
    some = Preparation("power", 5)
    before = some.on_fold(rows, 1)
    assert before.shape == (120, 5)
    np.testing.assert_allclose(before[train].mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(before[train].std(axis=0, ddof=1), 1, atol=1e-3)
    X[valid] = 1e4 * np.random.default_rng(0).normal(size=(len(valid), columns))
    np.testing.assert_array_equal(some.on_fold(rows_of(X, y), 1)[train], before[train])


def test_the_leading_components_are_those_of_fewer() -> None:
    rows = rows_of(*buried(300))
    many, few = (Preparation(n_components=count).on_fold(rows, 0) for count in (20, 10))
    np.testing.assert_allclose(many[:, :10], few, atol=1e-5)


def test_components_of_no_variance_are_left_out() -> None:
    X, y = buried(300)
    X[:, 5:] = X[:, :5].repeat(55, axis=1)  # five directions in 280 columns
    rows = rows_of(X, y)
    *_, matrix = steps = Preparation(n_components=20).fit(rows)
    assert matrix.arrays()["weight"].shape == (5, 280)
    new = X + 0.01 * np.random.default_rng(0).normal(size=X.shape).astype(np.float32)
    found = transformed(steps, new)
    np.testing.assert_allclose(found, transformed(steps, X), atol=0.1)
    layers = torch.nn.Sequential(*(step.module() for step in steps))
    with torch.inference_mode():
        np.testing.assert_allclose(layers(torch.from_numpy(new)).numpy(), found, atol=1e-3)
    # All columns are constant: nothing is divided by zero.
    X[:] = 3
    assert np.isfinite(Preparation(n_components=20).on_fold(rows_of(X, y), 0)).all()


def test_without_components_nothing_is_copied_that_need_not_be() -> None:
    rows = rows_of(*buried(60))
    one, other, last = Preparation(scaled=False).on_folds(rows)
    assert one is other is last is rows.X


def test_many_rows_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcache.heads.preparation._MOST_ROWS", 90)
    seen: list[int] = []
    fit = StandardScaler.fit

    def counted(self: Any, X: np.ndarray, y: Any = None) -> Any:
        seen.append(len(X))
        return fit(self, X, y)

    monkeypatch.setattr(StandardScaler, "fit", counted)
    rows = rows_of(*buried(300))
    assert Preparation(n_components=4).on_fold(rows, 0).shape == (300, 4)
    assert seen == [90]


def test_counts_leave_out_half_of_the_columns_and_rows() -> None:
    wanted = (64, 128, 256)
    X, y = buried(300, 280)
    assert component_counts(rows_of(X, y), wanted) == (64,)  # 200 rows of training
    views = TrainingRows.check(np.stack([X, X], axis=1), y, folds(y, cv=3, random_state=0), None)
    assert component_counts(views, wanted) == (64, 128)
    assert component_counts(rows_of(X[:, :100], y), wanted) == ()


@pytest.mark.parametrize("head", ["forest", "knn"])
def test_tiny_features_are_told_apart_like_others(head: str) -> None:
    X, y = load_wine(return_X_y=True)
    X, parts = X.astype(np.float32), folds(y.astype(str), cv=2)
    usual, tiny = (HEADS[head].search(one, y, parts) for one in (X, np.ldexp(X, -100)))
    for one, other in zip(usual.trials, tiny.trials, strict=True):
        assert one.fold_scores == other.fold_scores
    found = tiny.estimator.logits(np.ldexp(X, -100))
    np.testing.assert_allclose(found, usual.estimator.logits(X), rtol=1e-5, atol=1e-5)
