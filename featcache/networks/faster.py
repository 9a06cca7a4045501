"""A faster copy of a network that computes the same features.

The copy shares every tensor with the original that needs no change, and the original is never
touched. Batch normalisations are folded into the convolutions before them; weights are brought to
the device, type and memory format of the forward pass; on processors of AMD, linear layers multiply
by oneDNN.

What can be made faster is found in the trace of one forward pass rather than in a graph (`torch.fx`
cannot trace every network, and renames what taps name). A convolution or normalisation that holds a
tap is left alone, and `featcache.networks.forward` compares the features of copy and original
before it trusts the copy.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from featcache.networks.backbone import Backbone

__all__ = ["faster_copy", "find_speed_ups", "products_pay"]

# Smallest matrix product, in multiplications, that gains from oneDNN.
_SMALLEST_PRODUCT = 1_000_000


def find_speed_ups(
    backbone: Backbone,
) -> tuple[list[tuple[str, str]], dict[str, tuple[int, int, int]]]:
    """Return what can be made faster in a network up to its last tap.

    Returns
    -------
    foldable : list of (str, str)
        Names of a convolution and of the batch normalisation that alone takes its output.
    products : dict of str to (int, int, int)
        Linear and attention layers, with rows, inputs and outputs of their product of one image.
    """
    taps = {point.tap.layer for point in backbone.points}
    runs = Counter(call.layer for call in backbone.traced.calls)
    foldable: list[tuple[str, str]] = []
    products: dict[str, tuple[int, int, int]] = {}
    for call in backbone.traced.calls:
        name, given, source = call.layer, call.input.shape, call.source
        part = backbone.module.get_submodule(name)
        if name not in backbone.used or _is_hooked(part):
            continue
        if type(part) in (nn.Linear, nn.MultiheadAttention) and given:
            inputs = given[-1]
            products[name] = math.prod(given[:-1]), inputs, getattr(part, "out_features", inputs)
        if isinstance(part, nn.BatchNorm2d) and _after_folding(part) is not None and source:
            before = backbone.module.get_submodule(source.layer)
            pair = source.layer, name
            once = all(runs[each] == 1 and each not in taps for each in pair)
            if once and type(before) is nn.Conv2d and not _is_hooked(before):
                foldable.append(pair)
    return foldable, products


def _is_hooked(part: nn.Module) -> bool:
    """Return whether somebody has hooked a layer: then it does more than its class says."""
    return bool(part._forward_hooks or part._forward_pre_hooks)


def faster_copy(
    backbone: Backbone,
    *,
    fold: Iterable[tuple[str, str]],
    pack: Iterable[str],
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool,
) -> nn.Module:
    """Return a copy of a network that computes the same features faster.

    Parameters
    ----------
    backbone : Backbone
        The network, which is not changed.
    fold : iterable of (str, str)
        Convolutions, each with the batch normalisation to fold into it.
    pack : iterable of str
        Linear and attention layers that are to multiply by oneDNN.
    device, dtype : torch.device, torch.dtype
        Device and type of the forward pass. Batch normalisations keep float32 statistics.
    channels_last : bool
        Lay out the weights of convolutions as (n, h, w, c).
    """
    module = backbone.module
    tensors = itertools.chain(module.parameters(), module.buffers())
    # What stands in a copy's memo is shared, not copied.
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    _fold(copied, fold)
    _convert(copied, backbone.used, device, dtype, channels_last)
    _pack(copied, pack)
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
    used: Set[str],
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    """Bring what is used to a device, type and memory format, in place."""
    done: dict[int, Tensor] = {}  # a tensor that two layers share stays one
    for layer, part in module.named_modules():
        keep = isinstance(part, nn.modules.batchnorm._BatchNorm)
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            # A layer that runs may use its tensors in ways that no trace sees.
            is_used = not layer or layer in used or f"{layer}.{name}" in used
            if tensor is None or not is_used:
                continue
            if id(tensor) not in done:
                target = tensor.dtype if keep or not tensor.is_floating_point() else dtype
                new = tensor.detach().to(device, target)
                if channels_last and new.ndim == 4:
                    new = new.contiguous(memory_format=torch.channels_last)
                done[id(tensor)] = new
            new = done[id(tensor)]
            setattr(part, name, nn.Parameter(new, False) if name in part._parameters else new)


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
        Rows for one image, inputs, outputs; see `find_speed_ups`.
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
