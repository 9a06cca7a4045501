"""Read and decode images into batches of pixels, in threads or in worker processes.

A task names the images of one batch and the slot that each of them takes. Whoever decodes it reads
the files, hashes them, and fills the slots of one block of uint8 pixels; a worker process sends
that block back through shared memory. An image that cannot be read or decoded leaves its slot
black, and its entry says that it failed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace

import joblib
import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing import get_context

from featcache.errors import DecodeError, ExtractionError
from featcache.images.image_set import ImageSet, content_hash
from featcache.pixels.decode import RawImage
from featcache.pixels.preprocessing import Preprocessing
from featcache.pixels.views import Augmentation
from featcache.store.format import DONE, ENTRY, FAILED, PENDING
from featcache.system.console import check_stopped
from featcache.system.processes import die_with_parent, start_processes

PREFETCH = 2  # tasks in the making for each worker process
READ_ATTEMPTS = 3
SYSTEM_FAULTS = 20  # so many images in a row that the system could not read end a run
DEATHS = 2  # a process of its own dies so often before an image counts as failed

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Batch:
    """Images that go from their files to their features together.

    Attributes
    ----------
    rows : ndarray of int64, shape (k,)
        Numbers of the images in the image set, ascending.
    slots : ndarray of int64, shape (k,)
        Index of each image in `pixels`.
    entries : ndarray of ENTRY, shape (k,)
        Status, file size, time of the last change, and hash of each image. The status is DONE for
        an image that was decoded, else FAILED.
    pixels : torch.Tensor of uint8, shape (slots, [views,] channels, h, w)
        The images; black where a slot has none. Channels are adjacent in memory. Empty once the
        features are there.
    features : dict of str to ndarray of float32, shape (m, [views,] ...)
        Features by tap of the m images that are `done`.
    failures : dict of int to DecodeError
        Reasons of the images that failed, by row.
    cut_off : list of int
        Rows of the images that are cut off before their end, and were read all the same.
    seconds : float
        Time spent on reading and decoding.
    """

    rows: np.ndarray
    slots: np.ndarray
    entries: np.ndarray
    pixels: Tensor
    features: dict[str, np.ndarray] = field(default_factory=dict)
    failures: dict[int, DecodeError] = field(default_factory=dict)
    cut_off: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def done(self) -> np.ndarray:
        """Mask of the images that have pixels or features: bool, shape (k,)."""
        return np.asarray(self.entries["status"] == DONE)

    def fail(self, k: int, error: DecodeError) -> None:
        """Record that image `k` of this batch has no pixels, and why."""
        self.entries["status"][k] = FAILED
        self.failures[int(self.rows[k])] = error


Task = tuple[np.ndarray, np.ndarray, int]  # rows (k,), slots (k,), and the slots of the batch


def make_tasks(rows: np.ndarray, size: int, places: np.ndarray | None = None) -> list[Task]:
    """Return the tasks that cover some rows, in the order of their places.

    Parameters
    ----------
    rows : ndarray of int64, shape (k,)
        Numbers of the images, ascending; at least one.
    size : int
        Slots of a batch.
    places : ndarray of int64, shape (k,), optional
        Give every row the slot ``place % size``, whichever other rows there are: for networks whose
        features depend, in their last bits, on an image's place in the batch. Left out, the rows
        are packed.
    """
    if places is None:
        places = np.arange(len(rows))
    order = np.argsort(places, kind="stable")
    rows, places = rows[order], places[order]
    edges = np.flatnonzero(np.diff(places // size)) + 1
    parts = zip(np.split(rows, edges), np.split(places % size, edges), strict=True)
    return [(*part, size) for part in parts]


@dataclass
class Decoder:
    """Reads and decodes the images of tasks.

    Parameters
    ----------
    images : ImageSet
        The images.
    preprocessing : Preprocessing
        Resizing and cropping.
    augmentation : Augmentation, optional
        Random views instead of the central crop; the pixels then have an axis of views.
    max_pixels : int, optional
        As for `featcache.extract`.
    """

    images: ImageSet
    preprocessing: Preprocessing
    augmentation: Augmentation | None = None
    max_pixels: int | None = None

    def blank(self, task: Task) -> Batch:
        """Return a batch of black images, none of them read."""
        rows, slots, size = task
        entries = np.zeros(len(rows), ENTRY)
        entries["status"], entries["size"], entries["stamp"] = PENDING, -1, -1
        channels, height, width = self.preprocessing.output_shape
        axes = (size,) if self.augmentation is None else (size, self.augmentation.views)
        # In memory (slots, [views,] h, w, c): torch then sees channels_last without a copy.
        pixels = np.moveaxis(np.zeros((*axes, height, width, channels), np.uint8), -1, -3)
        return Batch(rows, slots, entries, torch.from_numpy(pixels))

    def read(self, batch: Batch, k: int) -> RawImage | None:
        """Read image `k` of a batch and fill in its entry; None if it cannot be read."""
        row, entry = int(batch.rows[k]), batch.entries[k]
        try:
            for attempt in range(READ_ATTEMPTS):
                stat = self.images.stat(row)
                entry["size"], entry["stamp"] = stat
                try:
                    raw = self.images.read(row)
                except DecodeError as error:
                    if error.stage != "system" or attempt == READ_ATTEMPTS - 1:
                        raise
                    time.sleep(0.1)
                    continue
                if self.images.stat(row) == stat:
                    entry["sha256"] = np.frombuffer(content_hash(raw), np.uint8)
                    return raw
            raise DecodeError("read", f"the file changed during each of {READ_ATTEMPTS} readings")
        except DecodeError as error:
            batch.fail(k, error)
            return None

    def decode(self, batch: Batch, k: int, raw: RawImage | None) -> None:
        """Decode what was read of image `k` into its slot."""
        if raw is None:
            return
        try:
            row, whole = int(batch.rows[k]), replace(self.preprocessing, truncated="refuse")
            try:
                pixels = self._pixels(row, raw, whole)
            except DecodeError:
                if self.preprocessing == whole:
                    raise
                pixels = self._pixels(row, raw, self.preprocessing)
                batch.cut_off.append(row)
            # (c, h, w), or (views, c, h, w)
            batch.pixels[int(batch.slots[k])].numpy()[...] = pixels
            batch.entries["status"][k] = DONE
        except DecodeError as error:
            batch.fail(k, error)

    def _pixels(self, row: int, raw: RawImage, preprocessing: Preprocessing) -> np.ndarray:
        if self.augmentation is None:
            return preprocessing(raw, max_pixels=self.max_pixels)
        id = self.images.ids[row]
        return preprocessing.views(raw, self.augmentation, id, max_pixels=self.max_pixels)


class Loader:
    """Yields batches in the order of their tasks.

    With workers, processes decode ahead. A worker that is killed (out of memory, a decoder that
    crashes) ends nothing: the tasks in the making are decoded again image by image in a process of
    their own, an image whose process dies twice is recorded as failed, and decoding goes on with
    half the workers.

    Without workers, or where there is no shared memory for them, threads read the next batch ahead,
    and decode it when it is asked for. A daemonic process, such as Dask's worker, may have no
    children and decodes in threads as well.

    Parameters
    ----------
    decoder : Decoder
        Reads and decodes each image.
    workers : int
        Worker processes; 0 decodes in threads of this process.
    suspects : int
        Number of tasks to decode image by image in a process of their own before threads go on.
        They were in the making when an earlier run crashed.
    """

    def __init__(self, decoder: Decoder, *, workers: int, suspects: int = 0) -> None:
        self.decoder = decoder
        self.workers = 0 if multiprocessing.current_process().daemon else workers
        self.suspects = suspects

    def batches(self, tasks: Sequence[Task]) -> Generator[Batch, None, None]:
        """Yield one batch for each task; end where the system reads nothing any more."""
        faults = 0
        with contextlib.closing(self._batches(tasks)) as batches:
            for batch in batches:
                for row in batch.rows.tolist():
                    error = batch.failures.get(row)
                    faults = faults + 1 if error and error.stage == "system" else 0
                    if faults == SYSTEM_FAULTS:
                        raise ExtractionError(
                            f"{faults} images in a row {error and error.reason}. What was computed "
                            "is kept: run the same command again when the disk can be read."
                        )
                yield batch

    def _batches(self, tasks: Sequence[Task]) -> Generator[Batch, None, None]:
        apart = self._from_processes(tasks) if self.workers else None
        done = 0
        try:
            for batch in apart or self._decode_one_by_one(tasks[: self.suspects]):
                done += 1
                yield batch
        except RuntimeError as error:
            if "shared memory" not in str(error):  # as torch says it
                raise
            warnings.warn(
                "Images are decoded in this process: worker processes need more shared memory "
                "(/dev/shm) than there is. Make it larger (docker run --shm-size=1g), or type "
                "--workers 0 (workers=0).",
                stacklevel=2,
            )
        yield from self._from_threads(tasks[done:])

    def _from_threads(self, tasks: Sequence[Task]) -> Generator[Batch, None, None]:
        decoder, threads = self.decoder, joblib.cpu_count()
        with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as decoders:

            def read(task: Task) -> tuple[Batch, list[Future[RawImage | None]]]:
                batch = decoder.blank(task)
                return batch, [
                    readers.submit(decoder.read, batch, k) for k in range(len(batch.rows))
                ]

            def decode(batch: Batch, k: int, raw: Future[RawImage | None]) -> None:
                decoder.decode(batch, k, raw.result())

            reading = map(read, tasks)
            ahead = next(reading, None)
            while ahead is not None:
                (batch, raws), started = ahead, time.perf_counter()
                ahead = next(reading, None)
                for done in [decoders.submit(decode, batch, k, raw) for k, raw in enumerate(raws)]:
                    done.result()  # raises what a thread raised
                batch.seconds = time.perf_counter() - started
                yield batch

    def _from_processes(self, tasks: Sequence[Task]) -> Generator[Batch, None, None]:
        done = 0
        while done < len(tasks):
            ahead = self.workers * PREFETCH
            futures: dict[int, Future[Batch]] = {}
            with _worker_pool(self.decoder, min(self.workers, len(tasks) - done)) as pool:
                try:
                    while done < len(tasks):
                        for number in range(done, min(done + ahead, len(tasks))):
                            if number not in futures:
                                futures[number] = pool.submit(_decode, tasks[number])
                        batch = futures.pop(done).result()
                        done += 1
                        yield batch
                    return
                except BrokenProcessPool:
                    check_stopped()  # the signal may have been sent to all processes
            in_the_making = tasks[done : done + ahead]
            yield from self._decode_one_by_one(in_the_making)
            done += len(in_the_making)
            self.workers = max(1, self.workers // 2)

    def _decode_one_by_one(self, tasks: Sequence[Task]) -> Generator[Batch, None, None]:
        """Decode tasks image by image, each waited for before the next is begun."""
        rows = np.concatenate([np.zeros(0, np.int64), *(rows for rows, _, _ in tasks)])
        with contextlib.closing(self._alone(rows)) as images:
            for task in tasks:
                batch = self.decoder.blank(task)
                for k, slot in enumerate(batch.slots.tolist()):
                    one = next(images)
                    batch.entries[k], batch.pixels[slot] = one.entries[0], one.pixels[0]
                    batch.failures |= one.failures
                    batch.cut_off += one.cut_off
                    batch.seconds += one.seconds
                yield batch

    def _alone(self, rows: np.ndarray) -> Generator[Batch, None, None]:
        """Decode images in a process of their own; yield a batch of one slot for each."""
        k = deaths = 0
        while k < len(rows):
            others = set(multiprocessing.active_children())
            with _worker_pool(self.decoder, 1) as pool:
                processes = set(multiprocessing.active_children()) - others
                try:
                    while k < len(rows):
                        task = rows[k : k + 1], np.zeros(1, np.int64), 1
                        batch = pool.submit(_decode, task).result()
                        k, deaths = k + 1, 0
                        yield batch
                except BrokenProcessPool:
                    deaths += 1
            if deaths == DEATHS:
                code = min((process.exitcode or 0 for process in processes), default=0)
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "ended"
                batch = self.decoder.blank(task)
                batch.entries[["size", "stamp"]] = self.decoder.images.stat(int(rows[k]))
                batch.fail(0, DecodeError("decode", f"the process that decoded it {how}, twice"))
                k, deaths = k + 1, 0
                yield batch


# --- worker processes -----------------------------------------------------------------------------


@contextlib.contextmanager
def _worker_pool(decoder: Decoder, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes; on leaving, stop them after the image that each is decoding.

    On Linux they are forked, as those of `torch.utils.data.DataLoader` are: images in memory and
    the ids of millions of files are shared instead of copied to every worker, any data set can be
    read, and a script needs no ``if __name__ == "__main__"``. A forked child hangs if it needs a
    lock that another thread held at that moment. Therefore the children only decode, in one thread
    and without kernels of torch, and all of them start before the pool has a thread. A daemonic
    process belongs to an engine such as Dask and has busy threads of which nothing is known; there,
    and on other systems, a worker is a new process ("spawn").
    """
    this = multiprocessing.current_process()
    daemon = this.daemon
    fork = sys.platform.startswith("linux") and not daemon
    # Without a lock, which a killed worker could hold.
    stop = torch.zeros((), dtype=torch.bool, device="cpu")
    stop.share_memory_()  # type: ignore[no-untyped-call]
    context = get_context("fork" if fork else "spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (decoder, stop, os.getpid()))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
            this.daemon = False  # lest children become orphans; a daemon dies with its parent
            try:
                start_processes(pool, workers, _SIGNALS, "Type --workers 0 (workers=0)")
            finally:
                this.daemon = daemon
        yield pool
    finally:
        stop.fill_(True)
        pool.shutdown(cancel_futures=True)


_decoder: Decoder  # of this worker process
_stop: Tensor


def _start_worker(decoder: Decoder, stop: Tensor, parent: int) -> None:
    """Prepare a worker process.

    SIGINT and SIGHUP stay blocked: the main process stops the workers when everything is committed.
    The kernel kills a worker whose parent has died.
    """
    global _decoder, _stop
    _decoder, _stop = decoder, stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGINT, signal.SIGHUP})
    torch.set_num_threads(1)
    die_with_parent(parent)


def _decode(task: Task) -> Batch:
    """Decode a task in a worker process."""
    started = time.perf_counter()
    batch = _decoder.blank(task)
    for k in range(len(batch.rows)):
        if _stop:
            break
        _decoder.decode(batch, k, _decoder.read(batch, k))
    batch.seconds = time.perf_counter() - started
    return batch
