"""Cut a network in two at a tap, and run what lies behind the cut on cached features.

A `Suffix` runs the network's own ``forward``, so whatever it does between its layers (pooling,
flattening, adding) is done as the network does it; nothing is traced into a graph, and control
flow is Python's. The layers before the cut are taken out: each gives NaN of the right shape,
without memory and without computing. At the cut the cached features are put in.

That works only where the rest is computed from the features at the cut alone: the cut must be
*complete*. Inside a residual block it is not, since a path leads around the layer. NaN shows that:
whatever is computed from something before the cut is NaN itself, so a network whose output stays
finite, and equal to that of the whole network, depends on its input through the cut alone.
`check` compares both on images of noise and refuses a cut that is not complete.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from featcache.errors import BackboneError, TapError
from featcache.fingerprint import Tap
from featcache.networks.surgery import head_name, replace_head
from featcache.networks.taps import Tapped, resolve
from featcache.networks.tracing import Trace, trace

__all__ = ["Suffix", "check", "cut", "suggest", "taps_before"]

Shape: TypeAlias = tuple[int, ...]

_CLOSE = 1e-4  # of the largest output: another memory format sums in another order
_NAN = math.nan
_OTHER = 3.0  # a second filling: what swallows NaN (a comparison) shows by it
_SEED = 0


@dataclass(eq=False)
class _Slot:
    """The features that a suffix is running on, shared by the layers at its cut."""

    value: Tensor | None = None
    filling: float = _NAN
    runs: Counter[str] = field(default_factory=Counter)

    def take(self) -> Tensor:
        """Return the cached features."""
        if self.value is None:
            raise RuntimeError("the part behind a cut runs through Suffix.forward only")
        return self.value

    def placeholder(self, shape: Sequence[int]) -> Tensor:
        """Return (b, *shape), one number seen many times."""
        given = self.take()
        filled = torch.full((), self.filling, device=given.device, dtype=given.dtype)
        return filled.expand(given.shape[0], *shape)

    def number(self, layer: str) -> int:
        """Count the runs of a layer in this forward pass, from 0."""
        self.runs[layer] += 1
        return self.runs[layer] - 1


class _SkippedLayer(nn.Module):
    """Replacement of a layer before the cut: gives its shape and no numbers."""

    def __init__(self, layer: str, shapes: Sequence[Shape], slot: _Slot) -> None:
        super().__init__()
        self.layer = layer
        self.shapes = tuple(shapes)
        self.slot = slot

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what this run gave, without its numbers."""
        return self.slot.placeholder(self.shapes[self.slot.number(self.layer)])


@dataclass(eq=False)
class _SkipFirstRuns:
    """The ``forward`` of a layer that runs before the cut and behind it (a shared ReLU, say)."""

    skipped: _SkippedLayer
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        skipped = self.skipped
        if skipped.slot.runs[skipped.layer] < len(skipped.shapes):
            return skipped()
        return self.forward(*args, **kwargs)


class _CachedOutput(nn.Module):
    """Replacement of the layer whose output was cached."""

    def __init__(self, slot: _Slot) -> None:
        super().__init__()
        self.slot = slot

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the cached output."""
        return self.slot.take()


@dataclass(eq=False)
class _CachedInput:
    """A hook that gives a layer its cached input."""

    slot: _Slot

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            # A copy: the layer may compute in place, the caller's features stay.
            return (self.slot.take().clone(), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: self.slot.take().clone()}


class Suffix(nn.Module):
    """The part of a network behind a cut. Made by `cut`.

    Attributes
    ----------
    network : torch.nn.Module
        The network without the layers before the cut. Its layers keep their names.
    tap : str
        Canonical tap at which the network is cut.
    shape : tuple of int
        Shape of one image's features at the cut.
    head : str
        Name of the layer that gives the classes.
    order : tuple of str
        Names of the layers behind the cut, in the order in which they run.
    """

    def __init__(
        self,
        network: nn.Module,
        slot: _Slot,
        tap: str,
        shape: Sequence[int],
        image_shape: Sequence[int],
        head: str,
        order: Sequence[str],
    ) -> None:
        super().__init__()
        self.network = network
        self.tap = tap
        self.shape = tuple(shape)
        self.head = head
        self.order = tuple(order)
        self._slot = slot
        self._image_shape = tuple(image_shape)

    def forward(self, features: Tensor, filling: float = _NAN) -> Tensor:
        """Return the network's output for features at the cut.

        Parameters
        ----------
        features : torch.Tensor, shape (b, *shape)
        filling : float
            What the layers before the cut give. No result depends on it.

        Returns
        -------
        torch.Tensor, shape (b, k)
        """
        self._slot.value, self._slot.filling = features, filling
        self._slot.runs.clear()
        try:
            output = self.network(self._slot.placeholder(self._image_shape))
        finally:
            self._slot.value = None
        # In training, GoogLeNet and Inception give what their auxiliary heads say as well.
        logits: Tensor = output if isinstance(output, Tensor) else output[0]
        return logits

    @property
    def classifier(self) -> nn.Module:
        """The layer that gives the classes."""
        return self.network.get_submodule(self.head)

    def new_classifier(self, classes: int) -> nn.Module:
        """Put a new layer for so many classes in the place of the last one, and return it."""
        old = self.classifier
        new = replace_head(self.network, classes, name=self.head)
        for hook in old._forward_pre_hooks.values():
            if isinstance(hook, _CachedInput):  # the cut is at this layer's input
                new.register_forward_pre_hook(hook, with_kwargs=True)
        return new

    def trained(self, first: str | None = None) -> list[str]:
        """Return the names of the parameters that lie behind the cut, or from a layer on.

        Parameters
        ----------
        first : str, optional
            The first layer to train; left out, the first one behind the cut.

        Raises
        ------
        TapError
            The layer does not run behind the cut.
        """
        used = self._used()
        if first is None:
            return used
        ranks = {name: rank for rank, name in enumerate(self.order)}
        start = next((rank for name, rank in ranks.items() if first in _around(name)), None)
        if start is None:
            raise TapError(
                f"The layer {first!r} does not run behind the cut at {self.tap}. Layers that do: "
                f"{', '.join(self.order[:6])}"
            )
        return [name for name in used if _rank(name, ranks) >= start]

    def _used(self) -> list[str]:
        """Name the parameters that the output depends on: those that a gradient reaches."""
        copied = copy.deepcopy(self).eval().requires_grad_(True)
        own = dict(copied.network.named_parameters())
        device = next(iter(own.values())).device
        with torch.enable_grad():
            output = copied(torch.zeros((2, *self.shape), device=device)).sum()
        gradients = torch.autograd.grad(output, list(own.values()), allow_unused=True)
        return [name for name, g in zip(own, gradients, strict=True) if g is not None]

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers, also those that a state_dict leaves out, by name."""
        return {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}


def _rank(parameter: str, ranks: dict[str, int]) -> int:
    """Return when the layer of a parameter first runs; a container's own: with the container."""
    return next((ranks[name] for name in _around(parameter) if name in ranks), -1)


def cut(
    network: nn.Module, tap: str, image_shape: Sequence[int], *, traced: Trace | None = None
) -> Suffix:
    """Return the part of a network behind a tap.

    Parameters
    ----------
    network : torch.nn.Module
        Network in evaluation mode; copied, not changed. On the meta device, so is the result.
    tap : str
        A tap that keeps all of a layer's output or input: ``LAYER:output:map``,
        ``LAYER:input:map``; ``:flatten`` of vectors.
    image_shape : tuple of int
        (c, h, w) of the images.
    traced : Trace, optional
        Trace of `network`, if there is one already.

    Returns
    -------
    Suffix
        The part behind the cut; `check` tells whether the cut is complete.

    Raises
    ------
    TapError
        A tap that reduces what the layer gives, a layer that runs several times, or nothing to
        train behind it.
    """
    traced = trace(network, torch.zeros((2, *image_shape))) if traced is None else traced
    point = resolve(traced, [tap])[0]
    if not _keeps_all(traced, point.tap):
        raise TapError(
            f"The tap {point} reduces what the layer gives, so the rest of the network cannot run "
            f"on it. Extract with --layer {Tap(point.tap.layer, side=point.tap.side, reduce='map')}"
        )
    runs = traced.runs(point.tap.layer)
    if len(runs) > 1:
        raise TapError(
            f"The layer {point.tap.layer!r} runs {len(runs)} times in one forward pass: the "
            "network cannot be cut there. Cut at the block around it"
        )
    position = _position_of(traced, point.tap)
    try:
        head = head_name(network)
    except BackboneError as error:
        raise TapError(
            f"The rest of {type(network).__name__} cannot be trained to classify: it has several "
            "layers that give classes, or none."
        ) from error
    calls = traced.calls[position:]
    order = [call.layer for call in calls]
    if head not in order:
        raise TapError(
            f"Nothing can be trained behind {point}: the layer that gives the classes, {head!r}, "
            "does not run there. Cut before it"
        )
    slot = _Slot()
    copied = _prune(network, traced, point.tap, position, slot)
    suffix = Suffix(
        copied, slot, str(point), point.shape, image_shape, head, list(dict.fromkeys(order))
    )
    return suffix.eval()


def _keeps_all(traced: Trace, tap: Tap) -> bool:
    """Return whether a canonical tap holds all that the layer gives, in its own layout."""
    call = traced.runs(tap.layer)[0 if tap.call is None else tap.call - 1]
    shape = (call.input if tap.side == "input" else call.output).shape
    vector = shape is not None and len(shape) == 2
    return tap.reduce == "map" or (tap.reduce == "flatten" and vector)


def _position_of(traced: Trace, tap: Tap) -> int:
    """Return the number of the first call that starts behind a cut."""
    start = next(i for i, call in enumerate(traced.calls) if call.layer == tap.layer)
    if tap.side == "input":
        return start
    inside = f"{tap.layer}."
    rest = range(start + 1, len(traced.calls))
    return next(
        (i for i in rest if not traced.calls[i].layer.startswith(inside)), len(traced.calls)
    )


def _prune(network: nn.Module, traced: Trace, tap: Tap, position: int, slot: _Slot) -> nn.Module:
    """Copy a network without what runs before the cut."""
    before = _skippable(traced, tap, position)
    behind = {call.layer for call in traced.calls[position:]}
    memo: dict[int, Any] = {}
    for name, shapes in before.items():
        if name not in behind:
            # What stands in a copy's memo is not copied: skipped layers take no memory.
            memo[id(network.get_submodule(name))] = _SkippedLayer(name, shapes, slot)
    if tap.side != "input":
        memo[id(network.get_submodule(tap.layer))] = _CachedOutput(slot)
    copied: nn.Module = copy.deepcopy(network, memo)
    for name in before.keys() & behind:
        part = copied.get_submodule(name)
        part.forward = _SkipFirstRuns(_SkippedLayer(name, before[name], slot), part.forward)
    if tap.side == "input":
        first = copied.get_submodule(tap.layer)
        first.register_forward_pre_hook(_CachedInput(slot), with_kwargs=True)
    return copied


def _skippable(traced: Trace, tap: Tap, position: int) -> dict[str, list[Shape]]:
    """Name the layers that have run when the cut is reached, with what each run gives an image.

    Those that give no tensor with a row an image are left to run on nothing.
    """
    images = (traced.calls[0].input.shape or (0,))[0]
    around = {"", *_around(tap.layer)}
    shapes: dict[str, list[Shape | None]] = {}
    for call in traced.calls[:position]:
        if call.layer not in around:
            given = call.output.shape
            fits = given is not None and given[0] == images
            shapes.setdefault(call.layer, []).append(given[1:] if given and fits else None)
    found = {name: [s for s in one if s is not None] for name, one in shapes.items()}
    found = {name: one for name, one in found.items() if len(one) == len(shapes[name])}
    return {name: one for name, one in found.items() if not _inside(name, found)}


def _inside(name: str, others: Container[str]) -> bool:
    return any(around in others for around in _around(name.rpartition(".")[0]))


def check(network: nn.Module, suffix: Suffix) -> None:
    """Refuse a cut that is not complete, because a path leads around it.

    Parameters
    ----------
    network : torch.nn.Module
        The whole network, with its weights, in evaluation mode.
    suffix : Suffix
        Its part behind the cut, from `cut`.

    Raises
    ------
    TapError
        If the output depends on the images by another path; the message names a cut that would
        do.
    """
    if not _is_complete(network, suffix):
        hint = suggest(network, Tap.parse(suffix.tap).layer, suffix._image_shape)
        raise TapError(
            f"The network cannot be cut at {suffix.tap}: its output also depends on the images by "
            f"a path around it (a residual connection, say). {hint}"
        )


def _is_complete(network: nn.Module, suffix: Suffix) -> bool:
    """Compare the whole network with its suffix on noise, with two fillings of what is skipped."""
    generator = torch.Generator().manual_seed(_SEED)
    images = torch.randn((2, *suffix._image_shape), generator=generator)
    points = resolve(trace(network, images), [suffix.tap])
    with torch.inference_mode():
        features = Tapped(network, points)(images)[suffix.tap].clone()
        whole = network(images)
        found = [_filled(suffix, features, filling) for filling in (_NAN, _OTHER)]
    scale = float(whole.abs().max()) or 1.0
    return all(
        one is not None
        and one.shape == whole.shape
        and bool(((one - whole).abs() <= _CLOSE * scale).all())
        for one in found
    )


def _filled(suffix: Suffix, features: Tensor, filling: float) -> Tensor | None:
    try:
        output: Tensor = suffix(features, filling)
        return output
    except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError):
        return None  # what is skipped is needed for more than its shape


def suggest(network: nn.Module, layer: str, image_shape: Sequence[int]) -> str:
    """Name the tap at the smallest block around a layer where the network can be cut."""
    traced = trace(network, torch.zeros((2, *image_shape)))
    for name in _around(layer):
        tap = str(Tap(name, side="input", reduce="map"))
        try:
            suffix = cut(network, tap, image_shape, traced=traced)
        except (TapError, BackboneError):
            continue
        if _is_complete(network, suffix):
            return f"Cut at {name!r}: extract with --layer {suffix.tap}"
    return "Cut between two blocks: `featcache layers BACKBONE` lists them"


def _around(layer: str) -> Iterator[str]:
    """Yield a layer and the blocks around it, the smallest first."""
    while layer:
        yield layer
        layer = layer.rpartition(".")[0]


def taps_before(traced: Trace, taps: Sequence[str], first: str | None) -> list[str]:
    """Return those of some canonical taps where a network can be cut to train from a layer on.

    Parameters
    ----------
    traced : Trace
        Trace of the network.
    taps : list of str
        Taps of a store.
    first : str or None
        First layer to train; None for any.

    Returns
    -------
    list of str
        Taps sorted from the last layer to the first, so that the least is computed behind the
        first of them.
    """
    limit = len(traced.calls)
    if first is not None:
        runs = traced.runs(first)
        if not runs:
            raise TapError(f"The layer {first!r} never runs, so it cannot be trained.")
        limit = next(i for i, call in enumerate(traced.calls) if call is runs[0])
    found = []
    for text in taps:
        tap = Tap.parse(text)
        if not _keeps_all(traced, tap):
            continue
        position = _position_of(traced, tap)
        # A container starts when its first part does, so its input is that part's input.
        if position <= limit:
            found.append((position, text))
    return [text for _, text in sorted(found, reverse=True)]
