"""Progress bars: one rule for all of featcache says whether there is one.

Every function that takes `progress` takes True, False or None, and None, the default, is: if
standard error is a terminal. In a file, where True was asked for, a bar is a line every half
minute.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["is_shown", "progress_bar"]

_LOG_INTERVAL = 30.0  # seconds between two lines of progress that go to a file, not to a terminal


def is_shown(progress: bool | None) -> bool:
    """Return what a function's argument `progress` comes to."""
    return sys.stderr.isatty() if progress is None else progress


def progress_bar(progress: bool | None, steps: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a `tqdm.tqdm` on standard error.

    Parameters
    ----------
    progress : bool or None
        Show it; None: if standard error is a terminal.
    steps : iterable, optional
        What it counts; left out, it is told by ``update``.
    **options
        Of `tqdm.tqdm`.
    """
    from tqdm import tqdm

    return tqdm(
        steps,
        disable=not is_shown(progress),
        file=sys.stderr,
        mininterval=0.1 if sys.stderr.isatty() else _LOG_INTERVAL,
        **options,
    )
