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
import queue
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from featcache import canary, reuse
from featcache.backbone import Backbone
from featcache.decoding import Augmentation
from featcache.errors import (
    DecodeError,
    ExtractionError,
    FingerprintMismatch,
    Interrupted,
)
from featcache.fingerprint import Fingerprint, RequestKey
from featcache.images import ImageSet
from featcache.layout import DONE, FAILED
from featcache.loading import Decoder, Failed, Loader, Tasks
from featcache.runtime import Runtime, Settings, keep_pages
from featcache.store import FeatureStore
from featcache.writer import FeatureWriter

__all__ = ["Chunk", "Summary", "canary_features", "extract", "features"]

# Largest difference of features, relative to the largest, that rounding explains.
_CANARY_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}


@dataclass(frozen=True)
class Chunk:
    """Features of a few images, as `features` yields them.

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
class Summary:
    """What an extraction did.

    Attributes
    ----------
    images : int
        Size of the image set.
    computed, copied, failed : int
        Images whose features were computed in this run, were taken from an earlier one, and are
        recorded as failed.
    relabelled : bool
        Labels were rewritten.
    skipped : bool
        There was nothing to do, and no weights were loaded.
    seconds : dict of str to float
        ``total``, and of it how long decoding (per worker), forward passes and writing took.
    bottleneck : str or None
        "decode", "forward" or "write".
    hint : str
        What would make it faster.
    settings : dict
        `featcache.runtime.Settings` of the forward pass.
    """

    images: int
    computed: int = 0
    copied: int = 0
    failed: int = 0
    relabelled: bool = False
    skipped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    bottleneck: str | None = None
    hint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        """Images computed a second, from the first batch to the last."""
        seconds = self.seconds.get("total", 0.0)
        return self.computed / seconds if seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "images_per_second": self.images_per_second}

    def __str__(self) -> str:
        if self.skipped:
            return f"nothing to do: the features of all {self.images:,} images are there"
        parts = [
            f"{self.computed:,} computed",
            f"{self.copied:,} reused",
            f"{self.failed:,} failed",
        ]
        return f"{self.images:,} images: {', '.join(parts)}"


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
    augmentation = _augmentation(views, augmentation)
    with keep_pages():
        yield from _computed(images, runtime, wanted, views, augmentation, workers)


def _augmentation(views: int, augmentation: Augmentation | None) -> Augmentation | None:
    if views < 1:
        raise ExtractionError(f"views is at least 1, not {views}")
    if views > 1:
        return augmentation or Augmentation()
    return augmentation


def _computed(
    images: ImageSet,
    runtime: Runtime,
    rows: np.ndarray,
    views: int,
    augmentation: Augmentation | None,
    workers: int | None,
) -> Generator[Chunk, None, None]:
    if not len(rows):
        return
    decoder = Decoder(images, runtime.backbone.preprocessing, augmentation, views)
    settings = runtime.settings
    tasks = Tasks(rows, max(1, settings.batch_size // views))
    loader = Loader(decoder, workers=_workers(workers), pin=runtime.device.type == "cuda")
    for batch in loader.batches(tasks):
        pixels = batch.pixels
        computed = runtime(pixels if augmentation is None else pixels.flatten(0, 1))
        found = {
            tap: (value if views == 1 else value.reshape(-1, views, *value.shape[1:]))[batch.slots]
            for tap, value in computed.items()
        }
        yield Chunk(batch.rows, found, batch.failures, batch.sha256, batch.size, batch.mtime_ns)


def _workers(asked: int | None) -> int:
    return min(8, os.cpu_count() or 1) if asked is None else asked


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
        Image files, as `featcache.canary.images` makes them or a store keeps them.
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
        return _canaries(runtime, images)


def _canaries(runtime: Runtime, images: Sequence[bytes]) -> dict[str, np.ndarray]:
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
        Images a forward pass; left out, chosen.
    workers : int, optional
        Processes that decode; 0 decodes in this one. Left out, chosen.
    device : str or sequence of str
        As for `featcache.runtime.select_device`. Several: one process each, which fill disjoint
        rows of the file.
    precision : {"float32", "bfloat16", "float16"}
        Of the forward pass.
    store_dtype : {"float32", "float16"}
        Of the stored features.
    compile : bool, optional
        Whether to use ``torch.compile``; left out, where it pays.
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
        The file cannot be written; as for `featcache.writer.FeatureWriter`.
    ExtractionError
        An image failed and `on_error` is ``"fail"``, or an argument is impossible.
    """
    augmentation = _augmentation(views, augmentation)
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
        runtime=lambda count, settings: Runtime(
            backbone,
            device=str(device),
            precision=precision,
            batch_size=batch_size,
            compile=compile,
            settings=settings,
            count=count,
        ),
        augmentation=augmentation,
        workers=workers,
        on_error=on_error,
        max_failures=max_failures,
        retry_failed=retry_failed,
        progress=sys.stderr.isatty() if progress is None else progress,
    )
    with _interruptible(), keep_pages():
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
    runtime: Callable[[int, Settings | None], Runtime]
    augmentation: Augmentation | None
    workers: int | None
    on_error: str
    max_failures: float
    retry_failed: bool
    progress: bool

    def run(self) -> FeatureStore:
        started = time.perf_counter()
        known = reuse.known(self.path, self.key) or self._loaded()
        summary = Summary(len(self.images))
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
            if len(writer.pending):
                self._compute(writer, known.fingerprint, summary)
            summary.failed = int(np.count_nonzero(writer.status == FAILED))
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

    def _compute(self, writer: FeatureWriter, expected: Fingerprint, summary: Summary) -> None:
        """Compute what is pending."""
        difference = expected.diff(self._loaded().fingerprint, ("stored", "loaded"))
        if difference:
            raise FingerprintMismatch(
                f"The network is not the one that {self.path} was begun with:\n{difference}\n"
                f"Choose another file with -o, or delete it: rm {self.path}*"
            )
        pending = writer.pending
        runtime = self.runtime(len(pending) * self.key.views, self._recorded(writer))
        settings = runtime.settings
        writer.set_meta("settings", settings.to_dict())
        self._check_canaries(writer, runtime)
        bar = tqdm(
            total=len(self.images),
            initial=len(self.images) - len(pending),
            unit="img",
            desc=self.backbone.name,
            disable=not self.progress,
            file=sys.stderr,
        )
        chunks = _computed(
            self.images, runtime, pending, self.key.views, self.augmentation, self.workers
        )
        with bar, _Written(writer) as written, contextlib.closing(chunks):
            for chunk in chunks:
                written.put(chunk)
                summary.computed += len(chunk.rows)
                bar.update(len(chunk.rows) + len(chunk.failures))
                if runtime.settings != settings:
                    settings = runtime.settings
                    writer.set_meta("settings", settings.to_dict())
                if chunk.failures and self.on_error == "fail":
                    first = chunk.failures[0]
                    raise ExtractionError(
                        f"{self.images.ids[first.row]} failed ({first.stage}: {first.reason}). "
                        f"What was computed is kept in {self.path}.partial. Mend or remove the "
                        "image, or leave out --on-error fail, and run the same command again."
                    )
        summary.settings = settings.to_dict()

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
        found = _canaries(runtime, canaries.images)
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


def _canary_images(backbone: Backbone) -> list[tuple[str, bytes]]:
    """Return the canaries that this preprocessing can take: not every one has its channels."""
    usable = []
    for name, image in canary.images():
        with contextlib.suppress(DecodeError):
            backbone.preprocessing(image)
            usable.append((name, image))
    return usable


def _versions() -> dict[str, str]:
    names = ("featcache", "torch", "torchvision", "numpy", "pillow")
    versions = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


class _Written:
    """A thread that writes chunks while the next ones are computed."""

    def __init__(self, writer: FeatureWriter) -> None:
        self._writer = writer
        self._queue: queue.Queue[Chunk | None] = queue.Queue(maxsize=4)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="featcache-writer")
        self.seconds = 0.0

    def __enter__(self) -> _Written:
        self._thread.start()
        return self

    def put(self, chunk: Chunk) -> None:
        """Hand over a chunk; waits while several are in line."""
        self._queue.put(chunk)
        self._raise()

    def __exit__(self, kind: object, *rest: object) -> None:
        """Write what is in line, and have all of it on the disk."""
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._write(chunk)
                except BaseException as error:
                    self._error = error
        self._writer.commit()

    def _write(self, chunk: Chunk) -> None:
        started = time.perf_counter()
        self._writer.write(
            chunk.rows,
            chunk.features,
            sha256=chunk.sha256,
            size=chunk.size,
            mtime_ns=chunk.mtime_ns,
        )
        for failed in chunk.failures:
            self._writer.fail(
                failed.row,
                failed.stage,
                failed.reason,
                size=failed.size,
                mtime_ns=failed.mtime_ns,
            )
        self.seconds += time.perf_counter() - started


class _Stopped(BaseException):
    """Raised by the signal handler; no library catches it."""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`, raised when everything is committed.

    Outside the main thread Python delivers no signals, and nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: object) -> None:
        # Whoever is impatient sends more of them; what follows takes a second or two.
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except _Stopped as stopped:
        raise Interrupted(
            f"Stopped by {stopped}. Everything computed is kept: run the same command again to "
            "go on."
        ) from None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
