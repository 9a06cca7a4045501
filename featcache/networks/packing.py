"""Layers whose weights lie as oneDNN wants them, for networks that run on a CPU.

PyTorch's eager layers hand oneDNN their weights as they are, and compute activations in a pass of
their own. Here weights are brought into oneDNN's layout once, and an activation that follows a
convolution is computed with it (MobileNetV2: 12 % faster in float32, 25 % in bfloat16). Matrix
products go to oneDNN instead of the BLAS library that PyTorch was built with, where that is
measured to be faster: Intel's MKL computes float32 on AMD's processors at less than half of their
speed.

The operations are those that ``torch.compile`` uses; here they need no compiler and no seconds of
compiling. They are internal to PyTorch: where one of them is missing or behaves otherwise,
`featcache.networks.forward` notices and does without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featcache.networks.taps import ResolvedTap, Tapped

__all__ = ["Convolution", "observe", "pack", "products_pay"]

# Activations that oneDNN computes with a convolution: its name and numbers.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Hardswish: ("hardswish", []),
}


@dataclass(frozen=True)
class Convolution:
    """How a convolution was seen to be used.

    Attributes
    ----------
    shape : tuple of int
        Of its input for one image: channels, height, width.
    activation : str or None
        Name of the activation that alone takes its output.
    """

    shape: tuple[int, ...]
    activation: str | None


def observe(
    module: nn.Module, points: Sequence[ResolvedTap], example: Tensor
) -> dict[str, Convolution]:
    """Run a network once up to its last tap and note its convolutions, by name.

    Parameters
    ----------
    module : torch.nn.Module
        In evaluation mode, in float32 on the CPU; batch normalisations folded where they can be.
    points : sequence of ResolvedTap
        Where features are read. A convolution or an activation that holds a tap stays itself.
    example : torch.Tensor
        Normalised images.
    """
    tapped = {point.tap.layer for point in points}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    made: dict[int, tuple[str, Tensor, int]] = {}  # holding the tensor keeps its id unique
    followed: dict[str, str] = {}

    def after(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, output: Tensor) -> None:
            shapes.setdefault(name, []).append(tuple(args[0].shape[1:]))
            made[id(output)] = name, output, output._version

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any) -> None:
            convolution, _, version = made.get(id(args[0]), ("", None, -1))
            if version == args[0]._version:  # nothing has written into it since
                followed[convolution] = name

        return hook

    handles = []
    for name, part in module.named_modules():
        if name in tapped or part._forward_hooks or part._forward_pre_hooks:
            continue
        if _is_plain(part):
            handles.append(part.register_forward_hook(after(name)))
        elif type(part) in _ACTIVATIONS:
            handles.append(part.register_forward_pre_hook(before(name)))
    try:
        with torch.no_grad():
            Tapped(module, points)(example)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Convolution(seen[0], followed.get(name))
        for name, seen in shapes.items()
        if len(seen) == 1
    }


def _is_plain(part: nn.Module) -> bool:
    return (
        type(part) is nn.Conv2d
        and part.padding_mode == "zeros"
        and not isinstance(part.padding, str)
    )


def pack(
    module: nn.Module, products: set[str], convolutions: Mapping[str, Convolution], images: int
) -> None:
    """Replace layers by packed ones, in place.

    Parameters
    ----------
    module : torch.nn.Module
        A copy whose weights have their final type.
    products : set of str
        Linear and attention layers.
    convolutions : mapping of str to Convolution
        From `observe`.
    images : int
        Images a batch.
    """
    for name in products:
        part = module.get_submodule(name)
        if isinstance(part, nn.Linear):
            module.set_submodule(name, _PackedLinear(part.weight, part.bias))
        elif isinstance(part, nn.MultiheadAttention) and _PackedAttention.fits(part):
            module.set_submodule(name, _PackedAttention(part))
    for name, seen in convolutions.items():
        activation = None if seen.activation is None else module.get_submodule(seen.activation)
        if isinstance(activation, _Skippable):
            activation = activation.activation
        elif activation is not None:
            assert seen.activation is not None
            module.set_submodule(seen.activation, _Skippable(activation))
        packed = _PackedConv2d(module.get_submodule(name), (images, *seen.shape), activation)
        module.set_submodule(name, packed)


class _PackedConv2d(nn.Module):
    """A convolution, and perhaps the activation after it."""

    def __init__(
        self, convolution: Any, shape: tuple[int, ...], activation: nn.Module | None
    ) -> None:
        super().__init__()
        places = [list(getattr(convolution, k)) for k in ("padding", "stride", "dilation")]
        self.arguments = [*places, convolution.groups]
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            convolution.weight.detach(), *self.arguments, list(shape)
        )
        self.bias = convolution.bias
        self.activates = activation is not None
        self.arguments += _ACTIVATIONS[type(activation)] if activation else ("none", [])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.arguments, ""
        )
        if self.activates:
            y._featcache_activated = True  # type: ignore[attr-defined]
        return y


class _Skippable(nn.Module):
    """An activation that lets through what was activated already.

    One module may activate several tensors; the mark is on the tensor, and goes when it is used.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Any:
        if getattr(x, "_featcache_activated", False):
            del x._featcache_activated  # type: ignore[attr-defined]
            return x
        return self.activation(x)


class _PackedLinear(nn.Module):
    """A linear layer."""

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
        """Say whether it is of the kind that `forward` computes."""
        return (
            attention.batch_first
            and attention.in_proj_weight is not None
            and attention.bias_k is None
            and not attention.add_zero_attn
        )


_PAYS = 0.75  # of the time; less is not worth the risk that noise decides
_REPEATS = 5


def products_pay(product: tuple[int, int, int], images: int, dtype: torch.dtype) -> bool:
    """Measure whether oneDNN multiplies clearly faster than what `torch.nn.Linear` uses.

    Parameters
    ----------
    product : (int, int, int)
        Rows for one image, inputs, outputs; from `featcache.networks.fusion.observe`.
    images : int
        Images a batch.
    dtype : torch.dtype
        Of the forward pass.
    """
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    rows, inputs, outputs = product
    layer = nn.Linear(inputs, outputs, dtype=dtype).requires_grad_(False)
    batch = torch.zeros(min(rows * images, 1024), inputs, dtype=dtype)
    layers = layer, _PackedLinear(layer.weight, layer.bias)
    times = [math.inf, math.inf]
    with torch.inference_mode():
        for _ in range(_REPEATS):  # in turn, so that whatever else runs disturbs both
            for k, each in enumerate(layers):
                started = time.perf_counter()
                each(batch)
                times[k] = min(times[k], time.perf_counter() - started)
    return times[1] < _PAYS * times[0]
