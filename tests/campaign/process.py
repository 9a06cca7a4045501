"""Processes under attack: forks of this one, armed with the shim, watched with a deadline."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import gc
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Kinds of calls and what is done to the n-th of them, as in shim.c.
WRITE, SYNC, NAME, CREATE, READ, OPEN = (1 << k for k in range(6))
WRITES, READS = WRITE | SYNC | NAME | CREATE, READ | OPEN
KILL_BEFORE, KILL_INSIDE, KILL_AFTER, FAIL, FAIL_FROM, SHORT, STOP_BEFORE, RECORD = range(1, 9)

DEADLINE = 60.0  # seconds that a command may take, which takes less than one
_PRELOADED = "FEATCACHE_CAMPAIGN"


@dataclass(frozen=True)
class Arm:
    """What happens to call number `at` of some kinds that touch a folder."""

    folder: Path
    kinds: int
    action: int
    at: int = -1
    error: int = 0
    log: int = -1


@dataclass
class Ended:
    """How a process ended: its exit status (minus a signal), and what it wrote."""

    status: int
    out: str
    err: str
    hung: bool = False
    result: Any = None

    @property
    def said(self) -> str:
        """What it wrote on standard error, without the list of modules after a crash."""
        return self.err.split("\nExtension modules:")[0][-2500:]

    @property
    def fault(self) -> str:
        """What no command may do, whatever happens to it; empty if it did not."""
        word = ""
        signs = ("Traceback (most", "Exception ignored", "Fatal Python")
        crashes = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGFPE, 70}
        if self.hung:
            word = "hung"
        elif any(sign in self.err for sign in signs) or self.status in crashes:
            word = "traceback"
        return word and f"{word}: {self.status}: {self.said}"


def preload(arguments: list[str]) -> str | None:
    """Start this program again with the shim loaded; return why that cannot be, or None."""
    if os.environ.get(_PRELOADED):
        return None
    library = Path(tempfile.mkdtemp(prefix="featcache-shim-")) / "shim.so"
    source = Path(__file__).with_name("shim.c")
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"the shim cannot be built with cc: {error}"
    ones = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    settings = {_PRELOADED: str(library), "LD_PRELOAD": str(library), **ones}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "tests.campaign", *arguments],
              os.environ | settings)  # fmt: skip
    return None  # never


@functools.cache
def _shim() -> Any:
    return ctypes.CDLL(os.environ[_PRELOADED])


def arm(what: Arm) -> None:
    """Let it happen in this process from now on."""
    _shim().campaign_arm(
        os.fsencode(what.folder), what.kinds, what.action, ctypes.c_long(what.at), what.error,
        what.log,
    )  # fmt: skip


def disarm() -> dict[int, int]:
    """Return how many calls there were by kind, and count no more."""
    _shim().campaign_disarm()
    calls = _shim().campaign_calls
    calls.restype = ctypes.c_long
    return {1 << k: int(calls(k)) for k in range(6)}


def import_everything() -> None:
    """Import what any command may need, so that a fork has it and costs little."""
    import importlib
    import pkgutil

    import PIL.Image
    import torch

    import featcache

    torch.set_num_threads(1)
    PIL.Image.init()
    for module in pkgutil.walk_packages(featcache.__path__, "featcache."):
        importlib.import_module(module.name)
    for name in (
        "pyarrow.parquet",
        "pyarrow.csv",
        "lightgbm",
        "sklearn.compose",
        "sklearn.ensemble",
        "torch._dynamo",
        "torch.utils._device",
        "tests.campaign.network",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # A run of two dozen images writes several times then, as one of millions does.
    sys.modules["featcache.extraction.stream"]._IMAGES_A_THREAD = 2  # type: ignore[attr-defined]
    for one in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        one.atexit = False  # libraries of this process, which a fork need not take apart
    gc.collect()
    gc.freeze()
    _use_huge_pages()


def _use_huge_pages() -> None:
    """Move the memory to pages of 2 MB, where Linux can: a fork has fewer tables to copy."""
    page, collapse = 1 << 21, 25  # MADV_COLLAPSE
    madvise = ctypes.CDLL(None).madvise
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, _, _, inode = line.split()[:5]
        start, end = (int(bound, 16) for bound in span.split("-"))
        if mode == "rw-p" and inode == "0":
            for at in range(-(-start // page) * page, end // page * page, page):
                madvise(ctypes.c_void_p(at), ctypes.c_size_t(page), collapse)


def command(*argv: str) -> Callable[[], None]:
    """Return the function that runs a command of featcache as a terminal would."""

    def run() -> None:
        sys.argv = ["featcache", *map(str, argv)]
        sys.modules["featcache.cli.__main__"].main()

    return run


def status_of(function: Callable[[], None]) -> int:
    """Run a command to its end; return its exit status."""
    try:
        function()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


class Process:
    """A fork that runs a function; what the function returns comes back pickled."""

    def __init__(
        self,
        function: Callable[[], Any],
        attack: Arm | None = None,
        *,
        before: Callable[[], object] | None = None,
        deadline: float = DEADLINE,
    ) -> None:
        names = ("out", "err", "result")
        self._files = [os.fdopen(os.memfd_create(name), "w+b") for name in names]
        self._deadline = deadline
        self.pid = os.fork()
        if not self.pid:
            self._live(function, attack, before)
        self._watch = os.pidfd_open(self.pid)

    def _live(
        self,
        function: Callable[[], Any],
        attack: Arm | None,
        before: Callable[[], object] | None,
    ) -> None:
        """Be the child, to the end."""
        status = 0
        out, err, result = self._files
        try:
            os.setsid()
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            faulthandler.enable(err)
            faulthandler.dump_traceback_later(0.9 * self._deadline, file=err)
            if before:
                before()
            if attack:
                arm(attack)
            value = function()
            disarm()
            pickle.dump(value, result)
            result.flush()
        except SystemExit as end:
            disarm()
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 70
        finally:
            with contextlib.suppress(BaseException):
                threading._shutdown()  # type: ignore[attr-defined]  # as at the end of Python
                gc.collect()
                atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):
                    stream.flush()
            os._exit(status)

    def signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait_stopped(self) -> bool:
        """Wait until it is stopped or has ended; return whether it is stopped."""
        end = time.monotonic() + self._deadline
        while time.monotonic() < end:
            options = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
            info = os.waitid(os.P_PID, self.pid, options)
            if info is not None:
                return info.si_code == os.CLD_STOPPED
            time.sleep(0.002)
        return False

    def wait(self) -> Ended:
        """Wait for its end; a process past its deadline is killed and has hung."""
        hung = not select.select([self._watch], [], [], self._deadline)[0]
        if hung:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.signal(signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what it left behind
        os.close(self._watch)
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        result = pickle.loads(texts[2]) if texts[2] else None
        out, err = (text.decode("utf-8", "replace") for text in texts[:2])
        return Ended(os.waitstatus_to_exitcode(status), out, err, hung, result)


def run(function: Callable[[], Any], attack: Arm | None = None, **options: Any) -> Ended:
    """Run a function in a fork to its end."""
    return Process(function, attack, **options).wait()
