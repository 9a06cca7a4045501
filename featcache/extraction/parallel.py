"""Several devices fill one feature file: one process each, every one with rows of its own.

The processes share nothing but the file. The one that starts them shows the progress, stops them on
a signal, and finishes the file when all are done. If one of them dies, the others finish their
rows, and what it had written counts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import numpy as np

from featcache.errors import DecodeError, ExtractionError, FeatcacheError, Interrupted
from featcache.extraction.stream import Clock, Options, WriterThread, compute
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Settings
from featcache.store.writer import FeatureWriter
from featcache.system.console import interruptible
from featcache.system.memory import keep_pages

__all__ = ["Progress", "Work", "fill"]

# Forked children cannot use a GPU that their parent has touched.
_CONTEXT = multiprocessing.get_context("spawn")
_GRACE = 4.0  # seconds from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Work:
    """What every process needs to know.

    Attributes
    ----------
    path : str
        The store; its partial file is shared.
    images : ImageSet
        The images.
    backbone : Backbone
        The network; each process loads it for itself.
    options : Options
        Options of each process.
    settings : Settings
        For all of them.
    """

    path: str
    images: ImageSet
    backbone: Backbone
    options: Options
    settings: Settings


@dataclass(frozen=True)
class Progress:
    """Number of images of one chunk, and reasons of those that failed, by row."""

    rows: int
    failures: dict[int, DecodeError]


def fill(
    work: Work,
    rows: np.ndarray,
    devices: Sequence[str],
    clock: Clock,
    on_chunk: Callable[[int, Mapping[int, DecodeError]], None],
) -> None:
    """Compute rows on several devices at once.

    Parameters
    ----------
    work : Work
        What is done.
    rows : ndarray of int64
        The rows.
    devices : sequence of str
        One process each.
    clock : Clock
        Is told the times of all processes together.
    on_chunk : callable
        Called with the fields of the `Progress` of each chunk.

    Raises
    ------
    ExtractionError
        A process failed or died; the others have finished.
    """
    parts = np.array_split(rows, len(devices))
    crew = [_Hand(work, device, part) for device, part in zip(devices, parts, strict=True)]
    try:
        working = {hand.receiver: hand for hand in crew}
        while working:
            for ready in wait(list(working)):
                assert isinstance(ready, Connection)
                message = working[ready].next_message()
                if message is None:
                    del working[ready]
                elif isinstance(message, Clock):
                    clock.add(message)
                else:
                    on_chunk(message.rows, message.failures)
    finally:
        for hand in crew:
            hand.stop()
        for hand in crew:
            hand.join()
    troubles = [hand.trouble for hand in crew if hand.trouble]
    if troubles:
        raise ExtractionError(
            f"{'; '.join(troubles)}. Everything computed is kept: run the same command again to "
            "go on."
        )


class _Hand:
    """One process, as its parent sees it."""

    def __init__(self, work: Work, device: str, rows: np.ndarray) -> None:
        self.device = device
        self.trouble = ""
        self.receiver, sender = _CONTEXT.Pipe(duplex=False)
        self.process: BaseProcess = _CONTEXT.Process(
            target=_run, args=(work, device, rows, sender), name=f"featcache-{device}", daemon=False
        )
        # Inherited: while the process imports torch it could only answer Ctrl-C with a traceback.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self.process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        sender.close()

    def next_message(self) -> Clock | Progress | None:
        """Return what the process sent, None when it will send no more."""
        try:
            message = self.receiver.recv()
        except (EOFError, OSError):
            self.process.join()
            self._look_at(self.process.exitcode)
            return None
        if isinstance(message, str):
            self.trouble = f"{self.device}: {message}"
            return self.next_message()
        return message  # type: ignore[no-any-return]

    def _look_at(self, status: int | None) -> None:
        if status and not self.trouble:
            how = f"status {status}" if status > 0 else signal.Signals(-status).name
            self.trouble = f"The process of {self.device} ended with {how}"

    def stop(self) -> None:
        """Ask the process to commit and end."""
        if self.process.is_alive():
            self.process.terminate()

    def join(self) -> None:
        """Wait until it has."""
        self.process.join(_GRACE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _run(work: Work, device: str, rows: np.ndarray, sender: Connection) -> None:
    """Do the work of one process."""
    with sender, contextlib.suppress(Interrupted, BrokenPipeError):
        try:
            # Ctrl-C reaches the parent, which sends SIGTERM.
            with interruptible(signal.SIGTERM), keep_pages():
                _fill(work, device, rows, sender)
        except FeatcacheError as error:
            if isinstance(error, Interrupted):
                raise
            sender.send(str(error))
        except Exception as error:
            sender.send("".join(traceback.format_exception(error)))


def _fill(work: Work, device: str, rows: np.ndarray, sender: Connection) -> None:
    parent = os.getppid()
    options = replace(work.options, device=device)
    runtime = options.runtime(work.backbone, len(rows), settings=work.settings)
    clock = Clock()
    chunks = compute(work.images, runtime, rows, options, clock=clock)
    with FeatureWriter.open_shared(work.path, rows) as writer:
        with WriterThread(writer, clock) as thread, contextlib.closing(chunks):
            for chunk in chunks:
                thread.submit(chunk)
                sender.send(Progress(len(chunk.rows), chunk.failures))
                if os.getppid() != parent:
                    return  # the parent was killed: let another run take the file
        sender.send(clock)
