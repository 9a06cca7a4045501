"""From an image set to batches of pixels, decoded ahead by worker processes.

Each task names rows and the slot of a batch that each row takes. A worker reads the bytes, hashes
them, decodes, and sends one block of uint8 pixels back through shared memory. An image that cannot
be read or decoded leaves its slot black and is listed in `Batch.failures`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from featcache.decoding import Augmentation, Preprocessing
from featcache.errors import DecodeError
from featcache.images import ImageSet, RawImage, content_hash

__all__ = ["Batch", "Decoder", "Failed", "Loader", "Tasks"]

_READS = 3


@dataclass(frozen=True)
class Failed:
    """An image that gives no pixels.

    Attributes
    ----------
    row : int
        Its number in the image set.
    stage : str
        "read", "decode" or "forward".
    reason : str
        Why.
    size, mtime_ns : int
        Of its file; -1 = unknown.
    """

    row: int
    stage: str
    reason: str
    size: int = -1
    mtime_ns: int = -1


@dataclass
class Batch:
    """Images decoded together.

    Attributes
    ----------
    rows : ndarray of int64, shape (k,)
        The images that could be decoded.
    slots : ndarray of int64, shape (k,)
        Where in `pixels` each of them is.
    pixels : torch.Tensor of uint8, shape (m, [views,] channels, h, w)
        Slots that no image takes are black. Channels lie side by side in memory.
    sha256 : ndarray of uint8, shape (k, 32)
        Of the bytes that were decoded.
    size, mtime_ns : ndarray of int64, shape (k,)
        Of the files when they were read; -1 = unknown.
    failures : list of Failed
        The other images of the task.
    seconds : float
        Time it took to read and decode.
    """

    rows: np.ndarray
    slots: np.ndarray
    pixels: Tensor
    sha256: np.ndarray
    size: np.ndarray
    mtime_ns: np.ndarray
    failures: list[Failed] = field(default_factory=list)
    seconds: float = 0.0

    def pin_memory(self) -> Batch:
        """Copy the pixels to memory that a GPU can read by itself; `DataLoader` calls this."""
        self.pixels = self.pixels.pin_memory()
        return self


@dataclass(frozen=True)
class Task:
    """Rows to decode into one batch.

    Attributes
    ----------
    rows, slots : ndarray of int64, shape (k,)
        Images and their places.
    size : int
        Slots of the batch.
    """

    rows: np.ndarray
    slots: np.ndarray
    size: int


class Tasks(Sequence[Task]):
    """The tasks that cover some rows, made one at a time.

    Parameters
    ----------
    rows : ndarray of int64, ascending
        The images.
    size : int
        Images a batch.
    aligned : bool
        Give every row the slot ``row % size``, whichever other rows there are: for networks that
        compute other bits in other places of a batch.
    """

    def __init__(self, rows: np.ndarray, size: int, *, aligned: bool = False) -> None:
        self.rows = np.asarray(rows, np.int64)
        self.size = size
        self.aligned = aligned
        if aligned:
            starts = np.flatnonzero(np.diff(self.rows // size, prepend=-1))
        else:
            starts = np.arange(0, len(self.rows), size)
        self._starts = np.append(starts, len(self.rows))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = self.rows[self._starts[index] : self._starts[index + 1]]
        slots = rows % self.size if self.aligned else np.arange(len(rows))
        return Task(rows, slots, self.size)


class Decoder(Dataset[Batch]):
    """Reads and decodes tasks; what runs inside the workers.

    Parameters
    ----------
    images : ImageSet
        Where the images are.
    preprocessing : Preprocessing
        How they are resized and cropped.
    augmentation : Augmentation, optional
        Draw views instead.
    views : int
        Number of views; the pixels have an axis of views where there is an augmentation.
    """

    def __init__(
        self,
        images: ImageSet,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        views: int = 1,
    ) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.views = views

    def __getitem__(self, task: Task) -> Batch:
        started = time.perf_counter()
        channels, height, width = self.preprocessing.output_shape
        head = (task.size,) if self.augmentation is None else (task.size, self.views)
        # In memory (n, h, w, c): torch then sees channels_last without a copy.
        pixels = np.zeros((*head, height, width, channels), np.uint8)
        pixels = np.moveaxis(pixels, -1, -3)
        good = np.zeros(len(task.rows), bool)
        files = np.full((2, len(task.rows)), -1, np.int64)
        hashes = np.zeros((len(task.rows), 32), np.uint8)
        failures = []
        for k, (row, slot) in enumerate(zip(task.rows.tolist(), task.slots.tolist(), strict=True)):
            try:
                raw, files[:, k] = self._read(row, files[:, k])
                hashes[k] = np.frombuffer(content_hash(raw), np.uint8)
                pixels[slot] = self._pixels(raw, row)
                good[k] = True
            except DecodeError as error:
                failures.append(Failed(row, error.stage, error.reason, *files[:, k].tolist()))
        return Batch(
            task.rows[good],
            task.slots[good],
            torch.from_numpy(pixels),
            hashes[good],
            files[0, good],
            files[1, good],
            failures,
            time.perf_counter() - started,
        )

    def _read(self, row: int, file: np.ndarray) -> tuple[RawImage, np.ndarray]:
        """Return an image's bytes, and size and time of the file that they are all of."""
        for _ in range(_READS):
            file[:] = self.images.stat(row)
            raw = self.images.read(row)
            if self.images.stat(row) == tuple(file.tolist()):
                return raw, file
        raise DecodeError("read", f"the file changed during each of {_READS} readings")

    def _pixels(self, raw: RawImage, row: int) -> np.ndarray:
        if self.augmentation is None:
            return self.preprocessing(raw)
        return self.preprocessing.views(raw, self.augmentation, self.images.ids[row], self.views)


class Loader:
    """Yields batches in the order of their tasks, decoded ahead.

    Parameters
    ----------
    decoder : Decoder
        What is done to each task.
    workers : int
        Worker processes; 0 decodes in this process when a batch is asked for.
    pin : bool
        Copy batches to pinned memory.
    """

    def __init__(self, decoder: Decoder, *, workers: int, pin: bool = False) -> None:
        self.decoder = decoder
        self.workers = workers
        self.pin = pin

    def batches(self, tasks: Tasks) -> Iterator[Batch]:
        """Yield one batch a task."""
        loader: DataLoader[Batch] = DataLoader(
            self.decoder,
            sampler=tasks,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin,
            worker_init_fn=_init_worker,
        )
        yield from loader


def _init_worker(number: int) -> None:
    """Leave Ctrl-C to the main process, which stops the workers when all is committed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
