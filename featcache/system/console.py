"""What a command shows while it runs, and what SIGINT (Ctrl-C) and SIGTERM do to it.

One rule says whether there is a progress bar: every function that takes `progress` takes True,
False or None, and None, the default, means "if a person looks at standard error": in a terminal or
a notebook. A bar that goes to a file is a line every half minute. Signals stop the computing,
never the writing.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from featcache.errors import Interrupted

__all__ = [
    "deferred_signals",
    "doing",
    "interruptible",
    "is_shown",
    "progress_bar",
    "sigterm_as_ctrl_c",
]

_LOG_INTERVAL = 30.0  # seconds between two lines of progress that go to a file, not to a terminal
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def is_shown(progress: bool | None) -> bool:
    """Return whether an argument `progress` asks for a bar."""
    return _is_watched() if progress is None else progress


def _is_watched() -> bool:
    """Return whether standard error is a terminal or a notebook, whose kernel says it is none."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")


def progress_bar(progress: bool | None, steps: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a `tqdm.tqdm` on standard error.

    Parameters
    ----------
    progress : bool or None
        Show it; None: in a terminal or a notebook.
    steps : iterable, optional
        Steps to count; left out, the bar is moved by ``update``.
    **options
        Passed to `tqdm.tqdm`.
    """
    from tqdm import tqdm

    return tqdm(
        steps,
        disable=not is_shown(progress),
        file=sys.stderr,
        mininterval=0.1 if _is_watched() else _LOG_INTERVAL,
        **options,
    )


@contextlib.contextmanager
def doing(progress: bool | None, what: str) -> Iterator[None]:
    """Say what is being done, until the block ends, where a person would see a bar.

    Parameters
    ----------
    progress : bool or None
        False says nothing.
    what : str
        Such as ``"loading the network"``.
    """
    if progress is False or not _is_watched():
        yield
        return
    with progress_bar(True, desc=f"{what} ...", bar_format="{desc}", leave=False):
        yield


class _Stopped(BaseException):
    """Raised by the signal handler; no library catches it."""


@contextlib.contextmanager
def interruptible(kept: str = "Everything computed is kept") -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`, once the block has cleaned up.

    The first signal raises an exception in the main thread; further ones are ignored while rows are
    committed. In another thread Python delivers no signals, and nothing changes.

    Parameters
    ----------
    kept : str
        What the same command goes on from: a sentence without its full stop.

    Raises
    ------
    Interrupted
    """

    def stop(number: int, frame: object) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(signal.Signals(number).name)

    try:
        with _handled(_SIGNALS, stop):
            yield
    except _Stopped as stopped:
        raise Interrupted(
            f"Stopped by {stopped}. {kept}: run the same command again to go on."
        ) from None


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block has ended.

    For a block that must not be left half done, and for libraries that turn an exception raised by
    a signal handler into one of their own.
    """
    came: list[int] = []
    with _handled(_SIGNALS, lambda number, frame: came.append(number)):
        yield
    if came:
        signal.raise_signal(came[0])


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on SIGTERM too, so that everything is cleaned up."""
    with _handled((signal.SIGTERM,), signal.default_int_handler):
        yield


@contextlib.contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[..., object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
