"""Write files for the user: whole or not at all, and never over a file of another kind.

A file is written beside its place under a name that nobody can foresee, and renamed when it is on
the disk. Its writer holds a lock on it, so that what a killed one leaves is told from what is being
written, and is removed by the next that writes to that place.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import glob
import io
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import IO, Any

from featcache.errors import FeatcacheError, OutputError, explained
from featcache.system.tables import printable, typed

STDOUT = Path("-")
"""The path that means standard output wherever text is written."""
NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS}
"""What a file system says that cannot do a thing at all."""
_LINE = 1 << 26  # characters of the longest line that is looked at
_ESCAPED = "backslashreplace"  # names of files that are not UTF-8
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NAME = 50  # characters of a file's name in that of its temporary file
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def check_folder(path: Path) -> None:
    """Raise `OutputError` if the folder is missing that a file is going to be written in."""
    with _writing(path):
        if not path.parent.is_dir():
            raise OutputError(
                f"There is no folder {path.parent} to write {path.name} in. To make it, type: "
                f"{typed('mkdir -p', path.parent)}"
            )


def open_file(path: str | bytes | Path) -> io.FileIO:
    """Open a file for reading, unbuffered. A pipe, which might never have an end, is none.

    Raises
    ------
    OSError
        There is none, or it cannot be read.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    file = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.ENODEV, "not a regular file", os.fspath(path))
    return file


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
    with _writing(path):
        if path.is_dir():
            raise OutputError(f"{path} is a folder; name a file in it.")
        check_folder(path)
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is a pipe or a device; name a file.")
        there = path.exists() and path.stat().st_size > 0
    try:
        foreign = there and not force and not is_own(path)
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


@contextmanager
def replacing(
    path: Path,
    is_own: Callable[[Path], bool],
    what: str,
    *,
    force: bool = False,
    text: bool = False,
) -> Iterator[IO[Any]]:
    """Open a file for writing as `atomic_write` does, after `check_overwrite`."""
    check_overwrite(path, is_own, what, force=force)
    with atomic_write(path, text=text) as file:
        yield file


def csv_writer(file: IO[str], *, excel: bool = False) -> Callable[..., None]:
    """Return what writes a row of a CSV table: its cells of text, and then its numbers as they are.

    What would steer a terminal is escaped where the file is one.

    Parameters
    ----------
    file : text file
        Where to write.
    excel : bool
        For spreadsheets: begin with the mark of UTF-8, and write ``'`` before a text that begins as
        a formula; `unescaped` takes it off again.
    """
    plain, quoted = (
        csv.writer(file, lineterminator="\n", quoting=how)
        for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )
    shown: Callable[[Any], str] = printable if file.isatty() else str
    if excel:
        file.write("\ufeff")

    def write(texts: Iterable[object], numbers: Iterable[object] = ()) -> None:
        cells = [shown(str(text)) for text in texts]
        if excel:
            cells = [f"'{x}" if x.lstrip("'").startswith(_FORMULA) else x for x in cells]
        # Python 3.11 leaves a return bare, where readers see the end of a line.
        writer = quoted if any("\r" in cell for cell in cells) else plain
        writer.writerow([*cells, *numbers])

    return write


def unescaped(cell: str) -> str:
    """Return a text as it was before it was written for spreadsheets."""
    return cell[1:] if cell[:1] == "'" and cell.lstrip("'").startswith(_FORMULA) else cell


def is_table(
    path: Path,
    is_header: Callable[[list[str]], bool],
    cells: Mapping[str, str],
    is_row: Callable[[list[str]], bool] = bool,
) -> bool:
    """Return whether a CSV file is exactly of one kind, to its last cell.

    Parameters
    ----------
    path : Path
        The file.
    is_header : callable
        Return whether these are the names of such a file's columns.
    cells : dict of str to str
        Pattern of the names of columns, and of what stands in them; other columns hold any text.
    is_row : callable, optional
        Return whether such a file may have these cells in one row.

    Raises
    ------
    OSError, ValueError, csv.Error
        It cannot be read, or is no table.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(iter(lambda: file.readline(_LINE), ""))
        names = next(rows)
        checks = [
            (k, re.compile(cell))
            for k, name in enumerate(names)
            for pattern, cell in cells.items()
            if re.fullmatch(pattern, name)
        ]
        return is_header(names) and all(
            len(row) == len(names)
            and all(cell.fullmatch(row[k]) for k, cell in checks)
            and is_row(row)
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
        sys.stdout.flush()
        return
    with _writing(path):
        target = path.resolve()
        temporary, descriptor = new_file(target)
    raw = _Raw(descriptor, "wb")
    raw.path = path
    register_after_fork(raw, _Raw.close)  # a child would hold the lock of its killed parent
    buffered = io.BufferedWriter(raw)
    try:
        with (
            io.TextIOWrapper(buffered, "utf-8", _ESCAPED, newline="") if text else buffered as file
        ):
            yield file
            file.flush()
            with _writing(path):
                fsync(descriptor)
                take_place(descriptor, temporary, target)
    finally:
        remove(temporary)


def guarded(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return a stream like standard output or error, for when that cannot be written.

    Of standard output it raises `OutputError`; what is said on standard error is lost.
    """
    raw = (_Told if stream.fileno() == 1 else _Silent)(stream.fileno(), "wb", closefd=False)
    raw.path = "Standard output"
    errors = _ESCAPED if stream.errors == "strict" else stream.errors
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, errors, line_buffering=stream.line_buffering
    )


class _Raw(io.FileIO):
    """A file that says where it is when it cannot be written."""

    path: Path | str

    def write(self, data: Any) -> int:
        with _writing(self.path):
            return super().write(data)


class _Told(_Raw):
    """A stream that fails once: what is left in buffers at the end goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OutputError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise


class _Silent(_Raw):
    """A stream that never fails: no run ends because nobody hears of it."""

    def write(self, data: Any) -> int:
        with suppress(OSError, OutputError):
            return super().write(data)
        return len(data)


@contextmanager
def _writing(path: Path | str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # the system, links in a circle, NUL
        reason = explained(error) if isinstance(error, OSError) else error
        raise OutputError(f"{path} cannot be written: {reason}.") from error


def new_file(target: Path) -> tuple[Path, int]:
    """Make a file beside `target` that is going to take its place; return path and descriptor.

    While the descriptor is open it is no leftover.
    """
    remove_temporary(target)
    while True:
        path = target.with_name(f".{target.name[:_NAME]}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(path, _NEW, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if os.fstat(descriptor).st_nlink:  # nobody took it for a leftover before it was locked
            break
        os.close(descriptor)
    return path, descriptor


def take_place(descriptor: int, source: str | Path, target: str | Path) -> None:
    """Rename an open file to `target`, and give it the rights of the file that is there."""
    with suppress(FileNotFoundError):
        os.fchmod(descriptor, stat.S_IMODE(Path(target).stat().st_mode))
    rename(source, target)


def remove_temporary(target: Path) -> None:
    """Remove what writers that were killed left of a file, and of others whose names go on."""
    remove_leftovers(target.parent, f"{glob.escape(target.name[:_NAME])}*")


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove what writers that were killed left of files with such names."""
    for path in folder.glob(f".{pattern}.{'[0-9a-f]' * 16}.tmp"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


def fsync(descriptor: int) -> None:
    """Sync the file to the disk itself, through the drive's cache on macOS too."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # not every file system knows it
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def rename(source: str | Path, target: str | Path) -> None:
    """Replace `target` by `source` so that a power cut leaves the one or the other.

    When it returns, a power cut leaves `source` in the place of `target`.
    """
    Path(source).replace(target)
    sync_folder(Path(target).parent)


def remove(path: str | Path) -> None:
    """Remove a file that nobody needs any more, if it is there; one that cannot be, stays."""
    with suppress(OSError):
        Path(path).unlink()


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some network file systems cannot, and a folder may be closed to readers.
        if error.errno not in {*NOT_SUPPORTED, errno.EACCES}:
            raise
