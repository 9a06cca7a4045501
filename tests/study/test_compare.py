"""Networks and layers apart: `compare`, in Python and on the command line."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import featcache as fc
from featcache.cli.main import main
from featcache.errors import MissingFeatures, OutputError, TrainingError
from tests.labelled import POOL, clusters, make_store

Y = ["ant", "bee", "cod"] * 20
IDS = [f"{i:05d}.jpg" for i in range(60)]
EARLY = "layer1:output:mean"
PLAIN = "features:output:mean"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return a store of a good and a useless layer, and one with fewer images."""
    folder = tmp_path_factory.mktemp("compared")
    noise = np.random.default_rng(5).normal(size=(60, 6)).astype(np.float32)
    taps = {EARLY: noise, POOL: clusters(Y, spread=0.5)}
    make_store(folder / "a.h5", taps, Y, ids=IDS)
    other = {PLAIN: clusters(Y, spread=3.0)[5:][::-1].copy()}
    make_store(folder / "b.h5", other, Y[:4:-1], ids=IDS[:4:-1], backbone="mobilenet_v2")
    return [str(folder / "a.h5"), str(folder / "b.h5")]


def test_every_layer_of_every_store_is_a_row_on_the_same_images(paths: list[str]) -> None:
    found = fc.compare(paths, head=["ridge", "linear"], cv=3)
    assert {(row.store, row.layer) for row in found} == {
        (paths[0], EARLY),
        (paths[0], POOL),
        (paths[1], PLAIN),
    }
    assert len(found) == 6 and found.images == 55 and found.folds == "3 folds"
    assert f"images that not all stores have are left out ({paths[0]}: 5)" in found.notes
    assert (found[0].layer, found[-1].layer) == (POOL, EARLY)
    assert found[-1].result.difference.high < 0 == found[0].result.difference
    # Each is what `train` finds of this layer alone, on these images and folds.
    rows = fc.FeatureStore.open(paths[0]).select(range(5, 60))
    alone = fc.train(rows, head="ridge", layers=POOL, cv=3).leaderboard[0]
    (same,) = (row for row in found if (row.layer, row.head) == (POOL, "ridge"))
    assert (same.accuracy, same.result.params) == (alone.cv.accuracy, alone.params)


def test_test_images_choose_nothing(tmp_path: Path) -> None:
    splits = ["test" if i < 15 else "train" for i in range(60)]
    X = {EARLY: clusters(Y, spread=4, seed=1), POOL: clusters(Y, spread=4)}
    store = make_store(tmp_path / "s.h5", X, Y, splits=splits)
    found = fc.compare(store, head="ridge", cv=3)
    assert found.images == 45
    assert "15 images are held out, and choose nothing" in found.notes
    whole = fc.compare(store.select(range(15, 60)), head="ridge", cv=3)
    assert [row.to_dict() for row in whole] == [row.to_dict() for row in found]
    fit, _ = store.split(0.2)
    drawn = fc.compare(store, head="ridge", cv=3, test_size=0.2)
    assert drawn.images == len(fit) == 48


def test_layers_are_those_that_a_store_has(paths: list[str]) -> None:
    found = fc.compare(paths, layers=["avgpool", "features:mean"], head="ridge", cv=2)
    assert [row.layer for row in found] == [POOL, PLAIN]
    with pytest.raises(MissingFeatures, match="holds no features 'layer9'"):
        fc.compare(paths, layers=["avgpool", "layer9"])
    with pytest.raises(MissingFeatures, match="has none of the layers avgpool; name one of its"):
        fc.compare(paths, layers="avgpool")


def test_what_cannot_be_compared_is_said(paths: list[str], tmp_path: Path) -> None:
    others = make_store(tmp_path / "o.h5", clusters(Y), Y, ids=[f"x{one}" for one in IDS])
    with pytest.raises(TrainingError, match="No image is in all of"):
        fc.compare([paths[0], others])
    with pytest.raises(TrainingError, match="on maps: use train"):
        fc.compare(paths[0], head="suffix")
    with pytest.raises(TrainingError, match="There is no option 'cvs'"):
        fc.compare(paths[0], cvs=3)


def test_the_command_writes_a_table_and_leaves_others(paths: list[str], tmp_path: Path) -> None:
    def run(*arguments: object, status: int = 0) -> str:
        asked = ["compare", *paths, "--head", "ridge", "--cv", "2", "-q", *map(str, arguments)]
        done = CliRunner().invoke(main, asked)
        assert done.exit_code == status, done.output
        return done.output

    table = tmp_path / "compared.csv"
    text = run("-o", table)
    assert text.split()[:5] == ["store", "layer", "head", "CV", "accuracy"]
    assert "55 images, 2 folds, the same for all rows" in text and f"table: {table}" in text
    values = json.loads(run("--json", "-o", table))  # over its own
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert [row["layer"] for row in rows] == [row["layer"] for row in values["rows"]]
    last = values["rows"][-1]
    assert last["difference_low"] <= last["difference"] <= last["difference_high"] < 0
    assert float(rows[-1]["difference_low"]) == pytest.approx(last["difference_low"], abs=1e-6)
    assert run("-o", "-").startswith("store,layer,head,accuracy,accuracy_low,")
    table.write_text(table.read_text() + "mine\n")
    assert "is not a comparison of featcache" in run("-o", table, status=1)
    run("-o", table, "--force")
    with pytest.raises(OutputError):
        fc.compare(paths, head="ridge", cv=2).to_csv(__file__)
