"""Checkpoints of a training: written whole or not at all, read without running code.

A checkpoint is `_START`, the SHA-256 of the rest, and a file of `torch.save` that is only ever read
with ``weights_only=True``: tensors, numbers, text and containers of them. It carries the request
that it belongs to, so that another training does not go on from it. A folder of checkpoints holds
nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featcache.errors import OutputError, TrainingError
from featcache.system.console import check_stopped
from featcache.system.files import atomic_write, remove_leftovers, sync_folder

__all__ = ["Checkpoint", "check_folder", "remove_checkpoints"]

_START = b"featcache-checkpoint-2\n"
_DIGEST = hashlib.sha256().digest_size


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
        """Return what was last written; None where there is nothing to go on from, or damage."""
        start = len(_START) + _DIGEST
        try:
            content = self.path.read_bytes()
            payload = content[start:]
            if content[:start] != _START + hashlib.sha256(payload).digest():
                return None
            file = io.BytesIO(payload)
            request, state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # what bytes that are not ours can make of it is endless
            return None
        return state if request == self.request else None

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
            sync_folder(self.path.parent.parent)
        except OSError as error:
            raise TrainingError(
                f"The checkpoint folder {self.path.parent} cannot be made: {error.strerror}."
            ) from error
        payload = io.BytesIO()
        torch.save((self.request, dict(state)), payload)
        with atomic_write(self.path) as file:
            file.write(_START + hashlib.sha256(payload.getbuffer()).digest())
            file.write(payload.getbuffer())
        check_stopped()


def check_folder(folder: Path) -> None:
    """Refuse a folder of checkpoints that holds files of the user.

    Raises
    ------
    OutputError
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not path.name.startswith(".") and not _is_checkpoint(path):
            raise OutputError(
                f"{folder} is for checkpoints, and holds {path.name}, which is no checkpoint of "
                "featcache. Move it away, or choose another output."
            )


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints in a folder, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):  # what they are for is saved
        for path in folder.glob("*.pt"):
            if _is_checkpoint(path):
                path.unlink(missing_ok=True)
        remove_leftovers(folder, "*.pt")
        folder.rmdir()


def _is_checkpoint(path: Path) -> bool:
    """Return whether a file begins as ours do, or is what a power cut left of that."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _START.startswith(file.read(len(_START)))
