"""A faster copy of a network that computes the same features.

The copy shares every tensor with the original that needs no change, and the original is never
touched: a batch normalisation is folded into the convolution before it, weights are brought into
the wanted type, memory format and device. What runs together is found by watching one forward pass
rather than by tracing the graph (`torch.fx` cannot trace every network, and renames what taps
name); a pair that holds a tap is left alone, and `featcache.networks.forward` compares the features
of copy and original before it trusts the copy.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.overrides import TorchFunctionMode

from featcache.networks.taps import ResolvedTap, Tapped

__all__ = ["Observed", "converted", "fold", "observe", "shallow_copy"]


@dataclass
class Observed:
    """What one forward pass up to the last tap was seen to do.

    Attributes
    ----------
    pairs : list of (str, str)
        Names of a convolution and of the batch normalisation that alone takes its output.
    layers : set of str
        Linear and attention layers that were called as such.
    unused : set of int
        Identities of the parameters and buffers that took no part.
    product : (int, int, int) or None
        Rows, inputs and outputs of the largest matrix product of any linear layer.
    features : dict of str to torch.Tensor
        What it computed.
    """

    pairs: list[tuple[str, str]]
    layers: set[str]
    unused: set[int]
    product: tuple[int, int, int] | None
    features: dict[str, Tensor]


class _Arguments(TorchFunctionMode):
    """Notes which of some tensors are arguments of any torch function."""

    def __init__(self, candidates: set[int]) -> None:
        super().__init__()
        self.candidates = candidates
        self.seen: set[int] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self._note(args)
        self._note(kwargs.values())
        return func(*args, **kwargs)

    def _note(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self.candidates:
                    self.seen.add(id(value))
            elif isinstance(value, (list, tuple)):
                self._note(value)


class _Calls:
    """Forward hooks that note who takes whose output."""

    def __init__(self) -> None:
        self.runs: Counter[str] = Counter()
        self.made_by: dict[int, tuple[str, Tensor]] = {}  # holding the tensor keeps its id unique
        self.pairs: list[tuple[str, str]] = []
        self.layers: set[str] = set()
        self.products: list[tuple[int, int, int]] = []

    def product(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            self.layers.add(name)
            rows = args[0].numel() // args[0].shape[-1]
            sizes = args[0].shape[-1], getattr(module, "out_features", args[0].shape[-1])
            self.products.append((rows, *sizes))

        return hook

    def convolution(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.runs[name] += 1
            self.made_by[id(output)] = (name, output)

        return hook

    def normalisation(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.runs[name] += 1
            made = self.made_by.get(id(args[0])) if args else None
            if made:
                self.pairs.append((made[0], name))

        return hook


def observe(module: nn.Module, points: Sequence[ResolvedTap], example: Tensor) -> Observed:
    """Run a network once up to its last tap and note what can be made faster.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode.
    points : sequence of ResolvedTap
        Where features are read.
    example : torch.Tensor
        Normalised images of shape (b, c, h, w).
    """
    tensors = {id(t) for t in itertools.chain(module.parameters(), module.buffers())}
    arguments, calls, handles = _Arguments(tensors), _Calls(), []
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            continue  # what it does is not all in its class
        if type(part) is nn.Conv2d:
            handles.append(part.register_forward_hook(calls.convolution(name)))
        elif type(part) in (nn.Linear, nn.MultiheadAttention):
            handles.append(part.register_forward_hook(calls.product(name)))
        elif isinstance(part, nn.BatchNorm2d) and _after_folding(part) is not None:
            handles.append(part.register_forward_pre_hook(calls.normalisation(name)))
    try:
        with torch.no_grad(), arguments:
            features = Tapped(module, points)(example)
    finally:
        for handle in handles:
            handle.remove()
    tapped = {point.tap.layer for point in points}
    pairs = [
        (convolution, normalisation)
        for convolution, normalisation in calls.pairs
        if calls.runs[convolution] == calls.runs[normalisation] == 1
        and not tapped & {convolution, normalisation}
    ]
    product = max(calls.products, key=math.prod, default=None)
    return Observed(pairs, calls.layers, tensors - arguments.seen, product, features)


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a network whose parameters and buffers are those of the original."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def fold(module: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    """Fold batch normalisations into the convolutions before them, in place.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode.
    pairs : sequence of (str, str)
        From `observe`.
    """
    for convolution, normalisation in pairs:
        norm: Any = module.get_submodule(normalisation)
        rest = _after_folding(norm)
        assert rest is not None
        conv: Any = module.get_submodule(convolution)
        folded: nn.Module = fuse_conv_bn_eval(conv, norm)
        module.set_submodule(convolution, folded.requires_grad_(False))
        module.set_submodule(normalisation, rest)


def _after_folding(norm: Any) -> nn.Module | None:
    """Return what a normalisation still does once it is folded away; None: not foldable."""
    if not getattr(norm, "track_running_stats", False) or norm.running_mean is None:
        return None
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    if type(norm).__name__ == "BatchNormAct2d" and hasattr(norm, "drop") and hasattr(norm, "act"):
        return nn.Sequential(norm.drop, norm.act)  # timm's: normalisation and activation in one
    return None


def converted(
    module: nn.Module,
    unused: set[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    """Bring the tensors of a `shallow_copy` to a device, type and memory format, in place.

    Parameters
    ----------
    module : torch.nn.Module
        A `shallow_copy`, perhaps after `fold`.
    unused : set of int
        Identities of tensors that stay as they are: a classifier behind the last tap is neither
        copied nor sent to the device.
    device, dtype : torch.device, torch.dtype
        Of the forward pass. Batch normalisations keep float32 statistics.
    channels_last : bool
        Lay out the weights of convolutions as (n, h, w, c).
    """
    done: dict[int, Tensor] = {}  # a tensor that two layers share stays one
    for part in module.modules():
        keep = isinstance(part, nn.modules.batchnorm._BatchNorm)
        for holder, name, tensor in _tensors(part):
            if id(tensor) in unused:
                continue
            if id(tensor) not in done:
                target = tensor.dtype if keep or not tensor.is_floating_point() else dtype
                new = tensor.detach().to(device, target)
                if channels_last and new.ndim == 4:
                    new = new.contiguous(memory_format=torch.channels_last)
                done[id(tensor)] = new
            new = done[id(tensor)]
            holder[name] = nn.Parameter(new, False) if holder is part._parameters else new


def _tensors(part: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for holder in (part._parameters, part._buffers):
        for name, tensor in list(holder.items()):
            if tensor is not None:
                yield holder, name, tensor
