"""Test images in every file: their features say whether another machine computes the same."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from featcache.errors import DecodeError, ExtractionError, FingerprintMismatch
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Runtime
from featcache.pixels import canary
from featcache.store.format import Canaries
from featcache.store.writer import FeatureWriter

# Largest difference of features, relative to the largest, that rounding explains.
_CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
# Relative distance of an image's features from one batch to another, that rounding explains.
_VARYING = 1e-3
_BESIDE = 2  # images of noise that the test images share a batch with


def usable_canaries(backbone: Backbone) -> list[tuple[str, bytes]]:
    """Return the canaries that have the channels which this preprocessing needs."""
    usable = []
    for name, image in canary.images():
        with contextlib.suppress(DecodeError):
            backbone.preprocessing(image)
            usable.append((name, image))
    return usable or [canary.noise(backbone.preprocessing.output_shape[0])]


def of_canaries(runtime: Runtime, images: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Return the features of canary images by tap: (k, ...) float32."""
    return runtime(_pixels(runtime.backbone, images))


def _pixels(backbone: Backbone, images: Sequence[bytes]) -> np.ndarray:
    """Return images as the network takes them: uint8, (k, c, h, w)."""
    return np.stack([backbone.preprocessing(image) for image in images])


def check_canaries(writer: FeatureWriter, runtime: Runtime) -> float | None:
    """Store the canaries' features; compare them with those of rows that are there already.

    Before the first row the network is also checked: its features must be finite, and a function
    of the image alone.

    Returns
    -------
    float or None
        What rounding costs, see `Summary.rounding`; None in float32 or without canaries.
    """
    canaries = writer.canaries
    if canaries is None:
        return None
    pixels = _pixels(runtime.backbone, canaries.images)
    found = replace(canaries, features=runtime(pixels))
    varying = writer.fingerprint.varying
    if not varying:
        for other in [canaries, *(source.canaries for source in writer.earlier_stores)]:
            check_same_network(writer.path, runtime, other, found)
    exact, plain = runtime.precision == "float32", runtime
    if not exact or runtime.settings.batch_size == 1:
        plain = Runtime(runtime.backbone, device="cpu", batch_size=len(pixels) + _BESIDE)
    expected = found.features if exact else plain(pixels)
    if not canaries.features:
        _refuse_infinite(runtime, found, expected)
        if not varying:
            _refuse_varying(plain, pixels, expected)
        writer.set_canaries(found.features)
    away = [np.median(_distances(found.features[tap], one)) for tap, one in expected.items()]
    return None if exact else float(max(away))


def check_same_network(
    path: str, runtime: Runtime, stored: Canaries | None, found: Canaries | None = None
) -> None:
    """Refuse a network that gives a file's canary images other features than the file holds.

    Parameters
    ----------
    path : str
        The store.
    runtime : Runtime
        The network.
    stored : Canaries or None
        Canaries of the file; nothing is compared where it has none, or none were computed.
    found : Canaries, optional
        Canaries with this network's features, which are computed anew for other images.

    Raises
    ------
    FingerprintMismatch
        The features differ by more than rounding explains.
    """
    if stored is None or not stored.features:
        return
    if found is None or found.images != stored.images:
        found = replace(stored, features=of_canaries(runtime, stored.images))
    compare_canaries(path, runtime.precision, [found, stored])


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
                    f"that {path} was begun with: the code of the network is another, or a machine "
                    "decodes, resizes or computes differently (other versions of Pillow or torch?)."
                    " Compute into another file with -o; this one is left as it is."
                )


def _refuse_infinite(runtime: Runtime, found: Canaries, expected: Mapping[str, np.ndarray]) -> None:
    """Refuse a network whose features (k, ...) of test images are not finite."""
    network, precision = runtime.backbone.name, runtime.precision
    bad = [tap for tap, values in found.features.items() if not np.isfinite(values).all()]
    if not bad:
        return
    if all(np.isfinite(expected[tap]).all() for tap in bad):
        other = "--precision bfloat16 or " if precision == "float16" else ""
        raise ExtractionError(
            f"{network} does not compute in {precision}: features of {bad[0]} are not finite there,"
            f" and finite in float32. Type {other}--precision float32. Nothing was computed."
        )
    state = runtime.backbone.module.state_dict()
    names = [name for name, value in state.items() if not value.isfinite().all()]
    why = f": its weights are not finite (first: {names[0]}). Load others" if names else ""
    raise ExtractionError(
        f"{network} gives features of {bad[0]} that are not finite, for test images{why}. Nothing "
        "was computed."
    )


def _refuse_varying(runtime: Runtime, pixels: np.ndarray, alone: Mapping[str, np.ndarray]) -> None:
    """Refuse a network whose features of an image change with the pass, or with its neighbours."""
    noise = np.random.default_rng(0).integers(0, 256, (_BESIDE, *pixels.shape[1:]), np.uint8)
    beside = runtime(np.concatenate([noise, pixels]))  # (k + 2, c, h, w)
    change = _largest_change(alone, {tap: values[_BESIDE:] for tap, values in beside.items()})
    if change <= _VARYING:
        return
    again = _largest_change(runtime(pixels), runtime(pixels))
    why = (
        f"in two runs they differ by {again:.1%}. Dropout or noise may be left on in its forward()"
        if again > _VARYING
        else f"beside other images in a batch they differ by {change:.1%}. It may take statistics "
        "of the batch"
    )
    raise ExtractionError(
        f"The features of {runtime.backbone.name} are no function of the image: {why}. Mend the "
        "network, or type --accept-varying (accept_varying=True) to compute them all the same. "
        "Nothing was computed."
    )


def _largest_change(features: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> float:
    """Return the largest distance of an image's features (k, ...), relative to their length."""
    return max(float(_distances(others[tap], one).max()) for tap, one in features.items())


def _distances(values: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return the rows' distances from expected ones, relative to their length: (k, ...) -> (k,)."""
    values, expected = values.reshape(len(values), -1), expected.reshape(len(expected), -1)
    length = np.maximum(np.linalg.norm(expected, axis=1), np.finfo(np.float32).tiny)
    return np.asarray(np.linalg.norm(values - expected, axis=1) / length)
