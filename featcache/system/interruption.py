"""What SIGINT (Ctrl-C) and SIGTERM do: they stop the computing, never the writing."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

from featcache.errors import Interrupted

__all__ = ["as_ctrl_c", "interruptible", "put_off"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Stopped(BaseException):
    """Raised by the signal handler; no library catches it."""


@contextlib.contextmanager
def interruptible(
    *numbers: signal.Signals, kept: str = "Everything computed is kept"
) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted`, when everything within is wound up.

    The first of them raises an exception where the main thread is; further ones are ignored while
    rows are committed. Outside the main thread Python delivers no signals, and nothing changes.

    Parameters
    ----------
    numbers : signal.Signals
        Other signals than these two.
    kept : str
        What the same call goes on from: a sentence without its full stop.

    Raises
    ------
    Interrupted
    """
    numbers = numbers or _SIGNALS

    def stop(number: int, frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(signal.Signals(number).name)

    try:
        with _handled(numbers, stop):
            yield
    except _Stopped as stopped:
        raise Interrupted(
            f"Stopped by {stopped}. {kept}: run the same command again to go on."
        ) from None


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Let SIGINT and SIGTERM take effect only when what is within is done.

    For what must not be left half done, and for libraries that turn an exception out of a signal
    handler into one of their own.
    """
    came: list[int] = []
    with _handled(_SIGNALS, lambda number, frame: came.append(number)):
        yield
    if came:
        signal.raise_signal(came[0])


@contextlib.contextmanager
def as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM be what Ctrl-C is: a `KeyboardInterrupt`, so that all is wound up."""
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
