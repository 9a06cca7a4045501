"""Images in the members of WebDataset shards: uncompressed tar files, read in place."""
# ruff: noqa: PTH100, PTH116, PTH119, PTH122, PTH123

from __future__ import annotations

import json
import os
import tarfile
from array import array
from dataclasses import dataclass, field

import numpy as np

from featcache.errors import DecodeError, ImageSetError
from featcache.images.source import SUFFIXES, Source, id_of, no_images, read_error, sorted_tables

_JSON_LABELS = ("label", "cls", "class")  # keys of a sample's JSON; the first one there counts
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")


@dataclass(frozen=True)
class Shard:
    """One tar file, as it was when its members were listed."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True, kw_only=True)
class TarMembers(Source):
    """Members of tar files, read in place.

    Attributes
    ----------
    shards : tuple of Shard
        The tar files. `places` has a row for each image: the number of its shard, and where its
        bytes begin and how many they are, shape (n, 3).
    """

    shards: tuple[Shard, ...]

    def read(self, row: int) -> bytes:
        """Return the member's bytes."""
        shard, offset, size = self._place(row)
        try:
            # Opening takes microseconds; keeping thousands of shards open would meet limits.
            descriptor = os.open(shard.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                now = os.fstat(descriptor)
                data = os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise read_error(error, f"{shard.path}: ") from error
        except (MemoryError, OverflowError) as error:
            raise DecodeError("read", "the member does not fit into memory") from error
        if (now.st_size, now.st_mtime_ns) != (shard.size, shard.mtime_ns) or len(data) != size:
            raise DecodeError("read", f"{shard.path} has changed since its members were listed")
        return data

    def stat(self, row: int) -> tuple[int, int]:
        """Return the member's size, and the time of its shard's last change."""
        shard, _, size = self._place(row)
        return size, shard.mtime_ns

    def _place(self, row: int) -> tuple[Shard, int, int]:
        number, offset, size = self.places[row].tolist()
        return self.shards[number], offset, size


def are_tars(names: list[str]) -> bool:
    """Return whether all names end in .tar."""
    return bool(names) and all(name.lower().endswith(".tar") for name in names)


def tars(names: list[str]) -> TarMembers:
    """List the images in tar shards; see `ImageSet.from_tar`."""
    shards = sorted({os.path.abspath(name) for name in names})
    source = names[0] if len(shards) == 1 else f"{len(shards)} tar files"
    index = _Index()
    for shard in shards:
        index.add(shard)
    if not index.ids:
        raise no_images(source, index.ignored)
    values = {"ids": index.ids} | ({"labels": index.labels} if any(index.labels) else {})
    tables, order = sorted_tables(values, source)
    return TarMembers(
        tables=tables,
        name=source,
        ignored=index.ignored,
        places=np.array(index.places, np.int64).reshape(-1, 3)[order],  # (n, 3)
        shards=tuple(index.shards),
        unreadable=frozenset(index.unreadable),
    )


@dataclass
class _Index:
    """The images in tar shards: an entry each in `ids` and `labels`, three in `places`."""

    ids: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    places: array[int] = field(default_factory=lambda: array("q"))
    shards: list[Shard] = field(default_factory=list)
    unreadable: set[str] = field(default_factory=set)
    ignored: int = 0

    def add(self, path: str) -> None:
        """List the members of one shard."""
        try:
            status = os.stat(path)
            self.shards.append(Shard(path, status.st_size, status.st_mtime_ns))
            with tarfile.open(path, "r:") as tar:
                self._add_members(tar, os.path.basename(path))
        except OSError as error:
            raise ImageSetError(f"{path}: cannot read this tar: {error.strerror}") from error
        except (tarfile.TarError, ValueError, EOFError) as error:
            with open(path, "rb") as file:
                compressed = file.read(6).startswith(_COMPRESSED)
            why = "it is compressed, and cannot be read in place. Decompress it first"
            reason = why if compressed else str(error)
            raise ImageSetError(f"{path}: expected a whole tar file: {reason}") from error

    def _add_members(self, tar: tarfile.TarFile, shard: str) -> None:
        labels: dict[str, str] = {}
        images: dict[str, list[tarfile.TarInfo]] = {}
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            if not member.isreg() or member.issparse():
                self.ignored += not member.isdir()
                continue
            key, suffix = _sample(member.name)
            if suffix in ("cls", "json"):
                _note_label(labels, key, suffix, tar, member)
            elif _is_image(member.name):
                images.setdefault(key, []).append(member)
            else:
                self.ignored += 1
        for key, members in images.items():
            # x.jpg beside x.mask.png: the image is the one whose suffix is nothing but a suffix.
            plain = [m for m in members if "." not in _sample(m.name)[1]] or members
            self.ignored += len(members) - len(plain)
            for member in plain:
                name = f"{shard}/{member.name.removeprefix('./')}"
                raw = name.encode("utf-8", "surrogateescape")
                self.ids.append(id_of(raw, self.unreadable))
                self.labels.append(labels.get(key, ""))
                self.places.extend((len(self.shards) - 1, member.offset_data, member.size))


def _sample(name: str) -> tuple[str, str]:
    """Split a member's name into the key of its sample and the rest, in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _is_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in SUFFIXES


def _note_label(
    labels: dict[str, str], key: str, suffix: str, tar: tarfile.TarFile, member: tarfile.TarInfo
) -> None:
    """Keep the label that a ``.cls`` or ``.json`` member gives its sample."""
    file = tar.extractfile(member)
    text = b"" if file is None else file.read()
    try:
        if suffix == "cls":
            labels[key] = text.decode().strip()
        elif key not in labels:
            values = json.loads(text)
            found = [values[name] for name in _JSON_LABELS if name in values]
            labels.update({key: str(found[0])} if found else {})
    except (ValueError, TypeError) as error:
        where = os.fsdecode(tar.name or "")
        raise ImageSetError(f"{where}: {member.name} is not a label: {error}") from error
