from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_classification
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from featcache.errors import TrainingError
from featcache.heads import linear
from featcache.heads.base import FittedHead
from featcache.heads.calibration import Calibration, fit_calibration, fit_temperature
from featcache.heads.linear import LinearHead
from featcache.heads.rows import FeatureBlocks, TrainingRows
from featcache.heads.search import Search, search
from featcache.heads.solver import minimise
from featcache.heads.svm import GaussianSVMHead
from featcache.heads.table import HEADS
from featcache.results.evaluation import Evaluation
from featcache.store.splitting import folds


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


def balanced() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows to train and to test on, of which 8.4 % are of the second class."""
    X, y = make_classification(
        4000, 20, n_informative=5, weights=[0.926], class_sep=0.6, flip_y=0.02, random_state=0
    )
    X = X.astype(np.float32)
    return X[:2000], y[:2000], X[2000:], y[2000:]


def test_balanced_weights_get_probabilities_that_are_true() -> None:
    X, y, new, truth = balanced()
    found = HEADS["linear"].search(X, y, folds(y.astype(str), cv=5), class_weight="balanced")
    logits = found.estimator.logits(new)
    proba = found.calibration.proba(logits)
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    theirs = CalibratedClassifierCV(model, method="sigmoid", cv=5).fit(X, y).predict_proba(new)
    assert metrics.log_loss(truth, proba) < metrics.log_loss(truth, theirs) + 0.01
    assert abs(proba[:, 1].mean() - truth.mean()) < 0.02
    one = softmax(logits / fit_temperature(found.logits, y), axis=1)  # what a temperature leaves
    assert metrics.log_loss(truth, one) > 0.4 and one[:, 1].mean() > 0.3
    assert np.mean(logits.argmax(axis=1)) > 2 * np.mean(proba.argmax(axis=1))
    judged = Evaluation(
        np.arange(len(new)), truth, proba, ("no", "yes"), predicted=logits.argmax(axis=1)
    )
    recall = metrics.balanced_accuracy_score(truth, logits.argmax(axis=1))
    assert judged.balanced_accuracy == pytest.approx(recall)
    assert judged.classwise_ece < 0.03
    assert Evaluation(np.arange(len(new)), truth, one, ("no", "yes")).classwise_ece > 0.2


@pytest.mark.parametrize("parts", [1, 4])
def test_a_bias_is_fitted_where_it_is_better_on_other_rows(parts: int) -> None:
    logits, y = scored()
    rows = np.arange(len(y))
    by_part = [(rows[rows % 4 != k], rows[rows % 4 == k]) for k in range(4)]
    given = by_part if parts == 4 else [(rows[:0], rows)]
    plain = fit_calibration(3 * logits, y, given)
    assert plain == Calibration(fit_temperature(3 * logits, y), (0.0,) * 4)
    found = fit_calibration(3 * logits + np.array([0.0, 3.0, -6.0, 0.0]), y, given)
    assert found.temperature == pytest.approx(3, rel=0.1)
    bias = np.array(found.bias) - found.bias[0]
    np.testing.assert_allclose(bias, [0, -1, 2, 0], atol=0.2)


def test_probabilities_stay_calibrated_under_a_strong_penalty() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(900) % 3
    X = (rng.normal(size=(900, 5)) + np.eye(3, 5)[y]).astype(np.float32)
    rows = TrainingRows.check(X, y, folds(y.astype(str), cv=3), None)
    losses = []
    for C in (3e-6, 1e-2):
        found = search(LinearHead(Cs=[C], treatments=["standard"], refine=False), rows)
        proba = found.calibration.proba(found.logits)
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
    rows = TrainingRows.check(X, y, folds(y.astype(str), cv=2), None)
    Cs = [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    head = LinearHead()
    paths = linear._Paths(head, rows, Search(rows, head.options))
    reached = {}

    def kept(design: Any, problems: Any, V: Any, **options: Any) -> Any:
        solution = minimise(design, problems, V, **options)
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
        patch.setitem(linear._COLUMNS, "log", 10)  # one C at a time
        paths.follow("standard", Cs, stop_early=False)
        near = dict(reached)
        paths.follow("standard", Cs, tol=1e-7, stop_early=False)
    assert len(near) == 10
    for problem, value in near.items():
        assert value == pytest.approx(reached[problem], rel=2e-3)


def test_loading_a_predictor_waits_for_no_trees() -> None:
    code = (
        "import sys, featcache.predictor.predictor; "
        "print([name for name in ('sklearn.ensemble', 'sklearn.svm', 'sklearn.model_selection', "
        "'lightgbm', 'matplotlib', 'torchvision', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("head", ["linear", "svm"])
def test_many_rows_choose_roughly_on_a_part(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_MANY", 500)
    monkeypatch.setattr(linear, "_SOME", 240)
    rng = np.random.default_rng(0)
    y = np.arange(600) % 3
    X = (rng.normal(size=(600, 8)) + 2 * np.eye(3, 8)[y]).astype(np.float32)
    parts = folds(y.astype(str), cv=3)
    found = HEADS[head].search(X, y, parts)
    said = rf"{head} chose its treatment, and C to within a decade, on 24\d of 600 images"
    assert len(found.notes) == 1 and re.match(said, found.notes[0])
    assert len({one.params["treatment"] for one in found.trials}) == 1
    Cs = [one.params["C"] for one in found.trials]
    assert max(Cs) / min(Cs) < 1001 and len(Cs) <= 5
    assert not np.isnan(found.logits).any()
    blocks = HEADS[head].search(FeatureBlocks.of(X), y, parts)
    assert (blocks.params, blocks.notes) == (found.params, found.notes)
    np.testing.assert_allclose(blocks.estimator.logits(X), found.estimator.logits(X), atol=1e-2)
    views = np.stack([X, X], axis=1)[:400]
    both = HEADS[head].search(FeatureBlocks.of(views), y[:400], folds(y[:400].astype(str), cv=3))
    assert re.search(r"on 12\d of 400 images", both.notes[0])


@pytest.mark.parametrize("views", [1, 2])
def test_a_part_keeps_every_class_in_every_fold(views: int) -> None:
    y = np.where(np.arange(600) < 3, 0, 1 + np.arange(600) % 2)
    X = np.random.default_rng(0).normal(size=(600, views, 4)).astype(np.float16)
    parts = folds(y.astype(str), cv=3)
    for features in (X, FeatureBlocks.of(X)):
        rows = TrainingRows.check(features, y, parts, np.arange(600.0))
        part = rows.sample(60, random_state=0)
        assert part.images is not None and 60 <= len(part) < 75
        np.testing.assert_array_equal(part.features(), X[part.images].reshape(-1, 4))
        np.testing.assert_array_equal(part.codes, y[part.images])
        np.testing.assert_array_equal(part.weight, part.images)
        for (train, valid), (more, whole) in zip(part.folds, parts, strict=True):
            assert set(part.images[train]) <= set(more) and set(part.images[valid]) <= set(whole)
            assert len(np.unique(part.codes[train])) == len(np.unique(part.codes[valid])) == 3
            assert len(train) + len(valid) == len(part)
        values = part.spread(part.codes.astype(np.float32))
        np.testing.assert_array_equal(values[part.images], y[part.images])
        assert np.isnan(values).sum() == 600 - len(part)
        again = part.sample(30, random_state=1)
        np.testing.assert_array_equal(again.codes, y[again.images])


@pytest.mark.parametrize("views", [1, 2])
def test_blocks_give_some_images(views: int) -> None:
    X = np.random.default_rng(0).normal(size=(50, views, 3)).astype(np.float16)
    some = np.array([0, 7, 8, 31, 49])
    numbers = (some[:, None] * views + np.arange(views)).ravel()
    expected = X[some].reshape(-1, 3).astype(np.float32)
    np.testing.assert_array_equal(FeatureBlocks.of(X).take(numbers), expected)


def of_groups() -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Rows of three classes whose folds lack one: the last has the first two, the first all."""
    rng = np.random.default_rng(0)
    y = np.repeat(["ant", "bee", "wasp"], 40)
    X = (rng.normal(size=(120, 5)) + np.eye(3, 5)[np.unique(y, return_inverse=True)[1]]).astype(
        np.float32
    )
    valid = [np.r_[0:20, 40:60, 80:90], np.r_[20:30, 90:120], np.r_[30:40, 60:80]]
    return X, y, [(np.setdiff1d(np.arange(120), some), some) for some in valid]


def test_accuracy_and_f1_are_pooled_where_a_fold_lacks_a_class() -> None:
    X, y, parts = of_groups()
    for scoring in ("accuracy", "balanced_accuracy", "f1_macro"):
        found = HEADS["ridge"].search(X, y, parts, scoring=scoring)
        predicted = found.classes[found.logits.argmax(axis=1)]
        score = metrics.f1_score if scoring == "f1_macro" else getattr(metrics, f"{scoring}_score")
        options = {"average": "macro"} if scoring == "f1_macro" else {}
        assert found.score == pytest.approx(score(y, predicted, **options), abs=1e-12)


def test_log_loss_and_top_k_know_the_labels_that_a_fold_lacks() -> None:
    X, y, parts = of_groups()
    for scoring in ("neg_log_loss", "top_k_accuracy"):
        found = HEADS["ridge"].search(X, y, parts, scoring=scoring)
        codes = np.searchsorted(found.classes, y)
        proba = softmax(found.logits / fit_temperature(found.logits, codes), axis=1)
        score = getattr(metrics, scoring.replace("neg_", "").replace("accuracy", "accuracy_score"))
        each = [score(y[rows], proba[rows], labels=found.classes) for _, rows in parts]
        sign = -1 if scoring == "neg_log_loss" else 1
        assert found.score == pytest.approx(sign * np.mean(each), abs=1e-6)


@pytest.mark.parametrize("scoring", ["roc_auc_ovr", "roc_auc", "average_precision"])
def test_auc_is_the_mean_of_the_folds_where_it_is_defined(scoring: str) -> None:
    X, y, parts = of_groups()
    if scoring != "roc_auc_ovr":
        some = y != "wasp"
        place = np.cumsum(some) - 1
        parts = [(place[a[some[a]]], place[b[some[b]]]) for a, b in parts]
        X, y = X[some], y[some]
    found = HEADS["ridge"].search(X, y, parts, scoring=scoring)
    whole = [rows for _, rows in parts if len(np.unique(y[rows])) == len(found.classes)]
    assert len(whole) == (1 if scoring == "roc_auc_ovr" else 2)
    scores = found.logits if scoring == "roc_auc_ovr" else np.diff(found.logits, axis=1)[:, 0]
    if scoring == "roc_auc_ovr":
        proba = softmax(
            found.logits / fit_temperature(found.logits, np.searchsorted(found.classes, y)), axis=1
        )
        each = [metrics.roc_auc_score(y[rows], proba[rows], multi_class="ovr") for rows in whole]
    else:
        score = getattr(metrics, f"{scoring}_score")
        each = [score(y[rows] == "bee", scores[rows]) for rows in whole]
    assert found.score == pytest.approx(np.mean(each), abs=1e-6)
    assert sum(np.isnan(found.fold_scores)) == 3 - len(whole)
    assert found.params["alpha"] != found.trials[0].params["alpha"]  # NaN is never the best


def test_a_scoring_that_no_fold_can_give_is_refused_before_training() -> None:
    X, y, parts = of_groups()
    with pytest.raises(TrainingError, match="no fold has validation images of every class"):
        HEADS["ridge"].search(X, y, parts[1:], scoring="roc_auc_ovr")
    two = [(np.arange(0, 80), np.arange(0, 40))]
    with pytest.raises(TrainingError, match="no validation image is of"):
        HEADS["ridge"].search(X[:80], y[:80], two, scoring="f1")


@pytest.mark.parametrize(
    "scoring",
    ["f1", "precision", "recall", "jaccard", "average_precision", "roc_auc", "neg_brier_score"],
)
def test_scorings_of_two_classes_take_names(scoring: str) -> None:
    X, y, _ = of_groups()
    X, y = X[:80], y[:80]
    parts = folds(y, cv=4)
    found = HEADS["ridge"].search(X, y, parts, scoring=scoring)
    codes = np.searchsorted(found.classes, y)
    proba = softmax(found.logits / fit_temperature(found.logits, codes), axis=1)[:, 1]
    scorer = metrics.get_scorer(scoring)
    score, sign = scorer._score_func, scorer._sign
    values = found.logits.argmax(axis=1) if scorer._response_method == "predict" else proba
    each = [sign * score(codes[rows], values[rows]) for _, rows in parts]
    assert found.score == pytest.approx(np.mean(each), abs=1e-6)


def test_a_misspelt_class_weight_is_one_sentence() -> None:
    X, y, parts = of_groups()
    for head in ("ridge", "forest", "rbf-svm"):
        with pytest.raises(TrainingError, match="'balanced', a dict or None, got 'balancd'"):
            HEADS[head].search(X, y, parts, class_weight="balancd")


def test_a_tie_goes_to_the_lower_log_loss() -> None:
    """A rare class that no penalty recalls: balanced by hand, all settings have equal scores."""
    rng = np.random.default_rng(0)
    y = np.r_[np.zeros(220, int), np.ones(20, int)]
    X = rng.normal(size=(240, 4)).astype(np.float32)
    X[220:] += 0.7
    rows = TrainingRows.check(X, y, folds(y.astype(str), cv=4), None)
    head = LinearHead(Cs=[1e-5, 1e-3, 1e-1], treatments=["standard"], refine=False)
    found = search(head, rows)
    assert {round(one.score, 9) for one in found.trials} == {round(220 / 240, 9)}
    losses = [
        metrics.log_loss(y, softmax(one.logits / fit_temperature(one.logits, y), axis=1))
        for one in found.trials
    ]
    assert found.best is found.trials[int(np.argmin(losses))]
    assert found.params["C"] > 1e-5


def in_style(seed: int, n: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ten classes of two clusters each, drawn in a style that shifts all columns."""
    rng = np.random.default_rng(1)
    centres = 0.75 * (rng.normal(size=(10, 1, 10)) + rng.normal(size=(10, 2, 10)))
    W, style = rng.normal(size=(10, 48)) / 10**0.5, rng.normal(size=48)
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 10
    hidden = centres[y, rng.integers(0, 2, n)] + 0.8 * rng.normal(size=(n, 10))
    X = hidden @ W + (0.3 + 0.5 * shift) * rng.normal(size=(n, 48)) + shift * style
    return X.astype(np.float32), y


def test_a_wider_kernel_is_preferred_within_one_standard_error() -> None:
    X, y = in_style(10, 400, 0.0)
    other, truth = in_style(1, 2000, 1.0)
    head = GaussianSVMHead(treatments=["standard"])
    rows = TrainingRows.check(X, y, folds(y.astype(str), cv=5))
    found = search(head, rows)
    at_start = {one.params["gamma"]: one for one in found.trials if one.params["C"] == 10.0}
    best = max(at_start.values(), key=lambda one: one.score)
    within = []
    for gamma, one in at_start.items():
        off = np.subtract(best.fold_scores, one.fold_scores)
        if off.mean() <= off.std(ddof=1) / 5**0.5:
            within.append(gamma)
    chosen = found.params["gamma"]
    assert chosen == min(within) < best.params["gamma"]
    for gamma, least, most in ((chosen, 0.6, 1.0), (best.params["gamma"], 0.0, 0.5)):
        steps = head.fit(rows, {**found.params, "gamma": gamma})
        right = (FittedHead(steps, np.arange(10)).logits(other).argmax(axis=1) == truth).mean()
        assert least < right < most
