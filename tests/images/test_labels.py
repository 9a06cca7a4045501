"""Labels and pixels of arrays and data sets: what is no label, and what is refused at once."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.errors import ImageSetError
from featcache.images.image_set import ImageSet
from tests.images.test_images import ITEMS, Pairs

PIXELS = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)


@pytest.mark.parametrize(
    "labels, expected",
    [
        ([None, "cat", float("nan")], ["", "cat", ""]),
        (np.array([1.0, np.nan, 2.0]), ["1.0", "", "2.0"]),
        ([b"cat", np.bytes_(b"dog"), "cow"], ["cat", "dog", "cow"]),
        (torch.tensor([2, 0, 1]), ["2", "0", "1"]),
        (torch.tensor([[2], [0], [1]]), ["2", "0", "1"]),
        (np.array([[2], [0], [1]]), ["2", "0", "1"]),
    ],
)
def test_labels_of_any_kind_become_text(labels: Any, expected: list[str]) -> None:
    assert list(ImageSet.from_arrays(PIXELS, labels).labels) == expected
    items = Pairs(ITEMS[:3], targets=labels)
    assert list(ImageSet.from_dataset(items).labels) == expected


def test_several_labels_of_an_image_are_refused() -> None:
    for labels in (np.eye(3), torch.eye(3), [["a", "b"]] * 3):
        with pytest.raises(ImageSetError, match="Several labels per image are out of scope"):
            ImageSet.from_arrays(PIXELS, labels)
        with pytest.raises(ImageSetError, match=r"rows.argmax\(axis=1\)"):
            ImageSet.from_dataset(Pairs(ITEMS[:3], targets=labels))


def test_targets_without_a_name() -> None:
    names = {"classes": ["ant", "bee"]}
    images = ImageSet.from_dataset(Pairs(ITEMS, targets=np.array([0, 1, -1, 1, -1]), **names))
    assert list(images.labels) == ["ant", "bee", "", "bee", ""]
    images = ImageSet.from_dataset(Pairs(ITEMS, targets=["bee", None, "ant", 1, 0.0], **names))
    assert list(images.labels) == ["bee", "", "ant", "bee", "ant"]
    for target in (2, -2, 0.5):
        dataset = Pairs(ITEMS, targets=[0, 1, target, 1, 0], **names)
        with pytest.raises(ImageSetError, match=f"item 2 has the target {target}, .* 0 to 1"):
            ImageSet.from_dataset(dataset)


def test_data_sets_in_data_sets_keep_their_names() -> None:
    named = Pairs(ITEMS, targets=[0, 1, 0, 1, 0], classes=["ant", "bee"])
    other = Pairs(ITEMS[:2], targets=[0, 0], classes=["cow"])
    inner = torch.utils.data.Subset(torch.utils.data.Subset(named, [4, 3, 1]), [2, 0])
    images = ImageSet.from_dataset(inner)
    assert list(images.labels) == ["bee", "ant"] and images.read(0) is ITEMS[1][0]
    both = torch.utils.data.ConcatDataset([named, other])
    assert ImageSet.from_dataset(both).labels[4:].tolist() == ["ant", "cow", "cow"]
    mixed = torch.utils.data.Subset(both, [6, 1, 5])
    assert list(ImageSet.from_dataset(mixed).labels) == ["cow", "bee", "cow"]


def test_a_target_transform_gives_the_labels_without_names() -> None:
    items = [(image, f"kind {target}") for image, target in ITEMS]
    dataset = Pairs(items, targets=[0] * 5, classes=["ant", "bee"], target_transform=str)
    assert ImageSet.from_dataset(dataset).classes == ["kind 0", "kind 1"]
    turned = [(image, 1 - target) for image, target in ITEMS]
    dataset = Pairs(turned, classes=["ant", "bee"], target_transform=lambda y: 1 - y)
    assert ImageSet.from_dataset(dataset).classes == ["0", "1"]


class Random(Pairs):
    """A data set whose image number 3 is another one each time."""

    def __getitem__(self, index: int) -> Any:
        image, target = super().__getitem__(index)
        if index == 3:
            image = Image.fromarray(np.random.default_rng().integers(0, 255, (9, 9)).astype("u1"))
        return image, target


class Drawn(Pairs):
    """A data set whose targets are others each time."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0], int(np.random.default_rng().integers(1 << 40))


def test_random_targets_are_refused() -> None:
    with pytest.raises(ImageSetError, match="item 0 has another target each time it is read"):
        ImageSet.from_dataset(Drawn(ITEMS))


def test_random_transforms_are_refused() -> None:
    for dataset in (Random(ITEMS), torch.utils.data.Subset(Random(ITEMS), [1, 3])):
        with pytest.raises(ImageSetError, match="is another image each time it is read"):
            ImageSet.from_dataset(dataset)


def test_channels_first_are_refused_at_once() -> None:
    with pytest.raises(ImageSetError, match=r"channels last, .*got \(2, 3, 32, 32\)"):
        ImageSet.from_arrays(np.zeros((2, 3, 32, 32), np.uint8))
    assert len(ImageSet.from_arrays(np.zeros((2, 3, 32, 3), np.uint8))) == 2


def test_a_mapped_array_is_sent_as_its_path(tmp_path: Path) -> None:
    pixels = np.arange(40 * 64 * 64, dtype=np.uint16).reshape(40, 64, 64)
    np.save(tmp_path / "c.npy", pixels)
    np.save(tmp_path / "f.npy", np.asfortranarray(pixels))
    for name in ("c.npy", "f.npy"):
        mapped = np.load(tmp_path / name, mmap_mode="r")
        for view, plain in ((mapped, pixels), (mapped[5:30:2, 1:], pixels[5:30:2, 1:])):
            images = ImageSet.from_arrays(view).select([3, 7])
            sent = pickle.dumps(images)
            assert len(sent) < 2000
            again = pickle.loads(sent)
            assert np.array_equal(again.read(1), plain[7]) and again.read(0).dtype == np.uint16
    assert len(pickle.dumps(ImageSet.open(tmp_path / "c.npy"))) < 4000
    copied = np.load(tmp_path / "c.npy", mmap_mode="c")
    copied[0] = 1
    assert pickle.loads(pickle.dumps(ImageSet.from_arrays(copied))).read(0).max() == 1
    chosen = ImageSet.from_arrays(mapped[[2, 1]])
    (tmp_path / "f.npy").unlink()
    assert np.array_equal(pickle.loads(pickle.dumps(chosen)).read(1), pixels[1])
