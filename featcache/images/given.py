"""What a call was given for images, whatever it is: paths, images in memory, arrays, tensors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from featcache.errors import DecodeError, ImageSetError
from featcache.images.arrays import NOT_PIXELS
from featcache.images.folders import expanded, matches
from featcache.images.image_set import ImageSet
from featcache.images.sources import SHARDS, Source, numbered, sorted_tables
from featcache.pixels import decode

if TYPE_CHECKING:
    from featcache.pixels.decode import RawImage

Images: TypeAlias = ImageSet | str | os.PathLike[str] | Iterable[Any] | np.ndarray
"""Files, folders, patterns, an `ImageSet`; PIL images, arrays of uint8, a tensor of uint8."""


@dataclass(frozen=True, kw_only=True)
class Listed(Source):
    """Images in a list: PIL images, and arrays of uint8 (h, w) or (h, w, c)."""

    images: Sequence[Image.Image | np.ndarray]

    def read(self, row: int) -> RawImage:
        """Return the image, whose file is read now if it was not."""
        image: RawImage = self.images[self.places[row]]
        if isinstance(image, Image.Image):
            try:
                with decode.quiet:
                    image.load()
            except Exception as error:  # a decoder of Pillow's may raise anything
                raise DecodeError("read", decode.reason(error)) from error
        return image


def image_sets(images: Images) -> list[tuple[str, ImageSet]]:
    """Return image sets of whatever was given, in that order.

    Each with the path that its ids are below; of a single source, that is nothing.

    Raises
    ------
    ImageSetError
        It is empty, or holds something else than images.
    """
    if isinstance(images, ImageSet):
        return [("", images)]
    given = _as_array(images)
    one = isinstance(given, str | os.PathLike | Image.Image) or not isinstance(given, Iterable)
    if isinstance(given, np.ndarray) and given.dtype.kind not in "OTU":
        one = given.ndim == 2 or (given.ndim == 3 and given.shape[2] in (3, 4))
        if not one:
            return [("", ImageSet.from_arrays(given))]
    items: list[Any] = [given] if one else list(given)
    if not items:
        raise ImageSetError("There are no images: the list is empty.")
    paths = [os.fspath(item) for item in items if isinstance(item, str | os.PathLike)]
    if len(paths) < len(items):
        listed = [_picture(_as_array(item), k) for k, item in enumerate(items)]
        tables, order = sorted_tables({"ids": numbered(len(listed))}, "a list")
        source = Listed(tables=tables, name="a list", places=order, images=listed)
        return [("", ImageSet(source))]
    if len(paths) == 1:
        return [("", ImageSet.open(paths[0]))]
    matched = [one for path in paths for name in expanded(path) for one in matches(name) or [name]]
    found: list[tuple[str, ImageSet]] = []
    opened: set[str] = set()
    for is_file, run in itertools.groupby(matched, _is_image):
        names = [os.path.normpath(name) for name in run]
        if is_file:
            found += [("", _in_order(ImageSet.from_files(one), one)) for one in _each_once(names)]
            continue
        for name in names:
            if name in opened:
                continue  # a folder that is named twice; images come as often as they are given
            opened.add(name)
            # Ids in a tar begin with the name of the tar.
            place = Path(name).parent if name.lower().endswith(SHARDS) else name
            found.append((str(place), ImageSet.open(name)))
    return found


def _as_array(images: Any) -> Any:
    """Return a tensor of torch as an array, its channels last; anything else as it is.

    (n, c, h, w) -> (n, h, w, c), and of one image (c, h, w) -> (h, w, c).
    """
    if not hasattr(images, "detach"):
        return images
    array = images.detach().cpu().numpy()
    if array.ndim in (3, 4) and array.shape[-3] in (1, 3, 4):
        array = np.moveaxis(array, -3, -1)
        return array[..., 0] if array.shape == (*array.shape[:2], 1) else array
    return array


def _each_once(names: Sequence[str]) -> list[list[str]]:
    """Cut a list wherever a name comes again: an image set has each image once."""
    runs: list[dict[str, None]] = [{}]
    for name in names:
        if name in runs[-1]:
            runs.append({})
        runs[-1][name] = None
    return [list(run) for run in runs]


def _picture(item: Any, number: int) -> Image.Image | np.ndarray:
    """Return an image in memory if it is one."""
    if isinstance(item, Image.Image):
        return item
    pixels = isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.size
    if pixels and (item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (3, 4))):
        found: np.ndarray = item
        return found
    came = f"{item.dtype} {item.shape}" if hasattr(item, "dtype") else repr(item)[:60]
    came = f"{type(item).__name__} {came}"
    if isinstance(item, str | os.PathLike):
        came = f"the path {os.fspath(item)!r} in a list that holds other things too"
    hint = NOT_PIXELS if getattr(getattr(item, "dtype", None), "kind", "") == "f" else ""
    raise ImageSetError(
        f"Expected paths, or PIL images and arrays of uint8 (h, w, 3) or (h, w); got {came} as "
        f"number {number}.{hint}"
    )


def _is_image(path: str) -> bool:
    """Return whether a path is a file that holds one image, by its suffix."""
    return Path(path).is_file() and not path.lower().endswith((*SHARDS, ".npz"))


def _in_order(images: ImageSet, files: Sequence[str]) -> ImageSet:
    """Undo the sorting of an image set made of files."""
    row_of = {name: row for row, name in enumerate(images.ids)}
    if row_of.keys() != set(files):
        return images  # names that are not UTF-8
    return images.select([row_of[name] for name in files])
