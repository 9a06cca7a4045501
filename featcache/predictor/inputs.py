"""What the head of a predictor takes: columns of a store, or features of new images."""

from __future__ import annotations

import itertools
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.errors import FingerprintMismatch, PredictorError
from featcache.fingerprint import Fingerprint
from featcache.images.folders import expanded, matches
from featcache.images.sources import SHARDS
from featcache.networks.identity import difference

if TYPE_CHECKING:
    from PIL.Image import Image

    from featcache.extraction.decoding import Batch
    from featcache.images.image_set import ImageSet
    from featcache.networks.backbone import Backbone
    from featcache.store.store import FeatureStore

# Features of the canary images, relative to the largest. Another Pillow or libjpeg moves single
# pixels by one level; another device or instruction set moves the sums.
CLOSE: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
FAR = 0.2


@dataclass(frozen=True)
class InputTap:
    """Features of one tap among the columns that a head takes.

    Attributes
    ----------
    source : int
        Number of the fingerprint.
    tap : str
        Canonical tap.
    width : int
        Number of columns.
    """

    source: int
    tap: str
    width: int


def source_taps(store: FeatureStore) -> dict[tuple[int, str], str]:
    """Return the name that each tap of each network has in a store, by (network, tap)."""
    keys = [(k, tap) for k, one in enumerate(store.fingerprints) for tap in one.taps]
    return dict(zip(keys, store.taps, strict=True))


def layers_of(
    columns: Sequence[InputTap], fingerprints: Sequence[Fingerprint], store: FeatureStore
) -> list[str]:
    """Return the names that a predictor's columns have in a store.

    Raises
    ------
    FingerprintMismatch
        The store's features are of another origin; with the difference, field by field.
    """
    where = ", ".join(store.paths)
    numbers = []
    for k, trained in enumerate(fingerprints):
        found = store.fingerprints
        fitting = [n for n, one in enumerate(found) if not difference(trained, one)]
        if not fitting and len(found) < len(fingerprints):
            wanted = " and ".join(f"{one.backbone} ({', '.join(one.taps)})" for one in fingerprints)
            raise FingerprintMismatch(
                f"The predictor needs features of {len(fingerprints)} networks, {wanted}; {where} "
                f"holds those of {', '.join(one.backbone for one in found)}. Join the stores: "
                "FeatureStore.join([...])."
            )
        if not fitting:
            nearest = min((difference(trained, one) for one in found), key=len)
            raise FingerprintMismatch(
                f"{where} holds features of another origin than the predictor was trained on:\n"
                f"{nearest}\nExtract the images with the predictor's network, or train a predictor "
                "on these features."
            )
        numbers.append(fitting[0] if k not in fitting else k)
    names = source_taps(store)
    return [names[numbers[column.source], column.tap] for column in columns]


def image_sets(images: Any) -> list[tuple[str, ImageSet]]:
    """Return image sets of whatever `Predictor.stream` was given, in that order.

    Each with the path that its ids are below; of a single source, that is nothing.
    """
    from featcache.images.image_set import ImageSet

    if isinstance(images, ImageSet):
        return [("", images)]
    if isinstance(images, np.ndarray) and not (images.ndim == 3 and images.shape[2] in (3, 4)):
        return [("", ImageSet.from_arrays(images))]
    listed = isinstance(images, Iterable) and not isinstance(images, str | np.ndarray)
    items = list(images) if listed else [images]
    if not items:
        raise PredictorError("There is no image to predict: the list is empty.")
    paths = [os.fspath(item) for item in items if isinstance(item, str | os.PathLike)]
    if len(paths) < len(items):
        return [("", ImageSet.from_dataset([(_picture(item), 0) for item in items]))]
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


def _each_once(names: Sequence[str]) -> list[list[str]]:
    """Cut a list wherever a name comes again: an image set has each image once."""
    runs: list[dict[str, None]] = [{}]
    for name in names:
        if name in runs[-1]:
            runs.append({})
        runs[-1][name] = None
    return [list(run) for run in runs]


def _picture(item: Any) -> Image:
    """Return an image in memory as a PIL image."""
    from PIL import Image

    if isinstance(item, Image.Image):
        return item
    pixels = isinstance(item, np.ndarray) and item.dtype == np.uint8 and item.size
    if pixels and (item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (3, 4))):
        return Image.fromarray(item)
    came = f"{item.dtype} {item.shape}" if hasattr(item, "dtype") else repr(item)[:60]
    came = f"{type(item).__name__} {came}"
    if isinstance(item, str | os.PathLike):
        came = f"the path {os.fspath(item)!r} in a list that holds other things too"
    raise PredictorError(
        f"Expected paths, or PIL images and arrays of uint8 (h, w, 3) or (h, w); got {came}."
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


def features_of(
    images: ImageSet, network: Backbone, fingerprint: Fingerprint, **settings: Any
) -> Generator[Batch]:
    """Yield what a network makes of all images, in order, by the path that extraction takes."""
    from featcache.extraction import extract as extraction
    from featcache.pixels.views import Augmentation

    drawn = fingerprint.augmentation
    yield from extraction.features(
        images,
        network,
        precision=fingerprint.precision,
        augmentation=None if drawn is None else Augmentation.from_dict(drawn),
        **settings,
    )


def distance(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the largest difference relative to the largest expected value; NaN if there is one."""
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / scale
