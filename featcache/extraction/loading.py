"""From an image set to batches of pixels, decoded ahead by worker processes.

Each task names rows and the slot of a batch that each row takes. A worker reads the bytes, hashes
them, decodes, and sends one block of uint8 pixels back through shared memory. An image that cannot
be read or decoded leaves its slot black and is listed in `Batch.failures`.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import ProcessError
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from featcache.errors import DecodeError
from featcache.images.image_set import ImageSet, RawImage, content_hash
from featcache.pixels.decoding import Augmentation, Preprocessing

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


@dataclass(frozen=True)
class Fetched:
    """An image as it was read.

    Attributes
    ----------
    row : int
        Its number in the image set.
    raw : bytes, ndarray or PIL.Image.Image
        What was read.
    sha256 : bytes
        Hash of that.
    size, mtime_ns : int
        Of its file when it was read; -1 = unknown.
    """

    row: int
    raw: RawImage
    sha256: bytes
    size: int
    mtime_ns: int


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

    def add(self, other: Batch, slot: int) -> None:
        """Put a batch of one image into `slot`."""
        self.rows = np.append(self.rows, other.rows)
        self.slots = np.append(self.slots, np.full(len(other.rows), slot))
        self.pixels[slot] = other.pixels[0]
        self.sha256 = np.concatenate([self.sha256, other.sha256])
        self.size = np.append(self.size, other.size)
        self.mtime_ns = np.append(self.mtime_ns, other.mtime_ns)
        self.failures += other.failures
        self.seconds += other.seconds

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

    def blank(self, size: int) -> np.ndarray:
        """Return the pixels of a batch of black images."""
        channels, height, width = self.preprocessing.output_shape
        head = (size,) if self.augmentation is None else (size, self.views)
        # In memory (n, h, w, c): torch then sees channels_last without a copy.
        return np.moveaxis(np.zeros((*head, height, width, channels), np.uint8), -1, -3)

    def fetch(self, row: int) -> Fetched | Failed:
        """Read one image's bytes and hash them."""
        size, mtime_ns = -1, -1
        try:
            for _ in range(_READS):
                size, mtime_ns = self.images.stat(row)
                raw = self.images.read(row)
                if self.images.stat(row) == (size, mtime_ns):
                    return Fetched(row, raw, content_hash(raw), size, mtime_ns)
            raise DecodeError("read", f"the file changed during each of {_READS} readings")
        except DecodeError as error:
            return Failed(row, error.stage, error.reason, size, mtime_ns)

    def decode(self, fetched: Fetched | Failed, out: np.ndarray) -> Fetched | Failed:
        """Decode what was read into a slot of a batch."""
        if isinstance(fetched, Failed):
            return fetched
        try:
            out[...] = self._pixels(fetched)
        except DecodeError as error:
            stat = fetched.size, fetched.mtime_ns
            return Failed(fetched.row, error.stage, error.reason, *stat)
        return fetched

    def _pixels(self, fetched: Fetched) -> np.ndarray:
        if self.augmentation is None:
            return self.preprocessing(fetched.raw)
        name = self.images.ids[fetched.row]
        return self.preprocessing.views(fetched.raw, self.augmentation, name, self.views)

    def batch(
        self, task: Task, pixels: np.ndarray, results: Sequence[Fetched | Failed], seconds: float
    ) -> Batch:
        """Put together what became of the rows of a task."""
        good = [k for k, result in enumerate(results) if isinstance(result, Fetched)]
        files = [result for result in results if isinstance(result, Fetched)]
        return Batch(
            task.rows[good],
            task.slots[good],
            torch.from_numpy(pixels),
            np.frombuffer(b"".join(f.sha256 for f in files), np.uint8).reshape(-1, 32),
            np.array([f.size for f in files], np.int64),
            np.array([f.mtime_ns for f in files], np.int64),
            [result for result in results if isinstance(result, Failed)],
            seconds,
        )

    def __getitem__(self, task: Task) -> Batch:
        started = time.perf_counter()
        pixels = self.blank(task.size)
        results = [
            self.decode(self.fetch(row), pixels[slot])
            for row, slot in zip(task.rows.tolist(), task.slots.tolist(), strict=True)
        ]
        return self.batch(task, pixels, results, time.perf_counter() - started)


class Loader:
    """Yields batches in the order of their tasks.

    With workers, processes decode ahead. A worker that the system kills (out of memory, a decoder
    that crashes) ends nothing: the tasks that were in the making are done again image by image in a
    process of their own, an image that kills it twice is recorded as failed, and decoding goes on
    with half the workers.

    Without, threads read the next batch ahead and decode it when it is asked for.

    Parameters
    ----------
    decoder : Decoder
        What is done to each task.
    workers : int
        Worker processes; 0 decodes in threads of this process.
    pin : bool
        Copy batches to pinned memory.
    """

    def __init__(self, decoder: Decoder, *, workers: int, pin: bool = False) -> None:
        self.decoder = decoder
        self.workers = workers
        self.pin = pin

    def batches(self, tasks: Tasks) -> Generator[Batch, None, None]:
        """Yield one batch a task."""
        return self._from_processes(tasks) if self.workers else self._from_threads(tasks)

    def _from_threads(self, tasks: Tasks) -> Generator[Batch, None, None]:
        decoder, threads = self.decoder, os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as decoders:

            def read(task: Task) -> list[Future[Fetched | Failed]]:
                return [readers.submit(decoder.fetch, row) for row in task.rows.tolist()]

            ahead = read(tasks[0]) if len(tasks) else []
            for number in range(len(tasks)):
                task, fetched = tasks[number], ahead
                ahead = read(tasks[number + 1]) if number + 1 < len(tasks) else []
                started = time.perf_counter()
                pixels = decoder.blank(task.size)
                results = decoders.map(
                    lambda future, slot, pixels: decoder.decode(future.result(), pixels[slot]),
                    fetched,
                    task.slots.tolist(),
                    itertools.repeat(pixels),
                )
                yield decoder.batch(task, pixels, list(results), time.perf_counter() - started)

    def _from_processes(self, tasks: Tasks) -> Generator[Batch, None, None]:
        done = 0
        while done < len(tasks):
            try:
                for batch in self._stream(tasks, done, self.workers, _AHEAD):
                    done += 1
                    yield batch
            except _WorkerLost:
                for task in range(done, min(done + self.workers * _AHEAD, len(tasks))):
                    yield self._alone(tasks[task])
                    done += 1
                self.workers = max(1, self.workers // 2)

    def _alone(self, task: Task) -> Batch:
        """Decode a task image by image, each waited for before the next is begun."""
        whole = self.decoder.batch(task, self.decoder.blank(task.size), [], 0.0)
        tried = -1
        while len(whole.rows) + len(whole.failures) < len(task.rows):
            first = len(whole.rows) + len(whole.failures)
            singles = Tasks(task.rows[first:], 1)
            try:
                for single in self._stream(singles, 0, 1, 1):
                    whole.add(single, task.slots[first])
                    first += 1
            except _WorkerLost as lost:
                first = len(whole.rows) + len(whole.failures)
                if tried == first:
                    row = int(task.rows[first])
                    size, mtime_ns = self.decoder.images.stat(row)
                    whole.failures.append(Failed(row, "decode", str(lost), size, mtime_ns))
                tried = first
        return whole

    def _stream(
        self, tasks: Tasks, start: int, workers: int, ahead: int
    ) -> Generator[Batch, None, None]:
        """Yield the batches of the tasks from `start` on; raise `_WorkerLost` if one dies."""
        with _Children() as children:
            iterator: Any = None
            try:
                iterator = self._iterator(_From(tasks, start), workers, ahead)
                for _ in range(start, len(tasks)):
                    try:
                        with children.heard():
                            if _have_ended(iterator):
                                raise _WorkerLost
                            batch = next(iterator)
                    except Exception as error:
                        if not _is_loss(error, iterator):
                            raise
                        raise _WorkerLost(_how_they_ended(iterator)) from error
                    yield batch
            finally:
                # Without terminating them, leaving early waits for whatever they are decoding.
                for process in getattr(iterator, "_workers", ()):
                    process.terminate()
                if iterator is not None:
                    iterator._shutdown_workers()

    def _iterator(self, tasks: Sequence[Task], workers: int, ahead: int) -> Any:
        with warnings.catch_warnings():
            # More workers than cores, if the user says so; forking beside threads, which
            # `DataLoader` does everywhere: the children only decode.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            loader: DataLoader[Batch] = DataLoader(
                self.decoder,
                sampler=tasks,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=ahead,
                pin_memory=self.pin,
                worker_init_fn=_init_worker,
            )
            return iter(loader)


_LOST = r"DataLoader worker \(pid.*(exited|killed)"
_AHEAD = 2  # tasks in the making for each worker


class _WorkerLost(Exception):
    """A worker process ended before its work did."""


class _From(Sequence[Task]):
    """The tasks from one on, as a sampler."""

    def __init__(self, tasks: Tasks, start: int) -> None:
        self.tasks = tasks
        self.start = start

    def __len__(self) -> int:
        return len(self.tasks) - self.start

    def __getitem__(self, index: Any) -> Any:
        return self.tasks[self.start + index]


_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def _init_worker(number: int) -> None:
    """Leave Ctrl-C to the main process, which stops the workers when all is committed.

    And die with it: an orphan would hold the lock on the store that it has inherited, for the five
    seconds after which `DataLoader`'s workers look for their parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


class _Children:
    """Hears of dying workers only while a batch is waited for.

    `DataLoader`'s handler of SIGCHLD raises an error wherever the main thread happens to be: in the
    midst of a forward pass, or of the caller's own work.
    """

    def __enter__(self) -> Self:
        self._theirs: Any = None
        self._waiting = False
        return self

    def __exit__(self, *_: object) -> None:
        if self._theirs is not None:
            signal.signal(signal.SIGCHLD, self._theirs)

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Let the handler act within the context."""
        if self._theirs is None and threading.current_thread() is threading.main_thread():
            self._theirs = signal.signal(signal.SIGCHLD, self._handle) or signal.SIG_DFL
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def _handle(self, number: int, frame: Any) -> None:
        if self._waiting and callable(self._theirs):
            self._theirs(number, frame)


def _have_ended(iterator: Any) -> bool:
    """Say whether a worker has ended; none does by itself before the last batch."""
    return any(process.exitcode is not None for process in iterator._workers)


def _is_loss(error: Exception, iterator: Any) -> bool:
    """Say whether an error is that of a worker's end, not one of its work."""
    if isinstance(error, _WorkerLost) or re.search(_LOST, str(error)):
        return True
    if not isinstance(error, (OSError, EOFError, ProcessError)):
        return False
    # A batch that could not be fetched from a worker: it may be dying this very moment.
    deadline = time.monotonic() + 1
    while not _have_ended(iterator) and time.monotonic() < deadline:
        time.sleep(0.01)
    return _have_ended(iterator)


def _how_they_ended(iterator: Any) -> str:
    """Return in words how worker processes died."""
    for process in getattr(iterator, "_workers", ()):
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            if name != "SIGTERM":
                return f"the process that decoded it was killed by {name}, twice"
    return "the process that decoded it ended, twice"
