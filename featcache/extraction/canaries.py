"""Test images in every file: their features say whether another machine computes the same."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from featcache.errors import DecodeError, FingerprintMismatch
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Runtime
from featcache.pixels import canary
from featcache.store.format import Canaries
from featcache.store.writer import FeatureWriter

__all__ = ["check_canaries", "compare_canaries", "of_canaries", "usable_canaries"]

# Largest difference of features, relative to the largest, that rounding explains.
_CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


def usable_canaries(backbone: Backbone) -> list[tuple[str, bytes]]:
    """Return the canaries that have the channels which this preprocessing needs."""
    usable = []
    for name, image in canary.images():
        with contextlib.suppress(DecodeError):
            backbone.preprocessing(image)
            usable.append((name, image))
    return usable


def of_canaries(runtime: Runtime, images: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Return the features of canary images by tap: (k, ...) float32."""
    return runtime(np.stack([runtime.backbone.preprocessing(image) for image in images]))


def check_canaries(writer: FeatureWriter, runtime: Runtime) -> float | None:
    """Store the canaries' features; compare them with those of rows that are there already.

    Returns
    -------
    float or None
        What rounding costs, see `Summary.rounding`; None in float32 or without canaries.
    """
    canaries = writer.canaries
    if canaries is None:
        return None
    found = replace(canaries, features=of_canaries(runtime, canaries.images))
    earlier = [canaries, *(source.canaries for source in writer.earlier_stores)]
    compare_canaries(writer.path, runtime.precision, [found, *earlier])
    if not canaries.features:
        writer.set_canaries(found.features)
    if runtime.precision == "float32":
        return None
    return _rounding(runtime.backbone, canaries.images, found.features)


def compare_canaries(path: str, precision: str, canaries: Sequence[Canaries | None]) -> None:
    """Compare the features of test images, and refuse those that were computed differently.

    Parameters
    ----------
    path : str
        The store.
    precision : {"float32", "bfloat16", "float16"}
        Precision of the forward pass.
    canaries : sequence of Canaries or None
        Test images; the features of each are compared with the first one's.

    Raises
    ------
    FingerprintMismatch
        The features differ by more than rounding explains.
    """
    known = [each for each in canaries if each and each.features]
    for other in known[1:]:
        if other.images != known[0].images:
            continue
        for tap, values in other.features.items():
            found = known[0].features[tap]
            error = np.abs(found - values).max() / max(np.abs(values).max(), 1e-30)
            if not error <= _CANARY_TOLERANCE[precision]:
                raise FingerprintMismatch(
                    f"The features of test images differ by {error:.1e} of the largest from those "
                    f"that {path} was begun with: a machine decodes, resizes or computes "
                    f"differently (other versions of Pillow or torch?). "
                    "Compute into another file with -o; this one is left as it is."
                )


def _rounding(
    backbone: Backbone, images: Sequence[bytes], found: Mapping[str, np.ndarray]
) -> float:
    """Return the distance of features (k, ...) from float32 ones, see `Summary.rounding`."""
    plain = of_canaries(Runtime(backbone, device="cpu"), images)
    worst = 0.0
    for tap, value in found.items():
        expected = plain[tap].reshape(len(images), -1)
        distance = np.linalg.norm(value.reshape(len(images), -1) - expected, axis=1)
        length = np.maximum(np.linalg.norm(expected, axis=1), np.finfo(np.float32).tiny)
        worst = max(worst, float(np.median(distance / length)))
    return worst
