"""What happens to chunks of features: a thread writes them while the next are computed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Self

from featcache.extraction.computing import Chunk, Clock
from featcache.store.writer import FeatureWriter

__all__ = ["Recorder"]

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
