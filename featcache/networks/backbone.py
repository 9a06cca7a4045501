"""A frozen pretrained network with its preprocessing and its taps.

`Backbone` is lazy: making one checks names and files, and loads no weights. Taps, shapes and the
table of layers come from a *skeleton*, the same network on PyTorch's meta device, which holds no
numbers. Weights are loaded when `Backbone.module` or `Backbone.fingerprint` is first used.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from featcache.errors import BackboneError
from featcache.fingerprint import Fingerprint, state_sha256
from featcache.networks.asked import as_asked
from featcache.networks.checkpoints import PartialReport
from featcache.networks.families import RANDOM_SEED, backbones, family_of
from featcache.networks.taps import ResolvedTap, resolve
from featcache.networks.tracing import LayerRow, Trace, trace
from featcache.pixels.decode import Truncated
from featcache.pixels.preprocessing import Preprocessing
from featcache.system.defaults import torch_defaults

__all__ = ["RANDOM_SEED", "Backbone", "backbones", "one_at_a_time", "shared_property"]

T = TypeVar("T")
# Held by what hooks a network, or sets what torch keeps for the whole process. One for all of it:
# threads that took two locks in different orders would wait for each other for ever.
one_at_a_time = threading.RLock()


class shared_property(functools.cached_property[T]):
    """A `functools.cached_property` that one thread computes at a time, of all that there are.

    Computing it may put hooks on a network, and hooks are called in whatever thread runs it.
    """

    def __get__(self, instance: Any, owner: Any = None) -> T:  # type: ignore[override]
        with one_at_a_time:  # before the lock that Python 3.11 has for each of them
            value: T = super().__get__(instance, owner)
            return value


class Backbone:
    """A frozen pretrained network with its preprocessing and its taps.

    Making one loads no weights. Several threads may use one. A backbone can be pickled; it travels
    without the weights that it can load again.

    Parameters
    ----------
    network : str or torch.nn.Module
        One of

        - a name of torchvision's (``"resnet50"``; `backbones` lists them);
        - ``"timm/NAME"`` or ``"timm/NAME.TAG"``, a name of timm's, with or without the tag of its
          weights;
        - ``"package.module:callable"``, a function of your own, on the import path or in the
          current folder. It takes no arguments and returns the pair ``(torch.nn.Module,
          Preprocessing)``: the network with its weights, and what it expects of images. It is
          called at once, because only its result tells whether the network is still the same;
        - a module. It is copied, so that training it further changes no features, and freezing the
          copy leaves the module alone.
    weights : str, Path or None
        A published name (``"IMAGENET1K_V2"``, timm's tag ``"a1_in1k"``), a file (``.pth``,
        ``.safetensors``), ``"auto"``, or None (also ``"none"``) for weights drawn at random from
        `RANDOM_SEED`. "auto" is the newest of torchvision's (of mobilenet_v2: ``IMAGENET1K_V1``),
        timm's default, or the weights that a module has.
    layers : iterable of str, optional
        Taps; see `featcache.networks.taps`. Left out: one tap before the classifier, by the rule in
        `featcache.networks.taps.resolve`.
    image_size : int, optional
        Height and width that images are cropped to. Left out: that of the weights.
    partial : bool
        Accept a weights file that leaves layers before the tap at random, and record which.
    weights_key : str, optional
        Dictionary or prefix of a weights file to take the weights from, where several fit:
        ``"teacher"``.
    bit_depth, truncated : optional
        As for `Preprocessing`. Left out: those of `preprocessing`.
    preprocessing : Preprocessing, optional
        What the network expects of images; needed for a module. Left out: that of the weights.
    name : str, optional
        Name of a module in the fingerprint. Left out: the name of its class.

    Attributes
    ----------
    preprocessing : Preprocessing
        How an image becomes what the network expects.
    name : str
        Name of the network at its source.
    source : {"torchvision", "timm", "callable", "module"}
        Where it comes from.
    weights : str
        Published name of the weights, name of the weights file, or "none".
    is_code : bool
        Whether the network comes as code: its features alone tell if it is the same.
    asked : dict or None
        `featcache.networks.asked.as_asked` of the arguments; None for a module, a callable, or
        with a `preprocessing` of one's own.

    Raises
    ------
    UnknownBackbone
        If there is no network of that name, or the callable cannot be imported.
    WeightsError
        If there are no weights of that name, and no such file.
    MissingExtra
        If timm is needed and not installed.
    BackboneError
        If the callable fails or returns something else, or a module comes without preprocessing.

    Examples
    --------
    >>> backbone = Backbone("resnet18", weights=None)
    >>> backbone.taps, backbone.shapes
    (['avgpool:output:flatten'], {'avgpool:output:flatten': (512,)})
    >>> backbone("flowers").shape  # doctest: +SKIP
    (80, 512)
    """

    # The network as it last ran, for calls in memory; see `featcache.extraction.features`.
    runtime: Any = None

    def __init__(
        self,
        network: str | nn.Module,
        *,
        weights: str | Path | None = "auto",
        layers: Iterable[str] | None = None,
        image_size: int | None = None,
        partial: bool = False,
        weights_key: str | None = None,
        bit_depth: int | None = None,
        truncated: Truncated | None = None,
        preprocessing: Preprocessing | None = None,
        name: str | None = None,
    ) -> None:
        weights = None if weights == "none" else weights
        self._asked = [layers] if isinstance(layers, str) else list(layers or ())
        self.asked = None
        if isinstance(network, str) and preprocessing is None:
            options: dict[str, Any] = {"image_size": image_size, "partial": partial}
            options |= {"weights_key": weights_key, "bit_depth": bit_depth, "truncated": truncated}
            self.asked = as_asked(network, weights=weights, layers=self._asked, **options)
        self._family = family_of(
            network, weights, preprocessing, name, partial=partial, key=weights_key
        )
        chosen = preprocessing or self._family.preprocessing()
        if image_size is not None:
            chosen = chosen.with_image_size(image_size)
        given = {"bit_depth": bit_depth, "truncated": truncated}
        reading: Any = {name: value for name, value in given.items() if value is not None}
        self.preprocessing = replace(chosen, **reading)
        self.name, self.source = self._family.name, self._family.kind
        self.weights = self._family.weights
        self.is_code = self.source in ("callable", "module")

    @property
    def request(self) -> dict[str, Any]:
        """What is asked for, as JSON values; loads no weights.

        Requests that are equal but for a weights file's path, inode and time give equal features.
        Of such a file it holds the hash, of a module or a callable that of the weights.
        """
        file = self._family.file
        request: dict[str, Any] = {
            "source": self.source,
            "backbone": self.name,
            "weights": str(file.path.absolute()) if file else self.weights,
            "taps": self._asked or None,
            "preprocessing": self.preprocessing.to_dict(),
        }
        if file:
            request |= {"weights_key": file.key, "partial": file.partial}
        if self.is_code:  # its weights are in memory, and nothing else tells of a change
            request["checkpoint"] = {"state_sha256": self._state_sha256}
        elif file:
            request["checkpoint"] = {**file.stamp(), "sha256": file.sha256}
        return request

    def recall(self, request: Mapping[str, Any] | None) -> None:
        """Do not read a weights file for its hash where an earlier request tells it."""
        if self._family.file is not None and request is not None:
            self._family.file.recall(request.get("checkpoint") or {})

    @property
    def module(self) -> nn.Module:
        """The network: in evaluation mode, frozen, on the CPU. Loads the weights.

        Raises
        ------
        WeightsError
            They cannot be loaded, or leave layers before the tap at random (`partial`).
        """
        _ = self._random
        return self._loaded[0]

    @torch_defaults()
    def skeleton(self) -> nn.Module:
        """Return the network in evaluation mode, on the meta device where it can be built so.

        A module or a callable has its weights anyway, and is returned with them.
        """
        built = self._family.skeleton()
        return self.module if built is None else built.eval()

    @shared_property
    def points(self) -> list[ResolvedTap]:
        """The resolved taps, which `featcache.networks.taps.Tapped` takes with `module`."""
        return resolve(self.traced, self._asked)

    @shared_property
    def traced(self) -> Trace:
        """What one forward pass does, layer by layer."""
        return self._trace()

    @shared_property
    def used(self) -> set[str]:
        """Names of the parameters, buffers and layers that the taps use."""
        return set().union(*(self.traced.used_at(point.tap) for point in self.points))

    @property
    def taps(self) -> list[str]:
        """The taps in canonical form."""
        return [str(point) for point in self.points]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """For each tap the shape of one image's features."""
        return {str(point): point.shape for point in self.points}

    @property
    def is_untrained(self) -> str | None:
        """Reason why the network counts as untrained, in a sentence, or None.

        Loads the weights, unless they are drawn at random.
        """
        if self._family.random:
            return (
                f"The weights of {self.name} are drawn at random (weights=None): its features "
                "carry no knowledge of images"
            )
        kind = nn.modules.batchnorm._BatchNorm
        norms: list[Any] = [part for part in self.module.modules() if isinstance(part, kind)]
        norms = [norm for norm in norms if norm.running_mean is not None]
        if norms and all((n.running_mean == 0).all() and (n.running_var == 1).all() for n in norms):
            return (
                f"The statistics of all {len(norms)} BatchNorm layers of {self.name} are at their "
                "initial values: the network has not been trained, or its weights were not loaded"
            )
        return None

    def fingerprint(
        self,
        *,
        precision: str = "float32",
        store_dtype: str = "float32",
        augmentation: Mapping[str, Any] | None = None,
        varying: bool = False,
    ) -> Fingerprint:
        """Return everything that decides the value of a feature. Loads the weights.

        Parameters
        ----------
        precision : {"float32", "bfloat16", "float16"}
            Type of the forward pass.
        store_dtype : {"float32", "float16"}
            Type of the stored features.
        augmentation : mapping, optional
            ``Augmentation.to_dict()`` where augmented views are stored.
        varying : bool
            Whether features are accepted that are no function of the image alone.
        """
        report = self._loaded[1]
        key = self._family.file.key if self._family.file else None
        return Fingerprint(
            source=self.source,
            backbone=self.name,
            weights=self.weights,
            state_sha256=self._state_sha256,
            taps=tuple(self.taps),
            preprocessing=self.preprocessing.to_dict(),
            precision=precision,
            store_dtype=store_dtype,
            augmentation=augmentation,
            untrained=self.is_untrained,
            checkpoint=None
            if report is None
            else {**report.to_dict(), "random": self._random, "key": key or ""},
            varying=varying,
        )

    def layers(self) -> list[LayerRow]:
        """List the layers; see `Trace.layers`.

        Loads no published weights; a weights file must fit.
        """
        if self._family.file:
            _ = self.module
        return self._trace(flops=True).layers()

    def __call__(self, images: Any, **options: Any) -> Any:
        """Return the features of images in memory: `featcache.features` of them."""
        import featcache  # extraction stands above this package: by its public name alone

        return featcache.features(images, self, **options)

    def __repr__(self) -> str:
        taps = ", ".join(self._asked) or "default tap"
        size = " x ".join(map(str, self.preprocessing.output_shape[1:]))
        return f"Backbone({self.source} {self.name}, weights {self.weights}, {size}, {taps})"

    def __getstate__(self) -> dict[str, Any]:
        heavy = ("_loaded", "traced", "used", "runtime")
        return {name: value for name, value in self.__dict__.items() if name not in heavy}

    @shared_property
    @torch_defaults()
    def _loaded(self) -> tuple[nn.Module, PartialReport | None]:
        module, report = self._family.load()
        return module.eval().requires_grad_(False), report

    @shared_property
    def _random(self) -> list[str]:
        """What the taps use and a weights file left at random; refused unless it was asked for."""
        report = self._loaded[1]
        if report is None or report.complete or self._family.file is None:
            return []
        return self._family.file.check(report, self.used)

    @shared_property
    def _state_sha256(self) -> str:
        return state_sha256(self.module.state_dict())

    @torch_defaults()
    def _trace(self, *, flops: bool = False) -> Trace:
        example = torch.zeros((1, *self.preprocessing.output_shape))
        with one_at_a_time:
            skeleton = self._family.skeleton()
            if skeleton is not None:
                try:
                    return trace(skeleton.eval(), example, flops=flops)
                except BackboneError as error:
                    # Without numbers a few networks cannot run; any other error is the user's.
                    if "meta" not in str(error):
                        raise
            return trace(self._loaded[0], example, flops=flops)
