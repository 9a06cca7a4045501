"""What the head of a predictor takes: columns of a store, or features of new images."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.errors import FingerprintMismatch, PredictorError
from featcache.fingerprint import Fingerprint
from featcache.networks.identity import difference

if TYPE_CHECKING:
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


def columns_of(store: FeatureStore, layers: Iterable[str]) -> list[InputTap]:
    """Return where the columns of taps come from, which are named as in a store."""
    keys = {name: key for key, name in source_taps(store).items()}
    return [InputTap(*keys[name], store.taps[name].width) for name in layers]


def side_by_side(
    columns: Sequence[InputTap],
    fingerprints: Sequence[Fingerprint],
    by_source: Mapping[int, Mapping[str, npt.NDArray[Any]]] | Sequence[Mapping[str, Any]],
    *,
    views: int = 1,
) -> npt.NDArray[np.float32]:
    """Put features by tap, one mapping a network, side by side.

    Each array is (m, ...) or, with views, (m, views, ...); the result (m, d) or (m, views, d).
    """
    parts = []
    for column in columns:
        part = by_source[column.source][column.tap]
        # Rounded as they were stored, so that they are what a head was trained on.
        part = part.astype(fingerprints[column.source].store_dtype, copy=False)
        head = part.shape[:2] if views > 1 else part.shape[:1]
        parts.append(part.reshape(*head, column.width))
    return np.concatenate(parts, axis=-1).astype(np.float32, copy=False)


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


def features_of(
    images: ImageSet, network: Backbone, fingerprint: Fingerprint, **settings: Any
) -> Generator[Batch]:
    """Yield what a network makes of all images, in order, by the path that extraction takes."""
    from featcache.extraction.features import batches_of
    from featcache.pixels.views import Augmentation

    drawn = fingerprint.augmentation
    yield from batches_of(
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


def check_canaries(
    names: Sequence[str],
    found: npt.NDArray[Any],
    expected: npt.NDArray[Any],
    precisions: Sequence[str],
    versions: str,
    what: str = "Predictions",
) -> None:
    """Compare features of test images (k, d) with those of the extraction that counts.

    Parameters
    ----------
    names : list of str
        The test images.
    found, expected : ndarray of shape (k, ...)
        Their features here and then.
    precisions : list of str
        Of the networks' forward passes.
    versions : str
        Of which packages here and then.
    what : str
        What such features are for.

    Raises
    ------
    PredictorError
        They have nothing to do with each other. A smaller difference than that is a warning.
    """
    limit = max(CLOSE[one] for one in precisions)
    off = [distance(a, b) for a, b in zip(found, expected, strict=True)]
    worst = int(np.argmax(off))
    if off[worst] <= limit:
        return
    text = (
        f"The canary image {names[worst]!r} gives features that differ from those at training by "
        f"{off[worst]:.2g} of the largest; up to {limit:g} is rounding. Another Pillow, torch or "
        f"device decodes, resizes or computes differently: {versions}."
    )
    if not off[worst] <= FAR:
        raise PredictorError(f"{text} {what} would be meaningless.")
    warnings.warn(f"{text} {what} may differ slightly.", stacklevel=5)
