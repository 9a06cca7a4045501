"""Commands that read a damaged store say which rows are damaged, and write nothing of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from featcache.cli.main import main
from featcache.errors import CorruptStore, StoreError
from featcache.store.file import StoreFile
from featcache.store.store import FeatureStore
from featcache.study import train as study
from tests.labelled import POOL, clusters, make_store

LABELS = ["ant", "bee", "cod"] * 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a store, and a predictor of the first half of its images."""
    folder = tmp_path_factory.mktemp("made")
    store = make_store(folder / "a.h5", clusters(LABELS, spread=3.0), LABELS)
    study.train(store.select(range(30)), head="ridge", cv=3).save(folder / "old.fcp")
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> FeatureStore:
    for one in made.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    return FeatureStore.open(tmp_path / "a.h5")


def flip(store: FeatureStore, name: str, row: int) -> None:
    """Flip a bit in a row of a dataset."""
    (path,) = store.paths
    dataset = StoreFile(path).datasets[name]
    data = bytearray(Path(path).read_bytes())
    data[dataset.offset + row * dataset.row_bytes + 2] ^= 16
    Path(path).write_bytes(data)


READING = [
    ["train", "a.h5", "--head", "knn", "--cv", "3", "-o", "new.fcp"],
    ["train", "a.h5", "--head", "ridge", "--memory", "1MB", "--cv", "3", "-o", "new.fcp"],
    ["evaluate", "old.fcp", "a.h5"],
    ["audit", "a.h5", "-o", "new.csv"],
    ["export", "a.h5", "-o", "new.npz"],
    ["export", "a.h5", "-o", "new.npy"],
    ["export", "a.h5", "-o", "new.csv"],
]


@pytest.mark.parametrize("command", READING, ids=" ".join)
@pytest.mark.parametrize("name", [f"features/{POOL}", "labels"])
def test_damage_is_said_by_whoever_reads_it(
    store: FeatureStore, command: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = map(Path, store.paths)
    monkeypatch.chdir(path.parent)
    damaged = store.ids[31]
    flip(store, name, 31)
    there = sorted(path.parent.iterdir())
    result = CliRunner().invoke(main, [*command, "--quiet"], catch_exceptions=False)
    assert result.exit_code == 1
    assert result.output.startswith("CorruptStore: "), result.output
    assert "mv a.h5 a.h5.partial, then run the same `featcache extract` command" in result.output
    assert damaged in result.output or name == "labels"
    assert sorted(path.parent.iterdir()) == there


def test_a_store_that_is_overwritten_while_it_is_trained_on_gives_no_predictor(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_store(tmp_path / "b.h5", clusters(LABELS, spread=2.0), LABELS[::-1])
    trained = study.train_heads

    def overwritten(*args: object, **options: object) -> object:
        found = trained(*args, **options)  # type: ignore[arg-type]
        Path(*store.paths).write_bytes(Path(*other.paths).read_bytes())  # as cp does
        return found

    monkeypatch.setattr(study, "train_heads", overwritten)
    with pytest.raises(StoreError, match="overwritten while it was open") as error:
        study.train(store, head="ridge", cv=3)
    assert not isinstance(error.value, CorruptStore)
