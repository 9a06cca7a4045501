"""A classifier of scikit-learn's as a head."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import featcache as fc
from featcache.errors import PredictorError, TrainingError
from featcache.study.options import TrainingOptions
from featcache.study.parts import folds_of
from tests.labelled import clusters, make_store

LABELS = ["ant", "bee", "cod", "doe"] * 30


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> fc.FeatureStore:
    path = tmp_path_factory.mktemp("own") / "s.h5"
    return make_store(path, clusters(LABELS, spread=3.0), LABELS)


def test_it_is_judged_on_the_same_folds_as_scikit_learn_would(store: fc.FeatureStore) -> None:
    classifier = LogisticRegression(C=0.01)
    predictor = fc.train(store, head=["linear", classifier], cv=3)
    row = next(row for row in predictor.leaderboard if row.head == "LogisticRegression")
    X, y = store.load()
    found = cross_val_predict(classifier, X, y, cv=folds_of(store, TrainingOptions(cv=3)))
    assert float(row.cv.accuracy) == pytest.approx((found == y).mean())
    assert row.params == {"classifier": "LogisticRegression(C=0.01)"} and len(row.candidates) == 1
    assert not hasattr(classifier, "classes_")  # it was cloned
    assert {row.head for row in predictor.leaderboard} == {"linear", "LogisticRegression"}


@pytest.mark.parametrize(
    "classifier",
    [
        make_pipeline(StandardScaler(), RidgeClassifier(alpha=10)),
        RandomForestClassifier(20, random_state=0),
        SVC(decision_function_shape="ovr"),
        KNeighborsClassifier(),
    ],
    ids=lambda one: type(one).__name__,
)
def test_it_labels_as_the_classifier_does(store: fc.FeatureStore, classifier: object) -> None:
    fit, test = store.split(random_state=0)
    predictor = fc.train(fit, test, head=classifier, cv=3)
    X, y = fit.load()
    assert np.array_equal(
        predictor.predict_features(test.load()[0]), classifier.fit(X, y).predict(test.load()[0])
    )
    proba = predictor.predict_proba(test.load()[0])
    assert proba.shape == (len(test), 4) and np.allclose(proba.sum(axis=1), 1)
    assert float(predictor.leaderboard[0].held_out.accuracy) > 0.5
    nested = fc.train(fit, head=classifier, cv=3, nested=True).leaderboard[0]
    assert nested.cv_score == pytest.approx(predictor.leaderboard[0].cv_score)  # no choice


def test_two_classes_have_one_score_each(tmp_path: Path) -> None:
    y = ["no", "yes"] * 20
    store = make_store(tmp_path / "s.h5", clusters(y, spread=2.0), y)
    predictor = fc.train(store, head=[LogisticRegression(), LogisticRegression(C=9)], cv=3)
    X, _ = store.load()
    expected = LogisticRegression(C=9 if predictor.head.endswith("2") else 1).fit(X, y)
    assert np.array_equal(predictor.predict_features(X), expected.predict(X))
    heads = {row.head for row in predictor.leaderboard}
    assert heads == {"LogisticRegression", "LogisticRegression 2"}


def test_it_is_kept_in_memory_and_not_in_a_file(store: fc.FeatureStore, tmp_path: Path) -> None:
    predictor = fc.train(store, head=LogisticRegression(), cv=3)
    with pytest.raises(PredictorError, match=r"LogisticRegression\(\) cannot be saved.*joblib"):
        predictor.save(tmp_path / "p.featcache")
    assert not list(tmp_path.iterdir())
    again = pickle.loads(pickle.dumps(predictor))
    X, _ = store.load()
    np.testing.assert_array_equal(again.predict_proba(X), predictor.predict_proba(X))


@pytest.mark.parametrize(
    "head, message",
    [
        (Ridge(), r"Ridge\(\) is no classifier"),
        (LogisticRegression, r"not its class: LogisticRegression\(\)"),
        (SVC(decision_function_shape="ovo"), r"predict_proba.*CalibratedClassifierCV\(SVC"),
        ([], "names no head"),
        ([LogisticRegression(), "lineal"], "Did you mean linear"),
    ],
)
def test_what_is_no_head_is_refused(store: fc.FeatureStore, head: object, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        fc.train(store, head=head, cv=3)


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head", ["linear", LogisticRegression(), make_pipeline(StandardScaler(), LogisticRegression())],
    ids=["linear", "own", "pipeline"],
)  # fmt: skip
def test_rows_of_weight_0_are_not_trained_on_and_are_scored(
    store: fc.FeatureStore, head: object
) -> None:
    wrong = np.arange(len(store)) % 6 == 0
    X, y = store.load()
    y = y.copy()
    shuffled = np.random.default_rng(0).permutation(len(y))
    y[wrong] = y[shuffled][wrong]
    path = Path(store.paths[0]).with_name(f"{type(head).__name__}.h5")
    noisy = make_store(path, X, ["", *y[1:].tolist()])  # a row without a label, too
    weight = np.where(wrong, 0.0, 1.0)
    weighted = fc.train(noisy, head=head, cv=3, sample_weight=weight)
    assert weighted.leaderboard.n_fit == len(store) - 1  # scores count each image
    clean = fc.train(noisy.select(~wrong), head=head, cv=3)
    if isinstance(head, LogisticRegression):  # no C that depends on folds, no unweighted scaling
        np.testing.assert_allclose(weighted.logits(X), clean.logits(X), atol=0.02)
    plain = fc.train(noisy, head=head, cv=3)
    assert not np.allclose(weighted.logits(X), plain.logits(X), atol=0.1)


def test_weights_that_do_not_fit_are_refused(store: fc.FeatureStore) -> None:
    ones = np.ones(len(store))
    for weight, head, message in (
        (ones[1:], "linear", "a number for each of the 120 rows"),
        (-ones, "linear", "not negative; that of row 0"),
        (ones, LinearDiscriminantAnalysis(), "LinearDiscriminantAnalysis takes none in its fit"),
    ):
        with pytest.raises(TrainingError, match=message):
            fc.train(store, head=head, cv=3, sample_weight=weight)
    with pytest.raises(TrainingError, match="give it to LogisticRegression itself"):
        fc.train(store, head=LogisticRegression(), cv=3, class_weight="balanced")
