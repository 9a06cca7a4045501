"""Free memory, the most that was used, and reuse of memory between batches."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# glibc's numbers in <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1


@contextlib.contextmanager
def reuse_memory() -> Iterator[bool]:
    """Stop glibc from returning freed memory to the system between batches.

    A large tensor is by default a mapping of its own, whose every page the kernel must clear again
    for the next batch. Within the context such memory stays in the heap; on leaving, what is free
    of it goes back to the system. The thresholds themselves stay raised until the process ends:
    glibc cannot tell what they were.

    Yields
    ------
    bool
        True if this C library is glibc; others are left alone.
    """
    library = glibc()
    if library is None:
        yield False
        return
    tuned = bool(library.mallopt(_M_TRIM_THRESHOLD, _NEVER))
    tuned &= bool(library.mallopt(_M_MMAP_THRESHOLD, _NEVER) or library.mallopt(_M_MMAP_MAX, 0))
    try:
        yield tuned
    finally:
        library.malloc_trim(0)


def glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc, else None."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    known = hasattr(library, "mallopt") and hasattr(library, "malloc_trim")
    return library if known else None


def available_memory() -> int:
    """Return 80 % of the memory in bytes that this process may still take."""
    free = _linux("/proc/meminfo", "MemAvailable")
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists():  # a container's own limit
        text = limit.read_text().strip()
        if text.isdigit():
            free = min(free, int(text) - int(used.read_text()))
    return int(0.8 * max(free, 0))


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Measure by how many bytes the resident memory of this process has risen at most.

    Linux keeps a high-water mark that can be reset; elsewhere the mark only rises, so that what
    stays below an earlier peak shows 0.

    Yields
    ------
    callable
        Returns the bytes: since the block was entered, until it is called.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _high_water()
    yield lambda: _high_water() - before


def _high_water() -> int:
    peak = _linux("/proc/self/status", "VmHWM")
    if peak is None:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak


def _linux(path: str, field: str) -> int | None:
    """Return bytes that the kernel tells in a file of lines "field: kB"; None if it does not."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
