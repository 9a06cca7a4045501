"""`extract`: from images to a feature store, each image computed once.

Decoding, the forward pass and writing overlap: decoding in threads or worker processes, the forward
pass in this thread, writing in another. Rows are committed as they come; a run that was stopped,
whatever stopped it, goes on where it stopped, with the same settings, and ends with the same bits.
A second run over a changed folder copies the features of unchanged images, and one over an
unchanged folder loads no weights at all.

`features` is the same path without a file; prediction uses it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featcache.errors import DecodeError, ExtractionError, FingerprintMismatch
from featcache.extraction import parallel, reuse
from featcache.extraction.stream import (
    Chunk,
    Clock,
    Options,
    WriterThread,
    compute,
    default_workers,
)
from featcache.extraction.summary import Summary
from featcache.fingerprint import Fingerprint
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Runtime, Settings
from featcache.pixels import canary
from featcache.pixels.views import Augmentation
from featcache.store.format import DONE, FAILED
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter, relabel
from featcache.system.console import interruptible, progress_bar
from featcache.system.memory import keep_pages

__all__ = ["Chunk", "Summary", "canary_features", "extract", "features"]

# Images that are replaced again and again during a run are left to the next one.
_ROUNDS = 3
# Largest difference of features, relative to the largest, that rounding explains.
_CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


def features(
    images: ImageSet,
    backbone: Backbone,
    *,
    rows: np.ndarray | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "float32",
    compile: bool | None = None,
    augmentation: Augmentation | None = None,
) -> Iterator[Chunk]:
    """Compute features, a batch at a time, in the order of the rows.

    Parameters
    ----------
    images : ImageSet
        The images.
    backbone : Backbone
        The network.
    rows : array of int, optional
        Numbers of the images to compute, ascending; all if left out.
    batch_size, workers, device, precision, compile, augmentation
        As for `extract`.

    Yields
    ------
    Chunk
        Features and failures of the next images.
    """
    options = Options(
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=precision,
        compile=compile,
        augmentation=augmentation,
    )
    wanted = np.arange(len(images)) if rows is None else np.asarray(rows, np.int64)
    with keep_pages():
        yield from compute(images, options.runtime(backbone, len(wanted)), wanted, options)


def canary_features(
    backbone: Backbone,
    images: Sequence[bytes],
    *,
    device: str = "auto",
    precision: str = "float32",
) -> dict[str, np.ndarray]:
    """Compute the features of canary images.

    Parameters
    ----------
    backbone : Backbone
        The network.
    images : sequence of bytes
        Image files, as `featcache.pixels.canary.images` makes them or a store keeps them.
    device, precision
        As for `features`.

    Returns
    -------
    dict of str to ndarray of float32, shape (k, ...)
        Features by tap.
    """
    runtime = Options(device=device, precision=precision).runtime(backbone, len(images))
    with keep_pages():
        return _of_canaries(runtime, images)


def _of_canaries(runtime: Runtime, images: Sequence[bytes]) -> dict[str, np.ndarray]:
    return runtime(np.stack([runtime.backbone.preprocessing(image) for image in images]))


def extract(
    images: ImageSet,
    backbone: Backbone,
    path: str | Path,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | Sequence[str] = "auto",
    precision: str = "float32",
    store_dtype: str = "float32",
    compile: bool | None = None,
    augmentation: Augmentation | None = None,
    on_error: Literal["skip", "fail"] = "skip",
    max_failures: float = 0.01,
    retry_failed: bool = False,
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
        Processes that decode; 0 decodes in this one. Left out, chosen.
    device : str or sequence of str
        As for `featcache.networks.forward.select_device`. Several: one process each, which fill
        disjoint rows of the file.
    precision : {"float32", "bfloat16", "float16"}
        Of the forward pass.
    store_dtype : {"float32", "float16"}
        Of the stored features.
    compile : bool, optional
        Use ``torch.compile``. Left out: as the rows that are there were computed, otherwise not.
    augmentation : Augmentation, optional
        Draw augmented views of each image in place of the plain crop. With several views, as in
        ``Augmentation(views=4)``, the features have shape (n, views, d).
    on_error : {"skip", "fail"}
        What to do with an image that cannot be read or decoded: record it and leave it out, or
        stop at once.
    max_failures : float
        Share of the images that may fail, 0 to 1.
    retry_failed : bool
        Try images again that failed before and have not changed.
    progress : bool, optional
        Show a progress bar on standard error; left out, if that is a terminal.

    Returns
    -------
    FeatureStore
        The finished store; its ``extraction`` is the `Summary` of this run.

    Raises
    ------
    TooManyFailures
        More images failed than `max_failures` allows. The good rows are kept.
    Interrupted
        SIGINT or SIGTERM came. Everything computed is kept.
    DiskFull, StoreLocked, FingerprintMismatch, StoreError
        The file cannot be written; as for `featcache.store.writer.FeatureWriter`.
    ExtractionError
        An image failed and `on_error` is ``"fail"``, or an argument is impossible.
    """
    devices = [device] if isinstance(device, str) else list(device)
    options = Options(
        batch_size=batch_size,
        workers=workers,
        device=devices[0],
        precision=precision,
        compile=compile,
        augmentation=augmentation,
    )
    _check(store_dtype, on_error, max_failures)
    request = _request(backbone, options, store_dtype)
    path = os.path.realpath(path)
    store = None if retry_failed else reuse.complete_store(path, images, request)
    if store is not None:
        return _up_to_date(store, images)
    summary = Summary(len(images))
    started = time.perf_counter()
    with interruptible(), keep_pages():
        known = reuse.stored_layout(path, request) or _from_network(backbone, request)
        with FeatureWriter.begin(
            path,
            images.tables,
            known.shapes,
            fingerprint=known.fingerprint,
            meta=_meta(request),
            canaries=_canary_images(backbone),
            retry_failed=retry_failed,
        ) as writer:
            reuse.mark_changed(writer, images)
            reuse.copy_unchanged(
                writer,
                images,
                retry_failed=retry_failed,
                by_content=options.augmentation is None,
            )
            summary.copied = int(np.count_nonzero(writer.status == DONE))
            summary.failed = int(np.count_nonzero(writer.status == FAILED))
            if len(writer.pending):
                _check_network(writer, _from_network(backbone, request).fingerprint)
                bar = progress_bar(
                    progress,
                    total=len(images),
                    initial=len(images) - len(writer.pending),
                    unit="img",
                    desc=backbone.name,
                )

                def advance(rows: int, failures: Mapping[int, DecodeError]) -> None:
                    bar.update(rows)
                    summary.computed += rows - len(failures)
                    summary.failed += len(failures)
                    if failures and on_error == "fail":
                        raise _first_failure(images, path, failures)

                with bar:
                    _compute(images, writer, backbone, options, devices, summary, advance)
            summary.seconds["total"] = time.perf_counter() - started
            writer.set_meta("run", summary.to_dict())
            store = writer.finish(max_failures)
    store.extraction = summary
    return store


def _check(store_dtype: str, on_error: str, max_failures: float) -> None:
    if store_dtype not in ("float32", "float16"):
        raise ExtractionError(f"store_dtype is float32 or float16, not {store_dtype!r}")
    if on_error not in ("skip", "fail"):
        raise ExtractionError(f"on_error is 'skip' or 'fail', not {on_error!r}")
    if not 0 <= max_failures <= 1:
        raise ExtractionError(f"max_failures is a share from 0 to 1, not {max_failures}")


def _request(backbone: Backbone, options: Options, store_dtype: str) -> dict[str, Any]:
    """Return what is asked for, as JSON values: equal requests give equal features."""
    augmentation = options.augmentation
    return {
        **backbone.request,
        "precision": options.precision,
        "store_dtype": store_dtype,
        "augmentation": None if augmentation is None else augmentation.to_dict(),
    }


def _up_to_date(store: FeatureStore, images: ImageSet) -> FeatureStore:
    """Return the store that is there already, with the labels as they are now."""
    summary = Summary(len(images), failed=len(store.failures), skipped=True)
    if not reuse.same_tables(store, images):
        store = relabel(store, images.tables)
        summary.relabelled = True
    store.extraction = summary
    return store


def _from_network(backbone: Backbone, request: dict[str, Any]) -> reuse.StoredLayout:
    """Compute fingerprint and shapes from the network."""
    fingerprint = backbone.fingerprint(
        precision=request["precision"],
        store_dtype=request["store_dtype"],
        augmentation=request["augmentation"],
    )
    views = (fingerprint.views,) if fingerprint.views > 1 else ()
    shapes = {tap: (*views, *shape) for tap, shape in backbone.shapes.items()}
    return reuse.StoredLayout(fingerprint, shapes)


def _check_network(writer: FeatureWriter, fingerprint: Fingerprint) -> None:
    difference = writer.fingerprint.diff(fingerprint, ("stored", "loaded"))
    if difference:
        raise FingerprintMismatch(
            f"The network is not the one that {writer.path} was begun with:\n{difference}\n"
            f"Choose another file with -o, or delete it: rm {writer.path}*"
        )


def _compute(
    images: ImageSet,
    writer: FeatureWriter,
    backbone: Backbone,
    options: Options,
    devices: Sequence[str],
    summary: Summary,
    advance: Callable[[int, Mapping[int, DecodeError]], None],
) -> None:
    """Compute the pending rows."""
    pending, clock = writer.pending, Clock()
    runtime = options.runtime(
        backbone, len(pending), settings=_recorded(writer), processes=len(devices)
    )
    writer.set_meta("settings", runtime.settings.to_dict())
    summary.rounding = _check_canaries(writer, runtime)
    crashed = (writer.meta.get("run") or {}).get("state") == "running"
    if options.workers is None:
        options = replace(options, workers=default_workers(runtime, crashed=crashed))
    started = time.perf_counter()
    with _marked_as_running(writer):
        if len(devices) > 1:
            work = parallel.Work(writer.path, images, backbone, options, runtime.settings)
            runtime.release()
            writer.share()
            parallel.fill(work, pending, devices, clock, advance)
        else:
            _fill(images, writer, runtime, pending, options, clock, advance, crashed=crashed)
            for _ in range(_ROUNDS):
                reuse.recheck_replaced_files(writer, images, pending)
                if not len(again := writer.pending):
                    break
                _fill(
                    images, writer, runtime, again, options, clock, lambda _, bad: advance(0, bad)
                )
            # What the file says: features may not have been finite.
            summary.computed = int(np.count_nonzero(writer.status[pending] == DONE))
            summary.failed = int(np.count_nonzero(writer.status == FAILED))
    elapsed = time.perf_counter() - started
    summary.measure(clock, elapsed, runtime.settings)


def _fill(
    images: ImageSet,
    writer: FeatureWriter,
    runtime: Runtime,
    rows: np.ndarray,
    options: Options,
    clock: Clock,
    advance: Callable[[int, Mapping[int, DecodeError]], None],
    *,
    crashed: bool = False,
) -> None:
    """Compute rows and write them."""
    settings = runtime.settings
    chunks = compute(images, runtime, rows, options, clock=clock, crashed=crashed)
    with WriterThread(writer, clock) as thread, contextlib.closing(chunks):
        for chunk in chunks:
            if runtime.settings != settings:  # memory ran out, and the batch was halved
                settings = runtime.settings
                writer.set_meta("settings", settings.to_dict())
            thread.submit(chunk)
            advance(len(chunk.rows), chunk.failures)


def _first_failure(
    images: ImageSet, path: str, failures: Mapping[int, DecodeError]
) -> ExtractionError:
    row = min(failures)
    return ExtractionError(
        f"{images.ids[row]} failed ({failures[row]}). What was computed is kept in "
        f"{path}.partial. Mend or remove the image, or leave out --on-error fail, and run the same "
        "command again."
    )


def _recorded(writer: FeatureWriter) -> Settings | None:
    """Return the settings of the rows that are there already."""
    records = [writer.meta.get("settings")]
    records += [source.meta.get("settings") for source in writer.earlier_stores]
    for record in records:
        if record and (settings := Settings.from_dict(record)):
            return settings
    return None


def _check_canaries(writer: FeatureWriter, runtime: Runtime) -> float | None:
    """Store the canaries' features; compare them with those of rows that are there already.

    Returns
    -------
    float or None
        What rounding costs, see `Summary`; None in float32 or without canaries.
    """
    canaries = writer.canaries
    if canaries is None:
        return None
    found = _of_canaries(runtime, canaries.images)
    earlier = [canaries, *(source.canaries for source in writer.earlier_stores)]
    for other in earlier:
        if other is None or not other.features or other.images != canaries.images:
            continue
        for tap, values in other.features.items():
            error = np.abs(found[tap] - values).max() / max(np.abs(values).max(), 1e-30)
            if not error <= _CANARY_TOLERANCE[runtime.precision]:
                raise FingerprintMismatch(
                    f"The features of test images differ from those that {writer.path} was begun "
                    f"with by {error:.1e} of the largest: this machine decodes, resizes or "
                    "computes otherwise (other versions of Pillow or torch?). Begin anew: "
                    f"rm {writer.path}*"
                )
    if not canaries.features:
        writer.set_canaries(found)
    if runtime.precision == "float32":
        return None
    return _rounding(runtime.backbone, canaries.images, found)


@contextlib.contextmanager
def _marked_as_running(writer: FeatureWriter) -> Iterator[None]:
    """Leave a mark in the partial file by which the next run sees that this one was killed."""
    writer.set_meta("run", {"state": "running"})
    try:
        yield
    except BaseException:
        writer.set_meta("run", {"state": "stopped"})
        raise


def _canary_images(backbone: Backbone) -> list[tuple[str, bytes]]:
    """Return the canaries that this preprocessing can take: not every one has its channels."""
    usable = []
    for name, image in canary.images():
        with contextlib.suppress(DecodeError):
            backbone.preprocessing(image)
            usable.append((name, image))
    return usable


def _rounding(
    backbone: Backbone, images: Sequence[bytes], found: Mapping[str, np.ndarray]
) -> float:
    """Return how far features (k, ...) are from float32 ones: see `Summary`."""
    plain = _of_canaries(Runtime(backbone, device="cpu"), images)
    worst = 0.0
    for tap, value in found.items():
        expected = plain[tap].reshape(len(images), -1)
        distance = np.linalg.norm(value.reshape(len(images), -1) - expected, axis=1)
        length = np.maximum(np.linalg.norm(expected, axis=1), np.finfo(np.float32).tiny)
        worst = max(worst, float(np.median(distance / length)))
    return worst


def _meta(request: dict[str, Any]) -> dict[str, Any]:
    """Return what the file says about how it came to be."""
    command = Path(sys.argv[0]).name
    meta: dict[str, Any] = {"request": request, "versions": _versions()}
    if command == "featcache":
        meta["command"] = shlex.join([command, *sys.argv[1:]])
    return meta


def _versions() -> dict[str, str]:
    names = ("featcache", "torch", "torchvision", "numpy", "pillow")
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
