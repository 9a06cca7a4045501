"""Networks of one's own: find what a name means, and copy what was given."""

from __future__ import annotations

import copy
import importlib
import itertools
import operator
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from featcache.errors import BackboneError, UnknownBackbone
from featcache.pixels.preprocessing import Preprocessing
from featcache.system.tables import first_names

__all__ = ["import_callable", "own_copy"]


def import_callable(spec: str) -> tuple[nn.Module, Preprocessing]:
    """Import and call ``package.module:callable``.

    Raises
    ------
    UnknownBackbone
        If it cannot be imported.
    BackboneError
        If it fails, or returns something else than ``(module, Preprocessing)``.
    """
    module_name, _, attribute = spec.partition(":")
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        found: Any = operator.attrgetter(attribute)(importlib.import_module(module_name))
    except Exception as error:  # one's own code may raise anything
        raise UnknownBackbone(
            f"{spec!r} cannot be imported: {error}. Expected package.module:callable, on the "
            "import path or in the current folder"
        ) from error
    finally:
        sys.path.remove(folder)
    wanted = f"{spec} must return (torch.nn.Module, featcache.Preprocessing)"
    try:
        result = found() if callable(found) and not isinstance(found, nn.Module) else found
    except Exception as error:  # one's own code may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise BackboneError(
            f"{wanted}; called without arguments, it failed with {type(error).__name__}: {error} "
            f"({place.filename}, line {place.lineno})"
        ) from error
    if (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[0], nn.Module)
        and isinstance(result[1], Preprocessing)
    ):
        return result
    did = "is" if result is found else "returned"
    raise BackboneError(f"{wanted}, it {did} a {type(result).__name__}")


def own_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module, in float32 on the CPU."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise BackboneError(
            f"{kind} is TorchScript, whose layers cannot be read. Give the module that it was made "
            "from"
        )
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    if lazy := [name for name, tensor in tensors if is_lazy(tensor)]:
        raise BackboneError(
            f"{kind} has parameters without a shape: {first_names(lazy)}. Run it once on an image "
            "(lazy layers learn their shapes), then give it"
        )
    try:
        return copy.deepcopy(module).cpu().float()
    except Exception as error:  # one's own code may raise anything
        raise BackboneError(
            f"{kind} cannot be copied: {' '.join(str(error).split())}. If it has layers with the "
            "old torch.nn.utils.weight_norm, call torch.nn.utils.remove_weight_norm on them, or "
            "take torch.nn.utils.parametrizations.weight_norm"
        ) from error
