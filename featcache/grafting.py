"""The whole network as one ``nn.Module``: backbone, scaling and head, from pixels to probabilities.

The head's feature treatment is folded into its first layer: with features x, scaling (x - m) / s
and weights W, b, the layer W (x - m) / s + b is the layer W' x + b' with W' = W / s and
b' = b - W' m. It is computed in float64 and stored in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from featcache import heads
from featcache.errors import PredictorError
from featcache.taps import Tapped

if TYPE_CHECKING:
    from featcache.backbone import Backbone
    from featcache.predictor import Predictor

__all__ = ["Grafted", "graft"]


class Grafted(nn.Module):
    """A backbone with a head grafted on: an ordinary module, for serving or for fine-tuning.

    Attributes
    ----------
    backbones : torch.nn.ModuleList
        The networks. They are run up to their last tap.
    head : torch.nn.Sequential
        Linear layers on the features; its output are logits, already divided by the temperature.
    classes : tuple of str
        Names of the outputs.
    probabilities : bool
        Whether `forward` ends in a softmax. Set it to False to train with a cross-entropy.
    """

    def __init__(
        self,
        networks: Sequence[Backbone],
        columns: Sequence[tuple[int, str]],
        head: nn.Sequential,
        classes: Sequence[str],
        *,
        probabilities: bool = True,
    ) -> None:
        super().__init__()
        self.backbones = nn.ModuleList(network.module for network in networks)
        self.head = head
        self.classes = tuple(classes)
        self.probabilities = probabilities
        self._points = [network.points for network in networks]
        self._columns = list(columns)

    def features(self, images: Tensor) -> Tensor:
        """Return the features of normalised images (b, c, h, w): (b, d), as the head takes them."""
        found = [
            Tapped(network, points)(images)
            for network, points in zip(self.backbones, self._points, strict=True)
        ]
        return torch.cat([found[k][tap].flatten(1) for k, tap in self._columns], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities (or logits) of shape (b, k).

        Parameters
        ----------
        images : torch.Tensor of float32, shape (b, c, h, w)
            Prepared by the predictor's `Preprocessing` and its ``normalize``.
        """
        logits: Tensor = self.head(self.features(images))
        return logits.softmax(dim=1) if self.probabilities else logits


def graft(predictor: Predictor, networks: Sequence[Backbone], *, probabilities: bool) -> Grafted:
    """Build the network of a predictor; see `Predictor.to_torch`.

    Raises
    ------
    PredictorError
        The head is not made of linear layers, or its networks prepare images differently.
    """
    first = networks[0].preprocessing
    if any(network.preprocessing != first for network in networks[1:]):
        raise PredictorError(
            "The predictor's networks prepare images differently (size, mean or standard "
            "deviation), so one input cannot serve them: there is no single network to return."
        )
    columns = [(column.source, column.tap) for column in predictor.columns]
    head = head_layers(predictor)
    return Grafted(networks, columns, head, predictor.classes, probabilities=probabilities)


def head_layers(predictor: Predictor) -> nn.Sequential:
    """Return a predictor's head as torch layers: features (b, d) to logits over temperature.

    Raises
    ------
    PredictorError
        It is not made of linear layers (forests, kernels, neighbours).
    """
    layers = heads.layers(predictor.estimator)
    if layers is None:
        raise PredictorError(
            f"A {predictor.head} head is not made of linear layers and cannot be part of a "
            "network. Heads that can: linear, svm, ridge, mlp; train with --head."
        )
    modules: list[nn.Module] = []
    for i, (weight, bias) in enumerate(layers):
        last = i == len(layers) - 1
        scale = predictor.temperature if last else 1.0
        modules.append(_linear(weight / scale, bias / scale))
        if not last:
            modules.append(nn.ReLU())
    return nn.Sequential(*modules)


def _linear(weight: np.ndarray, bias: np.ndarray) -> nn.Linear:
    """Return a layer with weights (out, in) and bias (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
        layer.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))
    return layer
