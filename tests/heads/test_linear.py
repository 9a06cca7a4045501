from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.estimator_checks import (
    check_sample_weight_equivalence_on_dense_data,
    parametrize_with_checks,
)

from featcache.errors import TrainingError
from featcache.heads import solver
from featcache.heads.base import FittedHead
from featcache.heads.linear import LinearClassifier, LinearHead, LinearSVMHead
from featcache.heads.ridge import Ridge, RidgeHead
from featcache.heads.rows import FeatureBlocks, TrainingRows
from featcache.heads.search import SearchOptions, search
from featcache.heads.steps import Power
from featcache.heads.table import HEADS
from tests.scores import logits

LINEAR = ("linear", "svm", "ridge")


WEIGHTS = "check_sample_weight_equivalence_on_dense_data"


def needs_digits(estimator):
    """The weights' contract compares two fits in seven digits; the next test asks for them."""
    exact = isinstance(estimator, Ridge)
    return {} if exact else {WEIGHTS: "stops at six digits"}


@parametrize_with_checks(
    [
        LinearClassifier(),
        LinearClassifier(standardize=False),
        LinearClassifier(loss="squared_hinge"),
        Ridge(),
    ],
    expected_failed_checks=needs_digits,
)
def test_scikit_learn_contract(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    "estimator",
    [
        LinearClassifier(tol=1e-20),
        LinearClassifier(tol=1e-20, standardize=False),
        LinearClassifier(loss="squared_hinge", tol=1e-20),
        Ridge(),
    ],
)
def test_a_weight_of_two_is_a_row_twice(estimator):
    check_sample_weight_equivalence_on_dense_data("head", estimator)


def features(n=400, d=30, classes=3, *, seed=0, shift=3.0):
    """Correlated columns of different scale and mean, none of them free of overlap."""
    rng = np.random.default_rng(seed)
    codes = np.sort(rng.permutation(np.arange(n) % classes))  # stores are sorted by folder
    latent = rng.normal(size=(n, 8)) + 0.8 * rng.normal(size=(classes, 8))[codes]
    X = latent @ rng.normal(size=(8, d)) + rng.normal(size=(n, d))
    X = X * np.exp(rng.normal(size=d)) + shift * rng.normal(size=d)
    return X.astype(np.float32), np.array([f"class {c}" for c in codes])


def folds_of(y, cv=4):
    split = StratifiedKFold(cv, shuffle=True, random_state=0)
    return list(split.split(np.zeros(len(y)), y))


def loss_of(kind, model, X, y, C, weight):
    """Objective at a fitted model, in float64, from its definition."""
    coef, intercept = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    scores = X @ coef.T + intercept
    classes, codes = np.unique(y, return_inverse=True)
    size = (coef**2).sum() / 2
    if kind == "softmax":
        losses = logsumexp(scores, axis=1) - scores[np.arange(len(X)), codes]
        return C * (weight * losses).sum() + size
    own = codes[:, None] == (np.arange(len(classes)) if len(classes) > 2 else np.array([1]))
    margin = scores * np.where(own, 1, -1)
    if kind == "logistic":
        return C * (weight[:, None] * np.logaddexp(0, -margin)).sum() + size
    hinge = np.maximum(0, 1 - margin) ** 2
    return C * (weight[:, None] * hinge).sum() + size


@pytest.mark.parametrize("C", [1e-5, 1e-3, 1e-1, 10.0])
@pytest.mark.parametrize(
    ("n", "d", "classes"), [(400, 30, 3), (400, 30, 2), (60, 200, 4), (300, 5, 12)]
)
def test_logistic_regression_reaches_scikit_learns_objective(n, d, classes, C):
    X, y = features(n, d, classes)
    weight = np.random.default_rng(1).uniform(0.2, 2.0, n)
    kind = "logistic" if classes == 2 else "softmax"
    ours = LinearClassifier(C).fit(X, y, weight)
    # The standardisation is weighted; scikit-learn gets the same coordinates.
    scaler = StandardScaler().fit(X.astype(np.float64), sample_weight=weight)
    Z = scaler.transform(X.astype(np.float64))
    theirs = LogisticRegression(C=C, tol=1e-8, max_iter=10_000).fit(Z, y, weight)
    in_z = LinearClassifier()
    in_z.coef_ = ours.coef_ * scaler.scale_
    in_z.intercept_ = ours.intercept_ + ours.coef_ @ scaler.mean_
    reached = loss_of(kind, in_z, Z, y, C, weight)
    assert reached <= loss_of(kind, theirs, Z, y, C, weight) * (1 + 1e-4)


@pytest.mark.parametrize("C", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(("n", "d", "classes"), [(400, 30, 3), (400, 30, 2), (60, 200, 4)])
def test_linear_svm_reaches_liblinears_objective(n, d, classes, C):
    X, y = features(n, d, classes)
    Z = StandardScaler().fit_transform(X.astype(np.float64))
    ours = LinearClassifier(C, loss="squared_hinge").fit(Z.astype(np.float32), y)
    # liblinear penalises the intercept, which is the weight of a column of such numbers.
    theirs = LinearSVC(C=C, dual=False, intercept_scaling=1e3, tol=1e-8, max_iter=10_000).fit(Z, y)
    one = np.ones(n)
    reached, best = (loss_of("hinge", model, Z, y, C, one) for model in (ours, theirs))
    assert reached == pytest.approx(best, rel=1e-4)


def test_a_free_intercept_lowers_the_svms_loss():
    X, y = features(300, 10, 2)
    y[40:] = y[-1]  # few of one class: the intercept is far from zero
    free = LinearClassifier(1e-4, loss="squared_hinge").fit(X, y)
    bound = make_pipeline(StandardScaler(), LinearSVC(C=1e-4, dual=False)).fit(X, y)
    assert np.mean(free.predict(X) == y) >= np.mean(y == y[-1])
    assert abs(free.decision_function(X).mean()) > 2 * abs(bound.decision_function(X).mean())


def test_the_intercept_is_not_penalised():
    X, y = features()
    a = LinearClassifier(1e-4, tol=1e-9).fit(X, y)
    b = LinearClassifier(1e-4, tol=1e-9).fit(X + np.float32(5), y)
    np.testing.assert_allclose(a.predict_proba(X), b.predict_proba(X + np.float32(5)), atol=1e-4)


@pytest.mark.parametrize(
    "model", [LinearClassifier(0.01), LinearClassifier(0.01, loss="squared_hinge"), Ridge(10.0)]
)
@pytest.mark.parametrize("classes", [2, 3])
def test_class_weights_are_scikit_learns(model, classes):
    X, y = features(400, 12, 3)
    keep = np.concatenate([np.flatnonzero(y != "class 1"), np.flatnonzero(y == "class 1")[:20]])
    X, y = X[keep], y[keep]
    if classes == 2:
        X, y = X[y != "class 2"], y[y != "class 2"]
    Z = StandardScaler().fit_transform(X.astype(np.float64)).astype(np.float32)
    rival = {
        "log": LogisticRegression(C=0.01, tol=1e-8, max_iter=1000),
        "squared_hinge": LinearSVC(C=0.01, dual=False, tol=1e-8, intercept_scaling=300.0),
        "squares": RidgeClassifier(10.0),
    }[getattr(model, "loss", "squares")]
    for weights in ("balanced", {"class 1": 3.0}):
        ours = model.set_params(class_weight=weights).fit(Z, y)
        theirs = rival.set_params(class_weight=weights).fit(Z.astype(np.float64), y)
        a, b = ours.decision_function(Z), theirs.decision_function(Z)
        if classes == 3 and getattr(model, "loss", "") == "log":  # a free constant
            a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(a, b, atol=0.02)
    counts = compute_class_weight("balanced", classes=np.unique(y), y=y)
    by_hand = dict(zip(np.unique(y).tolist(), counts.tolist(), strict=True))
    balanced = model.set_params(class_weight="balanced").fit(Z, y).decision_function(Z)
    given = model.set_params(class_weight=by_hand).fit(Z, y).decision_function(Z)
    np.testing.assert_allclose(balanced, given, atol=1e-5)


@pytest.mark.parametrize("classes", [2, 4])
def test_ridge_of_few_rows_finds_what_products_of_columns_find(classes: int) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % classes
    X = (
        rng.normal(size=(60, 90)) * rng.uniform(0.1, 5, 90)
        + 3
        + 0.8 * y[:, None] * (np.arange(90) < 9)
    )
    X, weight = X.astype(np.float32), rng.uniform(0, 2, 60)
    X[:, 7] = 1.5  # a column that is constant
    splits = list(StratifiedKFold(3).split(X, y))
    options = {"sample_weight": weight, "class_weight": "balanced"}
    few = RidgeHead.search(X, y, splits, **options)
    read = RidgeHead.search(FeatureBlocks.of(X), y, splits, **options)  # by columns
    assert few.params["treatment"] == read.params["treatment"]
    for one, other in zip(few.trials, read.trials, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=2e-3, atol=2e-3)


def test_ridge_is_scikit_learns():
    for classes in (2, 3):
        X, y = features(classes=classes)
        Z = StandardScaler().fit_transform(X.astype(np.float64))
        ours = Ridge(7.0).fit(Z, y).decision_function(Z)
        theirs = RidgeClassifier(7.0).fit(Z, y).decision_function(Z)
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("head", LINEAR)
def test_constant_columns_change_nothing(head):
    X, y = features(200, 10)
    more = np.concatenate(
        [X, np.full((200, 1), 0.3, np.float32), np.zeros((200, 1), np.float32)], 1
    )
    plain, padded = (HEADS[head].search(one, y, folds_of(y)) for one in (X, more))
    assert padded.params["C" if head != "ridge" else "alpha"] > 0
    assert padded.score == pytest.approx(plain.score, abs=0.05)
    assert np.isfinite(logits(padded.estimator, more)).all()


# --- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", LINEAR)
@pytest.mark.parametrize("classes", [2, 3])
def test_out_of_fold_scores_are_those_of_fits_on_each_fold(head, classes):
    X, y = features(240, 15, classes)
    folds = folds_of(y)
    found = HEADS[head].search(X, y, folds)
    for train, valid in folds:
        model = {
            "linear": lambda: LinearClassifier(found.params["C"]),
            "svm": lambda: LinearClassifier(found.params["C"], loss="squared_hinge"),
            "ridge": lambda: Ridge(found.params["alpha"]),
        }[head]()
        steps = {"l2": [Normalizer()], "power": [FunctionTransformer(Power())], "standard": []}
        alone = make_pipeline(*steps[found.params["treatment"]], model).fit(X[train], y[train])
        mine, theirs = found.logits[valid], logits(alone, X[valid])
        if head == "linear":
            mine = mine - mine.mean(axis=1, keepdims=True)
            theirs = theirs - theirs.mean(axis=1, keepdims=True)
        np.testing.assert_allclose(mine, theirs, atol=0.02 * theirs.std())
    right = found.classes[found.logits.argmax(axis=1)] == y
    by_fold = [right[valid].mean() for _, valid in folds]
    np.testing.assert_allclose(found.fold_scores, by_fold)
    assert found.score == pytest.approx(np.mean(by_fold))
    assert found.score == max(one.score for one in found.trials)


@pytest.mark.parametrize("head", ["linear", "svm"])
def test_the_out_of_fold_labels_are_those_of_the_last_fits_tolerance(head: str) -> None:
    X, y = load_digits(return_X_y=True)
    rows = TrainingRows.check(X.astype(np.float32), y, folds_of(y, 5), None)
    found = search(HEADS[head](SearchOptions()), rows)
    for train, valid in rows.folds:
        steps = HEADS[head](SearchOptions()).fit(rows.only(train), found.params)
        theirs = FittedHead(steps, rows.classes).logits(rows.X[valid])
        np.testing.assert_array_equal(found.logits[valid].argmax(axis=1), theirs.argmax(axis=1))


@pytest.mark.parametrize("head", [LinearHead, LinearSVMHead, RidgeHead])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_the_search_finds_scikit_learns_scores_at_every_penalty(head, classes, class_weight):
    X, y = features(600, 12, classes, shift=1.0)
    X += np.random.default_rng(1).normal(size=X.shape).astype(np.float32) * 2 * X.std(axis=0)
    rare = y == f"class {classes - 1}"
    keep = np.concatenate([np.flatnonzero(~rare), np.flatnonzero(rare)[:43]])  # 34 or 35 a fold
    X, y = X[keep], y[keep]
    folds = folds_of(y, 5)
    grid = {"alphas": (100.0, 1.0)} if head is RidgeHead else {"Cs": (1e-5, 1e-3, 0.1)}
    if head is not RidgeHead:
        grid["refine"] = False
    kind = head(SearchOptions(class_weight=class_weight), treatments=("standard",), **grid)
    for trial in search(kind, TrainingRows.check(X, y, folds, None)).trials:
        C, theirs = trial.params.get("C"), []
        rival = {
            "linear": LogisticRegression(C=C, tol=1e-8, solver="newton-cholesky"),
            "svm": LinearSVC(C=C, dual=False, tol=1e-8, intercept_scaling=1e3, max_iter=10_000),
            "ridge": RidgeClassifier(trial.params.get("alpha")),
        }[head.name].set_params(class_weight=class_weight)
        for train, valid in folds:
            scaled = make_pipeline(StandardScaler(), rival).fit(X[train].astype(float), y[train])
            scores = scaled.decision_function(X[valid].astype(float))
            theirs.append(np.stack([-scores / 2, scores / 2], 1) if classes == 2 else scores)
        mine, theirs = trial.logits[np.concatenate([v for _, v in folds])], np.concatenate(theirs)
        if head is LinearHead:  # a free constant
            mine, theirs = (one - one.mean(axis=1, keepdims=True) for one in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, atol=0.15 * theirs.std(axis=0).mean())


@pytest.mark.parametrize("head", LINEAR)
def test_the_last_fit_is_a_fit_on_all_rows(head):
    X, y = features(240, 15)
    found = HEADS[head].search(X, y, folds_of(y))
    alone = {
        "linear": lambda: LinearClassifier(found.params["C"]),
        "svm": lambda: LinearClassifier(found.params["C"], loss="squared_hinge"),
        "ridge": lambda: Ridge(found.params["alpha"]),
    }[head]()
    steps = {"l2": [Normalizer()], "power": [FunctionTransformer(Power())], "standard": []}
    alone = make_pipeline(*steps[found.params["treatment"]], alone).fit(X, y)
    mine, theirs = logits(found.estimator, X), logits(alone, X)
    np.testing.assert_allclose(mine, theirs, atol=0.02 * theirs.std())


@pytest.mark.parametrize("head", LINEAR)
def test_blocks_give_what_memory_gives(head, monkeypatch):
    X, y = features(900, 20)
    folds = folds_of(y)
    options = {"class_weight": "balanced", "sample_weight": np.linspace(0.5, 2.0, 900)}
    monkeypatch.setattr(solver, "_CELLS", 3_000)  # blocks of 256 rows: several a fold
    inside = HEADS[head].search(X, y, folds, **options)
    sizes = []

    def read(rows):
        sizes.append(rows)
        for start in range(0, len(X), rows):
            block = X[start : start + rows]
            yield slice(start, start + len(block)), block

    outside = HEADS[head].search(FeatureBlocks(X.shape, read), y, folds, memory=10**8, **options)
    assert outside.params == inside.params
    assert outside.score == pytest.approx(inside.score, abs=0.003)
    scale = inside.logits.std()
    np.testing.assert_allclose(outside.logits, inside.logits, atol=0.03 * scale)
    np.testing.assert_allclose(
        logits(outside.estimator, X), logits(inside.estimator, X), atol=0.02 * scale
    )
    assert sizes.count(256) > 4  # passes of more than one block


def test_blocks_of_float16_views_are_read_as_they_are():
    X, y = features(200, 12)
    views = np.stack([X, X + 0.1 * X.std(axis=0)], axis=1).astype(np.float16)
    folds = folds_of(y)
    outside = HEADS["linear"].search(FeatureBlocks.of(views), y, folds)
    inside = HEADS["linear"].search(views.astype(np.float32), y, folds)
    assert outside.params == inside.params
    np.testing.assert_allclose(outside.logits, inside.logits, atol=0.02)


@pytest.mark.parametrize("head", LINEAR)
def test_views_share_an_images_weight(head):
    X, y = features(160, 8)
    twice = np.stack([X, X], axis=1)
    one, two = (HEADS[head].search(each, y, folds_of(y)) for each in (X, twice))
    assert one.params == two.params
    np.testing.assert_allclose(one.logits, two.logits, atol=0.02 * one.logits.std())
    np.testing.assert_allclose(
        logits(two.estimator, twice), logits(two.estimator, X), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", [LinearHead, LinearSVMHead])
def test_the_same_bits_for_any_number_of_threads(kind):
    X, y = features(300, 40, 5)
    rows = TrainingRows.check(X, y, folds_of(y), None)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            found = search(kind(Cs=[1e-3, 1e-2], treatments=["l2"], refine=False), rows)
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        results.append(found)
    np.testing.assert_array_equal(results[0].logits, results[1].logits)
    np.testing.assert_array_equal(logits(results[0].estimator, X), logits(results[1].estimator, X))


def test_exactly_the_given_grid_is_tried():
    X, y = features(150, 6)
    rows = TrainingRows.check(X, y, folds_of(y), None)
    found = search(LinearHead(Cs=[1.0, 0.01], treatments=["l2"], refine=False), rows)
    assert [dict(one.params) for one in found.trials] == [
        {"treatment": "l2", "C": 0.01},
        {"treatment": "l2", "C": 1.0},
    ]
    ridge = search(RidgeHead(alphas=[2.0, 1.0], treatments=["power"]), rows)
    assert [one.params["alpha"] for one in ridge.trials] == [300.0, 150.0]


def test_coarse_to_fine_looks_either_side_of_the_best():
    X, y = features(300, 20)
    found = HEADS["linear"].search(X, y, folds_of(y), scoring="neg_log_loss")
    coarse, fine = found.trials[:-2], found.trials[-2:]
    best = max(coarse, key=lambda one: one.score)
    values = sorted(one.params["C"] for one in fine)
    assert values[0] < best.params["C"] < values[1]
    assert found.score >= best.score
    assert {one.params["treatment"] for one in coarse} == {"standard", "l2", "power"}


def test_groups_of_labels_in_any_order_and_folds_that_overlap():
    X, y = features(120, 5)
    rng = np.random.default_rng(0)
    folds = [
        (np.setdiff1d(np.arange(120), valid), valid)
        for valid in (rng.permutation(120)[:30] for _ in range(5))
    ]
    found = HEADS["linear"].search(X, y, folds)
    never = np.setdiff1d(np.arange(120), np.concatenate([valid for _, valid in folds]))
    assert np.isnan(found.logits[never]).all()
    seen = np.setdiff1d(np.arange(120), never)
    assert np.isfinite(found.logits[seen]).all()


def test_what_cannot_be_trained_on_is_refused():
    X, y = features(60, 4)
    folds = folds_of(y, 3)
    refused = HEADS["linear"].search
    with pytest.raises(TrainingError, match=r"60 rows, 59 labels"):
        refused(X, y[:-1], folds)
    with pytest.raises(TrainingError, match="two classes"):
        refused(X, np.full(60, "one"), folds)
    with pytest.raises(TrainingError, match="at least one"):
        refused(X, y, [])
    with pytest.raises(TrainingError, match=r"shape \(60,\)"):
        refused(X[:, 0], y, folds)
    without = [(np.flatnonzero(y != "class 1"), np.flatnonzero(y == "class 1"))]
    with pytest.raises(TrainingError, match=r"Fold 0 has no training row of class 'class 1'"):
        refused(X, y, without)
    with pytest.raises(ValueError, match="must be positive"):
        LinearClassifier(0.0).fit(X, y)
    with pytest.raises(ValueError, match="'log' or 'squared_hinge', got 'hinge'"):
        LinearClassifier(loss="hinge").fit(X, y)
    with pytest.raises(ValueError, match="'balanced', a dict or None"):
        LinearClassifier(class_weight="even").fit(X, y)
    with pytest.raises(ValueError, match="not a class"):
        LinearClassifier(loss="squared_hinge", class_weight={"dog": 2.0}).fit(X, y)
    with pytest.raises(ValueError, match="alpha must be positive"):
        Ridge(0.0).fit(X, y)
