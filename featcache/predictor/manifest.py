"""The file of a predictor, and the parts of it that must be read with care.

A predictor file is one zip of uncompressed members, readable with any zip tool:

==================  ==============================================================================
``manifest.json``   ``format`` = "featcache-predictor", ``format_version``, head and parameters,
                    class names, temperature, columns (which taps of which networks, side by
                    side), the networks' fingerprints, metrics, leaderboard, versions
``head.skops``      the scikit-learn estimator (see `featcache.predictor.persistence`)
``arrays.npz``      ``train_sha256`` (n, 32): hash of each training image. ``canary_x`` (m, d) and
                    ``canary_logits`` (m, k): rows and what the head makes of them.
                    ``canary_image_0`` ...: the image files that those rows come from
==================  ==============================================================================

Whoever wrote a file decides what is in it, so nothing is taken for granted: every entry's type is
checked, and a file that is not a predictor ends in `PredictorError`.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import PredictorError
from featcache.fingerprint import Fingerprint
from featcache.pixels.views import Augmentation
from featcache.predictor.inputs import InputTap
from featcache.version import __version__

FORMAT = "featcache-predictor"
FORMAT_VERSION = 1

MEMBERS = MANIFEST, HEAD, ARRAYS = "manifest.json", "head.skops", "arrays.npz"


@dataclass(frozen=True, eq=False)
class CanaryRows:
    """Rows on which a head, and the network before it, can be checked.

    Attributes
    ----------
    x : ndarray of float32, shape (m, d)
        Features.
    logits : ndarray of float32, shape (m, k)
        What the head made of them when it was trained.
    names, images : tuple of str, tuple of bytes
        The image files that `x` are the features of; empty where `x` are training rows.
    """

    x: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    names: tuple[str, ...] = ()
    images: tuple[bytes, ...] = ()


def is_predictor(path: Path) -> bool:
    """Say whether a file is a predictor, of whatever version, intact or not behind its manifest."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f'"{FORMAT}"'.encode() in archive.read(MANIFEST)[:1000]
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError):
        return False


def zipped(members: Mapping[str, bytes]) -> bytes:
    """Return an uncompressed zip; the same members give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def npz(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return an uncompressed ``.npz`` without pickled objects."""
    members = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=False)
        members[f"{name}.npy"] = buffer.getvalue()
    return zipped(members)


def read(data: bytes) -> dict[str, Any]:
    """Parse the manifest and check its format.

    Raises
    ------
    PredictorError
        It is not a predictor's, or of another format version.
    """
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PredictorError(f"The manifest is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PredictorError(f"The manifest does not say that it is a {FORMAT}.")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        made = manifest.get("versions")
        raise PredictorError(
            f"It has format version {version!r} (made by {made!r}), this featcache "
            f"{__version__} reads version {FORMAT_VERSION}. Use that featcache, or train "
            "again."
        )
    return manifest


def typed(values: Mapping[str, Any], name: str, kind: type) -> Any:
    """Return an entry of the manifest after checking its type."""
    value = values.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise PredictorError(
            f"The manifest's {name!r} should be a {kind.__name__}, it is {value!r:.80}."
        )
    return value


def texts(manifest: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return a list of texts of the manifest after checking them."""
    items = typed(manifest, name, list)
    if not all(isinstance(item, str) for item in items):
        raise PredictorError(f"The manifest's {name!r} should be texts, they are {items!r:.80}.")
    return tuple(items)


def temperature(manifest: Mapping[str, Any]) -> float:
    """Return the temperature after checking that it is a positive number."""
    value = manifest.get("temperature")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PredictorError(f"The manifest's 'temperature' is {value!r:.80}, not a number.")
    if not (math.isfinite(value) and value > 0):
        raise PredictorError(f"The manifest's 'temperature' is {value}, not a positive number.")
    return float(value)


def column(values: Any) -> InputTap:
    """Return a column of the manifest after checking the types of its fields."""
    if not isinstance(values, dict):
        raise PredictorError(f"A column of the manifest is {values!r:.80}.")
    made = InputTap(
        typed(values, "source", int), typed(values, "tap", str), typed(values, "width", int)
    )
    if made.source < 0 or made.width < 1:
        raise PredictorError(f"A column of the manifest is {values!r:.80}.")
    return made


def fingerprint(values: Any) -> Fingerprint:
    """Return a fingerprint of the manifest after checking the types of its fields."""
    made = Fingerprint.from_dict(values)
    right = (
        made.source in ("torchvision", "timm", "callable", "module")
        and all(isinstance(x, str) for x in (made.backbone, made.weights, made.state_sha256))
        and len(made.taps) > 0
        and all(isinstance(tap, str) for tap in made.taps)
        and isinstance(made.preprocessing, dict)
        and made.precision in ("float32", "bfloat16", "float16")
        and made.store_dtype in ("float32", "float16")
        and isinstance(made.augmentation, dict | None)
        and isinstance(made.partial, dict | None)
        and type(made.views) is int
        and _is_augmentation(made.augmentation)
    )
    if not right:
        raise PredictorError(f"A fingerprint of the manifest is damaged: {values!r:.200}.")
    return made


def _is_augmentation(values: Mapping[str, Any] | None) -> bool:
    try:
        Augmentation.from_dict(values or {})
    except (TypeError, ValueError):
        return False
    return True


def canaries(manifest: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> CanaryRows:
    """Return the canary rows, of which the manifest has the names."""
    names = texts(manifest, "canaries")
    return CanaryRows(
        arrays["canary_x"],
        arrays["canary_logits"],
        names,
        tuple(arrays[f"canary_image_{i}"].tobytes() for i in range(len(names))),
    )


def versions() -> dict[str, str]:
    """Return the versions of what decides what a predictor computes."""
    from importlib.metadata import version

    packages = ("torch", "torchvision", "pillow", "scikit-learn", "numpy")
    return {"featcache": __version__, **{name: version(name) for name in packages}}


def then_and_now(trained: Mapping[str, str]) -> str:
    """Say which versions a predictor was trained with, and which are here."""
    then, now = (
        ", ".join(f"{name} {version}" for name, version in one.items())
        for one in (trained, versions())
    )
    return f"trained with {then}; here are {now}"
