"""A head made of the network's own last layers, trained on features cached at an earlier layer.

Its weights are numpy arrays, as those of every head. It cannot keep the code of the network, so
`bind` gives it a network of the same architecture (whose weights do not matter) before it first
predicts. `Predictor` does that by itself if the network is public.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featcache.errors import FeatcacheError, PredictorError
from featcache.finetuning.cutting import Suffix, cut
from featcache.heads.steps import Step
from featcache.system.memory import reuse_memory

__all__ = ["SCORED_AT_ONCE", "SuffixStep", "block_scores", "load_tensors", "to_device"]

SCORED_AT_ONCE = 64


class SuffixStep(Step):
    """The part of a network behind a cut, as the one step of a head: flattened features to scores.

    Attributes
    ----------
    state : dict of str to ndarray
        All parameters and buffers behind the cut.
    tap : str
        Where the network is cut, in canonical form.
    shape : tuple of int
        Shape of one image's features.
    head : str
        Name of the layer that gives the classes.
    outputs : int
        Number of classes.
    best_epoch : int
        Epoch of its training whose weights these are, from 1; 0 once it was saved and loaded.
    """

    kind = "suffix"
    best_epoch = 0
    _network: Suffix | None = None
    _device = torch.device("cpu")

    def __init__(
        self,
        state: Mapping[str, np.ndarray],
        *,
        tap: str,
        shape: Sequence[int],
        head: str,
        outputs: int,
    ) -> None:
        self.state = dict(state)
        self.tap, self.shape, self.head, self.outputs = tap, tuple(shape), head, outputs

    @classmethod
    def trained(cls, suffix: Suffix, outputs: int, best_epoch: int) -> SuffixStep:
        """Return the step of a suffix that was trained, of which one epoch's weights were kept."""
        tensors = suffix.tensors().items()
        state = {name: one.detach().cpu().contiguous().numpy().copy() for name, one in tensors}
        step = cls(state, tap=suffix.tap, shape=suffix.shape, head=suffix.head, outputs=outputs)
        step._network, step.best_epoch = suffix.eval(), best_epoch
        return step

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], **values: Any) -> SuffixStep:
        """Return the step that gave these `arrays` and `values`."""
        return cls(arrays, **values)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the weights by name."""
        return self.state

    def values(self) -> dict[str, Any]:
        """Return where the network is cut, as JSON values."""
        shape = list(self.shape)
        return {"tap": self.tap, "shape": shape, "head": self.head, "outputs": self.outputs}

    def check(self, width: int) -> int:
        """Refuse weights that are none; `bind` compares them with the network's layers."""
        kinds = {one.dtype.kind for one in self.state.values()}
        self._require(self.state and kinds <= set("fiub"), "weights of no network")
        self._require(isinstance(self.tap, str) and isinstance(self.head, str), "no cut")
        numbers = (*self.shape, self.outputs)
        self._require(all(type(n) is int and 0 < n < 2**31 for n in numbers), "no shape")
        self._require(math.prod(self.shape) == width, f"features other than {width}")
        return self.outputs

    @property
    def is_bound(self) -> bool:
        """Whether it has a network to run."""
        return self._network is not None

    @property
    def suffix(self) -> Suffix:
        """The network behind the cut, with the weights of this head.

        Raises
        ------
        PredictorError
            It has none yet.
        """
        if self._network is None:
            raise PredictorError(
                "This head is the rest of a network and has not been given one: use it through "
                "its Predictor, or call bind(network, image_shape)."
            )
        return self._network

    def bind(self, network: nn.Module, image_shape: Sequence[int]) -> SuffixStep:
        """Take the code of a network, of whatever weights, and give it the weights of this head.

        Parameters
        ----------
        network : torch.nn.Module
            The whole network; on the meta device if need be. It is copied.
        image_shape : tuple of int
            (c, h, w) of the images.

        Returns
        -------
        SuffixStep
            Itself.

        Raises
        ------
        PredictorError
            The network has other layers than the one that this head was part of.
        """
        try:
            suffix = cut(network, self.tap, image_shape)
            suffix.new_classifier(self.outputs)
        except (FeatcacheError, ValueError) as error:
            raise PredictorError(f"The head does not fit the network: {error}") from error
        if (suffix.shape, suffix.head) != (self.shape, self.head):
            raise PredictorError(
                f"The head takes features of shape {self.shape} and ends in {self.head!r}; the "
                f"network gives {suffix.shape} at {self.tap} and ends in {suffix.head!r}."
            )
        load_tensors(suffix, {n: torch.from_numpy(a) for n, a in self.state.items()})
        self._network = suffix.eval().requires_grad_(False).to(self._device)
        return self

    def to(self, device: torch.device) -> SuffixStep:
        """Compute on a device from now on."""
        self._device = device
        if self._network is not None:
            self._network.to(device)
        return self

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """Return scores (n, k), float32, for flattened features (n, d)."""
        suffix = self.suffix
        scores = [np.empty((0, self.outputs), np.float32)]
        with reuse_memory():
            for start in range(0, len(X), SCORED_AT_ONCE):
                block = np.ascontiguousarray(X[start : start + SCORED_AT_ONCE], dtype=np.float32)
                scores.append(block_scores(suffix, torch.from_numpy(block), self._device))
        return np.concatenate(scores)

    def module(self) -> nn.Module:
        """Return a copy of the network behind the cut, ready to be trained further."""
        suffix = copy.deepcopy(self.suffix).requires_grad_(True).cpu()
        return nn.Sequential(nn.Unflatten(1, suffix.shape), suffix)


def block_scores(suffix: Suffix, maps: Tensor, device: torch.device) -> np.ndarray:
    """Return scores (b, k), float32, of a few images, averaged over their views.

    Parameters
    ----------
    suffix : Suffix
        On `device`, in evaluation mode.
    maps : torch.Tensor
        Features at the cut: b times as many numbers as an image's views have, in whatever shape.
    device : torch.device
        Where to compute.
    """
    with torch.inference_mode():
        out = suffix(to_device(maps.reshape(-1, *suffix.shape), device)).float()
        scores: np.ndarray = out.reshape(len(maps), -1, out.shape[1]).mean(dim=1).cpu().numpy()
    return scores


def to_device(maps: Tensor, device: torch.device) -> Tensor:
    """Return features as float32 on a device, maps as convolutions take them fastest."""
    found = maps.to(device).float()
    return found.contiguous(memory_format=torch.channels_last) if found.ndim == 4 else found


def load_tensors(suffix: Suffix, tensors: Mapping[str, Tensor]) -> None:
    """Put parameters and buffers into a suffix by name, whatever device it is on.

    Raises
    ------
    PredictorError
        Other names or shapes than the suffix has.
    """
    own = suffix.tensors()
    for name in (*(own.keys() - tensors.keys()), *(tensors.keys() - own.keys())):
        raise PredictorError(f"The head does not fit the network: {name!r} is in one of them only.")
    for name, value in tensors.items():
        if value.shape != own[name].shape or value.dtype != own[name].dtype:
            raise PredictorError(
                f"The head does not fit the network: {name!r} is {tuple(value.shape)} "
                f"{value.dtype} in the head, {tuple(own[name].shape)} {own[name].dtype} there."
            )
        layer, _, attribute = name.rpartition(".")
        part = suffix.network.get_submodule(layer)
        if attribute in part._parameters:
            part._parameters[attribute] = nn.Parameter(value, requires_grad=False)
        else:
            part._buffers[attribute] = value
