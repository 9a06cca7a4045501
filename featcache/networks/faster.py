"""A faster copy of a network that computes the same features.

The copy shares every tensor with the original that needs no change, and the original is never
touched. Batch normalisations are folded into the convolutions before them; weights are brought to
the device, type and memory format of the forward pass; on processors of AMD, linear layers multiply
by oneDNN.

What can be made faster is found by watching one forward pass rather than by tracing the graph
(`torch.fx` cannot trace every network, and renames what taps name). A convolution or normalisation
that holds a tap is left alone, and `featcache.networks.forward` compares the features of copy and
original before it trusts the copy.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from featcache.networks.taps import ResolvedTap, Tapped

__all__ = ["SpeedUps", "faster_copy", "find_speed_ups", "products_pay"]

# Smallest matrix product, in multiplications, that gains from oneDNN.
_SMALLEST_PRODUCT = 1_000_000


@dataclass
class SpeedUps:
    """What one forward pass up to the last tap showed.

    Attributes
    ----------
    foldable : list of (str, str)
        Names of a convolution and of the batch normalisation that alone takes its output.
    products : list of str
        Linear and attention layers.
    largest_product : (int, int, int) or None
        Rows, inputs and outputs of the largest matrix product of a linear layer.
    unused : set of int
        Identities of the parameters and buffers that take no part.
    features : dict of str to torch.Tensor
        Features of the original, shape (b, *shape) for each tap.
    """

    foldable: list[tuple[str, str]]
    products: list[str]
    largest_product: tuple[int, int, int] | None
    unused: set[int]
    features: dict[str, Tensor]


class _Watcher:
    """Forward hooks that note which layers run, and which layer takes whose output."""

    def __init__(self) -> None:
        self.started: set[nn.Module] = set()
        self.ended: set[nn.Module] = set()
        self.runs: Counter[str] = Counter()
        self.made_by: dict[int, tuple[str, Tensor]] = {}  # holding the tensor keeps its id unique
        self.pairs: list[tuple[str, str]] = []
        self.products: dict[str, tuple[int, int, int]] = {}

    def start(self, module: nn.Module, args: Any) -> None:
        self.started.add(module)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.ended.add(module)

    def product(self, name: str, module: Any, args: tuple[Any, ...]) -> None:
        inputs = args[0].shape[-1]
        rows = args[0].numel() // inputs
        self.products[name] = rows, inputs, getattr(module, "out_features", inputs)

    def convolution(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.runs[name] += 1
        self.made_by[id(output)] = name, output

    def normalisation(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.runs[name] += 1
        if args and id(args[0]) in self.made_by:
            self.pairs.append((self.made_by[id(args[0])][0], name))


def find_speed_ups(module: nn.Module, points: Sequence[ResolvedTap], example: Tensor) -> SpeedUps:
    """Run a network once up to its last tap and note what can be made faster.

    Parameters
    ----------
    module : torch.nn.Module
        The network, in evaluation mode.
    points : sequence of ResolvedTap
        Taps.
    example : torch.Tensor
        Normalised images of shape (b, c, h, w).
    """
    watcher = _Watcher()
    # A layer that somebody else has hooked does more than its class says.
    hooked = {part for part in module.modules() if part._forward_hooks or part._forward_pre_hooks}
    with Tapped(module, points) as tapped:
        # After the hooks of the taps: a layer at whose input the network stops does not start.
        handles = list(_watch(module, watcher, hooked))
        try:
            with torch.no_grad():
                features = tapped(example)
        finally:
            for handle in handles:
                handle.remove()
    layers = {point.tap.layer for point in points}
    foldable = [
        pair
        for pair in watcher.pairs
        if all(watcher.runs[name] == 1 and name not in layers for name in pair)
    ]
    largest = max(watcher.products.values(), key=math.prod, default=None)
    unused = _unused(module, watcher)
    return SpeedUps(foldable, list(watcher.products), largest, unused, features)


def _watch(module: nn.Module, watcher: _Watcher, hooked: Container[nn.Module]) -> Iterator[Any]:
    """Register the hooks of a watcher; yield their handles."""
    for name, part in module.named_modules():
        yield part.register_forward_pre_hook(watcher.start)
        yield part.register_forward_hook(watcher.end)
        if part in hooked:
            continue
        if type(part) is nn.Conv2d:
            yield part.register_forward_hook(partial(watcher.convolution, name))
        elif type(part) in (nn.Linear, nn.MultiheadAttention):
            yield part.register_forward_pre_hook(partial(watcher.product, name))
        elif isinstance(part, nn.BatchNorm2d) and _after_folding(part) is not None:
            yield part.register_forward_pre_hook(partial(watcher.normalisation, name))


def _unused(module: nn.Module, watcher: _Watcher) -> set[int]:
    """Return the tensors of layers that never started, inside layers that were left half-way."""
    idle = {
        part
        for outer in module.modules()
        if outer not in watcher.ended
        for child in outer.children()
        if child not in watcher.started
        for part in child.modules()
    } - watcher.started
    of_idle = {id(t) for part in idle for _, _, t in _tensors(part)}
    others = (part for part in module.modules() if part not in idle)
    return of_idle - {id(t) for part in others for _, _, t in _tensors(part)}


def faster_copy(
    module: nn.Module,
    found: SpeedUps,
    *,
    fold: bool,
    pack: bool,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool,
) -> nn.Module:
    """Return a copy of a network that computes the same features faster.

    Parameters
    ----------
    module : torch.nn.Module
        The network, in evaluation mode; not changed.
    found : SpeedUps
        From `find_speed_ups`.
    fold : bool
        Fold batch normalisations into convolutions.
    pack : bool
        Multiply by oneDNN in linear and attention layers.
    device, dtype : torch.device, torch.dtype
        Device and type of the forward pass. Batch normalisations keep float32 statistics.
    channels_last : bool
        Lay out the weights of convolutions as (n, h, w, c).
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    # What stands in a copy's memo is shared, not copied.
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    if fold:
        _fold(copied, found.foldable)
    _convert(copied, found.unused, device, dtype, channels_last)
    if pack:
        _pack(copied, found.products)
    return copied


def _fold(module: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
    """Fold batch normalisations into the convolutions before them, in place."""
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


def _convert(
    module: nn.Module,
    unused: set[int],
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    """Bring all tensors but the unused ones to a device, type and memory format, in place."""
    done: dict[int, Tensor] = {}  # a tensor that two layers share stays one
    for part in module.modules():
        keep = isinstance(part, nn.modules.batchnorm._BatchNorm)
        for holder, name, tensor in list(_tensors(part)):
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
    """Yield a layer's own parameters and buffers, with the dictionary that holds them."""
    for holder in (part._parameters, part._buffers):
        for name, tensor in holder.items():
            if tensor is not None:
                yield holder, name, tensor


def _pack(module: nn.Module, layers: Iterable[str]) -> None:
    """Replace linear and attention layers by packed ones, in place."""
    for name in layers:
        part = module.get_submodule(name)
        if isinstance(part, nn.Linear):
            module.set_submodule(name, _PackedLinear(part.weight, part.bias))
        elif isinstance(part, nn.MultiheadAttention) and _PackedAttention.fits(part):
            module.set_submodule(name, _PackedAttention(part))


class _PackedLinear(nn.Module):
    """A linear layer whose weights lie as oneDNN wants them.

    The operations are those that ``torch.compile`` uses. They are internal to PyTorch: where one of
    them is missing or behaves otherwise, `featcache.networks.forward` notices and does without.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = bias

    def forward(self, inputs: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self.weight, self.bias, "none", [], ""
        )
        return product


class _PackedAttention(nn.Module):
    """`torch.nn.MultiheadAttention` of packed linear layers, for plain self-attention."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        assert attention.in_proj_weight is not None
        self.attention = attention
        self.heads = attention.num_heads
        self.inward = _PackedLinear(attention.in_proj_weight, attention.in_proj_bias)
        self.outward = _PackedLinear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        plain = options == {"need_weights": False} and not args and query.ndim == 3
        if not (plain and query is key and key is value):
            output: tuple[Tensor, Tensor | None] = self.attention(
                query, key, value, *args, **options
            )
            return output
        b, t, d = query.shape
        parts = self.inward(query).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (b, heads, t, d / heads)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.outward(mixed.transpose(1, 2).reshape(b, t, d)), None

    @staticmethod
    def fits(attention: nn.MultiheadAttention) -> bool:
        """Return whether it is of the kind that `forward` computes."""
        return (
            attention.batch_first
            and attention.in_proj_weight is not None
            and attention.bias_k is None
            and not attention.add_zero_attn
        )


def products_pay(product: tuple[int, int, int], images: int, dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies faster than what `torch.nn.Linear` uses.

    A fixed rule, so that every run on a machine decides alike: float32, on a processor of AMD, with
    a torch that was built with Intel's MKL.

    Parameters
    ----------
    product : (int, int, int)
        Rows for one image, inputs, outputs; `SpeedUps.largest_product` of one image.
    images : int
        Images in one batch.
    dtype : torch.dtype
        Type of the forward pass.
    """
    # Measured with torch 2.14 on an AMD EPYC of 2025 (AVX-512, one and two threads), products of
    # 10 million to 4 billion multiplications: oneDNN needs 0.40 to 0.56 of MKL's time in float32
    # (0.67 to 0.91 when both are held to AVX2); in bfloat16, which Linear gives to oneDNN itself,
    # 0.8 to 0.95. A product of 16 thousand takes twice as long. Processors of Intel, for which MKL
    # is made, were not measured.
    return (
        dtype == torch.float32
        and math.prod(product) * images >= _SMALLEST_PRODUCT
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _cpu_vendor() == "AuthenticAMD"
    )


def _cpu_vendor() -> str:
    """Return the vendor as Linux names it; an empty string on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    vendors = (line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    return next(vendors, "")
