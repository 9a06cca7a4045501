"""`extract`: from images to a feature store, each image computed once.

Decoding, the forward pass and writing overlap: decoding in threads or worker processes, the forward
pass in this thread, writing in another. Rows are committed as they come; a run that was stopped,
whatever stopped it, goes on where it stopped, with the same settings, and ends with the same bits.
A second run over a changed folder copies the features of unchanged images, and one over an
unchanged folder loads no weights at all.

`featcache.extraction.features` is the same path without a file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Literal

from featcache.errors import DecodeError, ExtractionError
from featcache.extraction import reuse
from featcache.extraction.filling import Job, filled
from featcache.extraction.parts import in_parts
from featcache.extraction.plan import Plan
from featcache.extraction.stream import Options
from featcache.extraction.summary import Summary
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.pixels.decode import bits_in_use
from featcache.pixels.views import Augmentation
from featcache.store import disk
from featcache.store.store import FeatureStore
from featcache.store.writer import check_unreplaced
from featcache.system.console import interruptible
from featcache.system.memory import reuse_memory
from featcache.system.tables import printable


def extract(
    images: ImageSet,
    backbone: Backbone,
    path: str | Path,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    max_pixels: int | None = None,
    device: str | Sequence[str] = "auto",
    parts: int | None = None,
    executor: Executor | None = None,
    precision: str = "float32",
    store_dtype: str = "float32",
    compile: bool | None = None,
    augmentation: Augmentation | None = None,
    on_error: Literal["skip", "fail"] = "skip",
    max_failures: float | None = None,
    retry_failed: bool = False,
    rehash: bool = False,
    accept_varying: bool = False,
    allow_removal: bool = False,
    drop_labels: bool = False,
    progress: bool | None = None,
) -> FeatureStore:
    """Compute the features of images and keep them in a file.

    Run it again to go on after an interruption, or to bring the file up to date with a changed
    image set: what is there is not computed again.

    Parameters
    ----------
    images : ImageSet
        The images.
    backbone : Backbone
        The network and its taps.
    path : str or Path
        The HDF5 file to be. Until it is complete it is called ``PATH.partial``.
    batch_size : int, optional
        Images in one forward pass. Left out: 8 on a CPU, 128 with CUDA.
    workers : int, optional
        Number of processes that decode images; 0 decodes in threads of this process. Left out: 0 on
        a CPU; beside a GPU one for each core that this process may use, at most 16.
    max_pixels : int, optional
        As for `featcache.pixels.decode.decode`. It changes no feature and is not recorded.
    device : str or sequence of str
        As for `featcache.networks.forward.select_device`. Several devices fill a part each, in a
        process of their own ("spawn": what a script does must stand below
        ``if __name__ == "__main__":``).
    parts : int, optional
        Number of parts, each in a file of its own until all are merged into `path`. Left out: one
        for each device, and one file for one device. Where parts were begun, the run goes on with
        these, and rows of parts with other images or batches are copied.
    executor : concurrent.futures.Executor, optional
        Computes the parts: of an engine for several machines that see the same files, such as
        Dask's ``client.get_executor(pure=False, retries=3)``; or of threads or processes. Make a
        ``ProcessPoolExecutor`` with ``mp_context=multiprocessing.get_context("spawn")``: a process
        that is forked from one in which torch has computed may hang.
        Every task uses one device of the kind of `device`, and as many threads on a CPU as this
        process would (`featcache.networks.forward.default_threads`): then the features are those of
        one process, bit for bit.
        The images must be found by `ImageSet.open`, and the network by its name.
    precision : {"float32", "bfloat16", "float16"}
        Precision of the forward pass.
    store_dtype : {"float32", "float16"}
        Type of the stored features.
    compile : bool, optional
        Use ``torch.compile``. Left out: only if the rows that are there were computed with it.
    augmentation : Augmentation, optional
        Draw augmented views of each image in place of the plain crop. With several views, as in
        ``Augmentation(views=4)``, the features have shape (n, views, d).
    on_error : {"skip", "fail"}
        What to do with an image that cannot be read or decoded: record it and leave it out, or
        stop at once.
    max_failures : float, optional
        Share of the images that may fail, from 0 to 1. Left out: 1 %, at least 5 images, and under
        half of them.
    retry_failed : bool
        Try images again that failed before and have not changed.
    rehash : bool
        Read the contents of all images. Left out, only of those whose file's size, times or inode
        are not as recorded.
    accept_varying : bool
        Accept a network whose features of an image change from one run to the next (dropout or
        noise in its ``forward``), or with the other images of a batch (statistics of the batch,
        routing). Left out, such a network is refused before the first image; it is found by
        computing test images twice. The answer is part of the fingerprint.
    allow_removal : bool
        Let more than half of the rows of the earlier file go, because their images are not in the
        image set any more. Left out, such a run is refused: it may be of another folder.
    drop_labels : bool
        Remove labels, groups, splits and kept columns of the file that is there if `images` have no
        labels. Left out, such images keep them, by their ids or else by their contents. Images with
        labels bring all of these anew.
    progress : bool, optional
        Show a progress bar on standard error. Left out: only in a terminal or a notebook.

    Returns
    -------
    FeatureStore
        The finished store; its ``extraction`` is the `Summary` of this run.

    Raises
    ------
    TooManyFailures
        More images failed than `max_failures` allows. The good rows are kept.
    Interrupted
        SIGINT or SIGTERM was received. Every finished batch is kept.
    DiskFull, StoreLocked, FingerprintMismatch, StoreError
        The file cannot be written, see `featcache.store.writer.FeatureWriter.begin`.
    ExtractionError
        The network's features are not finite, or no function of the image (`accept_varying`), an
        image failed and `on_error` is ``"fail"``, the system cannot read (too many open files, a
        disk that fails), rows would be removed (`allow_removal`), an argument is impossible, or
        one machine of several cannot compute as the others do.

    Examples
    --------
    >>> import featcache as fc
    >>> images = fc.ImageSet.open("flowers")  # doctest: +SKIP
    >>> store = fc.extract(images, fc.Backbone("resnet50"), "flowers.h5")  # doctest: +SKIP
    >>> print(store.extraction)  # doctest: +SKIP
    6,149 images: 6,149 computed, 0 reused, 0 failed, in 74.3 s
    from the first image to the last 70.6 s (87.1 images/s): forward pass 67.3 s, ...
    """
    devices = [device] if isinstance(device, str) else list(device)
    if not devices:
        raise ExtractionError("device is a name or several, not none")
    options = Options(
        batch_size=batch_size,
        workers=workers,
        max_pixels=max_pixels,
        device=devices[0],
        precision=precision,
        compile=compile,
        augmentation=augmentation,
        on_error=on_error,
        retry_failed=retry_failed,
        rehash=rehash,
        progress=progress,
    )
    _check(store_dtype, on_error, max_failures, parts)
    path = os.path.realpath(path)
    for earlier in reuse.recorded(path):
        backbone.recall(earlier.request)
    seen = disk.identity(path)  # before it is opened
    before = reuse.finished_store(path)
    labelled = before or reuse.unfinished_store(path)
    if labelled is not None and not drop_labels:
        images = reuse.with_labels(images, labelled)
    wanted = reuse.wanted(precision, store_dtype, augmentation, accept_varying)
    request = {**backbone.request, **wanted}
    locked = functools.partial(check_unreplaced, path, seen)
    job = Job(path, images, backbone, options, request, locked=locked)
    if before is not None and not retry_failed:
        store = reuse.up_to_date(before, images, drop_labels, rehash=rehash, request=job.request)
        if store is not None:
            job.check_code(store)
            return store
    if backbone.preprocessing.bit_depth is None:
        _warn_of_dark(images)
    summary = Summary(len(images), unlabelled=images.unlabelled)
    if before is not None and not allow_removal:
        reuse.check_removal(before, images)
    started = time.perf_counter()
    with interruptible(), reuse_memory():
        if executor is not None or parts or len(devices) > 1 or Plan.read(path):
            store = in_parts(job, summary, devices, parts, executor, max_failures)
        else:
            with filled(job, summary) as writer:
                summary.seconds["total"] = time.perf_counter() - started
                writer.set_meta("run", summary.to_dict())
                store = writer.finish(max_failures)
    if before is not None:
        summary.removed = reuse.count_removed(before, store, images)
    summary.notes = store.fingerprint.notes
    if failures := store.failures:
        why = f"not read: {printable(failures[0].id)} ({failures[0].reason})"
        more = f", and {len(failures) - 1:,} more: featcache info {path}"
        summary.notes.append(why + more * (len(failures) > 1))
    store.extraction = summary
    return store


def _check(store_dtype: str, on_error: str, max_failures: float | None, parts: int | None) -> None:
    if store_dtype not in ("float32", "float16"):
        raise ExtractionError(f"store_dtype is float32 or float16, not {store_dtype!r}")
    if on_error not in ("skip", "fail"):
        raise ExtractionError(f"on_error is 'skip' or 'fail', not {on_error!r}")
    if max_failures is not None and not 0 <= max_failures <= 1:
        raise ExtractionError(f"max_failures is a share from 0 to 1, not {max_failures}")
    if parts is not None and parts < 1:
        raise ExtractionError(f"parts is at least 1, not {parts}")


def _warn_of_dark(images: ImageSet) -> None:
    """Warn where grey images use few of the 16 bits that their files declare."""
    bits = 0
    for row in sorted({k * (len(images) - 1) // 7 for k in range(8)}):
        with contextlib.suppress(DecodeError):
            bits = max(bits, bits_in_use(images.read(row)))
    if 0 < bits <= 12:
        warnings.warn(
            f"Grey images of 16 bits use no more than {bits} of them (eight were looked at), and "
            "reach the network nearly black. If they have N bits, such as 12, type --bit-depth N "
            "(Preprocessing(bit_depth=N)).",
            stacklevel=3,
        )
