from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from featcache.errors import OutputError, TrainingError
from featcache.study.audit import audit
from tests.labelled import clusters, make_store
from tests.stores import sha256

TRUE = ["ant", "bee", "cod"] * 40
WRONG = [3, 9, 15, 40, 46, 70, 77, 83, 101]  # rows whose label is moved to the next class


def planted() -> tuple[np.ndarray, list[str], np.ndarray, list[str]]:
    """Return features, labels, hashes and splits with one of each kind of trouble."""
    X, y = clusters(TRUE, spread=0.8), list(TRUE)
    for row in WRONG:
        y[row] = {"ant": "bee", "bee": "cod", "cod": "ant"}[y[row]]
    X[50] = X[20] + 1e-3  # nearly the same picture twice, one of them held out
    X[90] = 8.0 * np.where(np.arange(12) % 2, 1, -1)  # like nothing else
    hashes = sha256([f"{i}" for i in range(120)]).copy()
    hashes[61] = hashes[12]  # the same bytes under two labels
    X[61] = X[12]
    splits = ["test" if row in (50, 61) else "train" for row in range(120)]
    return X, y, hashes, splits


def test_planted_trouble_is_found(tmp_path: Path) -> None:
    X, y, hashes, splits = planted()
    found = audit(make_store(tmp_path / "a.h5", X, y, hashes=hashes, splits=splits))
    assert found.n_images == 120

    labels = {int(one.id[:5]): one for one in found.of("label")}
    caught = labels.keys() & set(WRONG)
    assert len(caught) >= len(WRONG) - 2
    for row in caught:
        assert (labels[row].label, labels[row].suggested) == (y[row], TRUE[row])
    assert len(labels) <= len(caught) + 3  # the copy and the outlier are odd too
    scores = [one.score for one in found.of("label")]
    assert scores == sorted(scores)

    (copy,) = found.of("copy")
    assert (copy.id, copy.other_id) == ("00012.jpg", "00061.jpg")
    assert copy.note == "other label, across splits"

    (pair,) = found.of("near-duplicate")
    assert (pair.id, pair.other_id) == ("00020.jpg", "00050.jpg")
    assert pair.score > 0.999
    assert pair.note == "across splits"
    assert (pair.split, pair.other_split) == ("train", "test")

    assert [one.id for one in found.of("outlier")] == ["00090.jpg"]
    assert "2 pairs of copies or near-duplicates, 2 across splits, 1 other label" in str(found)
    assert "1 outlier" in str(found)


def test_clean_data_gives_no_pairs_and_no_outliers(tmp_path: Path) -> None:
    found = audit(make_store(tmp_path / "a.h5", clusters(TRUE, spread=0.8), TRUE))
    assert not found.of("copy") + found.of("near-duplicate") + found.of("outlier")
    assert len(found.of("label")) <= 2


def test_a_burst_is_listed_pair_by_pair(tmp_path: Path) -> None:
    X = clusters(TRUE, spread=0.8)
    X[30:36] = X[30] + np.linspace(0, 1e-3, 6)[:, None] * np.ones(12)
    found = audit(make_store(tmp_path / "a.h5", X, TRUE)).of("near-duplicate")
    assert 3 <= len(found) <= 6  # not all 15 pairs
    assert {one.id for one in found} | {one.other_id for one in found} == {
        f"{row:05d}.jpg" for row in range(30, 36)
    }


def test_labels_that_cannot_be_judged_are_named(tmp_path: Path) -> None:
    y = list(TRUE)
    y[0], y[1] = "", "unicorn"
    found = audit(make_store(tmp_path / "a.h5", clusters(TRUE, spread=0.8), y))
    assert found.notes == (
        "1 image has no label to judge",
        "1 class of one image cannot be judged: unicorn",
    )
    assert not {"00000.jpg", "00001.jpg"} & {one.id for one in found.of("label")}


def test_unlabelled_images_are_looked_at_too(tmp_path: Path) -> None:
    X = clusters(TRUE, spread=0.8)
    X[50] = X[20] + 1e-3
    found = audit(make_store(tmp_path / "a.h5", X, [""] * 120))
    assert [one.kind for one in found] == ["near-duplicate"]
    assert found.notes[-1].startswith("labels cannot be judged")


def test_views_are_averaged(tmp_path: Path) -> None:
    X = clusters(TRUE, spread=2.5, views=3)
    X[50] = X[20][::-1]  # the same three views in another order
    found = audit(make_store(tmp_path / "a.h5", X, TRUE, views=3))
    assert [(one.id, one.other_id) for one in found.of("near-duplicate")] == [
        ("00020.jpg", "00050.jpg")
    ]


def test_csv_has_one_line_a_finding_and_replaces_nothing_else(tmp_path: Path) -> None:
    X, y, hashes, splits = planted()
    found = audit(make_store(tmp_path / "a.h5", X, y, hashes=hashes, splits=splits))
    target = tmp_path / "suspects.csv"
    found.to_csv(target)
    found.to_csv(target)
    with target.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["id"] for line in lines] == [one.id for one in found]
    assert lines[0]["kind"] == "label"
    assert list(tmp_path.glob(".*")) == []

    other = tmp_path / "mine.csv"
    other.write_text("id,label\n")
    with pytest.raises(OutputError, match=r"mine\.csv is there already and is not a file of"):
        found.to_csv(other)
    assert other.read_text() == "id,label\n"


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="at least 3 images"):
        audit(make_store(tmp_path / "a.h5", clusters(["a", "b"]), ["a", "b"]))


def test_twins_that_are_edited_are_found_and_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = [f"class {i % 5}" for i in range(1500)]
    X = clusters(y, d=64, spread=1.5)
    X[1400:1430] = X[:30] + rng.normal(scale=0.75, size=(30, 64))  # cosines of about .9
    X[1430:1441] = X[100] + rng.normal(scale=0.2, size=(11, 64))  # a burst of twelve
    splits = ["test" if row >= 1400 else "train" for row in range(1500)]
    found = audit(make_store(tmp_path / "a.h5", X, y, splits=splits)).of("near-duplicate")
    pairs = {tuple(sorted((int(one.id[:5]), int(one.other_id[:5])))) for one in found}
    assert len(pairs & {(row, 1400 + row) for row in range(30)}) >= 25
    burst = {100, *range(1430, 1441)}
    assert {row for pair in pairs for row in pair if row in burst} == burst
    assert len([pair for pair in pairs if not burst & {*pair} and pair[1] - pair[0] != 1400]) <= 6
    scores = [one.score for one in found]
    assert scores[0] >= 0.98 > scores[-1]


def test_the_estimate_and_the_accuracy_without_twins_are_said(tmp_path: Path) -> None:
    X, y, hashes, splits = planted()
    found = audit(make_store(tmp_path / "a.h5", X, y, hashes=hashes, splits=splits))
    assert found.wrong_labels == len(found.of("label"))
    assert 5 <= found.wrong_labels <= 14  # 10 are wrong: 9 were moved, and one copy has two labels
    assert 0.8 < found.accuracy < found.accuracy_without_twins + 0.02 < 1
    text = str(found)
    assert f"about {found.wrong_labels} labels wrong; linear is right out of fold in 0." in text
    strongest = [line.split()[2] for line in text.splitlines() if line.startswith("label ")]
    assert strongest == [one.id for one in found.of("label")[:5]]
    unlabelled = audit(make_store(tmp_path / "b.h5", X, [""] * 120))
    assert np.isnan(unlabelled.accuracy) and "about" not in str(unlabelled)
