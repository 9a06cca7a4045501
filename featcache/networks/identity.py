"""Build the network that a fingerprint names, and say how another one differs from it.

Public names of torchvision and timm are built, with weights that these libraries publish.
Everything else (a callable, the path of a weights file, a module in memory) must be given again by
the user: what a file names is neither imported nor opened. Whatever network results, its
fingerprint must equal the one that the features were computed with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import FingerprintMismatch, MissingExtra, PredictorError, UnknownBackbone
from featcache.fingerprint import Fingerprint

if TYPE_CHECKING:  # torch is imported by who builds a network: to compare takes no torch
    from featcache.networks.backbone import Backbone
    from featcache.pixels.preprocessing import Preprocessing

__all__ = ["choose", "difference", "public_weights", "rebuild", "spec_of"]

_MOST_VALUES = 2**30  # of one image's pixels: 1 GiB; 300 views of 1,000 x 1,000 fit


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


def spec_of(fingerprint: Fingerprint) -> str:
    """Return what a network is called on the command line."""
    prefix = "timm/" if fingerprint.source == "timm" else ""
    return f"{prefix}{fingerprint.backbone}"


def public_weights(fingerprint: Fingerprint) -> str | None:
    """Return the weights' name if torchvision or timm publish weights of that name, else None.

    What a predictor file says is only compared with the published names; it is never taken for
    the path of a file.
    """
    spec = spec_of(fingerprint)
    if fingerprint.checkpoint is not None or fingerprint.source not in ("torchvision", "timm"):
        return None
    from featcache.networks.families import family_of

    try:
        known = ["none", *family_of(spec, None).published] if ":" not in spec else []
    except (UnknownBackbone, MissingExtra):
        return None
    return fingerprint.weights if fingerprint.weights in known else None


def rebuild(
    fingerprint: Fingerprint, *, backbone: str | None = None, weights: str | Path | None = None
) -> Backbone:
    """Build a network with the taps and the preprocessing of a fingerprint.

    Parameters
    ----------
    fingerprint : Fingerprint
        Fingerprint of the features that the predictor was trained on.
    backbone : str, optional
        Name of the network on the command line. Left out: its public name.
    weights : str or Path, optional
        Weights named by the user. Left out: the fingerprint's own, if they are public.

    Raises
    ------
    PredictorError
        If the user must name what is not public.
    BackboneError
        If there is no such network, or no such weights.
    """
    from featcache.networks.backbone import Backbone

    if fingerprint.source == "module":
        raise PredictorError(
            f"The network of the features, {fingerprint.backbone}, was given as a module; no name "
            "leads back to it. Give it again: Backbone(module, preprocessing=...), a predictor's "
            "with predictor.attach(...)."
        )
    # Whatever the source is said to be: a name with a colon would be imported.
    if backbone is None and (fingerprint.source == "callable" or ":" in fingerprint.backbone):
        raise PredictorError(
            f"The network of the features comes from the callable {fingerprint.backbone}. What a "
            "file names is not imported: name it again with --backbone PACKAGE.MODULE:CALLABLE "
            "(library: predictor.attach)."
        )
    chosen = weights if weights is not None else public_weights(fingerprint)
    if chosen is None and fingerprint.weights != "as given":
        raise PredictorError(
            f"The features are those of {spec_of(fingerprint)} with weights from a file, "
            f"{fingerprint.weights}. What a file names is not opened: name the file of weights "
            "again with --weights FILE (library: predictor.attach)."
        )
    spec = backbone if backbone is not None else spec_of(fingerprint)
    file = fingerprint.checkpoint or {}
    # A callable says itself what it expects of images; the fingerprints are compared later.
    given = None if ":" in spec else _preprocessing(fingerprint)
    return Backbone(
        spec,
        weights=chosen,
        layers=fingerprint.taps,
        partial=True,  # what a file leaves out is compared with the rest of the weights
        weights_key=file.get("key") or None,
        bit_depth=fingerprint.preprocessing.get("bit_depth"),  # a callable does not say these
        truncated=fingerprint.preprocessing.get("truncated"),
        preprocessing=given,
    )


def _preprocessing(fingerprint: Fingerprint) -> Preprocessing:
    from featcache.pixels.preprocessing import Preprocessing

    try:
        preprocessing = Preprocessing.from_dict(fingerprint.preprocessing)
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
    fingerprints: Sequence[Fingerprint],
    given: Backbone | Sequence[Backbone] | str | None,
    weights: str | Path | None = None,
) -> list[Backbone]:
    """Return a network for every fingerprint: one of those given, or built by its public name.

    Parameters
    ----------
    fingerprints : sequence of Fingerprint
        Of the features.
    given : Backbone, list of Backbone, or str, optional
        Networks, or the name of one.
    weights : str or Path, optional
        Of the one that is named, or that has no public weights.

    Raises
    ------
    FingerprintMismatch
        If a network is not the one of the features; with the difference, field by field.
    PredictorError
        If the user must name what is not public.
    """
    from featcache.networks.backbone import Backbone

    if isinstance(given, str) or weights is not None:
        name = given if isinstance(given, str) else None
        given = rebuild(_named(fingerprints, name), backbone=name, weights=weights)
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
                f"The network is not the one that the features are of:\n{unlike}"
            )
        networks.append(network)
    return networks


def _unlike(network: Backbone, fingerprint: Fingerprint) -> str:
    found = network.fingerprint(
        precision=fingerprint.precision,
        store_dtype=fingerprint.store_dtype,
        augmentation=fingerprint.augmentation,
    )
    return difference(fingerprint, found, ("features", "network"))


def _named(fingerprints: Sequence[Fingerprint], backbone: str | None) -> Fingerprint:
    """Return the fingerprint that a name on the command line means.

    Raises
    ------
    PredictorError
        If there are several, and none has this name.
    """
    for fingerprint in fingerprints:
        if backbone in (fingerprint.backbone, spec_of(fingerprint)):
            return fingerprint
    private = [one for one in fingerprints if public_weights(one) is None]
    candidates = private or list(fingerprints)
    if len(candidates) > 1:
        names = ", ".join(spec_of(one) for one in fingerprints)
        raise PredictorError(f"The features are of several networks: name one of {names}.")
    return candidates[0]
