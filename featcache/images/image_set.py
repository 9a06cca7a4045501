"""Which images there are: an ordered list of ids, where their bytes come from, and their labels.

An `ImageSet` is made of class folders, a table, a list of files, WebDataset shards, Parquet files,
arrays, or a data set of PIL images, and reads one image at a time. One rule holds for all ids: they
are unique, sorted by their UTF-8 bytes, relative to what was given (``/`` between folders), and the
same in every run. A file whose name is not UTF-8 gets an escaped id and cannot be read.

Each kind of source is a subclass of `featcache.images.sources.Source`, in a module with the
functions that list it: `folders`, `tars`, `parquet`, `arrays`. `csv_tables` and `layout` label what
is listed.
"""
# A relative path must stay as it is written, links included: not pathlib's resolve().
# ruff: noqa: PTH100, PTH110, PTH112, PTH118

from __future__ import annotations

import copy
import glob
import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from featcache.errors import DecodeError, ImageSetError
from featcache.images import arrays, csv_tables, folders, layout, parquet, tars
from featcache.images.arrays import TORCHVISION_SETS
from featcache.images.sources import SHARDS, SUFFIXES, Source, first_few, matcher, read_error
from featcache.pixels import decode
from featcache.system.tables import counted, in_order, kept_table

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from featcache.pixels.decode import RawImage

AnyPath: TypeAlias = str | os.PathLike[str]
AnyPaths: TypeAlias = AnyPath | Iterable[AnyPath]


class ImageSet:
    """An ordered list of images: their ids, where their bytes are, and perhaps their labels.

    Made by one of `from_folder`, `from_csv`, `from_files`, `from_tar`, `from_arrays`,
    `from_dataset`, or by `open`, which chooses among them. Sets can be pickled, and sent to
    worker processes.

    Attributes
    ----------
    tables : dict of str to ndarray of StringDType, shape (n,)
        One row an image: always "ids" (unique, sorted, relative to what was given); "labels"
        (class names), "groups" (images that must stay together, in training or in test) and
        "splits" (a division given in advance) if the source has them. "" means none. The tables
        are attributes, too: `ids`, `labels`, `groups`, `splits`; one that is missing is None.
    source : str
        Name of the folder, file or array, for messages.
    ignored : int
        Number of files that were left out.
    notes : list of str
        What was left out and why, images without a label, and what looks like a mistake.
    opened_with : dict or None
        Arguments of `open`, as JSON values with absolute paths, with which another process lists
        the same images: ``ImageSet.open(**images.opened_with)``. None for images in memory, for
        a selection, and for a set that `open` cannot make.

    Examples
    --------
    >>> images = ImageSet.from_folder("flowers")  # doctest: +SKIP
    >>> images  # doctest: +SKIP
    ImageSet(6149 images, 102 classes, from flowers)
    >>> images.ids[0], images.labels[0]  # doctest: +SKIP
    ('alpine/0001.jpg', 'alpine')
    """

    def __init__(self, source: Source, opened_with: dict[str, Any] | None = None) -> None:
        if not len(source.tables["ids"]):
            raise ImageSetError(f"{source.name}: there are no images")
        self.opened_with = opened_with
        self._source = source

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tables(self) -> dict[str, NDArray[Any]]:
        """Tables of text, one row an image: "ids", and "labels", "groups", "splits" if known."""
        return self._source.tables

    @property
    def source(self) -> str:
        """Name of the folder, file or array, for messages."""
        return self._source.name

    @property
    def ignored(self) -> int:
        """Number of files that were left out."""
        return sum(count for count, _ in self._source.left_out.values())

    @property
    def unlabelled(self) -> int:
        """Number of images without a label; 0 where no image can have one."""
        return 0 if self.labels is None else int((self.labels == "").sum())

    @property
    def notes(self) -> list[str]:
        """What was left out, images without a label, and what looks like a mistake."""
        notes = [
            f"{count:,} left out: {reason} (first: {name})"
            for reason, (count, name) in self._source.left_out.items()
        ]
        if self.labels is not None and (rows := np.flatnonzero(self.labels == "")).size:
            notes += [f"{len(rows):,} without a label (first: {self.ids[rows[0]]})"]
        alike: dict[str, list[str]] = {}
        for name in self.classes:
            form = unicodedata.normalize("NFC", name).casefold()
            alike.setdefault("".join(form.split()), []).append(name)
        notes += [
            f"different classes with almost one name: {first_few([repr(name) for name in names])}"
            for names in alike.values()
            if len(names) > 1
        ]
        return [*notes, *self._source.notes]

    @property
    def ids(self) -> NDArray[Any]:
        """The table "ids": unique, sorted, relative to what was given."""
        return self.tables["ids"]

    @property
    def labels(self) -> NDArray[Any] | None:
        """The table "labels", or None: class names, "" where an image has none."""
        return self.tables.get("labels")

    @property
    def groups(self) -> NDArray[Any] | None:
        """The table "groups", or None: images of one group stay together when a set is split."""
        return self.tables.get("groups")

    @property
    def splits(self) -> NDArray[Any] | None:
        """The table "splits", or None: a division given in advance."""
        return self.tables.get("splits")

    @property
    def classes(self) -> list[str]:
        """The distinct labels in their order; "" (no label) is not one of them."""
        return in_order(self._distinct("labels") - {""})

    def _distinct(self, name: str) -> set[str]:
        return set(self.tables.get(name, ()))

    def read(self, index: int) -> RawImage:
        """Return image number `index` as it is stored: a file's bytes, an array, a PIL image.

        Raises
        ------
        DecodeError
            With stage "read" and the reason, if it cannot be read.
        """
        if self.ids[index] in self._source.unreadable:
            raise DecodeError("read", "its name is not UTF-8; rename the file")
        try:
            return self._source.read(index)
        except OSError as error:
            raise read_error(error, self._source.where(index)) from error
        except (MemoryError, OverflowError) as error:
            raise DecodeError("read", "the image does not fit into memory") from error

    def stat(self, index: int) -> tuple[int, int]:
        """Return size (bytes) and time of the last change (ns) of image number `index`.

        Both are -1 where there is no file, or no file any more.
        """
        return self._source.stat(index)

    def select(self, indices: ArrayLike) -> ImageSet:
        """Return the images with these numbers, in this order.

        Parameters
        ----------
        indices : array_like of int, shape (k,)
            Numbers of images from 0, each at most once; or a mask, bool of shape (n,). Ascending
            numbers keep the ids sorted.

        Returns
        -------
        ImageSet
            A set of k images that reads from the same place.

        Raises
        ------
        ImageSetError
            If a number is negative, too large or given twice, or a mask has another length.
        """
        rows, n = np.asarray(indices), len(self)
        if rows.dtype == bool and rows.shape == (n,):
            rows = np.flatnonzero(rows)
        numbers = rows.ndim == 1 and rows.dtype.kind in "iu"
        if rows.size and not (
            numbers and 0 <= rows.min() <= rows.max() < n and len(np.unique(rows)) == len(rows)
        ):
            raise ImageSetError(
                f"{self.source}: expected numbers from 0 to {n - 1}, each once, or a mask of shape "
                f"({n},), got {rows.dtype} {rows.shape}: {first_few(rows.reshape(-1).tolist())}"
            )
        return self._with(self._source.select(rows.astype(np.int64).reshape(-1)))

    def with_tables(self, tables: dict[str, NDArray[Any]]) -> ImageSet:
        """Return the same images with other labels, groups or splits.

        Parameters
        ----------
        tables : dict of str to ndarray of str, shape (n,)
            "labels", "groups", "splits": those that are given replace the set's own.
        """
        text = {name: np.asarray(table, np.dtypes.StringDType()) for name, table in tables.items()}
        return self._with(replace(self._source, tables=self.tables | text), self.opened_with)

    def _with(self, source: Source, opened_with: dict[str, Any] | None = None) -> ImageSet:
        other = copy.copy(self)
        other._source, other.opened_with = source, opened_with
        return other

    def parts(self, n: int) -> list[ImageSet]:
        """Cut the set into `n` parts of equal size (to within one image), each sorted.

        Raises
        ------
        ImageSetError
            If there are fewer images than parts.
        """
        if not 1 <= n <= len(self):
            raise ImageSetError(f"{self.source}: {len(self)} images cannot make {n} parts")
        return [self.select(rows) for rows in np.array_split(np.arange(len(self)), n)]

    def __repr__(self) -> str:
        words = [f"{len(self)} images"]
        if self.labels is not None:
            words.append(f"{len(self.classes)} classes")
        if self.groups is not None:
            words.append(f"{len(self._distinct('groups'))} groups")
        if self.splits is not None:
            words.append(f"splits {', '.join(sorted(self._distinct('splits')))}")
        if self.ignored:
            words.append(f"{self.ignored} other files ignored")
        return f"ImageSet({', '.join(words)}, from {self.source})"

    def __str__(self) -> str:
        """Return what was found, and the notes, in lines for people."""
        found = f"{self.source}: {counted(len(self), 'image')}"
        if self.labels is not None:
            counts = Counter(self.labels[self.labels != ""].tolist())
            first = first_few([f"{name} {counts[name]:,}" for name in in_order(counts)])
            found += f" in {counted(len(counts), 'class', 'classes')} ({first})"
        if self.splits is not None:
            parts = sorted(Counter(self.splits.tolist()).items())
            first = first_few([f"{name or 'none'} {count:,}" for name, count in parts])
            found += f", split into {first}"
        return "\n".join([found, *(f"  {note}" for note in self.notes)])

    # -- where images come from --------------------------------------------------------------

    @classmethod
    def open(
        cls,
        images: AnyPaths,
        *,
        labels_csv: AnyPath | None = None,
        id_column: str = "id",
        label_column: str | None = "label",
        group_column: str | None = None,
        split_column: str | None = None,
        keep_columns: Iterable[str] = (),
        suffix: str = "",
        root: AnyPath | None = None,
        download: bool = False,
        relative_to: AnyPath = "",
        exclude: Iterable[str] = (),
        label_pattern: str | None = None,
    ) -> ImageSet:
        r"""Make a set of whatever the command line calls IMAGES.

        Parameters
        ----------
        images : str, path, or sequence of them
            A folder; a glob, a file or several files; ``.tar`` shards, also ``{000..099}.tar``;
            ``.parquet`` files with a column of image files, or a folder of such, as Hugging Face
            exports data sets; a ``.npy`` or ``.npz`` file of images; the name of a torchvision data
            set (CIFAR10, FashionMNIST, Flowers102, OxfordIIITPet), also as ``NAME:ROOT``. All
            splits of a data set are listed: ids begin with the split, and the table "splits" holds
            it. Ids of Parquet files are ``FILE.parquet/ROW/PATH``, with the path that the row names
            if it does; the column "label" gives labels, and names such as
            ``train-00000-of-00002.parquet`` splits.
        labels_csv : path, optional
            Table of labels, groups and splits of these images; see `from_csv`.
        id_column : str
            Column of the table with the images' paths relative to `images`, without `suffix`.
        label_column, group_column, split_column : str, optional
            Columns with labels, groups and splits; None leaves them out. An empty label is none.
        keep_columns : iterable of str
            Further columns of the table, which a store keeps as text: `FeatureStore.columns`.
        suffix : str
            What is added to an id to get its file, such as ".jpg".
        root : path, optional
            Folder of a torchvision data set.
        download : bool
            Whether a torchvision data set may be downloaded into `root`.
        relative_to : path, optional
            As for `from_files`.
        exclude : iterable of str
            Patterns of ids to leave out, such as ``"*/thumbs"`` or ``"*_mask.png"``: of a whole id
            or of a folder that it lies in; ``*`` stands for any text, also with ``/``.
        label_pattern : str, optional
            Regular expression that is looked for in each id; its group named ``label`` is the
            label, as in ``(?P<label>[a-z]+)\.\d+\.jpg$`` for ``cat.0.jpg``.

        Raises
        ------
        ImageSetError
            If nothing is there, or it cannot be listed.
        """
        if labels_csv is not None and label_pattern is not None:
            raise ImageSetError("labels come from a table or from a pattern of the names, not both")
        found, again = _listed(_names(images), os.fspath(relative_to), root, download)
        if labels_csv is None:
            return cls._labelled(found, again, exclude, label_pattern)
        columns = {"id": id_column, "label": label_column, "group": group_column}
        columns["split"] = split_column
        globs, path, kept = _several(exclude), os.fspath(labels_csv), _several(keep_columns)
        again |= {"labels_csv": os.path.abspath(path), "suffix": suffix, "exclude": globs}
        again |= {f"{role}_column": column for role, column in columns.items()}
        again |= {"keep_columns": kept}
        named = {f"{role}s": column for role, column in columns.items() if column is not None}
        named |= {kept_table(column): column for column in kept}
        return cls(csv_tables.labelled(found, path, named, suffix, matcher(globs)), again)

    @classmethod
    def _labelled(
        cls,
        found: Source,
        again: dict[str, Any] | None,
        exclude: Iterable[str] = (),
        label_pattern: str | None = None,
    ) -> ImageSet:
        """Make a set of what was listed, with the labels that its paths give."""
        globs = _several(exclude)
        found = found.excluding(matcher(globs)) if globs else found
        if label_pattern is not None:
            found = layout.by_pattern(found, label_pattern)
        elif (paths := found.paths()) is not None:
            found = layout.by_folders(found, paths)
        return cls(found, again and {**again, "exclude": globs, "label_pattern": label_pattern})

    @classmethod
    def from_folder(
        cls,
        root: AnyPath,
        *,
        suffixes: Iterable[str] = SUFFIXES,
        exclude: Iterable[str] = (),
        label_pattern: str | None = None,
    ) -> ImageSet:
        """List the images below a folder; the first folder below it is the label.

        A folder without folders gives no labels. Two or more folders named like the parts of a
        data set (train, training, val, valid, validation, dev, test, testing, in any case), of
        which those for training hold class folders, give both split and label: one of them that
        holds no class folders is a part without labels, and what lies beside them is left out.
        Links are followed. Files with another suffix, hidden files, and folders that systems make
        (``@eaDir``, ``lost+found``) are left out and counted; see `notes`.

        Parameters
        ----------
        root : path
            The folder.
        suffixes : iterable of str
            Suffixes of image files, in lower case.
        exclude, label_pattern
            As for `open`.

        Raises
        ------
        ImageSetError
            If the folder is missing, cannot be read, or holds no image.
        """
        found = folders.folder(os.fspath(root), suffixes)
        again = {"images": os.path.abspath(root)} if suffixes is SUFFIXES else None
        return cls._labelled(found, again, exclude, label_pattern)

    @classmethod
    def from_csv(cls, csv: AnyPath, root: AnyPath, **columns: Any) -> ImageSet:
        """List the images that a table names.

        An id need not be spelt as the file is where only one file can be meant: it may be absolute,
        begin with the folder's name, have backslashes, another case, accents of another form, no
        folder or no suffix. The image has the id of its file. Files without a row are left out and
        counted; see `notes`.

        Parameters
        ----------
        csv : path
            Table in UTF-8 with a header line; fields are divided by commas, semicolons or tabs. One
            that Excel saved may have a mark of UTF-8 and empty rows and columns at its end; with
            the mark, what ``--excel`` wrote as ``'-1`` is ``-1`` again.
        root : path
            Folder of the images.
        **columns
            `id_column`, `label_column`, `group_column`, `split_column`, `keep_columns` and
            `suffix`, as for `open`.

        Raises
        ------
        ImageSetError
            If the table cannot be read, a column is missing, a line has too many or too few
            fields, a label or group holds a line break, an id is empty, occurs twice, has no file
            or more than one, or leaves the folder.
        """
        if not os.path.isdir(root):
            raise ImageSetError(f"{csv}: its images should be in {root}, which is not a folder")
        return cls.open(root, labels_csv=csv, **columns)

    @classmethod
    def from_files(cls, paths: AnyPaths, *, relative_to: AnyPath = "") -> ImageSet:
        """List files, without labels.

        Parameters
        ----------
        paths : path, glob, or iterable of paths
            A glob such as ``"photos/**/*.jpg"`` gives ids relative to its folder (``photos``) and
            passes over files that are not images by their suffix. Paths are ids as they stand;
            one that is given twice counts once.
        relative_to : path, optional
            Folder that relative paths begin in. The working directory if left out.

        Raises
        ------
        ImageSetError
            If a file is missing or is a folder, or a glob matches no image.
        """
        names = _names(paths)
        found, again = _files(names, os.fspath(relative_to))
        alike = _kind(names, os.path.abspath(relative_to)) == "files"
        return cls._labelled(found, again if alike else None)

    @classmethod
    def from_tar(cls, paths: AnyPaths) -> ImageSet:
        """List the images in WebDataset shards; they are read in place, nothing is extracted.

        The label of an image is the text of the ``.cls`` with its name, else "label", "cls" or
        "class" of the ``.json``, whether they share the name up to the last dot or to the first.
        Where no image has a label, folders in the tars are classes, as in `from_folder`. Ids are
        ``SHARD.tar/MEMBER``. Only regular members and hard links to them are read.

        Parameters
        ----------
        paths : path or iterable of paths
            Uncompressed tar files.

        Raises
        ------
        ImageSetError
            If a file is missing, is not a tar, is cut short or compressed, or holds no image.
        """
        names = _names(paths)
        again = {"images": [os.path.abspath(name) for name in names]}
        return cls._labelled(tars.tars(names), again if _kind(names, "") == ".tar" else None)

    @classmethod
    def from_arrays(
        cls,
        images: ArrayLike,
        labels: Iterable[Any] | None = None,
        ids: Iterable[str] | None = None,
    ) -> ImageSet:
        """Make a set of the images in one array.

        Parameters
        ----------
        images : array_like of uint8, shape (n, h, w) or (n, h, w, c)
            The pixels; also bool, uint16, or a memory map.
        labels : iterable, optional
            A label an image; numbers become text, None and NaN are no label.
        ids : iterable of str, optional
            An id an image; left out, its number with eight digits.

        Raises
        ------
        ImageSetError
            If shapes, types or lengths do not fit, or an id occurs twice.
        """
        names = None if ids is None else list(ids)
        return cls(arrays.arrays(np.asanyarray(images), labels, names))

    @classmethod
    def from_dataset(cls, dataset: Any) -> ImageSet:
        """Make a set of a map-style data set of (PIL image, int), as those of torchvision are.

        Parameters
        ----------
        dataset : Dataset
            A data set without transform, or ``Subset`` and ``ConcatDataset`` of such. Labels are
            its ``classes`` where it has them, else numbers as text; None, NaN and -1 among
            ``classes`` are no label. They are taken from its ``targets`` (or ``labels``) where it
            has these, else from all its items. With a ``target_transform`` they are what it gives.

        Raises
        ------
        ImageSetError
            If it is empty, holds other items, an item is another image each time it is read, or a
            target has no name among the ``classes``.
        """
        return cls(arrays.datasets({"": dataset}, type(dataset).__name__))


def content_hash(raw: RawImage) -> bytes:
    """Return the SHA-256 of an image as it is stored.

    Parameters
    ----------
    raw : bytes, ndarray or PIL.Image.Image
        What `ImageSet.read` returned.

    Returns
    -------
    bytes of length 32
        Hash of a file's bytes as they are; of an array's type, shape and pixels; of a PIL image's
        mode, size, transparent colour, orientation, palette and pixels.
    """
    if isinstance(raw, bytes):
        return hashlib.sha256(raw).digest()
    if isinstance(raw, np.ndarray):
        digest = hashlib.sha256(f"{raw.dtype.str} {raw.shape}\n".encode())
        digest.update(np.ascontiguousarray(raw).data)
        return digest.digest()
    with decode.quiet:
        seen = f"{raw.mode} {raw.size} {raw.info.get('transparency')} {decode.orientation(raw)}\n"
    digest = hashlib.sha256(seen.encode())
    digest.update(bytes(raw.getpalette() or ()))
    digest.update(raw.tobytes())
    return digest.digest()


def _several(given: AnyPaths) -> list[str]:
    return [os.fspath(one) for one in ([given] if isinstance(given, str | os.PathLike) else given)]


def _names(paths: AnyPaths) -> list[str]:
    return [name for path in _several(paths) for name in folders.expanded(path)]


def _listed(
    names: list[str], place: str, root: AnyPath | None, download: bool
) -> tuple[Source, dict[str, Any]]:
    """List what `ImageSet.open` was given; return it and the arguments that list it again."""
    first = names[0] if names else ""
    match _kind(names, place):
        case "torchvision":
            name, _, folder = first.partition(":")
            again = {"images": name, "root": os.path.abspath(folder or root or "")}
            return arrays.torchvision_set(name, folder or root, download), again
        case "folder":
            again = {"images": os.path.abspath(first)}
            try:
                return folders.folder(first, SUFFIXES), again
            except ImageSetError:
                shards = folders.matches(os.path.join(glob.escape(first), "**", "*.parquet"))
                if not shards:
                    raise
            return parquet.parquet(shards), again
        case ".tar" | ".parquet" as kind:
            shards = [shard for name in names for shard in folders.matches(name)]
            found = tars.tars(shards) if kind == ".tar" else parquet.parquet(shards)
            return found, {"images": [os.path.abspath(shard) for shard in shards]}
        case "array file":
            return arrays.array_file(first), {"images": os.path.abspath(first)}
        case _:
            return _files(names, place)


def _files(names: list[str], relative_to: str) -> tuple[Source, dict[str, Any]]:
    root = os.path.abspath(relative_to)
    again = {"images": names, "relative_to": root}
    if len(names) == 1 and folders.is_glob(os.path.join(root, names[0])):
        return folders.globbed(names[0], root), again
    return folders.files(names, root), again


def _kind(names: list[str], root: str) -> str:
    """Return the kind of source that `open` takes names for, some relative to `root`."""
    listed = folders.matches(names[0]) if len(names) == 1 else names
    for suffix in SHARDS:
        if listed and all(one.lower().endswith(suffix) for one in listed):
            return suffix
    if len(names) != 1:
        return "files"
    name = os.path.join(root, names[0])
    if names[0].partition(":")[0] in TORCHVISION_SETS and not os.path.exists(name):
        return "torchvision"
    if os.path.isdir(name):
        return "folder"
    if name.lower().endswith((".npy", ".npz")) and not folders.is_glob(name):
        return "array file"
    return "files"
