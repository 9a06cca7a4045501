"""The transformer of scikit-learn's: in a Pipeline, and with a store that remembers."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline

import featcache as fc
from featcache.errors import ExtractionError, FingerprintMismatch
from tests.small import backbone, folder, photograph


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("photographs"), 12)


@pytest.fixture(scope="module")
def files(root: Path) -> list[str]:
    return sorted(map(str, root.rglob("*.jpg")))


def test_it_is_a_step_of_a_pipeline(files: list[str], tmp_path: Path) -> None:
    one, y = backbone(), [Path(file).parent.name for file in files]
    for path in (None, tmp_path / "seen.h5"):
        embedder = fc.Embedder(one, path)
        assert clone(embedder).backbone is one and clone(embedder).get_params()["path"] == path
        scores = cross_val_score(make_pipeline(embedder, LogisticRegression()), files, y, cv=3)
        assert scores.shape == (3,) and np.isfinite(scores).all()
        np.testing.assert_array_equal(embedder.fit_transform(files), one(files))
    assert len(fc.FeatureStore.open(tmp_path / "seen.h5")) == 12
    assert fc.Embedder(one).get_feature_names_out()[-1] == "pool:output:flatten[15]"


def test_several_taps_stand_side_by_side(files: list[str], tmp_path: Path) -> None:
    one = backbone(layers=("pool", "stem:map"))
    found = one(files)
    expected = np.concatenate([found[tap].reshape(12, -1) for tap in one.taps], axis=1)
    for path in (None, tmp_path / "seen.h5"):
        X = fc.Embedder(one, path).transform(files)
        np.testing.assert_array_equal(X, expected)
    assert fc.Embedder(one).get_feature_names_out().shape == X.shape[1:]


def test_it_only_adds_rows_to_a_store_and_reads_what_is_there(
    root: Path, files: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "s.h5"
    before = fc.extract(fc.ImageSet.open(root), backbone(), path)
    inode = path.stat().st_ino
    renamed = [shutil.copy(file, tmp_path / f"{k}.jpg") for k, file in enumerate(files)]
    embedder = fc.Embedder(backbone(), path)
    X = embedder.transform([*renamed[::-1], renamed[0]])
    np.testing.assert_array_equal(X, before.load()[0][[*range(11, -1, -1), 0]])
    assert path.stat().st_ino == inode  # nothing was written

    new = photograph(tmp_path / "new.jpg", 99)
    again = embedder.transform([new, files[3], new])
    after = fc.FeatureStore.open(path)
    assert len(after) == 13 and after.verify().ok
    assert after.ids.tolist()[:12] == before.ids.tolist()
    assert after.labels.tolist() == [*before.labels.tolist(), ""]
    np.testing.assert_array_equal(after.load()[0][:12], before.load()[0])
    np.testing.assert_array_equal(again, after.load()[0][[12, 3, 12]])
    np.testing.assert_allclose(again[0], backbone()(new)[0], rtol=1e-5)
    embedder.transform([np.array(Image.open(new))])  # another content: pixels, not a file
    assert len(fc.FeatureStore.open(path)) == 14
    assert sorted(x.name for x in tmp_path.iterdir() if "h5" in x.name) == ["s.h5"]


def test_what_does_not_fit_changes_nothing(files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    fc.Embedder(backbone(), path).transform(files[:4])
    content = path.read_bytes()
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(ExtractionError, match=r"bad\.jpg.*has no features"):
        fc.Embedder(backbone(), path).transform([*files[:4], bad])
    with pytest.raises(FingerprintMismatch, match="holds other features:\nstate_sha256"):
        fc.Embedder(backbone(seed=1), path).transform(files[:4])
    assert path.read_bytes() == content and len(list(tmp_path.iterdir())) == 2


def test_several_at_a_time_lose_no_row(files: list[str], tmp_path: Path) -> None:
    embedder = fc.Embedder(backbone(), path := tmp_path / "s.h5")

    def add(start: int) -> np.ndarray:
        return embedder.transform(files[start : start + 4])

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(add, (0, 4, 8)))
    assert len(fc.FeatureStore.open(path)) == 12
    np.testing.assert_array_equal(
        np.concatenate(found), fc.Embedder(backbone(), path).transform(files)
    )
