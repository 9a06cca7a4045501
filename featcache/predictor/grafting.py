"""The whole network as one ``nn.Module``: backbone, feature treatment and head.

Each step of the head becomes a layer. The last one divides by the temperature and adds the bias.
What comes of it is compared with the predictor's own logits of the canary images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featcache.errors import PredictorError
from featcache.heads.base import FittedHead
from featcache.heads.calibration import Calibration
from featcache.heads.steps import Matrix, Scale
from featcache.networks.taps import ResolvedTap, StopForward, Tapped
from featcache.predictor import inputs
from featcache.system.defaults import library_defaults

if TYPE_CHECKING:
    from featcache.networks.backbone import Backbone
    from featcache.predictor.inputs import InputTap

__all__ = ["Grafted", "canary_logits", "check_same", "graft"]

_SAME = 1e-3  # differences from the predictor that rounding explains, relative to the largest


class Grafted(nn.Module):
    """A backbone with a head grafted on: an ordinary module, for serving or for fine-tuning.

    Attributes
    ----------
    backbones : torch.nn.ModuleList
        The networks, frozen. They are run up to their last tap.
    head : torch.nn.Sequential
        The head on their features; its output are calibrated logits.
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
        kind = _ToTheEnd if torch.compiler.is_exporting() else Tapped
        pairs = zip(self.backbones, self._points, strict=True)
        found = [kind(network, points)(images) for network, points in pairs]
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


class _ToTheEnd(Tapped):
    """A tapped network that runs on after its last tap.

    `torch.export` loses its place when an exception leaves a module. It drops what nobody uses by
    itself.
    """

    def _read(self, layer: str, side: str, taps: Sequence[ResolvedTap], value: Any) -> None:
        with contextlib.suppress(StopForward):
            super()._read(layer, side, taps, value)
        for name in {str(tap) for tap in taps} & self._captured.keys():
            # Layers still to come may write into what a view shows.
            self._captured[name] = self._captured[name].clone()


@library_defaults()
def graft(
    networks: Sequence[Backbone],
    columns: Sequence[InputTap],
    head: FittedHead,
    *,
    name: str,
    calibration: Calibration,
    probabilities: bool,
) -> Grafted:
    """Build the network of a predictor, whose head is called `name`; see `Predictor.to_torch`.

    Raises
    ------
    PredictorError
        The head is not made of layers, its networks prepare images differently, or what comes of
        it gives other logits than the predictor.
    """
    first = networks[0].preprocessing
    if any(network.preprocessing != first for network in networks[1:]):
        raise PredictorError(
            "The predictor's networks prepare images differently (size, mean or standard "
            "deviation), so one input cannot serve them: there is no single network to return."
        )
    *steps, last = head.steps
    temperature, bias = calibration.temperature, np.array(calibration.bias)
    if isinstance(last, Matrix):  # inside it, so that a step of training is as large as it seems
        steps.append(Matrix(last.weight / temperature, last.bias / temperature + bias))
    else:
        steps += [last, Scale(-temperature * bias, np.array(temperature))]
    layers = [step.module() for step in steps]
    made = nn.Sequential(*(layer for layer in layers if layer is not None))
    if len(made) < len(layers):
        raise PredictorError(
            f"A {name} head is not made of layers and cannot be part of a network. Heads "
            "that can: linear, svm, ridge, mlp, suffix; train with --head."
        )
    where = [(column.source, column.tap) for column in columns]
    grafted = Grafted(networks, where, made, head.classes.tolist(), probabilities=False).eval()
    pixels, expected = canary_logits(networks, columns, head, calibration)
    with torch.inference_mode():
        check_same(grafted(first.normalize(pixels)).numpy(), expected, "the grafted network")
    grafted.probabilities = probabilities
    return grafted


def canary_logits(
    networks: Sequence[Backbone],
    columns: Sequence[InputTap],
    head: FittedHead,
    calibration: Calibration,
) -> tuple[Tensor, npt.NDArray[np.float64]]:
    """Return test images, uint8 (m, c, h, w), and the calibrated logits (m, k) they should have."""
    from featcache.extraction.canaries import usable_canaries
    from featcache.extraction.features import canary_features

    images = [image for _, image in usable_canaries(networks[0])]
    found = [canary_features(network, images, device="cpu") for network in networks]
    parts = [found[column.source][column.tap].reshape(len(images), -1) for column in columns]
    pixels = np.stack([networks[0].preprocessing(image) for image in images])
    logits = head.logits(np.concatenate(parts, axis=1))
    return torch.from_numpy(pixels), calibration.scores(logits)


def check_same(found: npt.NDArray[Any], expected: npt.NDArray[Any], what: str) -> None:
    """Refuse a model whose outputs for the canary images (m, k) are not the predictor's."""
    off = inputs.distance(found, expected)
    if not off <= _SAME:
        raise PredictorError(
            f"For the canary images, {what} gives other values than the predictor: by {off:.2g} of "
            f"the largest, where {_SAME:g} is rounding. It would label images differently."
        )
