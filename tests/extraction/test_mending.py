"""What damage costs: what the messages say is typed, and nothing is lost or believed unseen."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.errors import CorruptStore
from featcache.extraction.extract import extract
from featcache.images.image_set import ImageSet
from featcache.store.file import StoreFile
from featcache.store.store import FeatureStore
from tests.small import TAP, backbone, folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder(tmp_path / "images", 12, classes=(".",))


def run(root: Path, *, labels: bool = True, **options: Any) -> FeatureStore:
    images = ImageSet.from_folder(root)
    if labels:
        images = images.with_tables({"labels": np.array(["a", "b"] * 6)})
    options = {"batch_size": 4, "workers": 0, "device": "cpu", **options}
    return extract(images, backbone(), root.parent / "f.h5", **options)


def flip(path: Path, name: str, position: int, bit: int = 0) -> None:
    """Flip a bit of a dataset on the disk."""
    at = StoreFile(str(path)).datasets[name].offset + position
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def advised(error: BaseException | str, root: Path) -> None:
    """Type the command of the message."""
    command = str(error).split(": mv ")[1].split(", then")[0]
    subprocess.run(f"mv {command}", shell=True, check=True, cwd=root.parent)


@pytest.mark.parametrize(
    ("name", "position", "computed"),
    [
        (f"features/{TAP}", 64 * 5 + 3, 1),
        ("labels", 7, 0),
        ("rows", 5, 1),
        ("ids", 2, 1),
        ("failures/reason", 0, 0),
        ("canaries/images/1", 300, 0),
        (f"canaries/features/{TAP}", 7, 0),
        ("meta/run", 3, 0),
        ("meta/settings", 3, 0),
        ("meta/request", 30, 0),
        ("digest", 0, 0),
    ],
)
def test_what_is_damaged_is_written_again_and_not_sealed_as_it_is(
    root: Path, name: str, position: int, computed: int
) -> None:
    (root / "broken.jpg").write_bytes(b"no image")
    path, labels = root.parent / "f.h5", np.array(["a", "b"] * 6 + ["a"])
    images = ImageSet.from_folder(root).with_tables({"labels": labels})
    options: dict[str, Any] = {"batch_size": 4, "workers": 0, "device": "cpu"}
    whole = extract(images, backbone(), path, **options)
    expected, canaries = whole.load()[0].copy(), whole.canaries
    flip(path, name, position, bit=6)
    with pytest.raises(CorruptStore, match="mv ") as error:
        if name.startswith("features"):
            FeatureStore.open(path).load()
        extract(images, backbone(), path, **options)
    advised(error.value, root)
    again = extract(images, backbone(), path, **options)
    assert again.extraction.computed == computed
    assert again.verify().ok
    np.testing.assert_array_equal(again.load()[0], expected)
    assert again.labels.tolist() == labels[:12].tolist()
    assert [(x.id, x.stage, x.reason) for x in again.failures] == [
        (x.id, x.stage, x.reason) for x in whole.failures
    ]
    assert again.canaries is not None and canaries is not None
    assert again.canaries.images == canaries.images
    np.testing.assert_allclose(again.canaries.features[TAP], canaries.features[TAP], rtol=1e-5)
    assert [x.name for x in root.parent.iterdir() if x.name.startswith("f.h5")] == ["f.h5"]
    assert extract(images, backbone(), path, **options).extraction.skipped


@pytest.mark.parametrize("name", ["digest", f"canaries/features/{TAP}"])
def test_test_images_have_features_again_where_no_row_is_computed(root: Path, name: str) -> None:
    path, canaries = root.parent / "f.h5", run(root).canaries
    flip(path, name, 0)
    path.rename(f"{path}.partial")
    again = run(root)
    assert again.extraction.computed == 0 and again.canaries is not None and canaries is not None
    np.testing.assert_allclose(again.canaries.features[TAP], canaries.features[TAP], rtol=1e-5)


def test_a_store_that_is_mended_keeps_the_labels_that_it_alone_holds(root: Path) -> None:
    path = root.parent / "f.h5"
    whole = run(root).labels.tolist()
    flip(path, f"features/{TAP}", 64 * 5 + 3)
    with pytest.raises(CorruptStore, match="mv ") as error:
        FeatureStore.open(path).load()
    advised(error.value, root)
    mended = run(root, labels=False)
    assert (mended.extraction.computed, mended.labels.tolist()) == (1, whole)


def test_damaged_labels_are_not_taken_over(root: Path) -> None:
    path = root.parent / "f.h5"
    whole = run(root).labels.tolist()
    flip(path, "labels", 0, bit=1)  # another letter
    with pytest.raises(CorruptStore, match="mv ") as error:
        run(root, labels=False)
    advised(error.value, root)
    with pytest.raises(CorruptStore, match=r"its labels \(--labels FILE\), or with --drop-labels"):
        run(root, labels=False)
    assert run(root).labels.tolist() == whole
    path.rename(f"{path}.partial")
    assert run(root, labels=False).labels.tolist() == whole


def test_damaged_labels_may_be_dropped(root: Path) -> None:
    path = root.parent / "f.h5"
    run(root)
    flip(path, "labels", 0, bit=1)
    path.rename(f"{path}.partial")
    again = run(root, labels=False, drop_labels=True)
    assert (again.extraction.computed, again.classes) == (0, [])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("meta/settings", {b'"batch_size":4': b'"batch_size":{}'}),
        ("meta/request", {b'{"state_sha256":"': b'"state_sha256:   ', b'"},"prec': b' ","prec'}),
        (f"canaries/features/{TAP}", {b"": b"\xff\xff\xff\xff"}),
    ],
)
def test_values_that_no_run_writes_are_not_built_upon_though_they_are_signed(
    root: Path, name: str, changes: dict[bytes, bytes]
) -> None:
    path = root.parent / "f.h5"
    expected = run(root).load()[0].copy()
    file = StoreFile(str(path), writable=True)
    dataset = file.datasets[name]
    text = file.read(name).tobytes()
    for old, new in changes.items():
        text = text.replace(old, new, 1)[: dataset.nbytes]
    file.write_rows(dataset, 0, np.frombuffer(text, np.uint8))
    file.seal()
    file.close()
    if name == "meta/request":
        path.rename(f"{path}.partial")
    elif name == "meta/settings":
        folder(root, 13, classes=(".",))  # an image is to be computed
    else:
        (root / "0011.jpg").unlink()  # none is
    again = run(root, labels=False, batch_size=None)
    both = min(len(again), 12)
    np.testing.assert_allclose(again.load()[0][:both], expected[:both], rtol=1e-5)
    assert again.verify().ok
