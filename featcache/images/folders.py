"""Images that are files: those below a folder, those that a pattern matches, or a list of them."""
# Not pathlib: there may be millions of paths, and some are not text.
# ruff: noqa: PTH100, PTH112, PTH116, PTH118, PTH122, PTH123, PTH207, PTH208

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from featcache.errors import DecodeError, ImageSetError
from featcache.images.source import (
    SUFFIXES,
    Source,
    column,
    did_you_mean,
    first_few,
    id_of,
    no_images,
    read_error,
    sorted_tables,
)

_SPLIT_FOLDERS = frozenset({"train", "val", "valid", "validation", "test"})


@dataclass(frozen=True, kw_only=True)
class Files(Source):
    """One file an image: ``root/ID`` + suffix.

    Attributes
    ----------
    root : bytes
        Absolute path of the folder. Paths are bytes, whatever the locale is.
    suffix : bytes
        What is added to an id.
    """

    root: bytes
    suffix: bytes = b""

    def read(self, row: int) -> bytes:
        """Return the file's bytes."""
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for ever.
            descriptor = os.open(self._path(row), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(descriptor, "rb", buffering=0) as file:
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    raise DecodeError("read", "not a regular file")
                return file.readall()
        except OSError as error:
            raise read_error(error) from error
        except (MemoryError, OverflowError) as error:
            raise DecodeError("read", "the file does not fit into memory") from error

    def stat(self, row: int) -> tuple[int, int]:
        """Return size and time of the file's last change."""
        try:
            result = os.stat(self._path(row))
        except OSError:
            return -1, -1
        return result.st_size, result.st_mtime_ns

    def _path(self, row: int) -> bytes:
        return os.path.join(self.root, self.tables["ids"][row].encode() + self.suffix)


# -- folders -------------------------------------------------------------------------------------


def folder(root: str, suffixes: Iterable[str]) -> Files:
    """List the images below a folder; see `ImageSet.from_folder`."""
    endings = frozenset(suffix.lower().encode() for suffix in suffixes)
    ignored = 0

    def found() -> Iterator[bytes]:
        nonlocal ignored
        for path, names, hidden in _walk(os.fsencode(root)):
            images = [name for name in names if _is_image(name, endings)]
            ignored += hidden + len(names) - len(images)
            yield from (path + name for name in images)

    twice = "two names are both written {first}; rename the one that is not UTF-8"
    files = _files(found(), root, root, twice=twice)
    tables, ids = files.tables, files.tables["ids"]
    if not len(ids):
        raise no_images(root, ignored, suffixes)
    if any("/" in id for id in ids):
        # The uppermost folder; "" for an image that lies in none.
        tables["labels"] = column((id.rpartition("/")[0].partition("/")[0] for id in ids), root)
        if _are_splits(set(tables["labels"])) and all(id.count("/") > 1 for id in ids):
            tables["splits"] = tables["labels"]
            tables["labels"] = column((id.split("/", 2)[1] for id in ids), root)
    return replace(files, ignored=ignored)


def _walk(root: bytes) -> Iterator[tuple[bytes, list[bytes], int]]:
    """Yield each folder's path below `root` (with a / at its end), its files, its hidden folders.

    Links are followed. One that leads to a folder that it lies in is taken for an empty folder.
    """

    def refuse(error: OSError) -> None:
        raise error

    start = len(os.path.join(root, b""))
    above: dict[bytes, tuple[tuple[int, int], ...]] = {root: ()}
    try:
        for path, folders, files in os.walk(root, onerror=refuse, followlinks=True):
            status, outside = os.stat(path), above.pop(path)
            identity = status.st_dev, status.st_ino
            if identity in outside:
                folders.clear()
                continue
            seen = [name for name in folders if not name.startswith(b".")]
            yield os.path.join(path[start:], b""), files, len(folders) - len(seen)
            folders[:] = seen
            above |= {os.path.join(path, name): (*outside, identity) for name in seen}
    except OSError as error:
        where = os.fsdecode(error.filename)
        raise ImageSetError(f"expected a folder of images at {where}: {error.strerror}") from error


def _is_image(name: bytes, endings: frozenset[bytes]) -> bool:
    return name[name.rfind(b".") :].lower() in endings and not name.startswith(b".")


def _are_splits(names: set[str]) -> bool:
    return len(names) > 1 and "train" in names and names <= _SPLIT_FOLDERS


def _files(names: Iterable[bytes], root: str, source: str, **options: str) -> Files:
    """List files by their names below `root`; for `options` see `sorted_tables`."""
    unreadable: set[str] = set()
    ids = (id_of(name, unreadable) for name in names)
    tables, _ = sorted_tables({"ids": ids}, source, **options)
    home = os.fsencode(os.path.abspath(root))
    return Files(tables=tables, name=source, root=home, unreadable=frozenset(unreadable))


# -- patterns and lists --------------------------------------------------------------------------


def is_glob(name: str) -> bool:
    """Return whether a name is a pattern rather than the name of a file that exists."""
    return glob.has_magic(name) and not os.path.lexists(name)


def matches(pattern: str) -> list[str]:
    """Return the files that a pattern matches, or the one file that it names."""
    names = glob.glob(pattern, recursive=True) if is_glob(pattern) else [pattern]
    return sorted(name for name in names if not os.path.isdir(name))


def globbed(pattern: str, base: str) -> Files:
    """List the images that a pattern in the folder `base` matches; see `ImageSet.from_files`."""
    parts = pattern.split("/")
    plain = next(k for k, part in enumerate(parts) if glob.has_magic(part))
    root = os.path.join(base, "/".join(parts[:plain]) or ("/" if pattern.startswith("/") else ""))
    found = matches(os.path.join(glob.escape(root), *parts[plain:]))
    images = [name for name in found if os.path.splitext(name)[1].lower() in SUFFIXES]
    if not images:
        raise no_images(pattern, len(found))
    names = (os.fsencode(os.path.relpath(name, root)) for name in images)
    return replace(_files(names, root, pattern), ignored=len(found) - len(images))


def files(names: list[str], root: str) -> Files:
    """List files by their names, relative to `root`; see `ImageSet.from_files`."""
    names = sorted({os.path.normpath(name) for name in names})
    missing = [name for name in names if not os.path.lexists(os.path.join(root, name))]
    if missing:
        near = _near_names(os.path.join(root, missing[0]))
        raise ImageSetError(f"no such file: {first_few(missing)}.{near}")
    folders = [name for name in names if os.path.isdir(os.path.join(root, name))]
    if folders:
        raise ImageSetError(
            f"expected files, got {first_few(folders)}, which is a folder. Give one folder alone"
        )
    source = names[0] if len(names) == 1 else f"{len(names)} files"
    return _files(map(os.fsencode, names), root, source)


def _near_names(path: str) -> str:
    """Return a question after files with a name like that of a missing one, for a message."""
    folder, name = os.path.split(path)
    try:
        return did_you_mean(name, os.listdir(folder)) if name else ""
    except OSError:
        return ""
