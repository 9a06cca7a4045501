from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from featcache.errors import TrainingError
from featcache.heads import HEADS, fit_temperature, linear
from featcache.heads.linear import LinearClassifier, LinearSearch, search_linear
from featcache.heads.search import Rows
from featcache.heads.solver import minimise
from featcache.splitting import folds


def scored(n: int = 2000, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax are the very probabilities that the labels were drawn with."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(n, k))
    draws = rng.random((n, 1))
    return logits, (softmax(logits, axis=1).cumsum(axis=1) < draws).sum(axis=1)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1.0, 1e6])
def test_a_temperature_undoes_any_scale(scale: float) -> None:
    logits, y = scored()
    assert fit_temperature(scale * logits, y) == pytest.approx(scale, rel=0.1)


def test_scores_that_say_nothing_have_some_temperature() -> None:
    y = np.arange(40) % 2
    assert fit_temperature(np.zeros((40, 2)), y) == 1.0
    assert fit_temperature(np.full((40, 2), np.nan), y) == 1.0
    noise = np.random.default_rng(0).normal(size=(40, 2))
    assert 0 < fit_temperature(noise, y) < np.inf


def test_probabilities_stay_calibrated_under_a_strong_penalty() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(900) % 3
    X = (rng.normal(size=(900, 5)) + np.eye(3, 5)[y]).astype(np.float32)
    rows = Rows.check(X, y, folds(y.astype(str), cv=3), None)
    losses = []
    for C in (3e-6, 1e-2):
        found = search_linear(
            rows, LinearClassifier(), head="x", Cs=[C], treatments=["standard"], refine=False
        )
        proba = softmax(found.logits.astype(np.float64) / found.temperature, axis=1)
        losses.append(-np.log(proba[np.arange(900), y]).mean())
    # The direction is that of the class means: as good as any here, however small the scores.
    assert losses[0] < losses[1] + 0.05


def test_an_unknown_scoring_is_refused_with_near_names() -> None:
    y = np.arange(30) % 3
    X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    with pytest.raises(TrainingError, match=r"no scoring 'acuracy'. Did you mean accuracy"):
        HEADS["ridge"].search(X, y, folds(y.astype(str), cv=3), scoring="acuracy")


def test_a_path_reaches_the_minimum_of_every_problem() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(300) % 5
    X = (rng.normal(size=(300, 40)) + 1.5 * np.eye(5, 40)[y]).astype(np.float32)
    rows = Rows.check(X, y, folds(y.astype(str), cv=2), None)
    Cs = [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    search = LinearSearch(rows, LinearClassifier(), head="linear")
    reached = {}

    def kept(design: Any, problems: Any, W: Any, b: Any, **options: Any) -> Any:
        solution = minimise(design, problems, W, b, **options)
        reached.update(
            zip(
                zip(problems.C.ravel().tolist(), problems.fold.tolist(), strict=True),
                solution.objective[:, 0],
                strict=True,
            )
        )
        return solution

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.heads.linear.minimise", kept)
        patch.setitem(linear._COLUMNS, "softmax", 10)  # one C at a time
        search.path("standard", Cs, stop_early=False)
        near = dict(reached)
        search.path("standard", Cs, tol=1e-7, stop_early=False)
    assert len(near) == 10
    for problem, value in near.items():
        assert value == pytest.approx(reached[problem], rel=2e-3)


def test_loading_a_predictor_waits_for_no_trees() -> None:
    code = (
        "import sys, featcache.predictor; "
        "print([name for name in ('sklearn.ensemble', 'sklearn.svm', 'sklearn.model_selection', "
        "'lightgbm', 'matplotlib', 'torchvision', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
