"""Batches in, features out, in order; and the thread that writes them.

`compute` is the one path from images to features: extraction, its parts on other devices and
machines, and prediction go through it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import joblib
import numpy as np
import torch

from featcache.errors import ExtractionError
from featcache.extraction.decoding import Batch, Decoder, Loader, make_tasks
from featcache.extraction.summary import new_clock
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Pending, Runtime, Settings
from featcache.pixels.views import Augmentation
from featcache.store.writer import FeatureWriter

MAX_QUEUED = 4  # batches that may wait for the disk
_IMAGES_A_THREAD = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """How features are computed; the fields are the arguments of `featcache.extract`."""

    batch_size: int | None = None
    workers: int | None = None
    max_pixels: int | None = None
    device: str = "auto"
    precision: str = "float32"
    compile: bool | None = None
    augmentation: Augmentation | None = None
    on_error: str = "skip"
    retry_failed: bool = False
    rehash: bool = False
    progress: bool | None = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ExtractionError(f"workers is at least 0, not {self.workers}")

    @property
    def views(self) -> int:
        """Views of each image; 1 without augmentation."""
        return 1 if self.augmentation is None else self.augmentation.views

    def runtime(
        self, backbone: Backbone, images: int, *, settings: Settings | None = None
    ) -> Runtime:
        """Return the network as it runs on so many images; see `Runtime` for the others."""
        return Runtime(
            backbone,
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
            compile=self.compile,
            settings=settings,
            count=images * self.views,
        )


def compute(
    images: ImageSet,
    runtime: Runtime,
    rows: np.ndarray,
    options: Options,
    *,
    places: np.ndarray | None = None,
    clock: dict[str, float] | None = None,
    crashed: bool = False,
) -> Generator[Batch, None, None]:
    """Compute features, a batch at a time, in the order of the rows.

    Parameters
    ----------
    images : ImageSet
        The images.
    runtime : Runtime
        The network, where and how it runs.
    rows : ndarray of int64
        Numbers of the images, ascending.
    options : Options
        Views and workers.
    places : ndarray of int64, optional
        See `make_tasks`; used where a network's features depend on them.
    clock : dict of str to float, optional
        Receives the times.
    crashed : bool
        An earlier run ended without a word, perhaps because of one of the first of these images.

    Yields
    ------
    Batch
    """
    if not len(rows):
        return
    clock, views, workers = clock or new_clock(), options.views, options.workers
    preprocessing = runtime.backbone.preprocessing
    decoder = Decoder(images, preprocessing, options.augmentation, options.max_pixels)
    if workers is None:
        workers = _default_workers(runtime, crashed=crashed)
    loader = Loader(decoder, workers=workers, suspects=(MAX_QUEUED + 3) * crashed)
    group = max(1, runtime.settings.batch_size // views)
    size = _task_size(group, views, threads=loader.workers == 0)
    fixed = places if runtime.settings.fixed_slots else None
    batches = loader.batches(make_tasks(rows, size, fixed))
    on_gpu = runtime.device.type == "cuda"
    computing: deque[tuple[Batch, Pending]] = deque()
    try:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            loaded = time.perf_counter()
            clock["waiting_for_images"] += loaded - started
            if batch is not None:
                clock["decode"] += batch.seconds
                _drop_empty_groups(batch, group)
                # (slots, views, c, h, w) -> (slots * views, c, h, w)
                pixels = batch.pixels.flatten(0, 1) if batch.pixels.ndim == 5 else batch.pixels
                pixels = pixels.pin_memory() if on_gpu else pixels
                # Whatever is decoded together: a group's batches are the same.
                pending = runtime.submit(pixels, group=group * views)
                computing.append((batch, pending))
            # A GPU goes on by itself: one batch is decoded, and the one before fetched and written,
            # while it computes.
            ready = len(computing) > (on_gpu and batch is not None)
            finished = _finished(*computing.popleft(), views) if ready else None
            clock["forward"] += time.perf_counter() - loaded
            if finished is not None:
                yield finished
            elif batch is None:
                return
    finally:
        batches.close()


def _task_size(group: int, views: int, *, threads: bool) -> int:
    """Return how many images are decoded together: a group that fits a batch, or several.

    Threads that decode between forward passes need enough of them to end at the same time. It is
    always a multiple of what fits a batch, so that an image keeps its place in the batch.
    """
    wanted = _IMAGES_A_THREAD * joblib.cpu_count() if threads else group
    return group * max(1, -(-wanted // (group * views)))


def _drop_empty_groups(batch: Batch, group: int) -> None:
    """Leave out the groups of slots that hold no image; one stays where none does.

    A few images, or the last of a resumed run, would otherwise wait for dozens of black ones.
    """
    taken = batch.slots[batch.done]
    groups = np.unique(taken // group) if len(taken) else np.zeros(1, np.int64)
    if len(groups) * group >= len(batch.pixels):
        return
    kept = (groups[:, None] * group + np.arange(group)).ravel()
    batch.pixels = batch.pixels[torch.from_numpy(kept)]
    batch.slots = np.searchsorted(kept, batch.slots)


def _finished(batch: Batch, pending: Pending, views: int) -> Batch:
    """Return a batch with its features; where a signal stopped it, without what they lack."""
    batch.pixels = batch.pixels.new_empty(0)  # their memory is free for the next batch
    features = pending.result()
    count = min(map(len, features.values())) // views
    there = ~batch.done | (batch.slots < count)
    batch.rows, batch.slots, batch.entries = (
        x[there] for x in (batch.rows, batch.slots, batch.entries)
    )
    slots = batch.slots[batch.done]
    for tap, value in features.items():
        if views > 1:  # (slots * views, ...) -> (slots, views, ...)
            value = value[: count * views].reshape(count, views, *value.shape[1:])
        batch.features[tap] = value[slots]  # -> (m, [views,] ...)
    return batch


def _default_workers(runtime: Runtime, *, crashed: bool) -> int:
    """Return how many processes decode when the user does not say.

    Beside a network that runs on the CPU, none: threads of this process decode a batch between two
    forward passes. Processes that decode during the passes take the cores away from them, and a
    forward pass waits for its slowest thread (measured on two cores: 0.94 of the network's own
    speed with threads, 0.85 with processes for ResNet-50; 180 and 120 images a second for
    MobileNetV2). A GPU leaves the cores free, and Python's threads would not fill it.

    After a run that ended without a word, processes decode in any case: an image that crashes its
    decoder would take this run down as well, and so every run.
    """
    cores = joblib.cpu_count()  # that this process, or its container, may use
    return (cores if crashed else 0) if runtime.device.type == "cpu" else min(16, cores)


class WriterThread:
    """A thread that writes batches in the order in which they come.

    Use it as a context manager: on leaving, however that comes about, everything that was submitted
    is written and on the disk.

    Parameters
    ----------
    writer : FeatureWriter
        Where to write.
    clock : dict of str to float
        Receives the times.
    """

    def __init__(self, writer: FeatureWriter, clock: dict[str, float]) -> None:
        self._writer = writer
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "featcache-writer")
        self._queued: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def submit(self, batch: Batch) -> None:
        """Queue a batch, waiting while the queue is full. Raises what writing raised."""
        started = time.perf_counter()
        while self._queued and (self._queued[0].done() or len(self._queued) > MAX_QUEUED):
            self._queued.popleft().result()
        self._clock["waiting_for_writer"] += time.perf_counter() - started
        self._queued.append(self._thread.submit(self._write, batch))

    def __exit__(self, kind: object, *rest: object) -> None:
        self._queued.append(self._thread.submit(self._writer.commit))
        self._thread.shutdown()
        while kind is None and self._queued:
            self._queued.popleft().result()

    def _write(self, batch: Batch) -> None:
        started = time.perf_counter()
        done = {name: batch.entries[name][batch.done] for name in ("sha256", "size", "stamp")}
        self._writer.write(batch.rows[batch.done], batch.features, **done)
        for row, entry in zip(batch.rows.tolist(), batch.entries, strict=True):
            if error := batch.failures.get(row):
                stat = {name: int(entry[name]) for name in ("size", "stamp")}
                self._writer.fail(row, error.stage, error.reason, **stat)
        self._clock["write"] += time.perf_counter() - started
