"""Images in memory: arrays, ``.npy`` and ``.npz`` files, and map-style data sets of PIL images."""

from __future__ import annotations

import itertools
import os
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from featcache.errors import DecodeError, ImageSetError
from featcache.images.sources import Source, label_text, numbered, sorted_tables
from featcache.pixels import decode
from featcache.system.files import open_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

TORCHVISION_SETS: dict[str, dict[str, dict[str, Any]]] = {
    "CIFAR10": {"train": {"train": True}, "test": {"train": False}},
    "FashionMNIST": {"train": {"train": True}, "test": {"train": False}},
    "Flowers102": {split: {"split": split} for split in ("train", "val", "test")},
    "OxfordIIITPet": {split: {"split": split} for split in ("trainval", "test")},
}
"""Data sets of torchvision that are known by name: for each split, the arguments that give it."""

NOT_PIXELS = (
    " Are the numbers from 0 to 1, or normalised already? Give images as they were decoded: of 0 "
    "to 1, (images * 255).round() as uint8; normalising is done here, as the network expects."
)
"""What to do with images of floating point."""

_CHANNELS = (1, 2, 3, 4)
_TWICE_READ = 8  # so many items of a data set are read twice


@dataclass(frozen=True, kw_only=True)
class Arrays(Source):
    """Images in one array of shape (n, h, w) or (n, h, w, c); `places` are their indices in it."""

    images: NDArray[Any]

    def read(self, row: int) -> NDArray[Any]:
        """Return the image's pixels, shape (h, w) or (h, w, c)."""
        return np.asarray(self.images[self.places[row]])

    def __getstate__(self) -> dict[str, Any]:
        """Send the path of an array that is mapped from a file, not its pixels."""
        images = base = self.images
        while isinstance(base.base, np.ndarray):
            base = base.base
        if not isinstance(base, np.memmap) or base.filename is None or base.mode == "c":
            return vars(self)
        inside = images.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        place = str(base.filename), base.offset + inside, images.strides
        return vars(self) | {"images": (place, images.shape, images.dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["images"], tuple):
            (path, offset, strides), shape, dtype = state["images"]
            mapped = np.memmap(path, np.uint8, "r")
            state["images"] = np.ndarray(shape, dtype, mapped, offset, strides)
        self.__dict__.update(state)


def arrays(
    images: NDArray[Any], labels: Iterable[Any] | None, ids: list[str] | None, source: str = ""
) -> Arrays:
    """List the images of an array; see `ImageSet.from_arrays`."""
    source = source or f"an array {images.shape}"
    if images.ndim not in (3, 4) or images.dtype not in (np.uint8, np.uint16, np.bool_):
        raise ImageSetError(
            f"{source}: expected uint8 pixels of shape (n, h, w) or (n, h, w, c), "
            f"got {images.dtype} {images.shape}.{NOT_PIXELS if images.dtype.kind == 'f' else ''}"
        )
    if images.ndim == 4 and images.shape[3] not in _CHANNELS and images.shape[1] in _CHANNELS:
        raise ImageSetError(
            f"{source}: expected the channels last, as in (n, h, w, c), got {images.shape}. Give "
            "images.transpose(0, 2, 3, 1)"
        )
    values = {"ids": numbered(len(images)) if ids is None else ids}
    if labels is not None:
        values["labels"] = [label_text(label) for label in labels]
    for what, texts in values.items():
        if len(texts) != len(images):
            raise ImageSetError(
                f"{source}: expected {len(images)} {what}, one an image, got {len(texts)}"
            )
    tables, order = sorted_tables(values, source)
    return Arrays(tables=tables, name=source, places=order, images=images)


def array_file(path: str) -> Arrays:
    """List a ``.npy`` of images, or a ``.npz`` with ``images`` and perhaps ``labels``, ``ids``."""
    try:
        # numpy leaves a damaged .npz open when it is given a name, and waits for a pipe's writer
        with open_file(path) as file:
            if path.lower().endswith(".npy"):
                return arrays(np.load(path, mmap_mode="r"), None, None, path)
            with np.load(file) as parts:
                if "images" not in parts:
                    raise ImageSetError(f"{path}: expected an array 'images', got {parts.files}")
                labels = parts.get("labels")
                ids = parts["ids"].astype(str).tolist() if "ids" in parts else None
                return arrays(parts["images"], labels, ids, path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ImageSetError(f"{path}: cannot read this array: {error}") from error


# -- data sets -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Datasets(Source):
    """Items of map-style data sets; `places` are numbers of data set and item, shape (n, 2)."""

    datasets: tuple[Any, ...]

    def read(self, row: int) -> Image.Image:
        """Return the item's image."""
        which, item = self.places[row].tolist()
        try:
            with decode.quiet:
                image = self.datasets[which][item][0]
                if isinstance(image, Image.Image):
                    image.load()  # now, where a damaged file is this image's failure
        except Exception as error:  # a data set is foreign code that may raise anything
            raise DecodeError("read", decode.reason(error)) from error
        if not isinstance(image, Image.Image):
            raise DecodeError("read", f"expected a PIL image, got {type(image).__name__}")
        return image


def datasets(parts: Mapping[str, Any], source: str) -> Datasets:
    """List map-style data sets, one a split; "" names the only one that is no split."""
    ids, labels, splits, places = [], [], [], []
    for number, (split, dataset) in enumerate(parts.items()):
        _check_items(dataset, source)
        n = len(dataset)
        ids += [f"{split}/{name}" if split else name for name in numbered(n)]
        labels += _labels(dataset, range(n), source)
        splits += [split] * n
        places += [(number, item) for item in range(n)]
    values = {"ids": ids, "labels": labels} | ({} if "" in parts else {"splits": splits})
    tables, order = sorted_tables(values, source)
    at = np.array(places, np.int64)[order]  # (n, 2)
    return Datasets(tables=tables, name=source, places=at, datasets=tuple(parts.values()))


def torchvision_set(name: str, root: str | os.PathLike[str] | None, download: bool) -> Datasets:
    """List all splits of a data set of torchvision by its name; see `ImageSet.open`."""
    if root is None:
        raise ImageSetError(
            f"{name}: expected the folder that it is in, or is to be downloaded to. Type --root "
            f"FOLDER, or {name}:FOLDER where a command has no --root"
        )
    import torchvision.datasets

    make: Callable[..., Any] = getattr(torchvision.datasets, name)
    try:
        parts = {
            split: make(os.fspath(root), download=download, **arguments)
            for split, arguments in TORCHVISION_SETS[name].items()
        }
    except (RuntimeError, OSError) as error:
        reason = str(error).partition(" You can use download=True")[0].rstrip(".")
        hint = "" if download else ". To download it, type --download"
        raise ImageSetError(f"{name}: expected it in {os.fspath(root)}: {reason}{hint}") from error
    return datasets(parts, f"{name}:{os.fspath(root)}")


def _check_items(dataset: Any, source: str) -> None:
    """Refuse a data set whose first item is no (PIL image, target)."""
    if not len(dataset):
        raise ImageSetError(f"{source}: there are no images")
    item = dataset[0]
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise ImageSetError(f"{source}: expected items (PIL image, int), got {type(item).__name__}")
    if not isinstance(item[0], Image.Image):
        raise ImageSetError(
            f"{source}: expected items (PIL image, int), got ({type(item[0]).__name__}, ...). "
            "Make the data set without transform: the backbone brings its own"
        )
    for row in np.unique(np.linspace(0, len(dataset) - 1, _TWICE_READ, dtype=int)).tolist():
        try:
            (once, target), (again, other) = (dataset[row] for _ in range(2))
            same = np.array_equal(np.asarray(once), np.asarray(again))
        except Exception:  # an item that cannot be read fails by itself later
            continue
        if not same or str(target) != str(other):
            what = "has another target" if same else "is another image"
            raise ImageSetError(
                f"{source}: item {row} {what} each time it is read, as with a random transform. "
                "Make the data set without transform; for augmented views, give "
                "extract(..., augmentation=Augmentation(views=4)) or type --views 4"
            )


def _labels(dataset: Any, rows: Sequence[int], source: str) -> list[str]:
    """Return the labels of items, without decoding images where that is possible."""
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # torch.utils.data.Subset
        return _labels(dataset.dataset, [int(dataset.indices[row]) for row in rows], source)
    if hasattr(dataset, "datasets") and hasattr(dataset, "cumulative_sizes"):  # ConcatDataset
        ends, found = dataset.cumulative_sizes, []
        for part, run in itertools.groupby(rows, lambda row: bisect_right(ends, row)):
            start = ends[part - 1] if part else 0
            found += _labels(dataset.datasets[part], [row - start for row in run], source)
        return found
    changed = getattr(dataset, "target_transform", None) is not None
    targets = None if changed else _targets(dataset)
    names = None if changed else getattr(dataset, "classes", None)
    given = ((row, dataset[row][1] if targets is None else targets[row]) for row in rows)
    return [class_name(target, names, f"{source}: item {row}") for row, target in given]


def class_name(target: Any, names: Sequence[Any] | None, item: str) -> str:
    """Return the label of an item by its target."""
    text = label_text(target)
    if names is None or not text or isinstance(target, str | bytes):
        return text
    try:
        number = float(target)
    except (TypeError, ValueError):
        number = len(names)
    if number not in range(-1, len(names)):
        raise ImageSetError(
            f"{item} has the target {text}, and the data set has names for 0 to {len(names) - 1}, "
            "with -1 for no label. Give labels of your own: ImageSet.from_arrays, or a table"
        )
    return "" if number < 0 else str(names[int(number)])


def _targets(dataset: Any) -> Sequence[Any] | None:
    """Return the targets that a data set keeps as a list; None if only its items tell them."""
    for name in ("targets", "labels", "_labels"):
        values = getattr(dataset, name, None)
        if values is not None and len(values) == len(dataset):
            return list(values)
    return None
