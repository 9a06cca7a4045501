"""Fill one file in one process: copy the rows that are there, compute the others, write them.

The file is a whole store or a part of one (`featcache.extraction.parts`).
"""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import ExtractionError, FingerprintMismatch
from featcache.extraction import reuse
from featcache.extraction.canaries import check_canaries, check_same_network, usable_canaries
from featcache.extraction.stream import Options, WriterThread, compute
from featcache.extraction.summary import Summary, new_clock
from featcache.fingerprint import Fingerprint, differences
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Settings
from featcache.pixels.decode import NO_RANGE
from featcache.store.format import DONE, FAILED
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter
from featcache.system.console import check_stopped, doing, progress_bar
from featcache.system.tables import quoted

# Images that are replaced again and again during a run are left to the next one.
_ROUNDS = 3
_REPORT_SECONDS = 1.0  # between two reports of progress in the file


@dataclass(frozen=True)
class Job:
    """Features of images that go into a file.

    Attributes
    ----------
    path : str
        The file to be.
    images : ImageSet
        The images.
    backbone : Backbone
        The network.
    options : Options
        How features are computed.
    request : dict
        The features that are asked for, as JSON values.
    known : reuse.StoredLayout, optional
        Fingerprint and shapes. Left out: those that a file records, or those of the network.
    tables : dict of str to ndarray, optional
        Columns of the file. Left out: those of the images.
    earlier, wait
        As for `featcache.store.writer.FeatureWriter.begin`.
    settings : Settings, optional
        Of a part: settings of the whole job, for a file in which none are recorded. A machine that
        cannot compute with them refuses to; without them it may choose others.
    locked : callable
        Called once the file is locked. What it raises ends the run.
    check : callable
        Called after every batch. What it raises ends the run; everything computed is kept.
    """

    path: str
    images: ImageSet
    backbone: Backbone
    options: Options
    request: dict[str, Any]
    known: reuse.StoredLayout | None = None
    tables: Mapping[str, np.ndarray] | None = None
    earlier: Sequence[str] = ()
    settings: Settings | None = None
    wait: float = 0
    locked: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None

    @property
    def layout(self) -> reuse.StoredLayout:
        """Fingerprint and shapes of the features."""
        if self.known is not None:
            return self.known
        for known in reuse.recorded(self.path):
            if not reuse.differing(known.request, self.request):
                return known
        return self.from_network()

    def from_network(self) -> reuse.StoredLayout:
        """Compute fingerprint and shapes from the network."""
        with doing(self.options.progress, "loading the network"):
            fingerprint = self.backbone.fingerprint(**reuse.of_features(self.request))
            views = (fingerprint.views,) if fingerprint.views > 1 else ()
            shapes = {tap: (*views, *shape) for tap, shape in self.backbone.shapes.items()}
        return reuse.StoredLayout(fingerprint, shapes, self.request)

    def check_code(self, store: FeatureStore) -> None:
        """Refuse a store that other code computed with the same weights.

        Of a network that comes as code only its features tell whether it is the same.
        """
        canaries = store.canaries
        if canaries is not None and self.backbone.is_code and not store.fingerprint.varying:
            settings = Settings.from_dict(store.meta.get("settings") or {})
            runtime = self.options.runtime(self.backbone, len(canaries.images), settings=settings)
            check_same_network(self.path, runtime, canaries)


@contextlib.contextmanager
def filled(job: Job, summary: Summary) -> Iterator[FeatureWriter]:
    """Fill a file, and yield its writer when no row is pending any more.

    The summary receives counts and times.
    """
    images, options, known = job.images, job.options, job.layout
    with FeatureWriter.begin(
        job.path,
        job.tables or images.tables,
        known.shapes,
        fingerprint=known.fingerprint,
        meta=_meta(job),
        canaries=usable_canaries(job.backbone),
        earlier=job.earlier,
        retry_failed=options.retry_failed,
        wait=job.wait,
    ) as writer:
        job.locked()
        reuse.copy_unchanged(writer, images, options)
        if writer.meta.get("run") is None and len(writer.pending) < len(images):
            writer.pack(writer.pending)  # what is new fills whole batches
        summary.copied = int(np.count_nonzero(writer.status == DONE))
        summary.failed = int(np.count_nonzero(writer.status == FAILED))
        if len(writer.pending):
            _check_network(writer, job.from_network().fingerprint)
            _compute(job, writer, summary)
        else:
            for source in writer.earlier_stores:
                job.check_code(source)
            reuse.copy_record(writer)
            canaries = writer.canaries
            if canaries and not canaries.features:  # no earlier file has them intact
                _check_network(writer, job.from_network().fingerprint)
                settings = _recorded(writer, job.settings)
                runtime = options.runtime(job.backbone, len(canaries.images), settings=settings)
                summary.rounding = check_canaries(writer, runtime)
        yield writer


def _check_network(writer: FeatureWriter, fingerprint: Fingerprint) -> None:
    difference = writer.fingerprint.diff(fingerprint, ("stored", "loaded"))
    if difference:
        raise FingerprintMismatch(
            f"The network is not the one that {writer.path} was begun with:\n{difference}\n"
            "Choose another file with -o; what was computed is left as it is."
        )


def _compute(job: Job, writer: FeatureWriter, summary: Summary) -> None:
    """Compute the pending rows."""
    pending, clock, images, options = writer.pending, new_clock(), job.images, job.options
    recorded = _recorded(writer, job.settings)
    asked = job.settings and recorded  # what every part repeats
    with doing(options.progress, "checking the network"):
        runtime = options.runtime(job.backbone, len(pending), settings=recorded)
        _check_settings(writer.path, asked, runtime.settings)
        summary.rounding = check_canaries(writer, runtime)
    bar = progress_bar(
        options.progress,
        total=len(images),
        initial=len(images) - len(pending),
        unit="img",
        desc=job.backbone.name,
    )
    crashed = (writer.meta.get("run") or {}).get("state") == "running"

    def fill(rows: np.ndarray) -> None:
        """Compute rows and write them."""
        used, reported = None, time.monotonic()
        places = writer.places(rows)
        batches = compute(
            images, runtime, rows, options, places=places, clock=clock, crashed=crashed
        )
        with WriterThread(writer, clock) as thread, contextlib.closing(batches):
            for batch in batches:
                if runtime.settings != used:  # the first time, or memory ran out: half a batch
                    used = runtime.settings
                    _check_settings(writer.path, asked, used)
                    writer.set_meta("settings", used.to_dict())
                thread.submit(batch)
                if time.monotonic() > reported + _REPORT_SECONDS:
                    reported = time.monotonic()  # for the process that waits for this part
                    rows_done = int(np.count_nonzero(writer.status))
                    writer.set_meta("run", {"state": "running", "rows": rows_done})
                bar.update(min(len(batch.rows), len(images) - bar.n))  # a replaced one counts once
                summary.cut_off += len(batch.cut_off)
                if batch.failures and options.on_error == "fail":
                    row, error = min(batch.failures.items())
                    raise ExtractionError(
                        f"{images.ids[row]} failed ({error}). What was computed is kept in "
                        f"{job.path}.partial. Mend or remove the image, or leave out --on-error "
                        "fail, and run the same command again."
                    )
                for row, error in batch.failures.items():
                    if NO_RANGE in error.reason:  # darker ones of its kind were taken for 8-bit
                        raise ExtractionError(
                            f"{images.ids[row]}: {error.reason}. Choose another file with -o then: "
                            f"{job.path}.partial may hold images that were taken for 8-bit ones."
                        )
                check_stopped()
                job.check()

    started = time.perf_counter()
    with bar, _marked_as_running(writer):
        fill(pending)
        for _ in range(_ROUNDS):
            reuse.recheck_replaced_files(writer, images, pending)
            if not len(again := writer.pending):
                break
            fill(again)
        # As the writer counts: features that are not finite are failures too.
        summary.computed = int(np.count_nonzero(writer.status[pending] == DONE))
        summary.failed = int(np.count_nonzero(writer.status == FAILED))
    summary.measure(clock, time.perf_counter() - started, runtime.settings.to_dict())


def _recorded(writer: FeatureWriter, settings: Settings | None) -> Settings | None:
    """Return the settings of the rows that are there already, or else those that are given."""
    there = [writer.meta.get("settings"), settings and settings.to_dict()]
    there += [source.meta.get("settings") for source in writer.earlier_stores]
    known = (Settings.from_dict(record) for record in there if record)
    return next(filter(None, known), None)


def _check_settings(path: str, asked: Settings | None, here: Settings) -> None:
    if asked in (None, here):
        return
    possible = "--no-compile or --device cpu (compile=False, device='cpu')"
    if asked.batch_size != here.batch_size:
        possible = f"--batch-size {here.batch_size} (batch_size={here.batch_size})"
    raise ExtractionError(
        f"This machine cannot compute {path} as the job asks:\n"
        f"{differences(asked.to_dict(), here.to_dict(), ('asked for', 'here'))}\n"
        "Let only machines of one kind take part, or run the command again with what all of them "
        f"can do, such as {possible}. What was computed is kept."
    )


@contextlib.contextmanager
def _marked_as_running(writer: FeatureWriter) -> Iterator[None]:
    """Mark the partial file while a run goes on; after a kill the next run finds the mark."""
    writer.set_meta("run", {"state": "running"})
    try:
        yield
    except BaseException:
        writer.set_meta("run", {"state": "stopped"})
        raise


def versions() -> dict[str, str]:
    """Return the versions of what features depend on."""
    found = {"python": platform.python_version()}
    for name in ("featcache", "torch", "torchvision", "numpy", "pillow", "pillow-heif"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _meta(job: Job) -> dict[str, Any]:
    """Return the request, the versions of libraries and the command, to record them in the file."""
    asked = job.backbone.asked
    asked = asked and {**asked, **reuse.of_features(job.request)}
    meta: dict[str, Any] = {"request": job.request, "asked": asked, "versions": versions()}
    command = Path(sys.argv[0]).name
    if command == "featcache":
        meta["command"] = " ".join(map(quoted, [command, *sys.argv[1:]]))
    return meta
