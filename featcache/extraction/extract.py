"""`extract`: from images to a feature store, each image computed once.

Decoding (worker processes), the forward pass (this thread) and writing (a thread) overlap. Rows are
committed as they come; a run that was stopped by whatever goes on where it stopped, with the same
settings, and ends with the same bits. A second run over a changed folder copies the features of
unchanged images, and one over an unchanged folder loads no weights at all.

`features` is the one path from images to features: prediction uses it too.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featcache.errors import DecodeError, ExtractionError, FingerprintMismatch
from featcache.extraction import parallel, reuse
from featcache.extraction.computing import (
    Chunk,
    Clock,
    checked_augmentation,
    compute,
    default_workers,
    of_canaries,
)
from featcache.extraction.loading import Failed
from featcache.extraction.recording import Recorder
from featcache.extraction.summary import Summary
from featcache.fingerprint import Fingerprint, RequestKey
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Runtime, Settings
from featcache.pixels import canary
from featcache.pixels.decoding import Augmentation
from featcache.store.layout import DONE, FAILED
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter
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
    views: int = 1,
    augmentation: Augmentation | None = None,
    settings: Settings | None = None,
) -> Iterator[Chunk]:
    """Compute features, a batch at a time, in the order of the rows.

    Parameters
    ----------
    images : ImageSet
        The images.
    backbone : Backbone
        The network.
    rows : array of int, optional
        Which images, ascending; all if left out.
    batch_size, workers, device, precision, compile, views, augmentation
        As for `extract`.
    settings : Settings, optional
        Of an earlier run, to compute the same bits.

    Yields
    ------
    Chunk
        Features and failures of the next images.
    """
    wanted = np.arange(len(images)) if rows is None else np.asarray(rows, np.int64)
    runtime = Runtime(
        backbone,
        device=device,
        precision=precision,
        batch_size=batch_size,
        compile=compile,
        settings=settings,
        count=len(wanted) * views,
    )
    augmentation = checked_augmentation(views, augmentation)
    with keep_pages():
        yield from compute(
            images, runtime, wanted, views=views, augmentation=augmentation, workers=workers
        )


def canary_features(
    backbone: Backbone,
    images: Sequence[bytes],
    *,
    device: str = "auto",
    precision: str = "float32",
    settings: Settings | None = None,
) -> dict[str, np.ndarray]:
    """Compute the features of canary images.

    Parameters
    ----------
    backbone : Backbone
        The network.
    images : sequence of bytes
        Image files, as `featcache.pixels.canary.images` makes them or a store keeps them.
    device, precision, settings
        As for `features`.

    Returns
    -------
    dict of str to ndarray of float32, shape (k, ...)
        By tap.
    """
    runtime = Runtime(
        backbone, device=device, precision=precision, settings=settings, count=len(images)
    )
    with keep_pages():
        return of_canaries(runtime, images)


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
    views: int = 1,
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
    views : int
        Augmented views of each image; with more than one the features are (n, views, d).
    augmentation : Augmentation, optional
        What views look like; left out, the default for ``views > 1``, and none for one view.
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
    augmentation = checked_augmentation(views, augmentation)
    _check(store_dtype, on_error, max_failures)
    key = RequestKey(
        **backbone.request,
        precision=precision,
        store_dtype=store_dtype,
        augmentation=None if augmentation is None else augmentation.to_dict(),
        views=views,
    )
    path = os.path.realpath(path)
    store = None if retry_failed else reuse.complete_store(path, images, key)
    if store is not None:
        return _skipped(store, images)
    job = _Job(
        images=images,
        backbone=backbone,
        path=path,
        key=key,
        devices=[device] if isinstance(device, str) else list(device),
        batch_size=batch_size,
        compile=compile,
        augmentation=augmentation,
        workers=workers,
        on_error=on_error,
        max_failures=max_failures,
        retry_failed=retry_failed,
        progress=progress,
    )
    with interruptible(), keep_pages():
        return job.run()


def _check(store_dtype: str, on_error: str, max_failures: float) -> None:
    if store_dtype not in ("float32", "float16"):
        raise ExtractionError(f"store_dtype is float32 or float16, not {store_dtype!r}")
    if on_error not in ("skip", "fail"):
        raise ExtractionError(f"on_error is 'skip' or 'fail', not {on_error!r}")
    if not 0 <= max_failures <= 1:
        raise ExtractionError(f"max_failures is a share from 0 to 1, not {max_failures}")


def _skipped(store: FeatureStore, images: ImageSet) -> FeatureStore:
    """Return the store that is there already, with the labels as they are now."""
    summary = Summary(len(images), failed=len(store.failures), skipped=True)
    if not reuse.same_labels(store, images):
        store = store.relabel(images)
        summary.relabelled = True
    store.extraction = summary
    return store


@dataclass
class _Job:
    """One call of `extract` that has something to do."""

    images: ImageSet
    backbone: Backbone
    path: str
    key: RequestKey
    devices: list[str]
    batch_size: int | None
    compile: bool | None
    augmentation: Augmentation | None
    workers: int | None
    on_error: str
    max_failures: float
    retry_failed: bool
    progress: bool | None

    def __post_init__(self) -> None:
        self.summary = Summary(len(self.images))

    def run(self) -> FeatureStore:
        """Open the file, take over what is there, compute the rest, finish."""
        started = time.perf_counter()
        known = reuse.known(self.path, self.key) or self._loaded()
        summary = self.summary
        with FeatureWriter.open(
            self.path,
            self.images,
            known.shapes,
            fingerprint=known.fingerprint,
            meta=self._meta(),
            canaries=_canary_images(self.backbone),
            retry_failed=self.retry_failed,
        ) as writer:
            reuse.forget_changed(writer, self.images)
            there = np.count_nonzero(writer.status == DONE)
            summary.copied = int(there) + reuse.take_over(
                writer,
                self.images,
                retry_failed=self.retry_failed,
                by_content=self.augmentation is None,
            )
            summary.failed = int(np.count_nonzero(writer.status == FAILED))
            if len(writer.pending):
                self._compute(writer, known.fingerprint)
            summary.seconds["total"] = time.perf_counter() - started
            writer.set_meta("run", summary.to_dict())
            store = writer.finish(self.max_failures)
        store.extraction = summary
        return store

    def _loaded(self) -> reuse.Known:
        """Load the network and ask it."""
        fingerprint = self.backbone.fingerprint(
            precision=self.key.precision,
            store_dtype=self.key.store_dtype,
            augmentation=self.key.augmentation,
            views=self.key.views,
        )
        views = (self.key.views,) if self.key.views > 1 else ()
        shapes = {tap: (*views, *shape) for tap, shape in self.backbone.shapes.items()}
        return reuse.Known(fingerprint, shapes)

    def _meta(self) -> dict[str, Any]:
        command = Path(sys.argv[0]).name
        meta = {"request": json.loads(self.key.to_json()), "versions": _versions()}
        if command == "featcache":
            meta["command"] = shlex.join([command, *sys.argv[1:]])
        return meta

    def _compute(self, writer: FeatureWriter, expected: Fingerprint) -> None:
        """Compute what is pending."""
        difference = expected.diff(self._loaded().fingerprint, ("stored", "loaded"))
        if difference:
            raise FingerprintMismatch(
                f"The network is not the one that {self.path} was begun with:\n{difference}\n"
                f"Choose another file with -o, or delete it: rm {self.path}*"
            )
        pending = writer.pending
        clock = Clock()
        runtime = self._runtime(len(pending) * self.key.views, self._recorded(writer))
        writer.set_meta("settings", runtime.settings.to_dict())
        self._check_canaries(writer, runtime)
        bar = progress_bar(
            self.progress,
            total=len(self.images),
            initial=len(self.images) - len(pending),
            unit="img",
            desc=self.backbone.name,
        )
        self._choose_workers(writer, runtime)
        started = time.perf_counter()
        with bar, _marked_as_running(writer):
            if len(self.devices) > 1:
                self._fill_in_parallel(writer, runtime, pending, clock, bar)
            else:
                self._fill(writer, runtime, pending, clock, bar)
                self._fill_overtaken(writer, runtime, pending, clock, bar)
        if len(self.devices) == 1:  # what the file says: features may not have been finite
            self.summary.computed = int(np.count_nonzero(writer.status[pending] == DONE))
            self.summary.failed = int(np.count_nonzero(writer.status == FAILED))
        elapsed = time.perf_counter() - started
        self.summary.measure(clock, elapsed, runtime.settings, self.workers or 0)

    def _choose_workers(self, writer: FeatureWriter, runtime: Runtime) -> None:
        """Say how many processes decode, if the user did not.

        After a run that ended without a word they do in any case: an image that crashes its decoder
        would take this run down as well, and so every run.
        """
        if self.workers is None:
            crashed = (writer.meta.get("run") or {}).get("state") == "running"
            self.workers = default_workers(runtime) or (int(crashed) and (os.cpu_count() or 1))

    def _runtime(self, count: int, recorded: Settings | None) -> Runtime:
        return Runtime(
            self.backbone,
            device=self.devices[0],
            precision=self.key.precision,
            batch_size=self.batch_size,
            compile=self.compile,
            settings=recorded,
            count=count,
            processes=len(self.devices),
        )

    def _fill(
        self, writer: FeatureWriter, runtime: Runtime, rows: np.ndarray, clock: Clock, bar: Any
    ) -> None:
        """Compute rows in this process."""
        settings = runtime.settings
        chunks = compute(
            self.images,
            runtime,
            rows,
            views=self.key.views,
            augmentation=self.augmentation,
            workers=self.workers,
            clock=clock,
        )
        with Recorder(writer, clock) as recorder, contextlib.closing(chunks):
            for chunk in chunks:
                if runtime.settings != settings:  # memory ran out, and the batch was halved
                    settings = runtime.settings
                    writer.set_meta("settings", settings.to_dict())
                recorder.put(chunk)
                self._advance(bar, len(chunk.rows), chunk.failures)

    def _fill_overtaken(
        self, writer: FeatureWriter, runtime: Runtime, rows: np.ndarray, clock: Clock, bar: Any
    ) -> None:
        """Compute once more what was replaced while the run went on."""
        for _ in range(_ROUNDS):
            reuse.forget_overtaken(writer, self.images, rows)
            rows = writer.pending
            if not len(rows):
                return
            bar.total += len(rows)
            self._fill(writer, runtime, rows, clock, bar)

    def _fill_in_parallel(
        self, writer: FeatureWriter, runtime: Runtime, rows: np.ndarray, clock: Clock, bar: Any
    ) -> None:
        """Compute rows in one process a device."""
        work = parallel.Work(
            path=self.path,
            images=self.images,
            backbone=self.backbone,
            settings=runtime.settings,
            views=self.key.views,
            augmentation=self.augmentation,
            workers=self.workers,
        )
        runtime.release()
        writer.share()
        parallel.fill(
            work,
            rows,
            self.devices,
            clock,
            lambda progress: self._advance(bar, progress.computed, progress.failures),
        )

    def _advance(self, bar: Any, computed: int, failures: Sequence[Failed]) -> None:
        bar.update(computed + len(failures))
        self.summary.computed += computed
        self.summary.failed += len(failures)
        if failures and self.on_error == "fail":
            first = failures[0]
            raise ExtractionError(
                f"{self.images.ids[first.row]} failed ({first.stage}: {first.reason}). What was "
                f"computed is kept in {self.path}.partial. Mend or remove the image, or leave out "
                "--on-error fail, and run the same command again."
            )

    def _recorded(self, writer: FeatureWriter) -> Settings | None:
        """Return the settings of the rows that are there already."""
        records = [writer.meta.get("settings")]
        records += [source.meta.get("settings") for source in writer.sources()]
        for record in records:
            if record and (settings := Settings.from_dict(record)):
                return settings
        return None

    def _check_canaries(self, writer: FeatureWriter, runtime: Runtime) -> None:
        """Store the canaries' features; compare them with those of rows that are there already."""
        canaries = writer.canaries
        if canaries is None:
            return
        found = of_canaries(runtime, canaries.images)
        earlier = [canaries, *(source.canaries for source in writer.sources())]
        for other in earlier:
            if other is None or not other.features or other.images != canaries.images:
                continue
            for tap, values in other.features.items():
                error = np.abs(found[tap] - values).max() / max(np.abs(values).max(), 1e-30)
                if not error <= _CANARY_TOLERANCE[self.key.precision]:
                    raise FingerprintMismatch(
                        f"The features of test images differ from those that {self.path} was begun "
                        f"with by {error:.1e} of the largest: this machine decodes, resizes or "
                        "computes otherwise (other versions of Pillow or torch?). Begin anew: "
                        f"rm {self.path}*"
                    )
        if not canaries.features:
            writer.set_canaries(found)
        if self.key.precision != "float32":
            self.summary.rounding = _rounding(self.backbone, canaries.images, found)


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
    plain = of_canaries(Runtime(backbone, device="cpu"), images)
    worst = 0.0
    for tap, value in found.items():
        expected = plain[tap].reshape(len(images), -1)
        distance = np.linalg.norm(value.reshape(len(images), -1) - expected, axis=1)
        length = np.maximum(np.linalg.norm(expected, axis=1), np.finfo(np.float32).tiny)
        worst = max(worst, float(np.median(distance / length)))
    return worst


def _versions() -> dict[str, str]:
    names = ("featcache", "torch", "torchvision", "numpy", "pillow")
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
