"""Read checkpoints safely, match their keys to a network, and report what does not fit.

A checkpoint is read without running any code that it may hold (``weights_only=True``, or
safetensors). Its keys are then matched to the network's without the prefixes of wrappers, and a
`PartialReport` says what does not fit.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featcache.errors import WeightsError
from featcache.system.tables import first_names

#: Under these keys training scripts keep the weights beside the optimiser's state and the like.
NESTED = ("state_dict", "model_state_dict", "model", "network", "net")
#: What `DataParallel`, training frameworks and backbone wrappers put before every key.
PREFIXES = ("module.", "model.", "backbone.")
#: How the names of checkpoint files end.
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")

# Counts training batches; evaluation never reads it, and old checkpoints do not have it.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class PartialReport:
    """What of a checkpoint went into a network, and what did not.

    Attributes
    ----------
    loaded : tuple of str
        Names in the network of the parameters and buffers that were set.
    missing : tuple of str
        Names of those that the checkpoint does not have; they keep the values they had.
    unexpected : tuple of str
        Keys of the checkpoint that the network does not have.
    mismatched : tuple of (str, tuple of int, tuple of int)
        Name, shape in the checkpoint and shape in the network, where these differ; the network
        keeps the values it had.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        """True if everything fitted, on both sides."""
        return not (self.missing or self.unexpected or self.mismatched)

    def to_dict(self) -> dict[str, list[Any]]:
        """Return what did not fit as JSON values; it is recorded in the fingerprint."""
        return {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "mismatched": [[name, list(a), list(b)] for name, a, b in self.mismatched],
        }

    def __str__(self) -> str:
        wanted = len(self.loaded) + len(self.missing) + len(self.mismatched)
        lines = [f"{len(self.loaded)} of {wanted} parameters and buffers loaded"]
        if self.missing:
            lines.append(f"missing in the checkpoint: {first_names(self.missing)}")
        if self.unexpected:
            lines.append(f"unexpected in the checkpoint: {first_names(self.unexpected)}")
        if self.mismatched:
            shapes = [f"{name} {a} instead of {b}" for name, a, b in self.mismatched]
            lines.append(f"wrongly shaped: {first_names(shapes)}")
        return "\n".join(lines)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the weights in a checkpoint file.

    Parameters
    ----------
    path : str or Path
        A file that `torch.save` wrote (a ``state_dict``, alone or under one of the keys in
        `NESTED`), or a ``.safetensors`` file.

    Returns
    -------
    dict of str to torch.Tensor
        Tensors on the CPU, with the keys of the file.

    Raises
    ------
    WeightsError
        If there is no such file, it is damaged, holds other Python objects, or no tensors.
    MissingExtra
        If the package safetensors is needed and not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"There is no checkpoint file {path}")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors = _tensors(state)
    if not tensors:
        keys = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise WeightsError(f"The checkpoint {path} holds no weights, but: {keys or 'nothing'}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as a safetensors file: {error}") from error
    return state


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is damaged, or holds Python objects besides weights, and such objects can run "
            "any code when they are loaded. If you trust the file, write its weights anew: "
            "torch.save(network.state_dict(), FILE), or save them as .safetensors. "
            f"PyTorch says: {str(error).strip().splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{path} is damaged or no PyTorch checkpoint: {error or type(error).__name__}"
        ) from error


def _tensors(state: Any) -> dict[str, Tensor]:
    """Find the ``state_dict`` in what a checkpoint holds."""
    if not isinstance(state, Mapping):
        return {}
    for key in NESTED:
        inner = state.get(key)
        if isinstance(inner, Mapping) and (found := _tensors(inner)):
            return found
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}


def match(
    module: nn.Module, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], PartialReport]:
    """Match the keys of a checkpoint to those of a network.

    Parameters
    ----------
    module : torch.nn.Module
        Network to load into.
    state : mapping of str to torch.Tensor
        Tensors of the checkpoint. Prefixes of `PREFIXES` are taken off where more keys fit without
        them.

    Returns
    -------
    fitting : dict of str to torch.Tensor
        Tensors that can be loaded, with their names in the network.
    report : PartialReport
        Names of all of them, and of what does not fit.
    """
    wanted = module.state_dict()
    renamed = _without_prefix(state, wanted.keys())
    fitting = {
        name: value
        for name, value in renamed.items()
        if name in wanted and value.shape == wanted[name].shape
    }
    wrong = [name for name in renamed if name in wanted and name not in fitting]
    report = PartialReport(
        loaded=tuple(name for name in wanted if name in fitting),
        missing=_counted(name for name in wanted if name not in renamed),
        unexpected=_counted(name for name in renamed if name not in wanted),
        mismatched=tuple((n, tuple(renamed[n].shape), tuple(wanted[n].shape)) for n in wrong),
    )
    return fitting, report


def _counted(names: Any) -> tuple[str, ...]:
    return tuple(name for name in names if not name.endswith(_COUNTER))


def _without_prefix(state: Mapping[str, Tensor], wanted: Any) -> dict[str, Tensor]:
    """Take off the combination of wrappers' prefixes with which most keys fit."""
    stacks = ["", *("".join(p) for n in (1, 2, 3) for p in itertools.permutations(PREFIXES, n))]
    stacks += [2 * prefix for prefix in PREFIXES]
    fits = {
        stack: sum(key[len(stack) :] in wanted for key in state if key.startswith(stack))
        for stack in stacks
    }
    best = max(stacks, key=lambda stack: (fits[stack], -len(stack)))
    return {key.removeprefix(best): value for key, value in state.items()}


@dataclass(frozen=True)
class WeightsFile:
    """A file with the weights of a network.

    Attributes
    ----------
    path : Path
        Path of an existing file.
    partial : bool
        Accept a file that fits the network in part.
    """

    path: Path
    partial: bool = False

    def read(self) -> dict[str, Tensor]:
        """Read the weights; see `read_checkpoint`."""
        return read_checkpoint(self.path)

    def load(self, module: nn.Module, state: Mapping[str, Tensor]) -> PartialReport | None:
        """Load the weights of the file, `state`, into `module`; return what did not fit, or None.

        Raises
        ------
        WeightsError
            If nothing fits, or not everything does and `partial` is not set.
        """
        fitting, report = match(module, state)
        if not fitting:
            raise WeightsError(
                f"The checkpoint {self.path} shares no parameter with the network. Its first keys: "
                f"{', '.join(list(state)[:5])}; the network's: "
                f"{', '.join(list(module.state_dict())[:5])}. If only the names differ, rename the "
                "keys and save the file anew, or load it yourself and hand over the module: "
                "Backbone(module, preprocessing=...)"
            )
        if not report.complete and not self.partial:
            raise WeightsError(
                f"The checkpoint {self.path} does not fit the network.\n{report}\n"
                "To load what fits and record the rest, add --partial (partial=True)"
            )
        module.load_state_dict(fitting, strict=False)
        return None if report.complete else report

    def stamp(self) -> dict[str, int]:
        """Return size and time of the last change, which identify the file without reading it."""
        stat = self.path.stat()
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
