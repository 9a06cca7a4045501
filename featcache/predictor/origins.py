"""Where a predictor's features come from: which networks, of what weights, still the same or not.

A predictor file names networks. What may be done with such a name is decided here: public names
of torchvision and timm are built, with weights that these libraries publish; everything else (a
callable, a checkpoint's path, a module in memory) is given again by the user. Whatever network
results, its fingerprint must equal the one that the head was trained on, and on the canary images
it must still compute the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.errors import FingerprintMismatch, PredictorError
from featcache.fingerprint import Fingerprint

if TYPE_CHECKING:
    from featcache.images.image_set import ImageSet
    from featcache.networks.backbone import Backbone
    from featcache.store.store import FeatureStore

# Features of the canary images, relative to the largest. Another Pillow or libjpeg moves single
# pixels by one level; another device or instruction set moves the sums.
CLOSE: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}
FAR = 0.2

_MOST_VALUES = 2**30  # of one image's pixels: 1 GiB; 300 views of 1,000 x 1,000 fit


@dataclass(frozen=True)
class Column:
    """Features of one tap among the columns that a head takes.

    Attributes
    ----------
    source : int
        Number of the fingerprint.
    tap : str
        Canonical tap.
    width : int
        Columns.
    """

    source: int
    tap: str
    width: int


def source_taps(store: FeatureStore) -> dict[tuple[int, str], str]:
    """Return the name that each tap of each network has in a store, by (network, tap)."""
    keys = [(k, tap) for k, one in enumerate(store.fingerprints) for tap in one.taps]
    return dict(zip(keys, store.taps, strict=True))


def difference(
    trained: Fingerprint, found: Fingerprint, names: tuple[str, str] = ("predictor", "store")
) -> str:
    """Return what makes features of `found` unusable where `trained` were trained on, or ``""``.

    The storage type may differ (the same features, rounded), and there may be more taps.
    """
    changes: dict[str, Any] = {"store_dtype": trained.store_dtype}
    if set(trained.taps) <= set(found.taps):
        changes["taps"] = trained.taps
    return trained.diff(dataclasses.replace(found, **changes), names=names)


def layers_of(
    columns: Sequence[Column], fingerprints: Sequence[Fingerprint], store: FeatureStore
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


# --- networks ----------------------------------------------------------------------------------


def spec_of(fingerprint: Fingerprint) -> str:
    """Return what a network is called on the command line."""
    prefix = "timm/" if fingerprint.source == "timm" else ""
    return f"{prefix}{fingerprint.backbone}"


def public_weights(fingerprint: Fingerprint) -> str | None:
    """Return the weights' name if torchvision or timm publish weights of that name, else None.

    What a predictor file says is only compared with the published names; it is never taken for
    the path of a file.
    """
    name, weights = fingerprint.backbone, fingerprint.weights
    if fingerprint.partial is not None:
        return None
    if fingerprint.source == "torchvision":
        from torchvision.models import get_model_weights

        from featcache.networks.backbone import backbones

        known = {"none", *(w.name for w in get_model_weights(name))} if name in backbones() else ()
    elif fingerprint.source == "timm":
        known = {"none", *_timm_weights(name)}
    else:
        known = ()
    return weights if weights in known else None


def _timm_weights(name: str) -> set[str]:
    """Return the names of the weights that timm, or a package that we know, has for a network."""
    try:
        import timm
    except ImportError:
        return set()
    from featcache.networks.checkpoints import PACKAGED

    packaged = {w for source, network, w in PACKAGED if (source, network) == ("timm", name)}
    if not timm.is_model(name):
        return packaged
    return packaged | {full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")}


def rebuild(
    fingerprint: Fingerprint, *, backbone: str | None = None, weights: str | Path | None = None
) -> Backbone:
    """Build a network with the taps and the preprocessing of a fingerprint.

    Parameters
    ----------
    fingerprint : Fingerprint
        What the predictor was trained on.
    backbone : str, optional
        What the user calls it on the command line; left out, its public name.
    weights : str or Path, optional
        What the user names; left out, the fingerprint's own, where they are public.

    Raises
    ------
    PredictorError
        The user must name what is not public.
    BackboneError
        There is no such network, or no such weights.
    """
    from featcache.networks.backbone import Backbone
    from featcache.pixels.preprocessing import Preprocessing

    if fingerprint.source == "module":
        raise PredictorError(
            f"The predictor's network, {fingerprint.backbone}, was given as a module; no name "
            "leads back to it. Give it again: predict(..., backbone=Backbone.from_module(...))."
        )
    if fingerprint.source == "callable" and backbone is None:
        raise PredictorError(
            f"The predictor's network comes from the callable {fingerprint.backbone}. What a "
            "predictor names is not imported: name it again with --backbone "
            "PACKAGE.MODULE:CALLABLE (library: backbone=Backbone.from_callable(...))."
        )
    chosen = weights if weights is not None else public_weights(fingerprint)
    if chosen is None and fingerprint.weights != "as given":
        raise PredictorError(
            f"The predictor was trained on {spec_of(fingerprint)} with weights from a file, "
            f"{fingerprint.weights}. What a predictor names is not opened: name the file again "
            "with --weights FILE (library: backbone=)."
        )
    spec = backbone if backbone is not None else spec_of(fingerprint)
    partial = fingerprint.partial is not None
    if ":" in spec:
        return Backbone.from_callable(
            spec,
            weights=None if chosen == "none" else chosen,
            layers=fingerprint.taps,
            partial=partial,
        )
    make = Backbone.from_timm if spec.startswith("timm/") else Backbone.from_torchvision
    return make(
        spec.removeprefix("timm/"),
        weights=None if chosen == "none" else chosen,
        layers=fingerprint.taps,
        partial=partial,
        preprocessing=_preprocessing(fingerprint, Preprocessing),
    )


def _preprocessing(fingerprint: Fingerprint, kind: Any) -> Any:
    try:
        preprocessing = kind.from_dict(fingerprint.preprocessing)
    except (TypeError, ValueError) as error:
        raise PredictorError(f"The predictor's preprocessing is damaged: {error}") from error
    # Before anything of that size is made: the file may be hostile.
    values = math.prod(preprocessing.output_shape) * fingerprint.views
    if values > _MOST_VALUES:
        size = " x ".join(map(str, preprocessing.output_shape))
        raise PredictorError(
            f"The predictor's preprocessing is damaged: {fingerprint.views} views of {size} for "
            f"each image are {values:,} values; no more than {_MOST_VALUES:,} are made."
        )
    return preprocessing


def choose(
    fingerprints: Sequence[Fingerprint], given: Backbone | Sequence[Backbone] | None
) -> list[Backbone]:
    """Return a network for every fingerprint: one of those given, or built by its public name.

    Raises
    ------
    FingerprintMismatch
        A network is not the one of training; with the difference, field by field.
    PredictorError
        The user must name what is not public.
    """
    from featcache.networks.backbone import Backbone

    offered = [given] if isinstance(given, Backbone) else list(given or ())
    networks = []
    for fingerprint in fingerprints:
        fitting = [one for one in offered if one.name == fingerprint.backbone]
        if not fitting and len(fingerprints) == len(offered) == 1:
            fitting = offered  # whatever it is: the message below says what differs
        # Of two of the same name (two image sizes, say), the one that agrees.
        compared = [(_unlike(one, fingerprint), one) for one in fitting or [rebuild(fingerprint)]]
        unlike, network = min(compared, key=lambda pair: len(pair[0]))
        if unlike:
            raise FingerprintMismatch(
                f"The network is not the one that the predictor was trained on:\n{unlike}"
            )
        networks.append(network)
    return networks


def _unlike(network: Backbone, fingerprint: Fingerprint) -> str:
    found = network.fingerprint(
        precision=fingerprint.precision,
        store_dtype=fingerprint.store_dtype,
        augmentation=fingerprint.augmentation,
        views=fingerprint.views,
    )
    return difference(fingerprint, found, ("predictor", "network"))


def named(fingerprints: Sequence[Fingerprint], backbone: str | None) -> Fingerprint:
    """Return the fingerprint that a name on the command line means.

    Raises
    ------
    PredictorError
        There are several, and the name is none of theirs.
    """
    for fingerprint in fingerprints:
        if backbone in (fingerprint.backbone, spec_of(fingerprint)):
            return fingerprint
    private = [one for one in fingerprints if public_weights(one) is None]
    candidates = private or list(fingerprints)
    if len(candidates) > 1:
        names = ", ".join(spec_of(one) for one in fingerprints)
        raise PredictorError(f"The predictor uses several networks: name one of {names}.")
    return candidates[0]


@dataclass(frozen=True)
class ImageRow:
    """What one network makes of one image.

    Attributes
    ----------
    row : int
        Number of the image.
    features : dict of str to ndarray, shape ([views,] ...)
        By tap; empty where there is an error.
    error : str
        Why the image could not be read; empty where it could.
    """

    row: int
    features: Mapping[str, npt.NDArray[np.float32]]
    error: str = ""


def stream(
    images: ImageSet,
    network: Backbone,
    fingerprint: Fingerprint,
    *,
    batch_size: int | None,
    workers: int | None,
    device: str,
) -> Generator[ImageRow]:
    """Yield what a network makes of every image, in order, by the path that extraction takes."""
    from featcache.extraction import extract as extraction
    from featcache.pixels.views import Augmentation

    augmentation = fingerprint.augmentation
    chunks = extraction.features(
        images,
        network,
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=fingerprint.precision,
        views=fingerprint.views,
        augmentation=None if augmentation is None else Augmentation.from_dict(augmentation),
    )
    for chunk in chunks:
        positions = np.cumsum(chunk.done) - 1
        for row, k in zip(chunk.rows.tolist(), positions.tolist(), strict=True):
            if row in chunk.failures:
                yield ImageRow(row, {}, str(chunk.failures[row]))
            else:
                yield ImageRow(row, {tap: array[k] for tap, array in chunk.features.items()})


def canary_features(
    network: Backbone, fingerprint: Fingerprint, images: Sequence[bytes], device: str
) -> dict[str, npt.NDArray[np.float32]]:
    """Compute the features of the canary images: by tap, shape (m, ...), without views."""
    from featcache.extraction import extract as extraction

    return extraction.canary_features(
        network, list(images), device=device, precision=fingerprint.precision
    )


def distance(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    """Return the largest difference relative to the largest expected value; NaN if there is one."""
    scale = float(np.abs(expected).max(initial=0.0)) or 1.0
    return float(np.abs(found.astype(np.float64) - expected).max(initial=0.0)) / scale
