"""Images that are files: those below a folder, those that a pattern matches, or a list of them."""
# Not pathlib: there may be millions of paths, and some are not text.
# ruff: noqa: PTH100, PTH110, PTH112, PTH114, PTH115, PTH116, PTH118, PTH122, PTH207, PTH208

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from featcache.errors import ImageSetError
from featcache.images import sources
from featcache.system.files import open_file


@dataclass(frozen=True, kw_only=True)
class Files(sources.Source):
    """One file an image: ``root/ID`` + suffix.

    Attributes
    ----------
    root : bytes
        Absolute path of the folder. Paths are bytes, whatever the locale is.
    suffix : bytes
        What is added to an id.
    whole_folder : bool
        These are all images of the folder, and folders below it may be classes.
    """

    root: bytes
    suffix: bytes = b""
    whole_folder: bool = False

    def paths(self) -> Iterable[str] | None:
        """Return the ids of a whole folder."""
        return self.tables["ids"] if self.whole_folder else None

    def read(self, row: int) -> bytes:
        """Return the file's bytes."""
        with open_file(self._path(row)) as file:
            return file.readall()

    def where(self, row: int) -> str:
        """Return where a link that leads nowhere leads; "" for all else."""
        path = self._path(row)
        if os.path.exists(path) or not os.path.islink(path):
            return ""
        end = os.readlink(path).decode(errors="backslashreplace")
        return f"a link to {end}, which is missing: "

    def stat(self, row: int) -> tuple[int, int]:
        """Return size and stamp of the file."""
        try:
            result = os.stat(self._path(row))
        except OSError:
            return -1, -1
        return result.st_size, sources.stamp(result)

    def _path(self, row: int) -> bytes:
        return os.path.join(self.root, self.tables["ids"][row].encode() + self.suffix)


# -- folders -------------------------------------------------------------------------------------


def folder(root: str, suffixes: Iterable[str]) -> Files:
    """List the images below a folder; see `ImageSet.from_folder`."""
    endings = frozenset(suffix.lower().encode() for suffix in suffixes)
    left_out: dict[str, tuple[int, str]] = {}

    def found() -> Iterator[bytes]:
        for name in _walk(os.fsencode(root), left_out):
            if name[name.rfind(b".") :].lower() in endings:
                yield name
            else:
                sources.leave_out(left_out, sources.NO_IMAGES, name)

    twice = "two names are both written {first}; rename the one that is not UTF-8"
    files = _files(found(), root, root, twice=twice)
    if not len(files.tables["ids"]):
        raise sources.no_images(root, sum(count for count, _ in left_out.values()), suffixes)
    return replace(files, left_out=left_out, whole_folder=True)


def _walk(root: bytes, left_out: dict[str, tuple[int, str]]) -> Iterator[bytes]:
    """Yield the paths of the files below `root`; count what is hidden as left out.

    Hidden are also the folders that systems make.

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
            below = os.path.join(path[start:], b"")
            hidden = set(filter(sources.is_hidden, folders + files))
            for name in hidden:
                sources.leave_out(left_out, sources.HIDDEN, below + name)
            yield from (below + name for name in files if name not in hidden)
            folders[:] = [name for name in folders if name not in hidden]
            above |= {os.path.join(path, name): (*outside, identity) for name in folders}
    except OSError as error:
        where = os.fsdecode(error.filename)
        raise ImageSetError(f"expected a folder of images at {where}: {error.strerror}") from error


def _files(names: Iterable[bytes], root: str, source: str, **options: str) -> Files:
    """List files by their names below `root`; for `options` see `sorted_tables`."""
    unreadable: set[str] = set()
    ids = (sources.id_of(name, unreadable) for name in names)
    tables, _ = sources.sorted_tables({"ids": ids}, source, **options)
    home = os.fsencode(os.path.abspath(root))
    return Files(tables=tables, name=source, root=home, unreadable=frozenset(unreadable))


# -- patterns and lists --------------------------------------------------------------------------


def expanded(name: str) -> list[str]:
    """Return the names that braces stand for: ``{000..099}.tar``, ``{a,b}.tar``."""
    braces = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", name)
    if braces is None or os.path.lexists(name):
        return [name]
    first, last, listed = braces.groups()
    if listed is None:
        words = [f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1)]
    else:
        words = listed.split(",")
    start, end = name[: braces.start()], name[braces.end() :]
    return [one for word in words for one in expanded(start + word + end)]


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
    names = {os.fsencode(os.path.relpath(name, root)) for name in found}
    images = {
        name for name in names if os.fsdecode(os.path.splitext(name)[1]).lower() in sources.SUFFIXES
    }
    if not images:
        raise sources.no_images(pattern, len(found))
    left_out: dict[str, tuple[int, str]] = {}
    for name in names - images:
        sources.leave_out(left_out, sources.NO_IMAGES, name)
    return replace(_files(images, root, pattern), left_out=left_out)


def files(names: list[str], root: str) -> Files:
    """List files by their names, relative to `root`; see `ImageSet.from_files`."""
    names = sorted({os.path.normpath(name) for name in names})
    missing = [name for name in names if not os.path.lexists(os.path.join(root, name))]
    if missing:
        near = _near_names(os.path.join(root, missing[0]))
        raise ImageSetError(f"no such file: {sources.first_few(missing)}.{near}")
    folders = [name for name in names if os.path.isdir(os.path.join(root, name))]
    if folders:
        raise ImageSetError(
            f"expected files, got {sources.first_few(folders)}, which is a folder. Give one folder "
            "alone"
        )
    sources.refuse_others(names)
    source = names[0] if len(names) == 1 else f"{len(names)} files"
    return _files(map(os.fsencode, names), root, source)


def _near_names(path: str) -> str:
    """Return a question after files with a name like that of a missing one, for a message."""
    folder, name = os.path.split(path)
    try:
        return sources.did_you_mean(name, os.listdir(folder)) if name else ""
    except OSError:
        return ""
