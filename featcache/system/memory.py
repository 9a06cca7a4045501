"""Free memory, and reuse of memory between batches."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory", "glibc", "reuse_memory"]

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
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists():  # a container's own limit
        text = limit.read_text().strip()
        if text.isdigit():
            free = min(free, int(text) - int(used.read_text()))
    return int(0.8 * max(free, 0))
