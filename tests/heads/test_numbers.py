"""The numbers that heads give: beside scikit-learn's, on its own data sets, and on awkward ones."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

from featcache.errors import TrainingError
from featcache.heads.linear import LinearClassifier, LinearHead
from featcache.heads.mlp import MLP
from featcache.heads.neighbors import CosineNeighbors
from featcache.heads.ridge import Ridge
from featcache.heads.rows import FeatureBlocks, TrainingRows
from featcache.heads.search import SearchResult, search
from featcache.heads.solver import minimise
from featcache.heads.steps import Matrix
from featcache.heads.svm import GaussianSVM
from featcache.heads.table import HEADS
from featcache.heads.trees import BoostedTrees
from featcache.results.evaluation import Evaluation
from featcache.store.splitting import folds


def evaluated(found: SearchResult, X: np.ndarray, y: np.ndarray) -> Evaluation:
    proba = found.calibration.proba(found.estimator.logits(X))
    names = tuple(found.classes.astype(str).tolist())
    codes = np.searchsorted(found.classes, y)
    return Evaluation(np.arange(len(y)).astype(str), codes, proba, names)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("head", ["linear", "svm"])
def test_probabilities_of_digits_are_calibrated(head: str, seed: int) -> None:
    # Pixels at the edge are dark in all images of a fold's training part, and not in others.
    X, y = load_digits(return_X_y=True)
    A, B, a, b = train_test_split(
        X.astype(np.float32), y, test_size=0.5, stratify=y, random_state=seed
    )
    found = HEADS[head].search(A, a, folds(a.astype(str), cv=5, random_state=seed))
    held_out = evaluated(found, B, b)
    assert held_out.accuracy > 0.94
    assert held_out.log_loss < 0.22
    assert held_out.ece < 0.04
    assert np.abs(found.logits).max() < 1.5 * np.abs(found.estimator.logits(A)).max()


@pytest.mark.parametrize("head", ["linear", "svm", "ridge"])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_columns_that_a_fold_holds_constant_say_nothing_there(head: str, offset: float) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    X = rng.normal(size=(300, 40)) + np.eye(3, 40)[y]
    rare = np.where(rng.random((300, 40)) < 0.005, rng.exponential(5, (300, 40)), 0) + offset
    X = np.concatenate([X, rare], axis=1).astype(np.float32)
    parts = folds(y.astype(str), cv=5)
    constant = np.stack([X[train].std(axis=0) == 0 for train, _ in parts])
    assert constant.sum() > 5 and not constant.all(axis=0).all()
    found = HEADS[head].search(X, y, parts)
    assert np.abs(found.logits).max() < 4 * np.abs(found.estimator.logits(X)).max()
    X[:, 40:] = offset + (X[:, 40:] > offset)
    plain = {"refine": False, "Cs": [0.01]} if head != "ridge" else {"alphas": [1.0]}
    kind = HEADS[head](treatments=["standard"], **plain)
    scores = [search(kind, TrainingRows.check(X, y, [fold])).logits for fold in parts]
    for fold, dead, before in zip(parts, constant, scores, strict=True):
        # A fold's scores do not change with what only its validation rows hold there.
        moved = X.copy()
        moved[np.ix_(fold[1], dead)] += 1e3
        after = search(kind, TrainingRows.check(moved, y, [fold])).logits
        np.testing.assert_allclose(after, before, atol=0.02 * np.nanstd(before))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("length", [1e-6, 1e-14, 1e-21])
def test_a_head_computes_on_tiny_rows_what_was_cross_validated(
    small: Any, head: str, length: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.heads.mlp._CHECKPOINTS", (6,))
    X, y, parts = small
    tiny = np.where(np.arange(90)[:, None] % 2, X, X * np.float32(length))
    with np.errstate(under="ignore"):
        found = HEADS[head].search(tiny, y, parts)
        scores = found.estimator.logits(tiny)
    assert (found.classes[scores.argmax(axis=1)] == y).mean() > found.score - 0.05
    layers = [step.module() for step in found.estimator.steps]
    if None not in layers:
        with torch.inference_mode():
            grafted = torch.nn.Sequential(*layers)(torch.from_numpy(tiny)).numpy()
        np.testing.assert_allclose(grafted, scores, atol=1e-4 * np.abs(scores).max())


# --- what no head can compute with ----------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    y = np.arange(90) % 3
    X = np.random.default_rng(0).normal(size=(90, 6)) + 2 * np.eye(3, 6)[y]
    return X.astype(np.float32), y, folds(y.astype(str), cv=3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e19])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("blocks", [False, True])
def test_features_that_cannot_be_computed_with_are_refused(
    small: Any, head: str, value: float, blocks: bool
) -> None:
    X, y, parts = small
    views = np.stack([X, X], axis=1)
    views[40, 1, 2] = value
    given, options = (FeatureBlocks.of(views), {"memory": 1 << 20}) if blocks else (views, {})
    with pytest.raises(TrainingError, match=r"column 2 of image 40 is -?(nan|inf|1e\+19)"):
        HEADS[head].search(given, y, parts, **options)


def test_sample_weights_are_checked(small: Any) -> None:
    X, y, parts = small
    for weight, expected in (
        (np.ones(89), r"90 rows, weights of shape \(89,\)"),
        (np.where(np.arange(90) == 7, -1.0, 1.0), "row 7 is -1"),
        (np.where(np.arange(90) == 8, np.nan, 1.0), "row 8 is nan"),
        (np.where(y == 1, 0.0, 1.0), "no training row of class '1'"),
    ):
        with pytest.raises(TrainingError, match=expected):
            HEADS["ridge"].search(X, y, parts, sample_weight=weight)


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
@pytest.mark.parametrize("head", HEADS)
def test_class_weights_that_are_none_are_refused(small: Any, head: str, weight: float) -> None:
    X, y, parts = small
    with pytest.raises(TrainingError, match="class_weight is finite and not negative"):
        HEADS[head].search(X, y, parts, class_weight={1: weight})


@pytest.mark.parametrize(
    "kind", [LinearClassifier, Ridge, GaussianSVM, CosineNeighbors, MLP, BoostedTrees]
)
def test_estimators_refuse_them_too(small: Any, kind: Any) -> None:
    X, y, _ = small
    with pytest.raises(ValueError, match="class_weight is finite and not negative"):
        kind(class_weight={1: -1.0}).fit(X, y)


def test_fits_that_did_not_converge_are_said(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, parts = small
    with pytest.warns(ConvergenceWarning, match="did not converge in max_iter=2 passes"):
        LinearClassifier(10.0, max_iter=2).fit(X, y)
    monkeypatch.setattr("featcache.heads.linear.minimise", partial(minimise, max_iter=2))
    head = LinearHead(treatments=["l2"], Cs=[100.0], refine=False)
    with monkeypatch.context() as patch:
        patch.setattr(LinearHead, "fit", lambda *_: [Matrix(np.eye(3, 6), np.zeros(3))])
        found = search(head, TrainingRows.check(X, y, parts))
    assert found.notes == ("l2, C 100 did not converge in 2 passes over the rows.",)


# --- beside other trainings -----------------------------------------------------------------------


def test_trainings_in_threads_leave_torch_its_threads(small: Any) -> None:
    X, y, _ = small
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in pool.map(lambda C: LinearClassifier(C).fit(X, y), [1e-3, 1e-2, 0.1, 1.0] * 3):
                pass
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


@contextmanager
def unusual_settings() -> Iterator[None]:
    with (
        np.errstate(all="raise"),
        config_context(transform_output="pandas", enable_metadata_routing=True),
        torch.device("meta"),
        torch.inference_mode(),
    ):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("head", HEADS)
def test_settings_of_the_program_around_change_nothing(
    small: Any, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.heads.mlp._CHECKPOINTS", (2,))
    X, y, parts = small
    plain = HEADS[head].search(X, y, parts)
    with unusual_settings():
        found = HEADS[head].search(X, y, parts)
        scores = found.estimator.logits(X)
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_default_device().type == "meta"
    assert found.params == plain.params
    np.testing.assert_array_equal(found.logits, plain.logits)
    np.testing.assert_array_equal(scores, plain.estimator.logits(X))


def test_another_seed_searches_other_networks(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y, parts = small
    monkeypatch.setattr("featcache.heads.mlp._CHECKPOINTS", (1,))
    one, same, other = (
        HEADS["mlp"].search(X, y, parts, random_state=seed).trials[0].logits for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)


@pytest.mark.parametrize(
    "head", [BoostedTrees(), CosineNeighbors(), GaussianSVM(), LinearClassifier(), MLP(), Ridge()]
)
def test_an_estimator_refuses_features_that_are_too_large(head: Any, small: Any) -> None:
    X, y, _ = small
    with pytest.raises(TrainingError, match=r"at most 1e\+15; column \d+ of image \d+ is"):
        head.fit(X * np.float32(1e19), y)
