"""Read checkpoints safely, match their keys to a network, and report what does not fit.

A checkpoint is read without running any code that it may hold (``weights_only=True``, or
safetensors). Its keys are then matched to the network's, whatever dictionaries and prefixes of
wrappers they lie in, and a `PartialReport` says what does not fit.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featcache.errors import WeightsError
from featcache.system.tables import first_names

#: How the names of checkpoint files end.
SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")

# Counts training batches; evaluation never reads it, and old checkpoints do not have it.
_COUNTER = "num_batches_tracked"
# What training scripts save beside the weights; making one of these runs no code of the file's.
_NUMBERS = [np.dtype(code) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.float64(0).__reduce__()[0],
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),  # its name in numpy 1
    np.dtype,
    *{type(number) for number in _NUMBERS},
]


@dataclass(frozen=True)
class PartialReport:
    """What of a checkpoint went into a network, and what did not.

    Attributes
    ----------
    parameters : int
        Number of parameters of the network, buffers aside.
    loaded : tuple of str
        Names of the parameters that were set.
    missing : tuple of str
        Names of the parameters and buffers that the checkpoint does not have; they keep the values
        they had.
    unexpected : tuple of str
        Keys of the checkpoint that the network does not have.
    mismatched : tuple of (str, tuple of int, tuple of int)
        Name, shape in the checkpoint and shape in the network, where these differ; the network
        keeps the values it had.
    """

    parameters: int
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    @property
    def complete(self) -> bool:
        """True if everything fitted, on both sides."""
        return not (self.unset or self.unexpected)

    @property
    def unset(self) -> tuple[str, ...]:
        """Names of the parameters and buffers that keep the values they had."""
        return (*self.missing, *(name for name, _, _ in self.mismatched))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; it is recorded in the fingerprint."""
        return {**asdict(self), "loaded": len(self.loaded)}

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} of {self.parameters} parameters loaded"]
        found = {
            "missing in the checkpoint": self.missing,
            "unexpected in the checkpoint": self.unexpected,
            "wrongly shaped": [f"{name} {a} instead of {b}" for name, a, b in self.mismatched],
        }
        lines += [f"{what}: {first_names(names)}" for what, names in found.items() if names]
        return "\n".join(lines)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the weights in a checkpoint file.

    Parameters
    ----------
    path : str or Path
        A file that `torch.save` wrote (a ``state_dict``, alone or inside other dictionaries), or a
        ``.safetensors`` file.

    Returns
    -------
    dict of str to torch.Tensor
        Tensors on the CPU, with the keys of the file; that of an inner dictionary stands before
        them, as in ``"state_dict/fc.weight"``.

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
    tensors = dict(_tensors(state))
    if not tensors:
        keys = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise WeightsError(f"The checkpoint {path} holds no weights, but: {keys or 'nothing'}")
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as a safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*TorchScript archive")  # refused below
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"{path} is damaged, or holds Python objects besides weights{_others(path)}, and "
                "such objects can run any code when they are loaded. If you trust the file, write "
                "its weights anew: torch.save(network.state_dict(), FILE), or save them as "
                ".safetensors."
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            if "TorchScript" in str(error):
                raise WeightsError(
                    f"{path} is TorchScript, which is code beside weights. Where it was made, type "
                    "torch.save(network.state_dict(), FILE), and give that file."
                ) from error
            why = f": {error}" if isinstance(error, RuntimeError | OSError) else "."
            raise WeightsError(f"{path} is damaged or no PyTorch checkpoint{why}") from error


def _others(path: Path) -> str:
    """Return the names of the Python objects in a checkpoint that are refused, in brackets."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of a damaged file, or one in PyTorch's old format
        return ""
    return f" ({first_names(names)})" if names else ""


def _tensors(state: Any, inside: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of nested dictionaries with their keys, joined by slashes."""
    for key, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Tensor):
            yield f"{inside}{key}", value
        else:
            yield from _tensors(value, f"{inside}{key}/")


def match(
    module: nn.Module, state: Mapping[str, Tensor], key: str | None = None
) -> tuple[dict[str, Tensor], PartialReport]:
    """Match the keys of a checkpoint to those of a network.

    Parameters
    ----------
    module : torch.nn.Module
        Network to load into.
    state : mapping of str to torch.Tensor
        Tensors of the checkpoint, as `read_checkpoint` returns them. Of all dictionaries and
        prefixes in them, those are taken with which most keys fit.
    key : str, optional
        Dictionary or prefix to take, such as ``"teacher"``.

    Returns
    -------
    fitting : dict of str to torch.Tensor
        Tensors that can be loaded, with their names in the network.
    report : PartialReport
        Names of all of them, and of what does not fit.

    Raises
    ------
    WeightsError
        If several dictionaries or prefixes fit equally well, two keys are one parameter, or
        nothing fits under `key`.
    """
    wanted = module.state_dict()
    inside, prefix = _place(state, wanted.keys(), key)
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        folder, _, own = name.rpartition("/")
        if folder != inside or (key is not None and not own.startswith(prefix)):
            continue
        own = own.removeprefix(prefix)
        if own in renamed and own in wanted:
            raise WeightsError(
                f"Two keys of the checkpoint are one parameter of the network: {prefix}{own} and "
                f"{own}. Name one set of them with --weights-key {prefix.rstrip('.')} "
                "(weights_key=), or save the right one alone"
            )
        renamed[own] = value
    fitting = {
        name: value
        for name, value in renamed.items()
        if name in wanted and value.shape == wanted[name].shape
    }
    wrong = [name for name in renamed if name in wanted and name not in fitting]
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    report = PartialReport(
        parameters=len(parameters),
        loaded=tuple(name for name in parameters if name in fitting),
        missing=_counted(name for name in wanted if name not in renamed),
        unexpected=_counted(name for name in renamed if name not in wanted),
        mismatched=tuple((n, tuple(renamed[n].shape), tuple(wanted[n].shape)) for n in wrong),
    )
    return fitting, report


def _counted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name for name in names if not name.endswith(_COUNTER))


def _place(state: Iterable[str], wanted: Any, key: str | None) -> tuple[str, str]:
    """Return the dictionary and the prefix with which most keys of a checkpoint are wanted."""
    fits: Counter[tuple[str, str]] = Counter()
    for name in state:
        inside, _, own = name.rpartition("/")
        parts = own.split(".")
        for k in range(len(parts)):
            if ".".join(parts[k:]) in wanted:
                fits[inside, "".join(f"{part}." for part in parts[:k])] += 1
    names = {
        place: "/".join(filter(None, (place[0], place[1].rstrip(".")))) or "." for place in fits
    }
    if key is not None:
        begins = re.compile(rf"(.*/)?{re.escape(key)}($|[./])")
        asked = {place: name for place, name in names.items() if begins.match(name)}
        if not asked:
            fitting = f"Those that fit: {first_names(sorted(names.values()))}" if names else ""
            raise WeightsError(
                f"The checkpoint holds no weights of the network under {key!r}. {fitting}"
            )
        names = asked
    most = max((fits[place] for place in names), default=0)
    best = [place for place in names if fits[place] == most]
    if len(best) > 1:
        raise WeightsError(
            f"Several sets of weights in the checkpoint fit the network, with {most} keys each: "
            f"{', '.join(sorted(names[place] for place in best))}. Choose one with "
            f"--weights-key {names[best[0]]} (weights_key=)"
        )
    return best[0] if best else ("", "")


@dataclass(frozen=True)
class WeightsFile:
    """A file with the weights of a network.

    Attributes
    ----------
    path : Path
        Path of an existing file.
    partial : bool
        Accept a file that leaves layers before a tap at random.
    key : str, optional
        Which of several sets of weights in it to take.
    """

    path: Path
    partial: bool = False
    key: str | None = None

    def load(self, module: nn.Module, state: Mapping[str, Tensor]) -> PartialReport:
        """Load what fits of the weights of the file, `state`, into `module`.

        Raises
        ------
        WeightsError
            If nothing fits, or it cannot be told what does; see `match`.
        """
        fitting, report = match(module, state, self.key)
        if not fitting:
            raise WeightsError(
                f"The checkpoint {self.path} shares no parameter with the network. Its first keys: "
                f"{', '.join(list(state)[:5])}; the network's: "
                f"{', '.join(list(module.state_dict())[:5])}. If only the names differ, rename the "
                "keys and save the file anew, or load it yourself and hand over the module: "
                "Backbone(module, preprocessing=...)"
            )
        module.load_state_dict(fitting, strict=False)
        return report

    def check(self, report: PartialReport, used: Set[str]) -> list[str]:
        """Return the names of what the taps use and the file left at random.

        Parameters
        ----------
        report : PartialReport
            What `load` returned.
        used : set of str
            Names of the parameters, buffers and layers that the taps use.

        Raises
        ------
        WeightsError
            If there are some, or the file has more parameters in such a layer, and `partial` is not
            set.
        """
        random = [name for name in report.unset if name in used]
        inside = tuple(f"{name}." for name in used)
        foreign = [name for name in report.unexpected if name.startswith(inside)]
        if self.partial or not (random or foreign):
            return random
        what = (
            f"At random would be, before the tap: {first_names(random)}"
            if random
            else f"Layers before the tap lack, of the file: {first_names(foreign)}"
        )
        raise WeightsError(
            f"The checkpoint {self.path} does not fit the network.\n{report}\n{what}\n"
            "To load what fits and record the rest, add --partial (partial=True)"
        )

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 of the file's bytes, as 64 hexadecimal digits."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def stamp(self) -> dict[str, int]:
        """Return size, inode and time of the last change: if these are the same, so is the file."""
        stat = self.path.stat()
        return {"size": stat.st_size, "inode": stat.st_ino, "mtime_ns": stat.st_mtime_ns}

    def recall(self, record: Mapping[str, Any]) -> None:
        """Take the hash from the record of an earlier run instead of reading the file, if it may.

        Parameters
        ----------
        record : mapping
            Stamp and "sha256".
        """
        if self.stamp().items() <= record.items():
            self.__dict__["sha256"] = record["sha256"]
