"""Images in the members of WebDataset shards: uncompressed tar files, read in place."""
# ruff: noqa: PTH100, PTH119, PTH122, PTH123

from __future__ import annotations

import json
import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from featcache.errors import DecodeError, ImageSetError
from featcache.images import sources

_JSON_LABELS = ("label", "cls", "class")  # keys of a sample's JSON; the first one there counts
_SHOWN = 5  # so many kinds of what is not used are named
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")


@dataclass(frozen=True, kw_only=True)
class TarMembers(sources.Shards):
    """Members of tar files, read in place; `places` say where their bytes begin, and how many."""

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
        shard, offset, size = self.place(row)
        # Opening takes microseconds; keeping thousands of shards open would meet limits.
        with open(shard.path, "rb", buffering=0) as file:
            now, data = os.fstat(file.fileno()), os.pread(file.fileno(), size, offset)
        shard.check(now)
        if len(data) != size:
            raise DecodeError("read", f"{shard.path} is cut short")
        return data

    def stat(self, row: int) -> tuple[int, int]:
        """Return the member's size, and the stamp of its shard."""
        return self.place(row)[2], super().stat(row)[1]


def tars(names: list[str]) -> TarMembers:
    """List the images in tar shards; see `ImageSet.from_tar`."""
    paths = sorted({os.path.abspath(name) for name in names})
    source = names[0] if len(paths) == 1 else f"{len(paths)} tar files"
    shards, ids, labels, places = [], [], [], array("q")
    unreadable: set[str] = set()
    left_out: dict[str, tuple[int, str]] = {}
    unused: Counter[str] = Counter()
    for number, path in enumerate(paths):
        try:
            shards.append(sources.Shard.of(path))
            with tarfile.open(path, "r:") as tar:
                for name, label, place in _members(tar, os.path.basename(path), left_out, unused):
                    ids.append(sources.id_of(name, unreadable))
                    labels.append(label)
                    places.extend((number, *place))
        except OSError as error:
            raise ImageSetError(f"{path}: cannot read this tar: {error.strerror}") from error
        except (tarfile.TarError, ValueError, EOFError) as error:
            with open(path, "rb") as file:
                compressed = file.read(6).startswith(_COMPRESSED)
            why = "it is compressed, and cannot be read in place. Decompress it first"
            reason = why if compressed else str(error)
            raise ImageSetError(f"{path}: expected a whole tar file: {reason}") from error
    if not ids:
        raise sources.no_images(source, sum(count for count, _ in left_out.values()))
    values = {"ids": ids} | ({"labels": labels} if any(labels) else {})
    tables, order = sources.sorted_tables(values, source)
    what = ", ".join(f"{count} {what}" for what, count in unused.most_common(_SHOWN))
    return TarMembers(
        tables=tables,
        name=source,
        left_out=left_out,
        notes=(f"seen beside the images and not used: {what}",) if what else (),
        places=np.array(places, np.int64).reshape(-1, 3)[order],  # (n, 3)
        shards=tuple(shards),
        unreadable=frozenset(unreadable),
    )


def _members(
    tar: tarfile.TarFile, shard: str, left_out: dict[str, tuple[int, str]], unused: Counter[str]
) -> Iterator[tuple[bytes, str, tuple[int, int]]]:
    """Yield each image's path, which begins with `shard`, its label, and its offset and size."""
    labels: dict[str, str] = {}  # by key; "" for a sample whose members give none
    images: dict[str, tuple[int, int]] = {}

    def path(name: str) -> bytes:
        return f"{shard}/{name}".encode("utf-8", "surrogateescape")

    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
        name = member.name.removeprefix("./")
        key, suffix = os.path.splitext(name)
        if member.islnk() and (target := member.linkname.removeprefix("./")) in images:
            images[name] = images[target]
        elif not member.isreg() or member.issparse():
            if not member.isdir():
                sources.leave_out(left_out, "a link, a pipe or a device", path(name))
        elif suffix.lower() == ".cls":
            labels[key] = _label(tar, member, lambda text: text.decode().strip())
        elif suffix.lower() == ".json":
            label = _label(tar, member, lambda text: _of_json(text, unused))
            labels[key] = labels.get(key) or label
        elif any(sources.is_hidden(part) for part in path(name).split(b"/")[1:] if part != b".."):
            sources.leave_out(left_out, sources.HIDDEN, path(name))
        elif suffix.lower() in sources.SUFFIXES:
            images[name] = member.offset_data, member.size
        else:
            unused[suffix.lower() or "files without a suffix"] += 1
            sources.leave_out(left_out, sources.NO_IMAGES, path(name))
    # tarfile takes a header that is damaged or cut off for the end.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise ValueError("it is damaged or cut off behind its first members")
    keys = {os.path.splitext(name)[0] for name in images}
    for name, place in images.items():
        key, sample = os.path.splitext(name)[0], _sample(name)
        # x.mask.png beside x.jpg and x.cls belongs to the sample x, whose image is x.jpg.
        if key not in labels and sample in labels and key != sample and sample in keys:
            sources.leave_out(left_out, "beside the image of its sample", path(name))
        else:
            yield path(name), labels.get(key) or labels.get(sample, ""), place


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, read: Callable[[bytes], str]) -> str:
    """Return the label that a ``.cls`` or ``.json`` member gives its sample; "" for none."""
    file = tar.extractfile(member)
    try:
        return "" if file is None else read(file.read())
    except (ValueError, TypeError, ImageSetError) as error:
        where = os.fsdecode(tar.name or "")
        raise ImageSetError(f"{where}: {member.name} is not a label: {error}") from error


def _of_json(text: bytes, unused: Counter[str]) -> str:
    values = json.loads(text)
    values = values if isinstance(values, dict) else {"(no object)": values}
    unused.update(f"JSON key {name}" for name in values.keys() - set(_JSON_LABELS))
    found = [sources.label_text(values[name]) for name in _JSON_LABELS if name in values]
    return next(filter(None, found), "")


def _sample(name: str) -> str:
    """Return the key of a member's sample: its path up to the first dot of the name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]
