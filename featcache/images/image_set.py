"""Which images there are: an ordered list of ids, where their bytes come from, and their labels.

An `ImageSet` is made of class folders, a table, a list of files, WebDataset shards, arrays, or a
data set of PIL images, and reads one image at a time. One rule holds for all ids: they are unique,
sorted by their UTF-8 bytes, relative to what was given (``/`` between folders), and the same in
every run. A file whose name is not UTF-8 gets an escaped id and cannot be read.

Each kind of source is a subclass of `featcache.images.source.Source`, in a module with the
functions that list it: `folders`, `csv_tables`, `tars`, `arrays`.
"""
# A relative path must stay as it is written, links included: not pathlib's resolve().
# ruff: noqa: PTH100, PTH110, PTH112, PTH118

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from featcache.errors import DecodeError, ImageSetError
from featcache.images import arrays, csv_tables, folders, tars
from featcache.images.arrays import TORCHVISION_SETS
from featcache.images.source import SUFFIXES, Source
from featcache.pixels import decode

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
        Number of files that are not images by their names.
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
        """Number of files that are not images by their names."""
        return self._source.ignored

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
        """The distinct labels, sorted; "" (no label) is not one of them."""
        return sorted(self._distinct("labels") - {""})

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
        return self._source.read(index)

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
            Numbers of images, each at most once. Ascending numbers keep the ids sorted.

        Returns
        -------
        ImageSet
            A set of k images that reads from the same place.
        """
        chosen = copy.copy(self)
        chosen._source = self._source.select(np.asarray(indices, np.int64))
        chosen.opened_with = None
        return chosen

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
        suffix: str = "",
        root: AnyPath | None = None,
        download: bool = False,
        relative_to: AnyPath = "",
    ) -> ImageSet:
        """Make a set of whatever the command line calls IMAGES.

        Parameters
        ----------
        images : str, path, or sequence of them
            A folder; a glob, a file or several files; ``.tar`` shards; a ``.npy`` or ``.npz`` file
            of images; the name of a torchvision data set (CIFAR10, FashionMNIST, Flowers102,
            OxfordIIITPet), also as ``NAME:ROOT``. All splits of a data set are listed: ids begin
            with the split, and the table "splits" holds it.
        labels_csv : path, optional
            Table for `from_csv`; `images` is then the folder of the images.
        id_column, label_column, group_column, split_column, suffix
            As for `from_csv`.
        root : path, optional
            Folder of a torchvision data set.
        download : bool
            Whether a torchvision data set may be downloaded into `root`.
        relative_to : path, optional
            As for `from_files`.

        Raises
        ------
        ImageSetError
            If nothing is there, or it cannot be listed.
        """
        names = _names(images)
        if labels_csv is not None:
            if len(names) != 1:
                raise ImageSetError(f"a table of labels goes with one folder, got {len(names)}")
            return cls.from_csv(
                labels_csv,
                names[0],
                id_column=id_column,
                label_column=label_column,
                group_column=group_column,
                split_column=split_column,
                suffix=suffix,
            )
        first = names[0] if names else ""
        match _kind(names, os.fspath(relative_to)):
            case "torchvision":
                name, _, place = first.partition(":")
                found = arrays.torchvision_set(name, place or root, download)
                return cls(found, {"images": name, "root": os.path.abspath(place or root or "")})
            case "folder":
                return cls.from_folder(first)
            case "tars":
                return cls.from_tar(folders.matches(first) if len(names) == 1 else names)
            case "array file":
                return cls(arrays.array_file(first), {"images": os.path.abspath(first)})
            case _:
                return cls.from_files(names, relative_to=relative_to)

    @classmethod
    def from_folder(cls, root: AnyPath, *, suffixes: Iterable[str] = SUFFIXES) -> ImageSet:
        """List the images below a folder; the first folder below it is the label.

        A folder without folders gives no labels. Folders named like splits (train, val, test)
        that hold class folders give both: split and label. Links are followed. Files with another
        suffix and hidden files are ignored and counted.

        Parameters
        ----------
        root : path
            The folder.
        suffixes : iterable of str
            Suffixes of image files, in lower case.

        Raises
        ------
        ImageSetError
            If the folder is missing, cannot be read, or holds no image.
        """
        found = folders.folder(os.fspath(root), suffixes)
        again = {"images": os.path.abspath(root)}
        return cls(found, again if suffixes is SUFFIXES else None)

    @classmethod
    def from_csv(
        cls,
        csv: AnyPath,
        root: AnyPath,
        *,
        id_column: str = "id",
        label_column: str | None = "label",
        group_column: str | None = None,
        split_column: str | None = None,
        suffix: str = "",
    ) -> ImageSet:
        """List the images that a table names.

        Parameters
        ----------
        csv : path
            Table in UTF-8 with a header line; fields are divided by commas, semicolons or tabs.
        root : path
            Folder of the images.
        id_column : str
            Column with the images' paths relative to `root`, without `suffix`.
        label_column, group_column, split_column : str, optional
            Columns with labels, groups and splits; None leaves them out. An empty label is none.
        suffix : str
            What is added to an id to get its file, such as ".jpg".

        Raises
        ------
        ImageSetError
            If the table cannot be read, a column is missing, a line has too many or too few
            fields, an id is empty, occurs twice, has no file, or leaves the folder: by ".."
            or as an absolute path.
        """
        columns = {
            "ids": id_column,
            "labels": label_column,
            "groups": group_column,
            "splits": split_column,
        }
        named = {table: column for table, column in columns.items() if column is not None}
        again = {
            "images": os.path.abspath(root),
            "labels_csv": os.path.abspath(csv),
            **{f"{table[:-1]}_column": column for table, column in columns.items()},
            "suffix": suffix,
        }
        return cls(csv_tables.table(os.fspath(csv), os.fspath(root), named, suffix), again)

    @classmethod
    def from_files(
        cls,
        paths: AnyPaths,
        *,
        relative_to: AnyPath = "",
    ) -> ImageSet:
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
        names, root = _names(paths), os.path.abspath(relative_to)
        alike = _kind(names, root) == "files"
        opened_with = {"images": names, "relative_to": root} if alike else None
        if len(names) == 1 and folders.is_glob(os.path.join(root, names[0])):
            return cls(folders.globbed(names[0], root), opened_with)
        return cls(folders.files(names, root), opened_with)

    @classmethod
    def from_tar(cls, paths: AnyPaths) -> ImageSet:
        """List the images in WebDataset shards; they are read in place, nothing is extracted.

        Members that share their path up to the first dot are one sample; its label is the text of
        its ``.cls``, else "label", "cls" or "class" of its ``.json``. Ids are
        ``SHARD.tar/MEMBER``. Only regular members are read.

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
        return cls(tars.tars(names), again if tars.are_tars(names) else None)

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
            A label an image; numbers become text.
        ids : iterable of str, optional
            An id an image; left out, its number with eight digits.

        Raises
        ------
        ImageSetError
            If shapes, types or lengths do not fit, or an id occurs twice.
        """
        return cls(
            arrays.arrays(
                images if isinstance(images, np.ndarray) else np.asarray(images),
                None if labels is None else [str(label) for label in labels],
                None if ids is None else list(ids),
            )
        )

    @classmethod
    def from_dataset(cls, dataset: Any) -> ImageSet:
        """Make a set of a map-style data set of (PIL image, int), as those of torchvision are.

        Parameters
        ----------
        dataset : Dataset
            A data set without transform. Labels are its ``classes`` where it has them, else
            numbers as text. They are taken from its ``targets`` (or ``labels``) where it has
            these, else from all its items.

        Raises
        ------
        ImageSetError
            If it is empty, or holds other items.
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


def _names(paths: AnyPaths) -> list[str]:
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    return [os.fspath(path) for path in several]


def _kind(names: list[str], root: str) -> str:
    """Return the kind of source that `open` takes names for, some relative to `root`."""
    if len(names) != 1:
        return "tars" if tars.are_tars(names) else "files"
    name = os.path.join(root, names[0])
    if names[0].partition(":")[0] in TORCHVISION_SETS and not os.path.exists(name):
        return "torchvision"
    if os.path.isdir(name):
        return "folder"
    if tars.are_tars(folders.matches(name)):
        return "tars"
    if name.lower().endswith((".npy", ".npz")) and not folders.is_glob(name):
        return "array file"
    return "files"
