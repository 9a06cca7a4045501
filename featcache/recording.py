"""What happens to chunks of features: a thread writes them while the next are computed.

And what a signal does: SIGINT and SIGTERM stop the computing, never the writing.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from featcache.computing import Chunk, Clock
from featcache.errors import Interrupted
from featcache.writer import FeatureWriter

__all__ = ["Recorder", "interruptible"]

_IN_LINE = 4  # chunks that may wait for the disk


class Recorder:
    """A thread that writes chunks in the order in which they come.

    Use it as a context manager: on leaving, however that comes about, everything that was handed
    over is written and on the disk.

    Parameters
    ----------
    writer : FeatureWriter
        Where to.
    clock : Clock
        Is told the time it took.
    """

    def __init__(self, writer: FeatureWriter, clock: Clock) -> None:
        self._writer = writer
        self._clock = clock
        self._queue: queue.Queue[Chunk | None] = queue.Queue(_IN_LINE)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="featcache-recorder")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, chunk: Chunk) -> None:
        """Hand over a chunk; waits while several are in line. Raises what writing raised."""
        started = time.perf_counter()
        self._queue.put(chunk)
        self._clock.blocked += time.perf_counter() - started
        self._raise()

    def __exit__(self, kind: object, *rest: object) -> None:
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            self._guard(self._write, chunk)
        self._guard(self._writer.commit)

    def _guard(self, function: Callable[..., None], *args: Chunk) -> None:
        """Keep the first error for the main thread; after it, write nothing more."""
        if self._error is None:
            try:
                function(*args)
            except Exception as error:
                self._error = error

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
            stat = {"size": failed.size, "mtime_ns": failed.mtime_ns}
            self._writer.fail(failed.row, failed.stage, failed.reason, **stat)
        self._clock.write += time.perf_counter() - started


class _Stopped(BaseException):
    """Raised by the signal handler; no library catches it."""


@contextlib.contextmanager
def interruptible(
    *numbers: signal.Signals,
) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`, when everything within is wound up.

    The first of them raises an exception where the main thread is; further ones are ignored while
    rows are committed. Outside the main thread Python delivers no signals, and nothing changes.

    Parameters
    ----------
    numbers : signal.Signals
        Other signals than these two.

    Raises
    ------
    Interrupted
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = numbers or (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: object) -> None:
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
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
