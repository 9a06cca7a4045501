"""The plan of a job in parts: what every task must know, in a file beside the parts."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from featcache.errors import ExtractionError, FingerprintMismatch, Interrupted, StoreError
from featcache.extraction import reuse
from featcache.extraction.reuse import beside, plan_file
from featcache.extraction.stream import Options
from featcache.fingerprint import Fingerprint
from featcache.store import disk
from featcache.store.file import StoreFile
from featcache.system.files import atomic_write


@dataclass
class Plan:
    """What every part of a job must know.

    Attributes
    ----------
    path : str
        The store to be.
    request : dict
        What is asked for.
    fingerprint : dict
        What the features come from.
    shapes : dict of str to list of int
        Shape of one image's features by tap.
    images : dict or None
        Arguments of `ImageSet.open`; None if the images are only in memory.
    ids : str
        SHA-256 over the ids of all images.
    n : int
        Number of images.
    parts : int
        Number of parts.
    options : dict
        `featcache.extraction.stream.Options` but for the augmentation, which is in the request.
    threads : int
        Threads of a forward pass on a CPU.
    earlier : list of str
        Files whose rows may be copied.
    settings : dict or None
        `featcache.networks.forward.Settings` of every part; None until they are chosen.
    starts : list of int
        First row of each part, and `n`.
    merging : bool
        All parts were complete, and are being merged.
    stopped : bool
        No task may begin.
    """

    path: str
    request: dict[str, Any]
    fingerprint: dict[str, Any]
    shapes: dict[str, list[int]]
    images: dict[str, Any] | None
    ids: str
    n: int
    parts: int
    options: dict[str, Any]
    threads: int
    earlier: list[str] = field(default_factory=list)
    settings: dict[str, Any] | None = None
    starts: list[int] = field(default_factory=list)
    merging: bool = False
    stopped: bool = False

    @classmethod
    def read(cls, path: str) -> Self | None:
        """Return the plan beside the store at `path`, None if there is none."""
        try:
            return cls(path=path, **json.loads(reuse.plan_text(path)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError) as error:
            raise ExtractionError(
                f"{plan_file(path)} cannot be read: {error}. Move it away and run the same "
                "command again; what is done of the parts is copied."
            ) from error

    def write(self) -> None:
        """Keep the plan; tasks that read it before stop."""
        values = asdict(self)
        del values["path"]
        with atomic_write(plan_file(self.path), text=True) as file:
            json.dump(values, file)

    def cut(self, settings: Mapping[str, Any]) -> None:
        """Take the settings, and give every part whole batches."""
        views = (self.request["augmentation"] or {"views": 1})["views"]
        group = max(1, settings["batch_size"] // views)  # images that fit a batch
        groups = -(-self.n // group)
        self.parts = min(self.parts, groups)
        self.starts = [group * (groups * k // self.parts) for k in range(self.parts)] + [self.n]
        self.settings = dict(settings)
        self.write()

    @property
    def layout(self) -> reuse.StoredLayout:
        """Fingerprint and shapes of the features."""
        shapes = {tap: tuple(shape) for tap, shape in self.shapes.items()}
        return reuse.StoredLayout(Fingerprint.from_dict(self.fingerprint), shapes, self.request)

    @property
    def files(self) -> list[str]:
        """Files of the parts, there or not."""
        return [f"{self.path}.part-{k:04d}" for k in range(len(self.starts) - 1)]

    def rows(self, k: int) -> np.ndarray:
        """Return the numbers of the images of a part: int64, ascending."""
        return np.arange(self.starts[k], self.starts[k + 1])

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that are to be computed; the disk says it."""
        return [
            k
            for k, file in enumerate(self.files)
            if Path(f"{file}.partial").exists() or not (self.merging or Path(file).exists())
        ]

    @property
    def done(self) -> int:
        """Number of images that are done, as far as tasks have said so."""
        missing, done = self.missing, 0
        for k, file in enumerate(self.files):
            if k not in missing:
                done += len(self.rows(k))
            else:
                with contextlib.suppress(StoreError):
                    opened = StoreFile(f"{file}.partial")
                    done += (opened.meta("run") or {}).get("rows", 0)
                    opened.close()
        return done


def agree(wanted: Plan, options: Options) -> Plan:
    """Return the plan in force: that of an earlier run of the same job, else the one wanted.

    Parts of another plan are kept under other names, and their rows are copied.
    """
    path, there = wanted.path, Plan.read(wanted.path)
    if there and there.merging and not any(map(os.path.exists, [f"{path}.partial", *there.files])):
        there = None  # the store was finished, and the next moment the process killed
    names = ("begun", "asked for")
    if there and (different := reuse.differing(there.request, wanted.request, names)):
        raise FingerprintMismatch(
            f"{path} was begun with other features:\n{different}\n"
            "Choose another file with -o; what is there is left as it is."
        )
    if there and there.ids == wanted.ids and _fits(there.settings, options):
        if wanted.parts not in (0, there.parts):
            warnings.warn(f"{path} goes on in {there.parts} parts, as it was begun.", stacklevel=4)
        plan = replace(there, images=wanted.images, options=wanted.options, stopped=False)
    else:
        for name in beside(path, "part"):
            if name.endswith(".lock"):
                continue
            other = name.replace(f"{path}.part-", f"{path}.old-part-")
            while Path(other).exists():
                other += "~"
            disk.rename(name, other)
        files = [f"{path}.partial", *beside(path, "old-part"), path, f"{path}.partial.old"]
        plan = replace(wanted, earlier=[name for name in files if Path(name).exists()])
    plan.write()
    return plan


def _fits(settings: Mapping[str, Any] | None, options: Options) -> bool:
    """Return whether settings are those that the user asks for."""
    if settings is None:
        return True
    asked: dict[str, Any] = {"batch_size": options.batch_size, "compiled": options.compile}
    if options.device != "auto":
        asked["device"] = torch.device(options.device).type
    return all(value in (None, settings[name]) for name, value in asked.items())


def stopping(path: str) -> Callable[[], None]:
    """Return a function that raises `Interrupted` if the plan was written anew."""

    def written() -> tuple[int, int]:
        try:
            stat = plan_file(path).stat()
        except OSError:
            return 0, 0
        return stat.st_ino, stat.st_mtime_ns

    def check() -> None:
        if written() != before:
            raise Interrupted(f"The job of {path} was stopped, or another run has begun.")

    before = written()
    return check
