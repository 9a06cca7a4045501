"""What every head does: one contract, from the search to the exported model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from featcache import Predictor, extract, train
from featcache.errors import PredictorError
from featcache.heads.rows import FeatureBlocks
from featcache.heads.search import SearchResult
from featcache.heads.table import HEADS
from featcache.images.image_set import ImageSet
from featcache.predictor.export import export_model
from featcache.store.splitting import folds
from featcache.store.store import FeatureStore
from tests.labelled import clusters
from tests.small import SIDE, backbone

LAYERED = ("linear", "svm", "ridge", "mlp")
Y = np.array(["ant", "bee", "cod"] * 40)
FOLDS = folds(Y, cv=2, random_state=0)


def features(views: int = 1) -> np.ndarray:
    return clusters(Y.tolist(), d=8, spread=2.5, views=views)


@pytest.fixture(scope="module", autouse=True)
def short_searches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.heads.mlp._CHECKPOINTS", (2, 6))
        yield


@pytest.fixture(scope="module", params=HEADS)
def found(request: pytest.FixtureRequest) -> SearchResult:
    return HEADS[request.param].search(features(), Y, FOLDS)


def test_a_search_keeps_the_best_and_its_scores_out_of_fold(found: SearchResult) -> None:
    assert found.score > 0.6
    assert found.best in found.trials
    chosen = found.classes[found.logits.argmax(axis=1)]
    np.testing.assert_allclose(
        found.fold_scores, [(chosen[valid] == Y[valid]).mean() for _, valid in FOLDS]
    )
    proba = found.calibration.proba(found.logits)
    assert -np.log(proba[np.arange(len(Y)), found.classes.searchsorted(Y)]).mean() < np.log(3)


def test_the_same_search_gives_the_same_head(found: SearchResult) -> None:
    again = HEADS[found.head].search(features(), Y, FOLDS)
    assert (again.params, again.calibration) == (found.params, found.calibration)
    np.testing.assert_array_equal(again.logits, found.logits)
    for one, other in zip(again.estimator.steps, found.estimator.steps, strict=True):
        assert one.kind == other.kind
        for name, value in one.arrays().items():
            np.testing.assert_array_equal(value, other.arrays()[name])


def test_a_head_is_a_list_of_steps_that_fit(found: SearchResult) -> None:
    width = 8
    for step in found.estimator.steps:
        width = step.check(width)
    assert width == len(found.classes) == 3
    new = np.float32(1.01) * features()
    scores = found.estimator.logits(new)
    assert (scores.dtype, scores.shape) == (np.float32, (120, 3))
    assert (found.classes[scores.argmax(axis=1)] == Y).mean() > 0.6
    some = np.concatenate([found.estimator.logits(new[i : i + 7]) for i in range(0, 120, 7)])
    np.testing.assert_allclose(some, scores, rtol=1e-4, atol=1e-4)
    assert found.estimator.logits(new[:0]).shape == (0, 3)


def test_scores_of_views_are_averaged(found: SearchResult) -> None:
    views = features(views=3)
    each = [found.estimator.logits(views[:, v]) for v in range(3)]
    np.testing.assert_allclose(
        found.estimator.logits(views), np.mean(each, axis=0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("head", HEADS)
def test_views_stay_with_their_image(head: str) -> None:
    # Random labels, views nearly the same: only a leak could do better than chance.
    rng = np.random.default_rng(0)
    X = np.repeat(rng.normal(size=(200, 1, 8)), 2, axis=1)
    X += 1e-3 * rng.normal(size=X.shape)
    y = np.array(["ant", "bee"])[rng.permutation(np.arange(200) % 2)]
    found = HEADS[head].search(X.astype(np.float32), y, folds(y, cv=2, random_state=0))
    assert found.score < 0.68
    assert found.logits.shape == found.estimator.logits(X.astype(np.float32)).shape == (200, 2)


@pytest.mark.parametrize("head", HEADS)
def test_weights_of_rows_and_classes_reach_the_search(head: str) -> None:
    wrong = np.random.default_rng(0).random(len(Y)) < 0.4
    given, weight = np.where(wrong, "ant", Y), np.where(wrong, 0.0, 1.0)
    found = HEADS[head].search(features(), given, FOLDS, sample_weight=weight)
    # Rows of no weight say nothing: what they are called does not count.
    right = found.classes[found.logits.argmax(axis=1)] == Y
    assert right[wrong].mean() > 0.5
    X = clusters(Y.tolist(), d=8, spread=6.0)
    plain, heavy = (
        HEADS[head].search(X, Y, FOLDS, class_weight=one) for one in (None, {"bee": 50.0})
    )
    bee = plain.classes.tolist().index("bee")
    bees = [np.mean([trial.predicted == bee for trial in one.trials]) for one in (plain, heavy)]
    assert bees[1] > bees[0] or head == "forest"  # whose leaves are nearly all of one class


@pytest.mark.parametrize("head", [name for name in HEADS if HEADS[name].out_of_core])
@pytest.mark.parametrize("views", [1, 2])
def test_out_of_core_it_finds_the_same(head: str, views: int) -> None:
    X = features(views)
    inside = HEADS[head].search(X, Y, FOLDS)
    outside = HEADS[head].search(FeatureBlocks.of(X), Y, FOLDS, memory=1 << 26)
    assert outside.params == inside.params
    np.testing.assert_allclose(outside.logits, inside.logits, atol=0.05 * inside.logits.std())


# --- from images --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(flower_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    folder = tmp_path_factory.mktemp("contract")
    images = ImageSet.from_folder(flower_folder)
    return extract(images, backbone(), folder / "a.h5", workers=0, progress=False)


@pytest.fixture(scope="module", params=[(head, k) for head in HEADS for k in (2, 3)], ids=str)
def trained(
    request: pytest.FixtureRequest, store: FeatureStore
) -> Iterator[tuple[Predictor, FeatureStore]]:
    head, classes = request.param
    part = store.select(np.flatnonzero(np.isin(store.labels, ["daisy", "rose", "tulip"][:classes])))
    predictor = train(part, head=head, cv=2)
    predictor.attach(backbone())
    yield predictor, part


def test_it_comes_back_from_a_file(trained: tuple[Predictor, FeatureStore], tmp_path: Path) -> None:
    predictor, part = trained
    predictor.save(tmp_path / "a.featcache")
    loaded = Predictor.load(tmp_path / "a.featcache")
    X = part.matrix()
    np.testing.assert_array_equal(loaded.estimator.logits(X), predictor.estimator.logits(X))
    np.testing.assert_array_equal(loaded.predict_proba_of(part), predictor.predict_proba_of(part))


def test_it_is_grafted_and_exported_or_says_why_not(
    trained: tuple[Predictor, FeatureStore], flower_folder: Path, tmp_path: Path
) -> None:
    predictor, part = trained
    if predictor.head not in LAYERED:
        with pytest.raises(PredictorError, match=f"A {predictor.head} head .*that can: linear"):
            predictor.to_torch()
        return
    prepare = backbone().preprocessing
    pixels = np.stack([prepare((flower_folder / name).read_bytes()) for name in part.ids])
    assert pixels.shape[1:] == (3, SIDE, SIDE)
    network = predictor.to_torch(probabilities=False)
    with torch.inference_mode():
        logits = network(prepare.normalize(torch.from_numpy(pixels))).numpy()
    expected = np.log(predictor.predict_proba_of(part))
    logits = logits - logsumexp(logits, axis=1, keepdims=True)
    np.testing.assert_allclose(logits, expected, rtol=1e-6, atol=1e-5)  # float32 has no more
    export_model(predictor, tmp_path / "a.pt2")
    program = torch.export.load(tmp_path / "a.pt2").module()
    found = program(torch.from_numpy(pixels)).detach().numpy()
    np.testing.assert_allclose(found, predictor.predict_proba_of(part), atol=1e-5)
