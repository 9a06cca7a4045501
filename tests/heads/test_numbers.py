"""The numbers that heads give: beside scikit-learn's, on its own data sets, and on awkward ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from featcache.heads.rows import TrainingRows
from featcache.heads.search import SearchResult, search
from featcache.heads.table import HEADS
from featcache.results.evaluation import Evaluation
from featcache.store.splitting import folds


def evaluated(found: SearchResult, X: np.ndarray, y: np.ndarray) -> Evaluation:
    proba = softmax(found.estimator.logits(X).astype(np.float64) / found.temperature, axis=1)
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
