"""Images in the members of WebDataset shards: uncompressed tar files, read in place."""
# ruff: noqa: PTH100, PTH116, PTH119, PTH122, PTH123

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from featcache.errors import DecodeError, ImageSetError
from featcache.images.source import (
    HIDDEN,
    NO_IMAGES,
    SUFFIXES,
    Shard,
    Source,
    id_of,
    label_text,
    leave_out,
    no_images,
    read_error,
    sorted_tables,
    stamp,
)

_JSON_LABELS = ("label", "cls", "class")  # keys of a sample's JSON; the first one there counts
_SHOWN = 5  # so many kinds of what is not used are named
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")


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

    def paths(self) -> Iterable[str] | None:
        """Return the members' paths if none has a label, without a folder that all lie in."""
        if "labels" in self.tables:
            return None
        paths = [id.partition("/")[2] for id in self.tables["ids"]]
        while len(tops := {path.partition("/")[0] for path in paths}) == 1 and all(
            path.count("/") > 1 for path in paths
        ):
            paths = [path[len(*tops) + 1 :] for path in paths]
        return paths

    def read(self, row: int) -> bytes:
        """Return the member's bytes."""
        shard, offset, size = self._place(row)
        try:
            # Opening takes microseconds; keeping thousands of shards open would meet limits.
            with open(shard.path, "rb", buffering=0) as file:
                now, data = os.fstat(file.fileno()), os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise read_error(error, f"{shard.path}: ") from error
        except (MemoryError, OverflowError) as error:
            raise DecodeError("read", "the member does not fit into memory") from error
        shard.check(now)
        if len(data) != size:
            raise DecodeError("read", f"{shard.path} is cut short")
        return data

    def stat(self, row: int) -> tuple[int, int]:
        """Return the member's size, and the stamp of its shard."""
        shard, _, size = self._place(row)
        return size, stamp(shard.status)

    def _place(self, row: int) -> tuple[Shard, int, int]:
        number, offset, size = self.places[row].tolist()
        return self.shards[number], offset, size


def tars(names: list[str]) -> TarMembers:
    """List the images in tar shards; see `ImageSet.from_tar`."""
    shards = sorted({os.path.abspath(name) for name in names})
    source = names[0] if len(shards) == 1 else f"{len(shards)} tar files"
    index = _Index()
    for shard in shards:
        index.add(shard)
    if not index.ids:
        raise no_images(source, sum(count for count, _ in index.left_out.values()))
    values = {"ids": index.ids} | ({"labels": index.labels} if any(index.labels) else {})
    tables, order = sorted_tables(values, source)
    unused = [f"{count} {what}" for what, count in index.unused.most_common(_SHOWN)]
    return TarMembers(
        tables=tables,
        name=source,
        left_out=index.left_out,
        notes=(f"seen beside the images and not used: {', '.join(unused)}",) if unused else (),
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
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)

    def add(self, path: str) -> None:
        """List the members of one shard."""
        try:
            self.shards.append(Shard(path, os.stat(path)))
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
        labels: dict[str, str] = {}  # by key; "" for a sample whose members give none
        images: dict[str, tuple[int, int]] = {}
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            name = member.name.removeprefix("./")
            key, suffix = os.path.splitext(name)
            if member.islnk() and (target := member.linkname.removeprefix("./")) in images:
                images[name] = images[target]
            elif not member.isreg() or member.issparse():
                if not member.isdir():
                    self._leave_out("a link, a pipe or a device", shard, name)
            elif suffix.lower() in (".cls", ".json"):
                self._note_label(labels, key, suffix.lower(), tar, member)
            elif os.path.basename(name).startswith("."):
                self._leave_out(HIDDEN, shard, name)
            elif suffix.lower() in SUFFIXES:
                images[name] = member.offset_data, member.size
            else:
                self.unused[suffix.lower() or "files without a suffix"] += 1
                self._leave_out(NO_IMAGES, shard, name)
        keys = {os.path.splitext(name)[0] for name in images}
        for name, place in images.items():
            key, sample = os.path.splitext(name)[0], _sample(name)
            # x.mask.png beside x.jpg and x.cls belongs to the sample x, whose image is x.jpg.
            if key not in labels and sample in labels and key != sample and sample in keys:
                self._leave_out("beside the image of its sample", shard, name)
                continue
            raw = f"{shard}/{name}".encode("utf-8", "surrogateescape")
            self.ids.append(id_of(raw, self.unreadable))
            self.labels.append(labels.get(key) or labels.get(sample, ""))
            self.places.extend((len(self.shards) - 1, *place))

    def _leave_out(self, reason: str, shard: str, name: str) -> None:
        leave_out(self.left_out, reason, f"{shard}/{name}".encode("utf-8", "surrogateescape"))

    def _note_label(
        self,
        labels: dict[str, str],
        key: str,
        suffix: str,
        tar: tarfile.TarFile,
        member: tarfile.TarInfo,
    ) -> None:
        """Keep the label that a ``.cls`` or ``.json`` member gives its sample."""
        file = tar.extractfile(member)
        text = b"" if file is None else file.read()
        try:
            if suffix == ".cls":
                labels[key] = text.decode().strip()
                return
            values = json.loads(text)
            values = values if isinstance(values, dict) else {"(no object)": values}
            found = [label_text(values[name]) for name in _JSON_LABELS if name in values]
            labels[key] = labels.get(key) or next(filter(None, found), "")
            self.unused.update(f"JSON key {name}" for name in values.keys() - set(_JSON_LABELS))
        except (ValueError, TypeError, ImageSetError) as error:
            where = os.fsdecode(tar.name or "")
            raise ImageSetError(f"{where}: {member.name} is not a label: {error}") from error


def _sample(name: str) -> str:
    """Return the key of a member's sample: its path up to the first dot of the name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
