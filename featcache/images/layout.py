"""Labels and splits that paths give: by class folders, or by a pattern of the names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from featcache.errors import ImageSetError
from featcache.images.sources import Source, column, first_few

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
"""Names of folders that hold a part of a data set, in lower case."""


def by_folders(source: Source, paths: Iterable[str]) -> Source:
    """Label images by the uppermost folder of their paths; see `ImageSet.from_folder`.

    Folders are the parts of a divided data set where two or more are named like such parts, those
    for training hold class folders, and so does at least one. What lies beside them is left out.
    """
    paths = list(paths)
    names = {_cut(path)[0] for path in paths}
    inner = {_cut(path)[0] for path in paths if path.count("/") > 1}  # hold folders
    if names <= {""}:
        return source
    splits = {name for name in names if name.lower() in SPLITS}
    training = {name for name in splits if name.lower().startswith("train")}
    if len(splits) > 1 and splits & inner and training <= inner:
        return _by_splits(source, paths, splits, inner)
    labels = column((_cut(path)[0] for path in paths), source.name)
    notes = source.notes
    if len(names) == 1 and inner:
        (only,) = names
        below = sorted({_cut(_cut(path)[1])[0] for path in paths} - {""})
        notes += (
            f"the only class is {only}, a folder that holds folders ({first_few(below)}): if these "
            f"are the classes, give the folder {only}",
        )
    elif names == splits:
        notes += (
            f"the classes are named like parts of a data set ({first_few(sorted(names))}), but "
            "hold no class folders",
        )
    return replace(source, tables=source.tables | {"labels": labels}, notes=notes)


def _by_splits(source: Source, paths: list[str], splits: set[str], inner: set[str]) -> Source:
    """Take the folders for splits; one without class folders is a part without labels."""
    cut = [_cut(path) for path in paths]
    beside = [split not in splits or ("/" not in rest and split in inner) for split, rest in cut]
    kept = [parts for parts, out in zip(cut, beside, strict=True) if not out]
    tables = {
        "labels": column((_cut(rest)[0] for _, rest in kept), source.name),
        "splits": column((split for split, _ in kept), source.name),
    }
    found = source.without(np.array(beside), "outside the class folders of the splits")
    return replace(found, tables=found.tables | tables)


def _cut(path: str) -> tuple[str, str]:
    """Cut a path behind its uppermost folder, which is "" for a name alone."""
    folder, slash, rest = path.partition("/")
    return (folder, rest) if slash else ("", path)


def by_pattern(source: Source, pattern: str) -> Source:
    """Label each image by the group named ``label`` of a pattern found in its id."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ImageSetError(f"the label pattern {pattern!r} is not regular: {error}") from error
    if "label" not in compiled.groupindex:
        raise ImageSetError(
            f"the label pattern {pattern!r} has no group named label. For names such as "
            r"cat.0.jpg, write (?P<label>[^/.]+)\.\d+\.jpg$"
        )
    found = (compiled.search(id) for id in source.tables["ids"])
    labels = column(((match and match["label"]) or "" for match in found), source.name)
    return replace(source, tables=source.tables | {"labels": labels})
