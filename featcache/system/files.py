"""Write files for the user: whole or not at all, and never over a file of another kind."""

from __future__ import annotations

import csv
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from featcache.errors import FeatcacheError, OutputError

STDOUT = Path("-")
"""The path that means standard output wherever text is written."""
_LINE = 1 << 26  # characters of the longest line that is looked at


def check_folder(path: Path) -> None:
    """Raise `OutputError` if the folder is missing that a file is going to be written in."""
    if not path.parent.is_dir():
        raise OutputError(
            f"There is no folder {path.parent} to write {path.name} in. To make it, type: "
            f"mkdir -p {shlex.quote(str(path.parent))}"
        )


def check_overwrite(
    path: Path, is_own: Callable[[Path], bool], what: str, *, force: bool = False
) -> None:
    """Raise if a path cannot be written, or if it holds what a user may want to keep.

    Parameters
    ----------
    path : Path
        File that is going to be written.
    is_own : callable
        Return whether an existing, not empty file is of the kind that is written, or raise
        whatever reading it can: then it is not.
    what : str
        The kind of file, as it ends "is not ...": "a featcache predictor".
    force : bool
        Replace a file of any kind.

    Raises
    ------
    OutputError
    """
    if path == STDOUT:
        return
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file in it.")
    check_folder(path)
    try:
        foreign = not force and path.exists() and path.stat().st_size > 0 and not is_own(path)
    except OSError as error:
        raise OutputError(f"{path} is there and cannot be read: {error.strerror}.") from error
    except FeatcacheError:
        raise
    except Exception:
        foreign = True
    if foreign:
        raise OutputError(
            f"{path} is there already and is not {what}. It is left as it is: name another file, "
            "or move it away."
        )


def is_table(path: Path, is_header: Callable[[list[str]], bool], cells: Mapping[str, str]) -> bool:
    """Return whether a CSV file is exactly of one kind, to its last cell.

    Parameters
    ----------
    path : Path
        The file.
    is_header : callable
        Return whether these are the names of such a file's columns.
    cells : dict of str to str
        Pattern of the names of columns, and of what stands in them; other columns hold any text.

    Raises
    ------
    OSError, ValueError, csv.Error
        It cannot be read, or is no table.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(iter(lambda: file.readline(_LINE), ""))
        names = next(rows)
        checks = [
            (k, re.compile(cell))
            for k, name in enumerate(names)
            for pattern, cell in cells.items()
            if re.fullmatch(pattern, name)
        ]
        return is_header(names) and all(
            len(row) == len(names) and all(cell.fullmatch(row[k]) for k, cell in checks)
            for row in rows
        )


@contextmanager
def atomic_write(path: Path, *, text: bool = False) -> Iterator[IO[Any]]:
    """Open a file beside `path` for writing; rename it to `path` if the block succeeds.

    Parameters
    ----------
    path : Path
        A link keeps pointing at the file that is replaced.
    text : bool
        Write UTF-8 text instead of bytes, to standard output if `path` is `STDOUT`.

    Raises
    ------
    OutputError
        The file cannot be written; an earlier one is unchanged.
    """
    if text and path == STDOUT:
        yield sys.stdout
        return
    target = path.resolve()
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
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
