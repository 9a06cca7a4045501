"""The head that is the rest of a network: what lies behind a cut, trained on features at the cut.

Its weights are numpy arrays, as every head's. What it cannot keep is the network's own code: it
is `bind`'ed to a network of the same architecture (whose weights do not matter) before it first
predicts, and `Predictor` does that by itself where the network is public.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featcache.errors import FeatcacheError, PredictorError
from featcache.finetuning.cutting import Suffix, cut
from featcache.system.memory import reuse_memory

__all__ = ["SCORED_AT_ONCE", "SuffixClassifier", "block_scores", "load_tensors", "moved"]

SCORED_AT_ONCE = 64


class SuffixClassifier:
    """The part of a network behind a cut, as a classifier of flattened features at the cut.

    Attributes
    ----------
    classes_ : ndarray of str, shape (k,)
        Class names: the columns of the scores.
    n_features_in_ : int
        Numbers in one image's features.
    tap_ : str
        Where the network is cut, in canonical form.
    shape_ : tuple of int
        Shape of one image's features.
    head_ : str
        Name of the layer that gives the classes.
    state_ : dict of str to ndarray
        All parameters and buffers behind the cut.
    sha256_ : str
        Over `state_`.
    """

    _suffix: Suffix | None = None
    _device = torch.device("cpu")

    def __init__(self, suffix: Suffix, classes: Sequence[str] | np.ndarray) -> None:
        self.classes_ = np.asarray(classes)
        self.n_features_in_ = int(np.prod(suffix.shape))
        self.tap_ = suffix.tap
        self.shape_ = suffix.shape
        self.head_ = suffix.head
        self.state_ = {name: _array(one) for name, one in suffix.tensors().items()}
        self.sha256_ = state_digest(self.state_)
        self._suffix = suffix.eval()

    def __repr__(self) -> str:
        return f"SuffixClassifier({self.tap_}, {len(self.classes_)} classes)"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the network: it is made anew by `bind`."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @property
    def is_bound(self) -> bool:
        """Whether it has a network to run."""
        return self._suffix is not None

    @property
    def suffix(self) -> Suffix:
        """The network behind the cut, with the weights of this head.

        Raises
        ------
        PredictorError
            It has none yet.
        """
        if self._suffix is None:
            raise PredictorError(
                "This head is the rest of a network and has not been given one: use it through "
                "its Predictor, or call bind(network, image_shape)."
            )
        return self._suffix

    def bind(self, network: nn.Module, image_shape: Sequence[int]) -> SuffixClassifier:
        """Take the code of a network, of whatever weights, and give it the weights of this head.

        Parameters
        ----------
        network : torch.nn.Module
            The whole network; on the meta device if need be. It is copied.
        image_shape : tuple of int
            (c, h, w) of the images.

        Returns
        -------
        SuffixClassifier
            Itself.

        Raises
        ------
        PredictorError
            The network has other layers than the one that this head was part of.
        """
        try:
            suffix = cut(network, self.tap_, image_shape)
            suffix.new_classifier(len(self.classes_))
        except (FeatcacheError, ValueError) as error:
            raise PredictorError(f"The head does not fit the network: {error}") from error
        if (suffix.shape, suffix.head) != (self.shape_, self.head_):
            raise PredictorError(
                f"The head takes features of shape {self.shape_} and ends in {self.head_!r}; the "
                f"network gives {suffix.shape} at {self.tap_} and ends in {suffix.head!r}."
            )
        load_tensors(suffix, {n: torch.from_numpy(a) for n, a in self.state_.items()})
        self._suffix = suffix.eval().requires_grad_(False).to(self._device)
        return self

    def to(self, device: torch.device) -> SuffixClassifier:
        """Compute on a device from now on."""
        self._device = device
        if self._suffix is not None:
            self._suffix.to(device)
        return self

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Return scores (n, k), float32, for flattened features (n, d)."""
        suffix = self.suffix
        scores = [np.empty((0, len(self.classes_)), np.float32)]
        pages = reuse_memory() if self._device.type == "cpu" else nullcontext()
        with pages:
            for start in range(0, len(X), SCORED_AT_ONCE):
                block = np.ascontiguousarray(X[start : start + SCORED_AT_ONCE], dtype=np.float32)
                scores.append(block_scores(suffix, torch.from_numpy(block), self._device))
        return np.concatenate(scores)

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return the class of each row of features (n, d)."""
        chosen: np.ndarray = self.classes_[self.decision_function(X).argmax(axis=1)]
        return chosen


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
        out = suffix(moved(maps.reshape(-1, *suffix.shape), device)).float()
        scores: np.ndarray = out.reshape(len(maps), -1, out.shape[1]).mean(dim=1).cpu().numpy()
    return scores


def moved(maps: Tensor, device: torch.device) -> Tensor:
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


def state_digest(state: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = np.asarray(state[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _array(tensor: Tensor) -> np.ndarray:
    copied: np.ndarray = tensor.detach().cpu().contiguous().numpy().copy()
    return copied
