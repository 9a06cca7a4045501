"""Other columns of the user's table: kept in a store as text, and scores by their values."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import featcache as fc
from featcache.cli.main import main
from featcache.errors import ImageSetError, MissingFeatures
from tests.small import backbone, folder

CAMERAS = ["old", "new", ""]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = folder(tmp_path / "photographs", 24)
    rows = [("file", "label", "camera", "site/é %", "site")]
    for k, path in enumerate(sorted(root.rglob("*.jpg"))):
        name = path.relative_to(root).as_posix()
        rows.append((name, path.parent.name, CAMERAS[k % 3], f"ä {k % 2}", f"s{k % 12}"))
    with (tmp_path / "t.csv").open("w") as file:
        csv.writer(file).writerows(rows)
    return root


def listed(root: Path, *keep: str, **more: str) -> fc.ImageSet:
    table = root.parent / "t.csv"
    return fc.ImageSet.from_csv(table, root, id_column="file", keep_columns=keep, **more)


def test_a_store_keeps_columns_through_all_that_makes_stores(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    names = ["camera", "site/é %"]
    store = fc.extract(listed(root, *names), backbone(), path)
    expected = {"camera": [CAMERAS[k % 3] for k in range(24)], names[1]: ["ä 0", "ä 1"] * 12}
    assert {name: x.tolist() for name, x in store.columns.items()} == expected
    assert store.select([5, 2]).columns["camera"].tolist() == ["", ""]
    fit, test = store.split(random_state=0)
    assert len(fit.columns["camera"]) == len(fit) and list(test.columns) == list(store.columns)
    other = fc.extract(listed(root, "site"), backbone(layers=("stem:mean",)), tmp_path / "o.h5")
    joined = fc.FeatureStore.join([store, other])
    assert sorted(joined.columns) == ["camera", "site", "site/é %"]
    assert joined.columns["site"].tolist() == [f"s{k % 12}" for k in range(24)]
    halves = [
        fc.extract(listed(root, *names).select(rows), backbone(), tmp_path / f"{k}.h5")
        for k, rows in enumerate((np.arange(12), np.arange(12, 24)))
    ]
    below = fc.FeatureStore.open([half.paths[0] for half in halves])
    assert below.columns["camera"].tolist() == expected["camera"]
    grown = fc.extract(listed(root, *names), backbone(), halves[0].paths[0])
    assert grown.columns[names[1]].tolist() == expected[names[1]]
    assert grown.extraction.to_dict()["computed"] == 12
    assert "column    camera: 3 values (old 8, new 8, (none) 8)" in store.to_text()
    assert store.describe()["columns"] == {"camera": 3, "site/é %": 2}
    assert store.verify().ok


def test_a_later_run_keeps_them_like_groups(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    fc.extract(listed(root, group_column="site"), backbone(), path)
    again = fc.extract(listed(root, "camera", group_column="site"), backbone(), path)
    assert again.extraction.skipped and again.extraction.relabelled
    flat = fc.ImageSet.from_files(sorted(map(str, root.rglob("*.jpg"))))  # no labels: all stays
    kept = fc.extract(flat, backbone(), path)
    assert sorted(kept.columns["camera"]) == sorted(again.columns["camera"])
    assert kept.groups is not None
    dropped = fc.extract(listed(root), backbone(), path)  # labels, and neither is named
    assert dropped.columns == {} and dropped.groups is None


def test_exports_have_them(root: Path, tmp_path: Path) -> None:
    from featcache.store.export import export_store

    store = fc.extract(listed(root, "camera"), backbone(), tmp_path / "s.h5")
    for _ in range(2):  # the second replaces the first, which is known as its own
        export_store(store, tmp_path / "e.csv")
        export_store(store, tmp_path / "e.npz")
    with (tmp_path / "e.csv").open() as file:
        assert [row["camera"] for row in csv.DictReader(file)] == store.columns["camera"].tolist()
    with np.load(tmp_path / "e.npz") as arrays:
        assert arrays["camera"].tolist() == store.columns["camera"].tolist()
    pytest.importorskip("pandas")
    assert store.to_pandas()["camera"].tolist() == store.columns["camera"].tolist()


def test_scores_by_a_column(root: Path, tmp_path: Path) -> None:
    images = listed(root, "camera", group_column="site")
    store = fc.extract(images, backbone(), tmp_path / "s.h5")
    fit, test = store.select(np.arange(0, 24, 2)), store.select(np.arange(1, 24, 2))
    predictor = fc.train(fit, cv=2)
    found = fc.evaluate(predictor, test, by=["camera", "group"], other_groups=True)
    cameras = test.columns["camera"]
    assert set(found.by["camera"]) == set(CAMERAS)
    accuracies = [float(part.accuracy) for part in found.by["camera"].values()]
    assert accuracies == sorted(accuracies)
    for value, part in found.by["camera"].items():
        assert part.ids.tolist() == test.ids[cameras == value].tolist()
        right = (found.y_pred == found.y_true)[cameras == value]
        assert float(part.accuracy) == pytest.approx(right.mean())
        assert part.groups is not None
    weights = [len(part) for part in found.by["camera"].values()]
    assert np.average(accuracies, weights=weights) == pytest.approx(float(found.accuracy))
    values = json.loads(json.dumps(found.to_dict()))["by"]["camera"]
    assert [one["value"] for one in values] == list(found.by["camera"])
    assert values[0]["images"] == weights[0] and "accuracy_interval" in values[0]
    text = found.to_text()
    assert "camera  accuracy" in text and "(none)" in text
    assert "(no intervals for" in text and "images of fewer than" in text
    assert "camera" in found._repr_html_()
    assert fc.evaluate(predictor, test, other_groups=True).to_dict()["by"] == {}
    with pytest.raises(MissingFeatures, match=r"no column 'lens'; it keeps camera.*--keep-columns"):
        fc.evaluate(predictor, test, by="lens")


def test_the_commands(root: Path, tmp_path: Path) -> None:
    store, predictor = str(tmp_path / "s.h5"), str(tmp_path / "p.featcache")
    own = ["--backbone", "tests.small:own"]

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 0, result.output
        return result.stdout

    table = ["--labels", str(tmp_path / "t.csv"), "--id-column", "file"]
    keep = ["--keep-columns", "camera", "--keep-columns", "site"]
    run("extract", str(root), "-o", store, *own, *table, *keep)
    assert "column    camera: 3 values" in run("info", store)
    run("train", store, "-o", predictor, "--head", "ridge", "--cv", "2")
    assert "camera" in run("evaluate", predictor, store, "--by", "camera")
    found = json.loads(
        run("evaluate", predictor, store, "--by", "camera", "--by", "site", "--json")
    )
    assert list(found["by"]) == ["camera", "site"]
    for keep, message in (
        (["--keep-columns", "camera,site"], "of several, each with its own --keep-columns"),
        (["--keep-columns", "kamera"], "Did you mean 'camera'"),
    ):
        result = CliRunner().invoke(main, ["extract", str(root), "-o", store, *own, *table, *keep])
        assert isinstance(result.exception, ImageSetError) or result.exit_code == 1
        assert message in str(result.exception) + result.output
    result = CliRunner().invoke(main, ["extract", str(root), "-o", store, *own, *keep])
    assert "is for a table of labels; name it with --labels" in result.output
