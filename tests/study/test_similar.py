"""Images that look like others: from features, ids and files, in the library and by command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import featcache as fc
from featcache.cli.main import main
from featcache.errors import FingerprintMismatch, ImageSetError, PredictorError
from featcache.store import store as store_module
from tests.labelled import clusters, make_store
from tests.small import backbone, folder

TRUE = ["ant", "bee", "rose"] * 40


def by_hand(X: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return all cosines in double precision."""
    A, B = queries.astype(float), X.astype(float)
    A, B = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (A, B))
    return np.asarray(A @ B.T)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return folder(tmp_path / "pictures", 40)


@pytest.fixture
def store(pictures: Path, tmp_path: Path) -> fc.FeatureStore:
    images = fc.ImageSet.from_folder(pictures)
    return fc.extract(images, backbone(), tmp_path / "s.h5", workers=0, progress=False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("views", [1, 2])
def test_the_nearest_rows_are_those_of_the_largest_cosines(
    tmp_path: Path, dtype: str, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_PIECE_BYTES", 1000)  # many blocks
    X = clusters(TRUE, views=views).astype(dtype)
    store = make_store(tmp_path / "a.h5", X, TRUE, views=views, store_dtype=dtype)
    store = store.select(np.random.default_rng(0).permutation(120)[:90])
    mean = store.matrix().reshape(90, views, -1).mean(axis=1)
    expected = by_hand(mean, mean[:5])
    cosines, rows = store.nearest(store.matrix()[:5], k=7)
    np.testing.assert_allclose(cosines, np.sort(expected)[:, :-8:-1], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, rows, 1), cosines, atol=1e-5)
    assert (rows[:, 0] == np.arange(5)).all()
    # Rows are not their own neighbours.
    others = store.nearest(range(5), k=6)
    np.testing.assert_array_equal(others[1], rows[:, 1:])
    assert store.nearest([0], k=1000)[1].shape == (1, 89)


def test_joined_stores_are_compared_side_by_side(tmp_path: Path) -> None:
    parts = [clusters(TRUE, seed=seed) for seed in (0, 1)]
    joined = fc.FeatureStore.join(
        [make_store(tmp_path / f"{k}.h5", X, TRUE, backbone=f"net{k}") for k, X in enumerate(parts)]
    )
    expected = by_hand(np.hstack(parts), np.hstack(parts)[:3])
    cosines, _ = joined.nearest(np.hstack(parts)[:3], k=4)
    np.testing.assert_allclose(cosines, np.sort(expected)[:, :-5:-1], atol=1e-5)
    tap = next(iter(joined.taps))
    assert joined.nearest([3], k=2, layers=tap)[1].shape == (1, 2)


def test_checksums_are_not_read_and_wrong_queries_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a.h5", clusters(TRUE), TRUE)
    query = store.matrix()[:1]
    values = store.checked_files()[0].features["avgpool:output:flatten"]
    with (tmp_path / "a.h5").open("r+b") as file:  # a damaged row
        file.seek(values.offset + 100 * values.row_bytes)
        file.write(b"\0" * 8)
    assert fc.FeatureStore.open(tmp_path / "a.h5").nearest(query, k=1)[1] == [[0]]
    for wrong in (query[:, :5], query * np.nan, np.float32([1, 2])):
        with pytest.raises(ValueError, match=r"finite features \(q, 12\)"):
            store.nearest(wrong)
    with pytest.raises(ValueError, match="k from 1 on"):
        store.nearest([0], k=0)
    with pytest.raises(IndexError):
        store.nearest([120])


def test_ids_and_new_files_are_asked_together(store: fc.FeatureStore, pictures: Path) -> None:
    ids = store.ids.tolist()
    copy = pictures.parent / "new.jpg"
    copy.write_bytes((pictures / ids[7]).read_bytes())
    found = fc.similar(store, [ids[3], copy, ids[5]], 4, backbone=backbone(), workers=0)
    assert [one.query for one in found] == [ids[3], str(copy), ids[5]]
    assert ids[3] not in [one.id for one in found[0].nearest]
    assert found[1].nearest[0].id == ids[7]
    assert found[1].nearest[0].cosine == pytest.approx(1, abs=1e-4)
    cosines, rows = store.nearest([5], k=4)
    assert [one.id for one in found[2].nearest] == store.ids[rows[0]].tolist()
    np.testing.assert_allclose([one.cosine for one in found[2].nearest], cosines[0], atol=1e-6)


def test_what_is_neither_an_id_nor_a_file_or_another_network_is_refused(
    store: fc.FeatureStore, pictures: Path
) -> None:
    with pytest.raises(ImageSetError, match=r"no image 'nowhere\.jpg', and there is no such file"):
        fc.similar(store, "nowhere.jpg")
    with pytest.raises(PredictorError, match="was given as a module"):
        fc.similar(store, pictures)
    with pytest.raises(FingerprintMismatch, match="not the one that the features are of"):
        fc.similar(store, pictures, backbone=backbone(seed=1))


def test_the_command_prints_tables_and_json(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = ["--backbone", "tests.small:own", "--layer", "pool"]
    made = CliRunner().invoke(main, ["extract", str(pictures), "-o", "s.h5", *network])
    assert made.exit_code == 0, made.output
    ids = fc.FeatureStore.open("s.h5").ids.tolist()
    (tmp_path / ids[0]).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / ids[0]).write_bytes((pictures / ids[1]).read_bytes())  # an id and a file
    asked = ["similar", "s.h5", ids[0], f"./{ids[0]}", "--top-k", "3"]
    found = CliRunner().invoke(main, [*asked, *network[:2], "--json"])
    assert found.exit_code == 0, found.output
    by_id, by_file = json.loads(found.stdout)["similar"]
    assert by_id["query"] == ids[0] and len(by_id["nearest"]) == 3
    assert ids[0] not in [one["id"] for one in by_id["nearest"]]
    assert by_file["nearest"][0]["id"] == ids[1]
    assert by_file["nearest"][0].keys() == {"id", "label", "cosine"}
    text = CliRunner().invoke(main, [*asked[:3], "--top-k", "3"]).stdout.splitlines()
    assert text[0] == ids[0] and text[1].split() == ["id", "label", "cosine"] and len(text) == 5
    missing = CliRunner().invoke(main, [*asked[:2], "x.jpg"])
    assert missing.exit_code == 1 and "Ids look like" in missing.stderr
