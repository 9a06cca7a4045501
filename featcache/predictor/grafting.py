"""The whole network as one ``nn.Module``: backbone, feature treatment and head.

All that is affine in a head is folded into one layer: behind scaling (x - m) / s, the layer
W z + b is W' x + b' with W' = W / s and b' = b - W' m; the temperature divides the last one. It
is computed in float64 and stored in float32. Treatments that are not affine (unit length, signed
powers) become layers without weights.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from sklearn.decomposition import PCA
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from torch import Tensor, nn

from featcache.errors import PredictorError
from featcache.finetuning.head import SuffixClassifier
from featcache.heads.mlp import MLP
from featcache.heads.treatment import SignedPower
from featcache.networks.taps import ResolvedTap, StopForward, Tapped

if TYPE_CHECKING:
    from featcache.networks.backbone import Backbone
    from featcache.predictor.inputs import InputTap

__all__ = ["Grafted", "graft", "head_layers"]

Floats = npt.NDArray[np.float64]


class Trained(Protocol):
    """What is grafted: as much of a `Predictor`, which imports this module, as it takes."""

    estimator: Any
    head: str
    classes: tuple[str, ...]
    temperature: float
    columns: tuple[InputTap, ...]

    @property
    def n_features(self) -> int:
        """Columns that the head takes."""


class Grafted(nn.Module):
    """A backbone with a head grafted on: an ordinary module, for serving or for fine-tuning.

    Attributes
    ----------
    backbones : torch.nn.ModuleList
        The networks, frozen. They are run up to their last tap.
    head : torch.nn.Sequential
        The head on their features; its output are logits, already divided by the temperature.
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
            _tapped(network, points)(images)
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


def _tapped(network: nn.Module, points: Sequence[ResolvedTap]) -> Tapped:
    return (_ToTheEnd if torch.compiler.is_exporting() else Tapped)(network, points)


class UnitLength(nn.Module):
    """Scale rows to Euclidean length 1; rows of zeros stay."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled rows of `x`, of shape (b, d)."""
        length = x.norm(dim=1, keepdim=True)
        return x / torch.where(length == 0, 1.0, length)


class Divide(nn.Module):
    """Divide by a number: the temperature, behind layers that it cannot be folded into."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / by``."""
        return x / self.by


class Power(nn.Module):
    """Raise absolute values to a power and keep the signs."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        """Return ``sign(x) * abs(x) ** exponent``."""
        return x.sign() * x.abs().pow(self.exponent)


def graft(predictor: Trained, networks: Sequence[Backbone], *, probabilities: bool) -> Grafted:
    """Build the network of a predictor; see `Predictor.to_torch`.

    Raises
    ------
    PredictorError
        The head is not made of layers, or its networks prepare images differently.
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


def head_layers(predictor: Trained) -> nn.Sequential:
    """Return a predictor's head as torch layers: features (b, d) to logits over temperature.

    Raises
    ------
    PredictorError
        It is not made of layers (trees, kernels, neighbours).
    """
    if isinstance(predictor.estimator, SuffixClassifier):
        suffix = copy.deepcopy(predictor.estimator.suffix).requires_grad_(True).cpu()
        shape = nn.Unflatten(1, suffix.shape)
        return nn.Sequential(shape, suffix, Divide(predictor.temperature))
    modules: list[nn.Module] = []
    map_ = _Affine(predictor.n_features)
    steps = _steps(predictor.estimator)
    for step in steps:
        if isinstance(step, StandardScaler):
            # `mean_` is there even where it is not taken off.
            map_.scale(step.mean_ if step.with_mean else None, step.scale_)
        elif isinstance(step, PCA):
            scale = np.sqrt(step.explained_variance_) if step.whiten else 1.0
            map_.shift(-step.mean_)
            map_.matrix(step.components_ / np.reshape(scale, (-1, 1)), 0.0)
        elif isinstance(step, Normalizer) and step.norm == "l2":
            modules += [*map_.flush(), UnitLength()]
        elif isinstance(step, SignedPower):
            modules += [*map_.flush(), Power(step.exponent)]
        elif step is steps[-1] and isinstance(step, MLP):
            modules += _perceptron(step, map_, predictor.temperature)
        elif step is steps[-1] and hasattr(step, "coef_") and hasattr(step, "intercept_"):
            weight, bias = _both_classes(step.coef_, step.intercept_)
            map_.matrix(weight / predictor.temperature, bias / predictor.temperature)
        else:
            raise PredictorError(
                f"A {predictor.head} head ({type(step).__name__}) is not made of layers and cannot "
                "be part of a network. Heads that can: linear, svm, ridge, mlp, suffix; train with "
                "--head."
            )
    return nn.Sequential(*modules, *map_.flush())


def _steps(estimator: Any) -> list[Any]:
    return [step for _, step in estimator.steps] if isinstance(estimator, Pipeline) else [estimator]


def _perceptron(step: MLP, map_: _Affine, temperature: float) -> list[nn.Module]:
    """Return the layers of a perceptron but for the last, which `map_` keeps: weights (out, in)."""
    modules: list[nn.Module] = []
    *hidden, (weight, bias) = step.layers()
    for inner in hidden:
        map_.matrix(*inner)
        modules += [*map_.flush(), nn.ReLU()]
    map_.matrix(weight / temperature, bias / temperature)
    return modules


def _both_classes(coef: Any, intercept: Any) -> tuple[Floats, Floats]:
    """Return weights (k, d) and biases (k,); one row for two classes becomes -f/2 and f/2."""
    weight = np.atleast_2d(np.asarray(coef, np.float64))
    bias = np.broadcast_to(np.asarray(intercept, np.float64), (len(weight),))
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2


class _Affine:
    """An affine map that grows: x to W x + b, in float64; W = None while only scales are in it."""

    def __init__(self, width: int) -> None:
        self._reset(width)

    def _reset(self, width: int) -> None:
        self.width = width
        self.factor: Floats = np.ones(width)
        self.bias: Floats = np.zeros(width)
        self.weight: Floats | None = None
        self.empty = True

    def shift(self, by: Any) -> None:
        """Add a vector."""
        self.bias, self.empty = self.bias + by, False

    def scale(self, mean: Any, scale: Any) -> None:
        """Take a mean off and divide by a scale; None leaves either out."""
        if mean is not None:
            self.shift(-mean)
        if scale is not None:
            self.matrix(None, 0.0, 1.0 / scale)

    def matrix(self, weight: Floats | None, bias: Any, factor: Any = 1.0) -> None:
        """Multiply by a matrix (out, in), or by a diagonal, and add a bias."""
        self.empty = False
        if weight is None:
            self.bias = self.bias * factor
            if self.weight is None:
                self.factor = self.factor * factor
            else:
                self.weight = self.weight * np.reshape(factor, (-1, 1))
            return
        self.bias = weight @ self.bias + bias
        self.weight = weight * self.factor if self.weight is None else weight @ self.weight
        self.factor = np.ones(len(weight))
        self.width = len(weight)

    def flush(self) -> list[nn.Module]:
        """Return the map as a layer, if it does anything, and start anew behind it."""
        if self.empty:
            return []
        weight = np.diag(self.factor) if self.weight is None else self.weight
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
            layer.bias.copy_(torch.from_numpy(np.ascontiguousarray(self.bias)))
        self._reset(self.width)
        return [layer]
