"""Linear layers whose weights lie as oneDNN wants them, for networks that run on a CPU.

Matrix products go to oneDNN instead of the BLAS library that PyTorch was built with, where that is
measured to be faster: Intel's MKL computes float32 on AMD's processors at less than half of their
speed.

The operations are those that ``torch.compile`` uses; here they need no compiler and no seconds of
compiling. They are internal to PyTorch: where one of them is missing or behaves otherwise,
`featcache.networks.forward` notices and does without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["pack", "products_pay"]


def pack(module: nn.Module, layers: Iterable[str]) -> None:
    """Replace linear and attention layers by packed ones, in place.

    Parameters
    ----------
    module : torch.nn.Module
        A copy whose weights have their final type.
    layers : iterable of str
        Names of the layers.
    """
    for name in layers:
        part = module.get_submodule(name)
        if isinstance(part, nn.Linear):
            module.set_submodule(name, _PackedLinear(part.weight, part.bias))
        elif isinstance(part, nn.MultiheadAttention) and _PackedAttention.fits(part):
            module.set_submodule(name, _PackedAttention(part))


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
