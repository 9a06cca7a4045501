"""What a command shows while it runs, and what SIGINT (Ctrl-C), SIGTERM and SIGHUP do to it.

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

_LOG_INTERVAL = 30.0  # seconds between two lines of progress that go to a file, not to a terminal
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    """Raised by `check_stopped`; no library catches it."""


_came: list[signal.Signals] | None = None  # signals of the block that is interruptible now


@contextlib.contextmanager
def interruptible(kept: str = "Every finished batch is kept") -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Interrupted`, once the block has cleaned up.

    A handler that raises may do so inside a lock, which then stays locked for ever. So the first
    signal is only noted, and the block ends at its next `check_stopped`; another one ends the
    process at once, the default way. A signal that is ignored stays ignored: SIGHUP under nohup,
    SIGINT in ``command &`` of a script. In another thread than the main one Python delivers no
    signals, and nothing changes.

    Parameters
    ----------
    kept : str
        What the same command goes on from: a sentence without its full stop.

    Raises
    ------
    Interrupted
    """
    global _came

    def note(number: int, frame: object) -> None:
        came.append(signal.Signals(number))
        for each in _SIGNALS:
            if signal.getsignal(each) is note:
                signal.signal(each, signal.SIG_DFL)

    came: list[signal.Signals] = []
    outer = _came
    try:
        with _handled(_SIGNALS, note) as watched:
            _came = came if watched else outer
            yield
            check_stopped()
    except _Stopped as stopped:
        raise Interrupted(
            f"Stopped by {stopped}. {kept}: run the same command again to go on."
        ) from None
    finally:
        _came = outer


def is_stopped() -> bool:
    """Return whether a signal has come since the block began that is `interruptible`."""
    return bool(_came)


def check_stopped() -> None:
    """End the block that is `interruptible`, if a signal has come since it began."""
    if _came:
        raise _Stopped(_came[0].name)


@contextlib.contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on SIGTERM and SIGHUP too, so that everything is cleaned up."""
    with _handled(_SIGNALS[1:], signal.default_int_handler):
        yield


@contextlib.contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[..., object]) -> Iterator[bool]:
    """Handle signals that are not ignored, in the main thread; yield whether it is that."""
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in numbers if main}
    previous = {n: before for n, before in handlers.items() if before is not signal.SIG_IGN}
    for number in previous:
        signal.signal(number, handler)
    try:
        yield main
    finally:
        for number, before in previous.items():
            signal.signal(number, before if before is not None else signal.SIG_DFL)
