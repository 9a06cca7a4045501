"""Pools of processes that start together, and end with the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from featcache.errors import ExtractionError

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; end it if that has happened.

    Parameters
    ----------
    parent : int
        Process id of the parent.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)


def start_processes(
    pool: ProcessPoolExecutor, count: int, blocked: Iterable[int], hint: str
) -> None:
    """Start the processes of a pool, with signals blocked from birth, whatever they inherit.

    Parameters
    ----------
    pool : ProcessPoolExecutor
        A pool that nothing was submitted to.
    count : int
        Number of its processes.
    blocked : iterable of int
        Signals that the processes do not receive.
    hint : str
        What the user may do where they cannot start: a sentence without its full stop.

    Raises
    ------
    ExtractionError
        They end at once, such as those that find no ``if __name__ == "__main__":`` in a script.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        try:
            pings = [pool.submit(os.getpid) for _ in range(count)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for ping in pings:
            ping.result()
    except BrokenProcessPool:
        raise ExtractionError(
            f"The processes end as soon as they are started. {hint}, or put what your script does "
            'below if __name__ == "__main__":'
        ) from None
