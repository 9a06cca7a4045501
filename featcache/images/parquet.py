"""Images in the rows of Parquet files, as Hugging Face exports data sets."""
# ruff: noqa: PTH100, PTH116, PTH120

from __future__ import annotations

import functools
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from featcache.errors import DecodeError, ImageSetError, MissingExtra
from featcache.images.arrays import class_name
from featcache.images.layout import SPLITS
from featcache.images.sources import Shard, Shards, first_few, sorted_tables
from featcache.pixels import decode

_IMAGES = ("image", "img")  # names of columns; the first one there counts
_LABELS = ("label", "labels", "cls", "class")


@dataclass(frozen=True, kw_only=True)
class ParquetRows(Shards):
    """Rows of Parquet files; of these, a group of rows is in memory at a time.

    `places` say the group of rows, and the place in it.

    Attributes
    ----------
    columns : dict of str to str
        The column of images in each file, by its path.
    """

    columns: dict[str, str]

    def read(self, row: int) -> bytes:
        """Return the bytes in the row."""
        shard, group, place = self.place(row)
        try:
            shard.check(os.stat(shard.path))
            with _one_at_a_time:  # else each thread would read the group
                value = _group(shard, self.columns[shard.path], group)[place].as_py()
        except (OSError, ValueError) as error:  # of pyarrow, too
            if getattr(error, "errno", None):
                raise
            raise DecodeError("read", decode.reason(error)) from error
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise DecodeError("read", "the row holds no bytes of an image")
        return bytes(data)


_one_at_a_time = threading.Lock()


@functools.lru_cache(maxsize=2)  # neighbours are read together
def _group(shard: Shard, column: str, group: int) -> Any:
    """Return the column of images in a group of rows."""
    with _opened(shard.path) as file:
        return file.read_row_group(group, [column], use_threads=False).column(0)


def _opened(path: str) -> Any:
    """Open a Parquet file. pyarrow's threads are not used: a forked worker could wait for them."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtra("pyarrow", "parquet", "Reading Parquet") from error
    return ParquetFile(path, memory_map=True, pre_buffer=False)


def parquet(names: list[str]) -> ParquetRows:
    """List the images in Parquet files; see `ImageSet.open`."""
    paths = sorted({os.path.abspath(name) for name in names})
    home = os.path.commonpath([os.path.dirname(path) for path in paths])
    source = names[0] if len(paths) == 1 else f"{len(paths)} Parquet files"
    shards, places, columns, unused = [], [], {}, set()
    values: dict[str, list[str]] = {"ids": [], "labels": [], "splits": []}
    for number, path in enumerate(paths):
        name = os.path.relpath(path, home)
        split = re.split(r"[-./]", name)[0]
        try:
            shards.append(Shard.of(path))
            with _opened(path) as file:
                image, label, others = _columns(file.schema_arrow, path)
                columns[path] = image
                unused.update(others)
                for row, (place, inner, target) in enumerate(_rows(file, image, label, path)):
                    places.append((number, *place))
                    values["ids"].append(f"{name}/{row:08d}/{inner}".rstrip("/"))
                    values["labels"].append(target)
                    values["splits"].append(split if split.lower() in SPLITS else "")
        except (OSError, ValueError) as error:  # of pyarrow, too
            raise ImageSetError(f"{path}: cannot be read: {decode.reason(error)}") from error
    if len(set(values["splits"])) == 1:
        del values["splits"]
    if not any(values["labels"]):
        del values["labels"]
    tables, order = sorted_tables(values, source)
    return ParquetRows(
        tables=tables,
        name=source,
        notes=(f"columns that are not used: {first_few(sorted(unused))}",) if unused else (),
        places=np.array(places, np.int64).reshape(-1, 3)[order],  # (n, 3)
        shards=tuple(shards),
        columns=columns,
    )


def _columns(schema: Any, path: str) -> tuple[str, str | None, set[str]]:
    """Return the columns of images and of labels, and those that are not used."""
    kinds = {field.name: str(field.type) for field in schema}
    of_bytes = re.compile(r"(struct<(.*, )?bytes: )?(large_)?binary")
    held = [name for name, kind in kinds.items() if of_bytes.match(kind)]
    image = next((name for name in (*_IMAGES, *held) if name in held), None)
    if image is None:
        raise ImageSetError(
            f"{path}: expected a column of images, such as 'image' with the bytes of an image file "
            f"in each row, got {', '.join(kinds) or 'no columns'}"
        )
    label = next((name for name in _LABELS if name in kinds), None)
    return image, label, kinds.keys() - {image, label}


def _rows(
    file: Any, image: str, label: str | None, path: str
) -> Iterator[tuple[tuple[int, int], str, str]]:
    """Yield each row's group and place in it, the path that it names, and its label."""
    told = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    names = told.get("info", {}).get("features", {}).get(label, {}).get("names")
    leaves = {file.schema.column(k).path for k in range(len(file.schema))}
    inner = f"{image}.path"
    wanted = [label] * (label is not None) + [inner] * (inner in leaves)
    for group in range(file.num_row_groups):
        n = file.metadata.row_group(group).num_rows
        table = file.read_row_group(group, wanted, use_threads=False).to_pydict()
        targets, images = table.get(label, [None] * n), table.get(image, [{}] * n)
        for k, (target, one) in enumerate(zip(targets, images, strict=True)):
            where = f"{path}: row {k} of group {group}"
            yield (group, k), (one or {}).get("path") or "", class_name(target, names, where)
