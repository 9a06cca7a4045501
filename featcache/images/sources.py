"""What there is to read: folders, tables, globs, tar shards, arrays and data sets are listed here.

Each function lists one kind of source and returns a `Listing`: sorted unique ids, a reader for
them, and what else the source says about its images.
"""
# Not pathlib: there may be millions of paths, and some are not text.
# ruff: noqa: PTH100, PTH110, PTH112, PTH116, PTH118, PTH119, PTH122, PTH123, PTH207, PTH208

from __future__ import annotations

import csv
import difflib
import glob
import itertools
import json
import os
import stat
import tarfile
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.errors import ImageSetError
from featcache.images.readers import Arrays, Datasets, Files, Reader, Shard, TarMembers
from featcache.images.tables import column

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".j2k", ".jfif", ".jp2", ".jpe"}
    | {".jpeg", ".jpg", ".npy", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff"}
    | {".webp"}
)
"""Suffixes of the files that are taken for images, in lower case."""

TORCHVISION_SETS = {
    "CIFAR10": ("train", "test"),
    "FashionMNIST": ("train", "test"),
    "Flowers102": ("train", "val", "test"),
    "OxfordIIITPet": ("trainval", "test"),
}
"""Data sets of torchvision that are known by name, and their splits."""

_SPLIT_FOLDERS = frozenset({"train", "val", "valid", "validation", "test"})
_JSON_LABELS = ("label", "cls", "class")  # keys of a WebDataset sample's JSON, the first one counts
_NAMED = 3  # so many offenders are named in a message


@dataclass(frozen=True)
class Listing:
    """The images of one source.

    Attributes
    ----------
    tables : dict of str to ndarray
        What the source says of each image: "ids", sorted and unique, and "labels", "groups" and
        "splits" where it has them.
    reader : Reader
        Reads them by row and id.
    source : str
        Where it is, for messages.
    ignored : int
        Number of files that were passed over.
    """

    tables: dict[str, NDArray[Any]]
    reader: Reader
    source: str = ""
    ignored: int = 0


# -- folders and files ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """A folder that is being walked.

    Attributes
    ----------
    path, prefix : bytes
        Where it is, and what the ids below it begin with.
    readable : bool
        Whether all names down to here are UTF-8.
    above : tuple of (int, int)
        Device and inode of the folders that it lies in.
    identity : (int, int)
        Its own.
    names : iterator of bytes
        The sorted names that are still to come; those of folders end in ``/``.
    escaped : dict
        The true names of folders and files whose names are not UTF-8.
    """

    path: bytes
    prefix: bytes
    readable: bool
    above: tuple[tuple[int, int], ...]
    identity: tuple[int, int]
    names: Iterator[bytes]
    escaped: dict[bytes, bytes]


class _FolderScan:
    """Walks a folder; iterating gives the ids, in UTF-8 and sorted, and collects the rest.

    Entries are sorted with a ``/`` after the names of folders, so that a walk in this order meets
    the paths in their own sorted order: only one folder's entries are in memory at a time.
    """

    def __init__(self, root: str, suffixes: frozenset[bytes]) -> None:
        self.source = root
        self.root = os.fsencode(root)
        self.suffixes = suffixes
        self.ignored = 0
        self.unreadable: list[str] = []

    def __iter__(self) -> Iterator[str]:
        stack = [self._enter(self.root, b"", True, ())]
        while stack:
            folder = stack[-1]
            for name in folder.names:
                if name.endswith(b"/"):
                    stack.append(self._below(folder, name))
                    break
                id = (folder.prefix + name).decode()
                if not folder.readable or name in folder.escaped:
                    self.unreadable.append(id)
                yield id
            else:
                stack.pop()

    def _below(self, folder: _Folder, name: bytes) -> _Folder:
        return self._enter(
            os.path.join(folder.path, folder.escaped.get(name, name[:-1])),
            folder.prefix + name,
            folder.readable and name not in folder.escaped,
            (*folder.above, folder.identity),
        )

    def _enter(
        self,
        path: bytes,
        prefix: bytes,
        readable: bool,
        above: tuple[tuple[int, int], ...],
    ) -> _Folder:
        names, escaped, identity = self._entries(path)
        # A link may lead to a folder that it lies in; such a folder is taken for empty.
        entries = iter(() if identity in above else names)
        return _Folder(path, prefix, readable, above, identity, entries, escaped)

    def _entries(self, folder: bytes) -> tuple[list[bytes], dict[bytes, bytes], tuple[int, int]]:
        """List one folder.

        Returns
        -------
        tuple
            Names of folders (ending in ``/``) and images, sorted; the true names of those that
            are not UTF-8 and were escaped; device and inode of the folder.
        """
        names, escaped = [], {}
        try:
            status = os.stat(folder)
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    is_folder = entry.is_dir()
                    if name.startswith(b".") or not (is_folder or self._is_image(name)):
                        self.ignored += 1
                        continue
                    key = name + b"/" if is_folder else name
                    if not _is_utf8(name):
                        key = key.decode(errors="backslashreplace").encode()
                        escaped[key] = name
                    names.append(key)
        except OSError as error:
            where = os.fsdecode(folder)
            raise ImageSetError(
                f"expected a folder of images at {where}: {error.strerror}"
            ) from error
        if escaped and len(set(names)) < len(names):
            raise ImageSetError(
                f"{os.fsdecode(folder)}: two names are both written {_listed(list(escaped))}; "
                "rename the one that is not UTF-8"
            )
        names.sort()
        return names, escaped, (status.st_dev, status.st_ino)

    def _is_image(self, name: bytes) -> bool:
        return name[name.rfind(b".") :].lower() in self.suffixes


def _is_utf8(name: bytes) -> bool:
    if name.isascii():
        return True
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def folder(root: str, suffixes: frozenset[str]) -> Listing:
    """List the images below a folder; see `ImageSet.from_folder`."""
    scan = _FolderScan(root, frozenset(suffix.lower().encode() for suffix in suffixes))
    ids = column(scan, root)
    if not len(ids):
        raise ImageSetError(_no_images(root, scan.ignored, suffixes))
    tables = {"ids": ids}
    if any("/" in id for id in ids):
        tables["labels"] = column((id.rpartition("/")[0].partition("/")[0] for id in ids), root)
        if _are_splits(set(tables["labels"])) and all(id.count("/") > 1 for id in ids):
            tables["splits"] = tables["labels"]
            tables["labels"] = column((id.split("/", 2)[1] for id in ids), root)
    reader = Files(os.path.abspath(scan.root), unreadable=frozenset(scan.unreadable))
    return Listing(tables, reader, root, scan.ignored)


def _no_images(source: str, others: int, suffixes: Iterable[str]) -> str:
    known = " ".join(sorted(suffixes))
    return f"{source}: expected images, found none among {others} files. Known suffixes: {known}"


def _are_splits(names: set[str]) -> bool:
    return len(names) > 1 and "train" in names and names <= _SPLIT_FOLDERS


def kind_of(names: list[str], root: str = "") -> str:
    """Return the kind of source that `ImageSet.open` takes these names for, relative to `root`."""
    if len(names) > 1:
        return "tars" if are_tars(names) else "files"
    name = os.path.join(root, names[0])
    if names[0].partition(":")[0] in TORCHVISION_SETS and not os.path.exists(name):
        return "torchvision"
    if os.path.isdir(name):
        return "folder"
    if are_tars(matches(name)):
        return "tars"
    if name.lower().endswith((".npy", ".npz")) and not is_glob(name):
        return "array file"
    return "files"


def is_glob(name: str) -> bool:
    """Tell whether a name is a pattern, and not a file that is called so."""
    return glob.has_magic(name) and not os.path.lexists(name)


def matches(pattern: str) -> list[str]:
    """Return the files that a pattern matches, or the one file that it names."""
    names = glob.glob(pattern, recursive=True) if is_glob(pattern) else [pattern]
    return sorted(name for name in names if not os.path.isdir(name))


def globbed(pattern: str, base: str) -> Listing:
    """List the images that a pattern in the folder `base` matches; see `ImageSet.from_files`."""
    parts = pattern.split("/")
    plain = next(k for k, part in enumerate(parts) if glob.has_magic(part))
    root = os.path.join(base, "/".join(parts[:plain]) or ("/" if pattern.startswith("/") else ""))
    found = matches("/".join([glob.escape(root), *parts[plain:]]))
    images = [name for name in found if os.path.splitext(name)[1].lower() in SUFFIXES]
    if not images:
        raise ImageSetError(_no_images(pattern, len(found), SUFFIXES))
    names = [os.path.relpath(name, root) for name in images]
    return _named(names, root, pattern, len(found) - len(images))


def files(names: list[str], root: str) -> Listing:
    """List files by their names, relative to `root`; see `ImageSet.from_files`."""
    names = sorted({os.path.normpath(name) for name in names})
    missing = [name for name in names if not os.path.lexists(os.path.join(root, name))]
    if missing:
        near = _near_names(os.path.join(root, missing[0]))
        raise ImageSetError(f"no such file: {_listed(missing)}.{near}")
    folders = [name for name in names if os.path.isdir(os.path.join(root, name))]
    if folders:
        raise ImageSetError(
            f"expected files, got {_listed(folders)}, which is a folder. Give one folder alone"
        )
    return _named(names, root, names[0] if len(names) == 1 else f"{len(names)} files")


def _named(names: Iterable[str], root: str, source: str, ignored: int = 0) -> Listing:
    """List files by their names (as Python gives them) relative to `root`."""
    ids, unreadable = [], set()
    for name in names:
        raw = os.fsencode(name)
        ids.append(raw.decode(errors="backslashreplace"))
        if not _is_utf8(raw):
            unreadable.add(ids[-1])
    tables, _ = _sorted_tables({"ids": ids}, source)
    reader = Files(os.fsencode(os.path.abspath(root)), unreadable=frozenset(unreadable))
    return Listing(tables, reader, source, ignored)


# -- tables --------------------------------------------------------------------------------------


def table(path: str, root: str, columns: dict[str, str], suffix: str) -> Listing:
    """List the images that a table names; see `ImageSet.from_csv`."""
    values = _read_table(path, columns)
    _check_ids(values["ids"], root, suffix, path)
    # ./a.jpg is a.jpg, and must not count twice
    values["ids"] = [os.path.normpath(id) for id in values["ids"]]
    tables, _ = _sorted_tables(values, path, f", column {columns['ids']!r}")
    return Listing(tables, Files(os.fsencode(os.path.abspath(root)), suffix.encode()), path)


def _read_table(path: str, columns: dict[str, str]) -> dict[str, list[str]]:
    """Return the wanted columns of a table.

    Parameters
    ----------
    path : str
        The table.
    columns : dict
        For each table ("ids", "labels", ...), the name of its column.

    Returns
    -------
    dict
        For each table, its values, line by line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            lines = csv.reader(file, delimiter=_delimiter(header), skipinitialspace=True)
            return _columns_of(lines, path, columns)
    except OSError as error:
        raise ImageSetError(f"{path}: cannot read this table: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ImageSetError(f"{path}: expected UTF-8 text: {error.reason}") from error
    except csv.Error as error:
        raise ImageSetError(f"{path}: not a table: {error}") from error


def _delimiter(header: str) -> str:
    return max(",\t;", key=header.count)  # of equal counts, the comma


def _columns_of(lines: Any, path: str, columns: dict[str, str]) -> dict[str, list[str]]:
    header = [name.strip() for name in next(lines, [])]
    places = {role: _place(name, header, path, role[:-1]) for role, name in columns.items()}
    table: dict[str, list[str]] = {role: [] for role in columns}
    fields = [(table[role], place, role != "ids") for role, place in places.items()]
    for line in lines:
        if not line:
            continue
        if len(line) != len(header):
            raise ImageSetError(
                f"{path}, line {lines.line_num}: expected {len(header)} fields, got {len(line)}"
            )
        for values, place, strip in fields:
            values.append(line[place].strip() if strip else line[place])
    return table


def _place(name: str, header: list[str], path: str, role: str) -> int:
    """Return the number of a column."""
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        raise ImageSetError(f"{path}: column {name!r} occurs {header.count(name)} times")
    raise ImageSetError(
        f"{path}: no column {name!r} for the {role}.{_perhaps(name, header)} "
        f"Columns: {', '.join(header) or 'none'}. Name yours with --{role}-column"
    )


def _check_ids(ids: list[str], root: str, suffix: str, source: str) -> None:
    """Refuse ids that name no file below `root`."""
    if not os.path.isdir(root):
        raise ImageSetError(f"{source}: its images should be in {root}, which is not a folder")
    leaving = [id for id in ids if not id or id.startswith("/") or ".." in id.split("/")]
    if leaving:
        raise ImageSetError(
            f"{source}: {len(leaving)} of {len(ids)} ids are not paths below {root} "
            f"(first: {_listed(leaving)}). Expected relative paths without '..'"
        )
    home = os.path.realpath(root)
    inside = _Inside(home)
    missing = []
    for id in ids:
        path = f"{home}/{id}{suffix}"
        try:
            is_link = stat.S_ISLNK(os.lstat(path).st_mode)
        except (OSError, ValueError):  # ValueError: a null character
            missing.append(id)
            continue
        if not inside(path, is_link):
            raise ImageSetError(
                f"{source}: id {id!r} is a link that leaves {root}. Copy the file, or give the "
                "folder that holds both"
            )
    if missing:
        raise ImageSetError(
            f"{source}: {len(missing)} of {len(ids)} ids have no file "
            f"(first: {_listed(missing)}). Expected {root}/ID{suffix}."
            + ("" if suffix else _suffix_hint(home, missing[0]))
        )


class _Inside:
    """Tells whether paths, with all links followed, lie in a folder; each parent is solved once."""

    def __init__(self, home: str) -> None:
        self.home = home
        self._parents: dict[str, bool] = {}

    def __call__(self, path: str, is_link: bool) -> bool:
        if is_link:
            return self._holds(path)
        parent = path.rpartition("/")[0]
        if parent not in self._parents:
            self._parents[parent] = self._holds(parent)
        return self._parents[parent]

    def _holds(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self.home or real.startswith(self.home.rstrip("/") + "/")


def _suffix_hint(home: str, id: str) -> str:
    """Return a hint where a file of that name has a suffix that was not given."""
    for candidate in sorted(SUFFIXES):
        for spelling in (candidate, candidate.upper()):
            if os.path.exists(f"{home}/{id}{spelling}"):
                return f" There is {id}{spelling}: type --suffix {spelling}"
    return ""


# -- tar shards ----------------------------------------------------------------------------------


def are_tars(names: list[str]) -> bool:
    """Tell whether all names are those of tar files."""
    return bool(names) and all(name.lower().endswith(".tar") for name in names)


def tars(names: list[str]) -> Listing:
    """List the images in tar shards; see `ImageSet.from_tar`."""
    shards = sorted({os.path.abspath(name) for name in names})
    source = names[0] if len(shards) == 1 else f"{len(shards)} tar files"
    index = _TarIndex()
    for shard in shards:
        index.add(shard)
    if not index.ids:
        raise ImageSetError(_no_images(source, index.ignored, SUFFIXES))
    values = {"ids": index.ids} | ({"labels": index.labels} if any(index.labels) else {})
    tables, order = _sorted_tables(values, source)
    reader = TarMembers(
        tuple(index.shards),
        np.array(index.shard, np.int64)[order],
        np.array(index.offset, np.int64)[order],
        np.array(index.size, np.int64)[order],
        frozenset(index.unreadable),
    )
    return Listing(tables, reader, source, index.ignored)


@dataclass
class _TarIndex:
    """The images in tar shards: one entry a member in each list."""

    ids: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    shard: array[int] = field(default_factory=lambda: array("q"))
    offset: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))
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
                start = file.read(6)
            if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\xfd7zXZ\0":
                reason = "it is compressed, and cannot be read in place. Decompress it first"
            else:
                reason = str(error)
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
            elif _is_tar_image(member.name):
                images.setdefault(key, []).append(member)
            else:
                self.ignored += 1
        for key, members in images.items():
            # x.jpg beside x.mask.png: the image is the one whose suffix is nothing but a suffix.
            plain = [m for m in members if "." not in _sample(m.name)[1]] or members
            self.ignored += len(members) - len(plain)
            for member in plain:
                self._append(
                    f"{shard}/{member.name.removeprefix('./')}", labels.get(key, ""), member
                )

    def _append(self, name: str, label: str, member: tarfile.TarInfo) -> None:
        raw = name.encode("utf-8", "surrogateescape")
        id = raw.decode(errors="backslashreplace")
        if not _is_utf8(raw):
            self.unreadable.add(id)
        self.ids.append(id)
        self.labels.append(label)
        self.shard.append(len(self.shards) - 1)
        self.offset.append(member.offset_data)
        self.size.append(member.size)


def _sample(name: str) -> tuple[str, str]:
    """Split a member's name into the key of its sample and the rest, in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _is_tar_image(name: str) -> bool:
    base = name.rpartition("/")[2]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in SUFFIXES


def _note_label(
    labels: dict[str, str], key: str, suffix: str, tar: tarfile.TarFile, member: tarfile.TarInfo
) -> None:
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


# -- arrays and data sets ------------------------------------------------------------------------


def arrays(
    images: NDArray[Any], labels: list[str] | None, ids: list[str] | None, source: str = ""
) -> Listing:
    """List the images of an array; see `ImageSet.from_arrays`."""
    source = source or f"an array {images.shape}"
    if images.ndim not in (3, 4) or images.dtype not in (np.uint8, np.uint16, np.bool_):
        raise ImageSetError(
            f"{source}: expected uint8 pixels of shape (n, h, w) or (n, h, w, c), "
            f"got {images.dtype} {images.shape}"
        )
    values = {"ids": _numbered(len(images)) if ids is None else ids}
    if labels is not None:
        values["labels"] = labels
    for what, texts in values.items():
        if len(texts) != len(images):
            raise ImageSetError(
                f"{source}: expected {len(images)} {what}, one an image, got {len(texts)}"
            )
    tables, order = _sorted_tables(values, source)
    return Listing(tables, Arrays(images, order), source)


def array_file(path: str) -> Listing:
    """List a ``.npy`` of images, or a ``.npz`` with ``images`` and perhaps ``labels``, ``ids``."""
    try:
        if path.lower().endswith(".npy"):
            return arrays(np.load(path, mmap_mode="r"), None, None, path)
        # numpy leaves a damaged .npz open when it is given a name
        with open(path, "rb") as file, np.load(file) as parts:
            if "images" not in parts:
                raise ImageSetError(f"{path}: expected an array 'images', got {parts.files}")
            texts = {k: parts[k].astype(str).tolist() for k in ("labels", "ids") if k in parts}
            return arrays(parts["images"], texts.get("labels"), texts.get("ids"), path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ImageSetError(f"{path}: cannot read this array: {error}") from error


def torchvision_set(
    name: str, root: str | os.PathLike[str] | None, split: str | None, download: bool
) -> Listing:
    """List a data set of torchvision by its name; see `ImageSet.from_torchvision`."""
    if name not in TORCHVISION_SETS:
        known = ", ".join(TORCHVISION_SETS)
        raise ImageSetError(f"no torchvision data set {name!r} is known. Known: {known}")
    if root is None:
        raise ImageSetError(f"{name}: expected the folder that it is in. Type {name}:FOLDER")
    splits = TORCHVISION_SETS[name]
    if split is not None and split not in splits:
        raise ImageSetError(f"{name} has the splits {', '.join(splits)}, not {split!r}")
    chosen = splits if split is None else (split,)
    loaded = {which: _load_torchvision(name, root, which, download) for which in chosen}
    return datasets(loaded, f"{name}:{os.fspath(root)}")


def datasets(parts: dict[str, Any], source: str) -> Listing:
    """List map-style data sets, one a split; "" names the only one that is no split."""
    for dataset in parts.values():
        _check_items(dataset, source)
    lengths = [len(dataset) for dataset in parts.values()]
    ids = [
        f"{split}/{number}" if split else number
        for split, length in zip(parts, lengths, strict=True)
        for number in _numbered(length)
    ]
    values = {
        "ids": ids,
        "labels": [label for dataset in parts.values() for label in _dataset_labels(dataset)],
    }
    if "" not in parts:
        values["splits"] = [id.partition("/")[0] for id in ids]
    tables, order = _sorted_tables(values, source)
    which = np.repeat(np.arange(len(lengths)), lengths)
    item = np.concatenate([np.arange(length) for length in lengths])
    return Listing(tables, Datasets(tuple(parts.values()), which[order], item[order]), source)


def _check_items(dataset: Any, source: str) -> None:
    """Refuse a data set whose first item is no (PIL image, target)."""
    from PIL import Image

    if not len(dataset):
        raise ImageSetError(f"{source}: there are no images")
    item = dataset[0]
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise ImageSetError(f"{source}: expected items (PIL image, int), got {type(item).__name__}")
    if not isinstance(item[0], Image.Image):
        raise ImageSetError(
            f"{source}: expected items (PIL image, int), got ({type(item[0]).__name__}, ...). "
            "Make the data set without transform: the backbone brings its own"
        )


def _dataset_labels(dataset: Any) -> list[str]:
    """Return the labels of a data set's items, without decoding images where that is possible."""
    names = getattr(dataset, "classes", None)
    targets = _targets(dataset)
    if targets is None or getattr(dataset, "target_transform", None) is not None:
        targets = [dataset[index][1] for index in range(len(dataset))]
    if names is None and hasattr(dataset, "dataset"):  # torch.utils.data.Subset
        names = getattr(dataset.dataset, "classes", None)
    if names is None:
        return [str(target) for target in targets]
    return [str(names[int(target)]) for target in targets]


def _targets(dataset: Any) -> list[Any] | None:
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        inner = _targets(dataset.dataset)
        if inner is None or getattr(dataset.dataset, "target_transform", None) is not None:
            return None
        return [inner[index] for index in dataset.indices]
    for name in ("targets", "labels", "_labels"):
        values = getattr(dataset, name, None)
        if values is not None and len(values) == len(dataset):
            listed: list[Any] = np.asarray(values).tolist()
            return listed
    return None


def _load_torchvision(name: str, root: str | os.PathLike[str], split: str, download: bool) -> Any:
    import torchvision.datasets

    kind = getattr(torchvision.datasets, name)
    which = {"train": split == "train"} if name in ("CIFAR10", "FashionMNIST") else {"split": split}
    try:
        return kind(os.fspath(root), download=download, **which)
    except (RuntimeError, OSError) as error:
        hint = "" if download else ". To download it, type --download"
        raise ImageSetError(f"{name}: expected it in {os.fspath(root)}: {error}{hint}") from error


# -- ids and messages ----------------------------------------------------------------------------


def _numbered(n: int) -> list[str]:
    """Return ids for images without names: they sort like their numbers, however many come."""
    return [f"{number:08d}" for number in range(n)]


def _sorted_tables(
    values: Mapping[str, Sequence[str]], source: str, where: str = ""
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Return the tables sorted by "ids", and the order; refuse ids that occur twice."""
    tables = {name: column(texts, source) for name, texts in values.items()}
    order = np.argsort(tables["ids"], kind="stable")
    tables = {name: table[order] for name, table in tables.items()}
    twice = sorted({a for a, b in itertools.pairwise(tables["ids"]) if a == b})
    if twice:
        raise ImageSetError(
            f"{source}{where}: {len(twice)} ids occur more than once (first: {_listed(twice)})"
        )
    return tables, order


def _listed(names: Sequence[object]) -> str:
    """Return the first few names, for a message."""
    text = ", ".join(str(name) for name in names[:_NAMED])
    return f"{text}, ..." if len(names) > _NAMED else text


def _perhaps(name: str, known: Iterable[str]) -> str:
    """Return a question after names like this one, whatever their case; "" if there are none."""
    spelling = {k.lower(): k for k in known}
    near = difflib.get_close_matches(name.lower(), spelling, n=_NAMED, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(spelling[k]) for k in near)}?" if near else ""


def _near_names(path: str) -> str:
    """Return names near that of a missing file, for a message."""
    folder, name = os.path.split(path)
    try:
        return _perhaps(name, os.listdir(folder or ".")) if name else ""
    except OSError:
        return ""
