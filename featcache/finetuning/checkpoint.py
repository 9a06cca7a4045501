"""Checkpoints of a training: written whole or not at all, read without running code.

A checkpoint is a file of `torch.save` that is only ever read with ``weights_only=True``: tensors,
numbers, text and containers of them. It carries the request that it belongs to, so that another
training does not go on from it.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featcache.errors import TrainingError
from featcache.system.console import check_stopped
from featcache.system.files import atomic_write

__all__ = ["Checkpoint"]

_FORMAT = "featcache-checkpoint-1"


@dataclass(frozen=True)
class Checkpoint:
    """One file that a training resumes from.

    Parameters
    ----------
    path : Path
        Its folder is made when it is first written.
    request : str
        What decides the result: a checkpoint of another request counts as none.
    """

    path: Path
    request: str

    def read(self) -> dict[str, Any] | None:
        """Return what was last written; None where there is nothing to go on from."""
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile):
            return None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            return None
        if content.get("request") != self.request:
            return None
        state: dict[str, Any] = content["state"]
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the last state; a signal that comes meanwhile takes effect afterwards.

        Raises
        ------
        TrainingError
            The folder cannot be made.
        OutputError
            The file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                f"The checkpoint folder {self.path.parent} cannot be made: {error.strerror}."
            ) from error
        with atomic_write(self.path) as file:
            content = {"format": _FORMAT, "request": self.request, "state": dict(state)}
            torch.save(content, file)
        check_stopped()
