"""One writer of a feature file at a time, and a second one that hears who the first is.

The lock is ``flock`` on a small file beside the store. The kernel drops it when its holder dies,
however it dies, so there is no stale lock to remove by hand. The file's text (process, host,
since when) is for the message only.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Self

from featcache.errors import StoreError, StoreLocked

try:
    import fcntl
except ImportError as error:  # pragma: no cover (Windows)
    raise StoreError(
        "Feature files need a POSIX system (Linux or macOS). On Windows, run featcache inside "
        "the Windows Subsystem for Linux: https://learn.microsoft.com/windows/wsl/install"
    ) from error

__all__ = ["WriteLock", "fcntl"]


class WriteLock:
    """The right to write one store, held until `release` or the end of the process.

    Parameters
    ----------
    path : str
        The lock file; made if there is none.
    store : str
        The store's path, for messages.
    shared : bool
        Share it with other processes that fill the same file. Nobody can take it alone then.

    Raises
    ------
    StoreLocked
        Another process holds it; the message says which, where, and since when.
    OSError
        The lock file cannot be made.
    """

    def __init__(self, path: str, store: str, *, shared: bool = False) -> None:
        self._path = path
        self._store = store
        self._descriptor = -1
        self.shared = shared
        while self._descriptor < 0:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._take(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
                # Its last holder may have removed the file between our open and our lock.
                if _is_at(descriptor, path):
                    self._descriptor, descriptor = descriptor, -1
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
        if not shared:
            self._sign()
        register_after_fork(self, WriteLock._forget)

    def _forget(self) -> None:
        """Let go of the lock in a forked child, which would otherwise hold it too."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _take(self, descriptor: int, kind: int) -> None:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreLocked(
                f"{self._store} is being written by {_holder(descriptor)}. Wait until it is "
                "done, or stop it and run the same command again."
            ) from error

    def _sign(self) -> None:
        """Write who holds it, for those who come second."""
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(who).encode(), 0)

    def share(self) -> None:
        """Let other processes take it with ``shared=True``."""
        self._take(self._descriptor, fcntl.LOCK_SH)
        self.shared = True

    def own(self) -> None:
        """Have it alone again.

        Raises
        ------
        StoreLocked
            Another process still shares it.
        """
        self._take(self._descriptor, fcntl.LOCK_EX)
        self.shared = False

    def release(self) -> None:
        """Give it up, and remove the lock file unless others share it."""
        if self._descriptor < 0:
            return
        if not self.shared:
            with contextlib.suppress(OSError):
                Path(self._path).unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_at(descriptor: int, path: str) -> bool:
    """Say whether `path` still leads to the open file."""
    try:
        there = Path(path).stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _holder(descriptor: int) -> str:
    """Return who signed the lock file, in words."""
    try:
        who = json.loads(os.pread(descriptor, 4096, 0))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who["since"]))
        return f"process {who['pid']} on {who['host']} (since {since})"
    except (ValueError, KeyError, TypeError):
        return "another process"
