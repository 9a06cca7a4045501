"""From rows of an image set to their features, in chunks: decode, forward, in order.

`compute` is the one path from images to features. Extraction, prediction, and each process of a run
on several devices go through it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from featcache.errors import ExtractionError
from featcache.extraction.loading import Batch, Decoder, Failed, Loader, Tasks
from featcache.images.image_set import ImageSet
from featcache.networks.forward import Pending, Runtime
from featcache.pixels.decoding import Augmentation

__all__ = ["Chunk", "Clock", "checked_augmentation", "compute", "default_workers", "of_canaries"]


@dataclass(frozen=True)
class Chunk:
    """Features of a few images.

    Attributes
    ----------
    rows : ndarray of int64, shape (k,)
        The images that worked, by their number in the image set.
    features : dict of str to ndarray of float32, shape (k, [views,] ...)
        By tap.
    failures : list of Failed
        The images that did not.
    sha256 : ndarray of uint8, shape (k, 32)
        Of the images' files.
    size, mtime_ns : ndarray of int64, shape (k,)
        Of the images' files; -1 = unknown.
    """

    rows: np.ndarray
    features: dict[str, np.ndarray]
    failures: list[Failed]
    sha256: np.ndarray
    size: np.ndarray
    mtime_ns: np.ndarray


@dataclass
class Clock:
    """Where the time went, in seconds.

    Attributes
    ----------
    decode : float
        Reading and decoding, summed over all that did it.
    waited : float
        The forward pass waited so long for decoded images.
    forward : float
        Forward passes.
    write : float
        Writing, beside the forward pass.
    blocked : float
        The forward pass waited so long for the writer.
    """

    decode: float = 0.0
    waited: float = 0.0
    forward: float = 0.0
    write: float = 0.0
    blocked: float = 0.0

    def add(self, other: Clock) -> None:
        """Add another's times."""
        for name, seconds in vars(other).items():
            setattr(self, name, getattr(self, name) + seconds)


def compute(
    images: ImageSet,
    runtime: Runtime,
    rows: np.ndarray,
    *,
    views: int = 1,
    augmentation: Augmentation | None = None,
    workers: int | None = None,
    clock: Clock | None = None,
) -> Generator[Chunk, None, None]:
    """Compute features, a batch at a time, in the order of the rows.

    Parameters
    ----------
    images : ImageSet
        The images.
    runtime : Runtime
        The network, where and how it runs.
    rows : ndarray of int64
        Which images, ascending.
    views : int
        Augmented views of each image.
    augmentation : Augmentation, optional
        What they look like; None for no augmentation and one view.
    workers : int, optional
        As for `featcache.extraction.extract.extract`.
    clock : Clock, optional
        Is told the time it took.

    Yields
    ------
    Chunk
    """
    if not len(rows):
        return
    clock = clock or Clock()
    count = default_workers(runtime) if workers is None else workers
    group = max(1, runtime.settings.batch_size // views)
    size = _images_a_task(group, views, threads=count == 0)
    tasks = Tasks(rows, size, aligned=runtime.settings.fixed_slots)
    decoder = Decoder(images, runtime.backbone.preprocessing, augmentation, views)
    on_gpu = runtime.device.type == "cuda"
    batches = Loader(decoder, workers=count, pin=on_gpu).batches(tasks)
    computing: deque[tuple[Batch, Pending]] = deque()
    try:
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            loaded = time.perf_counter()
            clock.waited += loaded - started
            if batch is not None:
                clock.decode += batch.seconds
                batch = _without_gaps(batch, group)
                computing.append((batch, runtime.submit(_flat(batch))))
            # A GPU goes on by itself: one batch is decoded, and the one before fetched and written,
            # while it computes.
            ready = len(computing) > (on_gpu and batch is not None)
            chunk = _chunk(*computing.popleft(), views) if ready else None
            clock.forward += time.perf_counter() - loaded
            if chunk is not None:
                yield chunk
            elif batch is None:
                return
    finally:
        batches.close()


def _images_a_task(group: int, views: int, *, threads: bool) -> int:
    """Return how many images are decoded together: a group that fits a batch, or several.

    Threads that decode between forward passes need enough of them to end at the same time. It is
    always a multiple of what fits a batch, so that an image keeps its place in the batch.
    """
    wanted = _IMAGES_A_THREAD * (os.cpu_count() or 1) if threads else group
    return group * max(1, -(-wanted // (group * views)))


_IMAGES_A_THREAD = 16


def _without_gaps(batch: Batch, group: int) -> Batch:
    """Leave out the groups of slots that hold no image; one stays where none does.

    A few images, or those that are left of a resumed run, would else wait for dozens of black ones.
    """
    groups = np.unique(batch.slots // group) if len(batch.slots) else np.zeros(1, np.int64)
    if len(groups) * group >= len(batch.pixels):
        return batch
    kept = (groups[:, None] * group + np.arange(group)).ravel()
    pixels = batch.pixels[torch.from_numpy(kept)]
    return replace(batch, pixels=pixels, slots=np.searchsorted(kept, batch.slots))


def _flat(batch: Batch) -> Tensor:
    """Return the pixels with views, where there are any, as images of their own."""
    return batch.pixels.flatten(0, 1) if batch.pixels.ndim == 5 else batch.pixels


def _chunk(batch: Batch, pending: Pending, views: int) -> Chunk:
    features = {}
    for tap, value in pending.result().items():
        if views > 1:
            value = value.reshape(-1, views, *value.shape[1:])
        features[tap] = value[batch.slots]
    return Chunk(batch.rows, features, batch.failures, batch.sha256, batch.size, batch.mtime_ns)


def default_workers(runtime: Runtime) -> int:
    """Return how many processes decode when the user does not say.

    Beside a network that runs on the CPU, none: threads of this process decode a batch between two
    forward passes. Processes that decode during the passes take the cores away from them, and a
    forward pass waits for its slowest thread (measured on two cores: 0.94 of the network's own
    speed with threads, 0.85 with processes for ResNet-50; 180 and 120 images a second for
    MobileNetV2). A GPU leaves the cores free, and Python's threads would not fill it.
    """
    return 0 if runtime.device.type == "cpu" else min(16, os.cpu_count() or 1)


def of_canaries(runtime: Runtime, images: Sequence[bytes]) -> dict[str, np.ndarray]:
    """Return the features of canary images, by tap: (k, ...) float32."""
    return runtime(np.stack([runtime.backbone.preprocessing(image) for image in images]))


def checked_augmentation(views: int, augmentation: Augmentation | None) -> Augmentation | None:
    """Return what views look like; None for the plain crop.

    Raises
    ------
    ExtractionError
        `views` is less than 1.
    """
    if views < 1:
        raise ExtractionError(f"views is at least 1, not {views}")
    return augmentation or (Augmentation() if views > 1 else None)
