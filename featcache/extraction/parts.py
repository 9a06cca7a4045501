"""A job in parts: each device, or each task of an engine, fills a file of its own.

Beside ``flowers.h5`` there are, until it is complete:

======================================= =========================================================
``flowers.h5.partial.plan``             JSON: what every part must know, and where each begins
``flowers.h5.part-0003``                part 3; until it is complete it has a ``.partial`` file and
                                        a lock of its own
``flowers.h5.old-part-0003``            a part of an earlier plan, until its rows were copied
======================================= =========================================================

A task gets the path of the store and the number of a part, and reads the rest from the plan. The
disk says what is done: a part that is complete is not computed again, whatever became of the future
that computed it, and a torn one is resumed. A task stops between two batches, with everything
committed, as soon as the plan is written anew. So Ctrl-C reaches the tasks on every machine, and
tasks that an earlier run left behind let go of their parts.

Settings are chosen once. Every part begins where a batch begins, and every image keeps its slot in
the batch, so the features are those of one process, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import (
    ExtractionError,
    FeatcacheError,
    Interrupted,
    StoreLocked,
    TooManyFailures,
)
from featcache.extraction import reuse
from featcache.extraction.canaries import compare_canaries
from featcache.extraction.filling import Job, filled
from featcache.extraction.plan import Plan, agree, stopping
from featcache.extraction.stream import Options
from featcache.extraction.summary import Summary, new_clock
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Settings, default_threads, select_device
from featcache.pixels.preprocessing import Preprocessing
from featcache.pixels.views import Augmentation
from featcache.store import disk
from featcache.store.file import StoreFile
from featcache.store.format import FAILED
from featcache.store.store import FeatureStore
from featcache.store.writer import check_replaceable, locked, merge
from featcache.system.console import check_stopped, progress_bar
from featcache.system.memory import reuse_memory
from featcache.system.processes import die_with_parent, start_processes

_TRIES = 3  # how often a part is submitted at most
_GRACE = 4.0  # seconds that tasks have to stop
_LOOK = 1.0  # seconds between two looks at the progress
_WAIT = 60.0  # seconds to wait for the lock of a task that an earlier run left behind


# --- in the main process --------------------------------------------------------------------------


def in_parts(
    job: Job,
    summary: Summary,
    devices: Sequence[str],
    parts: int | None,
    executor: Executor | None,
    max_failures: float | None,
) -> FeatureStore:
    """Have the parts computed, and merge them into the file of the job.

    The parameters are those of `featcache.extraction.extract.extract`, and `job` and `summary` as
    for `featcache.extraction.filling.filled`.
    """
    main = sys.modules["__main__"]
    if executor is None and sys.modules.get("__mp_main__", main) is not main:
        raise SystemExit(1)  # a process of ours imports the script; the one that started it says so
    path, images, backbone, options = job.path, job.images, job.backbone, job.options
    named: tuple[str, ...] = ()
    if executor is not None:
        named = _portable(images, backbone, devices, parts)
    elif len(kinds := {select_device(device).type for device in devices}) > 1:
        raise ExtractionError(
            f"The devices of one job are of one kind, as different kinds give different bits; "
            f"{', '.join(sorted(kinds))} came. Name those of one kind with --device."
        )
    started = time.perf_counter()
    known = job.layout
    check_replaceable(path, known.fingerprint)
    wanted = Plan(
        path=path,
        request=job.request,
        fingerprint=known.fingerprint.to_dict(),
        shapes={tap: list(shape) for tap, shape in known.shapes.items()},
        images=images.opened_with,
        ids=_digest(images),
        n=len(images),
        parts=parts or len(devices),
        options=asdict(replace(options, augmentation=None, progress=False)),
        threads=default_threads(),
    )
    bar = progress_bar(options.progress, total=len(images), unit="img", desc=backbone.name)
    with locked(path)[1], bar:
        job.locked()
        plan = agree(wanted, options)

        def pool() -> contextlib.AbstractContextManager[Executor]:
            if executor is None:
                return _processes(devices[: plan.parts], images, backbone)
            return contextlib.nullcontext(executor)

        _recheck(plan, images, options)
        loop = time.perf_counter()
        try:
            results = _fill(plan, pool, named, lambda: bar.update(plan.done - bar.n))
        except BaseException:
            if plan.settings is None and not plan.earlier:  # nothing was begun
                disk.remove(reuse.plan_file(path))
            raise
        _summarize(plan, results, time.perf_counter() - loop, summary)
        plan.merging = True
        plan.write()
    summary.seconds["total"] = time.perf_counter() - started
    try:
        store = merge(
            path,
            images.tables,
            plan.files,
            run=summary.to_dict(),
            max_failures=max_failures,
            wait=_GRACE,
        )
    except TooManyFailures:
        replace(plan, merging=False).write()  # the next run looks at the images that failed
        raise
    reuse.remove_parts(path)
    summary.copied, summary.failed = len(store) - summary.computed, len(store.failures)
    return store


def _portable(
    images: ImageSet, backbone: Backbone, devices: Sequence[str], parts: int | None
) -> tuple[str, ...]:
    """Return what a task must be told beside path and number, or say what cannot be told."""
    if not parts:
        raise ExtractionError("An executor needs the number of parts: parts=20, for instance.")
    if len(devices) > 1:
        raise ExtractionError("With an executor name one device, the one of every task.")
    if backbone.source == "module":
        raise ExtractionError(
            f"The tasks of an executor cannot be sent {backbone.name}, a network in memory. Name a "
            "function that makes it, package.module:callable, or leave out executor."
        )
    if images.opened_with is None:
        raise ExtractionError(
            f"The tasks of an executor cannot list {images.source} by themselves: these images are "
            "in memory, or a selection. Keep arrays in a file (np.save), images in a folder, a "
            "selection as a CSV file of its ids, and open that; or leave out executor."
        )
    return (backbone.name,) if backbone.source == "callable" else ()


def _digest(images: ImageSet) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(images), 65_536):
        digest.update("\0".join([*images.ids[start : start + 65_536], ""]).encode())
    return digest.hexdigest()


def _recheck(plan: Plan, images: ImageSet, options: Options) -> None:
    """Take up again the complete parts whose images changed since, or failed and are retried."""
    for k, file in enumerate(plan.files):
        if plan.merging or k in plan.missing:
            continue
        opened = StoreFile(file)
        entries = opened.read("rows")
        failures = opened.failures(np.flatnonzero(entries["status"] == FAILED))
        opened.close()
        retried = any(options.retry_failed or failure.stage == "system" for failure in failures)
        part, rows = images.select(plan.rows(k)), np.arange(len(entries))
        if retried or not reuse.unchanged(part, rows, entries, rehash=options.rehash).all():
            disk.rename(file, f"{file}.partial")


def _summarize(
    plan: Plan, results: Sequence[Mapping[str, Any]], seconds: float, summary: Summary
) -> None:
    """Say what the tasks did, and compare what their machines made of the test images."""
    opened = [StoreFile(file) for file in plan.files if Path(file).exists()]
    compare_canaries(plan.path, plan.request["precision"], [file.canaries for file in opened])
    failed = [np.count_nonzero(file.read("rows")["status"] == FAILED) for file in opened]
    for file in opened:
        file.close()
    summary.computed = sum(result["computed"] for result in results)
    summary.cut_off = sum(result["cut_off"] for result in results)
    summary.failed = int(sum(failed))
    summary.copied = plan.n - summary.computed - summary.failed
    times = [result["seconds"] for result in results if "loop" in result["seconds"]]
    if times:
        clock = {name: sum(each[name] for each in times) for name in new_clock()}
        summary.measure(clock, seconds, plan.settings or {})
        summary.rounding = max(result["rounding"] or 0.0 for result in results) or None


def _fill(
    plan: Plan,
    pool: Callable[[], contextlib.AbstractContextManager[Executor]],
    named: tuple[str, ...],
    look: Callable[[], None],
) -> list[dict[str, Any]]:
    """Submit the parts that are missing, again if futures are lost; return what tasks returned."""
    results: list[dict[str, Any]] = []
    lost: dict[int, Exception] = {}
    for _ in range(_TRIES):
        with pool() as executor:
            if plan.settings is None:
                calls: dict[int, tuple[Any, ...]] = {0: (choose_settings, plan.path, *named)}
                chosen, lost = _run(plan, executor, calls, look)
                if lost:
                    continue
                plan.cut(chosen[0])
            calls = {k: (extract_part, plan.path, k, *named) for k in plan.missing}
            found, lost = _run(plan, executor, calls, look)
            results += found.values()
        if not plan.missing:
            return results
    k = min(lost or plan.missing)
    error = lost.get(k)
    kept = "What was computed is kept: run" if plan.done else "Run"
    raise ExtractionError(
        f"{plan.path} is not complete after {_TRIES} attempts; part {k}: {type(error).__name__}: "
        f"{str(error).rstrip('.')}. {kept} the same command again to go on."
    ) from error


def _run(
    plan: Plan, executor: Executor, calls: Mapping[int, tuple[Any, ...]], look: Callable[[], None]
) -> tuple[dict[int, Any], dict[int, Exception]]:
    """Make calls, and return by number what they returned, and why others returned nothing."""
    futures: dict[Future[Any], int] = {}
    found: dict[int, Any] = {}
    lost: dict[int, Exception] = {}
    try:
        for k, call in calls.items():
            futures[executor.submit(*call)] = k
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, _LOOK, FIRST_COMPLETED)
            for future in done:
                try:
                    found[futures[future]] = future.result()
                except Exception as error:
                    if isinstance(error, FeatcacheError) and not isinstance(error, StoreLocked):
                        raise
                    # A worker was killed, or a task of an earlier run has not let go yet.
                    lost[futures[future]] = error
            look()
            check_stopped()
    except BaseException:
        for future in futures:
            future.cancel()
        with contextlib.suppress(FeatcacheError):  # where the disk is full, tasks stop anyway
            replace(plan, stopped=True).write()
        wait(futures, _GRACE)
        raise
    return found, lost


# --- processes of our own -------------------------------------------------------------------------

_given: tuple[ImageSet, Backbone, str] | None = None  # with the device of this process


@contextlib.contextmanager
def _processes(devices: Sequence[str], images: ImageSet, backbone: Backbone) -> Iterator[Executor]:
    """Start a process for each device, and give each images and network once.

    They are spawned: forked ones could not use a GPU that this process has touched.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    names = context.SimpleQueue()
    for device in devices:
        names.put(device)
    pool = ProcessPoolExecutor(
        len(devices), context, _start_process, (names, images, backbone, os.getpid())
    )
    try:
        start_processes(pool, len(devices), {signal.SIGINT, signal.SIGHUP}, "Name one device")
        yield pool
    finally:
        pool.shutdown(wait=False)
        for process in set(multiprocessing.active_children()) - others:
            process.join(1)  # it ends by itself, unless its task has not stopped
            process.kill()
        pool.shutdown()


def _start_process(names: Any, images: ImageSet, backbone: Backbone, parent: int) -> None:
    """Prepare a process; SIGINT stays blocked, and the kernel kills it if its parent dies."""
    from tqdm import tqdm

    global _given
    _given = images, backbone, names.get()
    die_with_parent(parent)
    tqdm.set_lock(threading.RLock())  # tqdm's own, a semaphore of the system, would outlive a kill


# --- in a task ------------------------------------------------------------------------------------

_one_at_a_time = threading.Lock()  # torch's threads and precision belong to the whole process


def choose_settings(path: str, network: str | None = None) -> dict[str, Any]:
    """Return the settings of all parts, as this machine chooses them.

    Parameters
    ----------
    path, network
        As for `extract_part`.
    """
    with _one_at_a_time, reuse_memory():
        plan, job = _planned(path, network)
        settings = job.options.runtime(job.backbone, len(job.images)).settings
    threads = plan.threads if settings.device == "cpu" else 1
    return replace(settings, threads=threads, fixed_slots=True).to_dict()


def extract_part(path: str, k: int, network: str | None = None) -> dict[str, Any]:
    """Compute one part of a job, unless it is complete.

    Parameters
    ----------
    path : str
        The store whose plan is followed.
    k : int
        Number of the part.
    network : str, optional
        ``package.module:callable``, if the network comes from one. No file can make this process
        import a module: the plan's must be the same.

    Returns
    -------
    dict
        The `Summary` of the part.

    Raises
    ------
    Interrupted
        The job was stopped, or another run has begun. Every finished batch is kept.
    ExtractionError
        This process lists other images, or knows another network, than the plan says, or cannot
        compute with its settings.
    StoreLocked
        Another task has been filling the part for a minute.
    """
    with _one_at_a_time, reuse_memory():
        check = stopping(path)
        plan, job = _planned(path, network)
        assert plan.settings is not None
        part = replace(
            job,
            path=plan.files[k],
            images=job.images.select(plan.rows(k)),
            options=replace(job.options, batch_size=None, compile=None),  # as settings say
            known=plan.layout,
            tables={"ids": job.images.ids[plan.rows(k)]},
            earlier=plan.earlier,
            settings=Settings.from_dict(plan.settings),
            wait=_WAIT,
            check=check,
        )
        summary = Summary(len(part.images))
        if k not in plan.missing:
            return summary.to_dict()
        with filled(part, summary) as writer:
            writer.set_meta("run", summary.to_dict())
            writer.finish_part()
    return summary.to_dict()


def _planned(path: str, network: str | None) -> tuple[Plan, Job]:
    """Return the plan, and the whole job that it describes."""
    plan = Plan.read(path)
    if plan is None or plan.stopped:
        raise Interrupted(f"The job of {path} was stopped. Run its command again to go on.")
    options, augmentation = Options(**plan.options), plan.request["augmentation"]
    if augmentation is not None:
        options = replace(options, augmentation=Augmentation.from_dict(augmentation))
    if _given is None:
        images, backbone = _opened(json.dumps([plan.images, plan.ids, plan.request]), network)
    else:
        images, backbone, device = _given
        options = replace(options, device=device)
    return plan, Job(path, images, backbone, options, plan.request)


@functools.lru_cache(maxsize=1)  # for the next part
def _opened(planned: str, network: str | None) -> tuple[ImageSet, Backbone]:
    """List the images and build the network that a plan names."""
    spec, ids, request = json.loads(planned)
    images = ImageSet.open(**spec)
    if _digest(images) != ids:
        raise ExtractionError(
            f"A task lists {len(images):,} images in {images.source}, and not the same ones as the "
            "run that sent it. Every machine must see the same files; if they have changed, run "
            "the command again."
        )
    name = request["backbone"]
    # Whatever the source is said to be: a name with a colon would be imported.
    if (request["source"] == "callable" or ":" in name) and name != network:
        raise ExtractionError(f"The plan names the network {name}, the task {network}.")
    backbone = Backbone(
        f"timm/{name}" if request["source"] == "timm" else name,
        weights="auto" if request["weights"] == "as given" else request["weights"],
        layers=request["taps"],
        partial=request.get("partial", False),
        weights_key=request.get("weights_key"),
        preprocessing=Preprocessing.from_dict(request["preprocessing"]),
    )
    backbone.recall(request)
    here = backbone.request
    of_plan = {key: request.get(key) for key in here}
    if different := reuse.differing(of_plan, here, ("plan", "here")):
        raise ExtractionError(f"A task knows another network {name}:\n{different}")
    return images, backbone
