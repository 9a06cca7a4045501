"""Linear layers whose weights lie as oneDNN wants them, for networks that run on a CPU.

Matrix products go to oneDNN instead of the BLAS library that PyTorch was built with, where that is
known to be faster: Intel's MKL computes float32 on AMD's processors at less than half of their
speed.

The operations are those that ``torch.compile`` uses; here they need no compiler and no seconds of
compiling. They are internal to PyTorch: where one of them is missing or behaves otherwise,
`featcache.networks.forward` notices and does without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
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


# Smallest matrix product, in multiplications, that gains from oneDNN.
_SMALLEST = 1_000_000


def products_pay(product: tuple[int, int, int], images: int, dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies faster than what `torch.nn.Linear` uses.

    A fixed rule, so that every run on a machine decides alike: float32, on a processor of AMD, with
    a torch that was built with Intel's MKL.

    Parameters
    ----------
    product : (int, int, int)
        Rows for one image, inputs, outputs; from `featcache.networks.fusion.observe`.
    images : int
        Images in one batch.
    dtype : torch.dtype
        Type of the forward pass.
    """
    # Measured with torch 2.14 on an AMD EPYC of 2025 (AVX-512, one and two threads), products of
    # 10 million to 4 billion multiplications: oneDNN needs 0.40 to 0.56 of MKL's time in float32
    # (0.67 to 0.91 when both are held to AVX2); in bfloat16, which Linear gives to oneDNN itself,
    # 0.8 to 0.95. A product of 16 thousand takes twice as long. On Intel's processors MKL is as
    # fast as oneDNN.
    return (
        dtype == torch.float32
        and math.prod(product) * images >= _SMALLEST
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
