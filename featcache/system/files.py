"""Files that featcache writes for its user: never over one of another kind, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from featcache.errors import PredictorError

__all__ = ["refuse_foreign", "replacing"]


def refuse_foreign(path: Path, is_own: Callable[[Path], bool], what: str) -> None:
    """Raise where a path cannot be written, or holds something of another kind.

    Raises
    ------
    PredictorError
        The message says what is there.
    """
    if path.is_dir():
        raise PredictorError(f"{path} is a folder; name a file in it.")
    if not path.parent.is_dir():
        raise PredictorError(f"There is no folder {path.parent} to write {path.name} in.")
    try:
        foreign = path.exists() and path.stat().st_size > 0 and not is_own(path)
    except OSError as error:
        raise PredictorError(f"{path} is there and cannot be read: {error.strerror}.") from error
    if foreign:
        raise PredictorError(
            f"{path} is there already and is not {what}. It is left as it is: name another file, "
            "or move it away."
        )


@contextmanager
def replacing(path: Path, *, text: bool = False) -> Iterator[IO[Any]]:
    """Open a file beside `path` for writing, and put it in its place when all went well.

    Raises
    ------
    PredictorError
        It cannot be written; what was there is still there.
    """
    target = path.resolve()  # a link keeps pointing at the file that is replaced
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with (
            temporary.open("w", encoding="utf-8", newline="") if text else temporary.open("wb")
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise PredictorError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
