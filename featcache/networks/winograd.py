"""3 x 3 convolutions with a quarter of the multiplications, for float32 on a CPU.

Winograd's minimal filtering F(4 x 4, 3 x 3) computes a tile of 4 x 4 outputs from 6 x 6 inputs with
36 multiplications instead of 144 for each pair of channels: ``Y = A^T [(G g G^T) * (B^T d B)] A``.
Summed over the channels, the products of each of the 36 places are one matrix product; the
transforms are additions. See Lavin and Gray, Fast Algorithms for Convolutional Neural Networks,
https://arxiv.org/abs/1509.09308, whose matrices are used here.

It pays where both numbers of channels are large, so that the products outweigh the transforms: a
VGG's deep layers become twice as fast. PyTorch's own CPU kernels do not have it. The features of
VGG-16 differ from those of float64 by as much as the direct convolution's do, 4e-7 of the largest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["WinogradConv2d", "faster", "suits"]

_TILE = 4  # outputs along one side of a tile
_WINDOW = 6  # inputs along one side
_FILTER = (  # G
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
# A^T takes place (1, 1) of the products to every output of the tile with the factor 1: the bias
# added there is added everywhere.
_BIAS_PLACE = 1 * _WINDOW + 1


def suits(convolution: nn.Module) -> bool:
    """Say whether a layer is a convolution of the kind that can be computed so."""
    return (
        type(convolution) is nn.Conv2d
        and convolution.kernel_size == (3, 3)
        and convolution.stride == (1, 1)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and convolution.weight.dtype == torch.float32
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class WinogradConv2d(nn.Module):
    """A 3 x 3 convolution by F(4 x 4, 3 x 3).

    Parameters
    ----------
    convolution : torch.nn.Conv2d
        Of the kind that `suits` accepts.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        assert not isinstance(convolution.padding, str)
        self.padding = convolution.padding
        self.outputs = convolution.out_channels
        g = torch.tensor(_FILTER, dtype=torch.float64)
        weight = convolution.weight.detach().double()
        # (6, 6, out, in): one matrix for each place of the window
        matrices = torch.einsum("ai,kcij,bj->abkc", g, weight, g).float().flatten(0, 1)
        self.weights = [torch.ops.mkldnn._reorder_linear_weight(m.contiguous()) for m in matrices]
        self.bias = None if convolution.bias is None else convolution.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve maps of shape (n, c, h, w); the result is laid out as channels_last."""
        n, c, height, width = x.shape
        top, left = self.padding
        height, width = height + 2 * top - 2, width + 2 * left - 2  # of the result
        rows, columns = -(-height // _TILE), -(-width // _TILE)
        padded = x.new_zeros(n, rows * _TILE + 2, columns * _TILE + 2, c)
        padded[:, top : top + x.shape[2], left : left + x.shape[3]] = x.permute(0, 2, 3, 1)

        along_rows = _inward([padded[:, i : i + rows * _TILE : _TILE] for i in range(_WINDOW)])
        products: list[list[Tensor]] = []
        for i, part in enumerate(along_rows):  # (n, rows, width + 2, c)
            windows = [part[:, :, j : j + columns * _TILE : _TILE] for j in range(_WINDOW)]
            products.append(
                [
                    self._product(i * _WINDOW + j, window.view(-1, c))
                    for j, window in enumerate(_inward(windows))
                ]
            )  # each (n * rows * columns, out)

        result = x.new_empty(n, rows, _TILE, columns, _TILE, self.outputs)
        tiles = (n, rows, columns, self.outputs)
        halves = [
            _outward([products[i][j] for i in range(_WINDOW)], [None] * _TILE)
            for j in range(_WINDOW)
        ]
        for a in range(_TILE):
            places = [result[:, :, a, :, b] for b in range(_TILE)]
            _outward([half[a].view(tiles) for half in halves], places)
        result = result.view(n, rows * _TILE, columns * _TILE, self.outputs)
        result = result[:, :height, :width].permute(0, 3, 1, 2)
        return result.contiguous(memory_format=torch.channels_last)

    def _product(self, place: int, inputs: Tensor) -> Tensor:
        bias = self.bias if place == _BIAS_PLACE else None
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self.weights[place], bias, "none", [], ""
        )
        return product


def _inward(d: Sequence[Tensor]) -> list[Tensor]:
    """Multiply by B^T along one axis, given as a list of six tensors."""
    a = torch.sub(d[4], d[2], alpha=4)
    b = torch.sub(d[3], d[1], alpha=4)
    e, f = d[4] - d[2], d[3] - d[1]
    return [
        torch.sub(d[4], d[2], alpha=5).add_(d[0], alpha=4),
        a + b,
        a - b,
        torch.add(e, f, alpha=2),
        torch.sub(e, f, alpha=2),
        torch.sub(d[5], d[3], alpha=5).add_(d[1], alpha=4),
    ]


def _outward(m: Sequence[Tensor], out: Sequence[Tensor | None]) -> list[Tensor]:
    """Multiply by A^T along one axis; the results go where `out` says."""
    p, q = m[1] + m[2], m[1] - m[2]
    r, s = m[3] + m[4], m[3] - m[4]
    return [
        torch.add(m[0] + p, r, out=out[0]),
        torch.add(q, s, alpha=2, out=out[1]),
        torch.add(p, r, alpha=4, out=out[2]),
        torch.add(q.add_(m[5]), s, alpha=8, out=out[3]),
    ]


def faster(module: nn.Module, inputs: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """Return which convolutions of a network are to be computed so: the large ones, or none.

    One decision is taken, by measuring the most expensive of them. Layer by layer, noise would
    decide where it makes little difference, and two runs would give different last bits.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    inputs : mapping of str to (int, int)
        Height and width of the inputs of its convolutions, by name; those that ran.

    Returns
    -------
    tuple of str
        Names.
    """
    sizes = {}
    for name, (height, width) in inputs.items():
        layer: Any = module.get_submodule(name)
        channels = layer.in_channels, layer.out_channels
        if suits(layer) and min(channels) >= _CHANNELS and min(height, width) >= _SIDE:
            sizes[name] = (*channels, layer.padding, height, width)
    if not sizes:
        return ()
    most_expensive = max(sizes.values(), key=lambda size: size[0] * size[1] * size[3] * size[4])
    return tuple(sizes) if _is_faster(*most_expensive) else ()


# Where the products outweigh the transforms: measured, two cores with AVX-512.
_CHANNELS, _SIDE = 256, 14
_SHARE = 0.75  # of the direct convolution's time
_IMAGES = 4  # at a time
_REPEATS = 6


def _is_faster(inputs: int, outputs: int, padding: Any, height: int, width: int) -> bool:
    direct = nn.Conv2d(inputs, outputs, 3, padding=padding)
    direct = direct.to(memory_format=torch.channels_last).requires_grad_(False)
    x = torch.zeros(_IMAGES, inputs, height, width)
    x = x.contiguous(memory_format=torch.channels_last)
    layers = direct, WinogradConv2d(direct)
    times: list[list[float]] = [[], []]
    with torch.inference_mode():
        for _ in range(_REPEATS):  # in turn, so that whatever else runs disturbs both
            for layer, own in zip(layers, times, strict=True):
                started = time.perf_counter()
                layer(x)
                own.append(time.perf_counter() - started)
    return min(times[1]) < _SHARE * min(times[0])
