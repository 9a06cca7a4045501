"""Images that a CSV table names: their ids, and labels, groups and splits beside them."""
# ruff: noqa: PTH100, PTH110, PTH112, PTH123

from __future__ import annotations

import csv
import os
from typing import Any

from featcache.errors import ImageSetError
from featcache.images.folders import Files
from featcache.images.source import SUFFIXES, did_you_mean, first_few, sorted_tables


def table(path: str, root: str, columns: dict[str, str], suffix: str) -> Files:
    """List the images that a table names; see `ImageSet.from_csv`.

    Parameters
    ----------
    path, root, suffix : str
        The table, the folder of the images, and what is added to an id to get its file.
    columns : dict of str to str
        For each of the tables "ids", "labels", "groups", "splits" that is wanted, its column.
    """
    values = _read(path, columns)
    _check_ids(values["ids"], root, suffix, path)
    # ./a.jpg is a.jpg, and must not count twice
    values["ids"] = [os.path.normpath(id) for id in values["ids"]]
    tables, _ = sorted_tables(values, f"{path}, column {columns['ids']!r}")
    home = os.fsencode(os.path.abspath(root))
    return Files(tables=tables, name=path, root=home, suffix=suffix.encode())


def _read(path: str, columns: dict[str, str]) -> dict[str, list[str]]:
    """Return the wanted columns, line by line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            delimiter = max(",\t;", key=header.count)  # of equal counts, the comma
            lines = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            return _columns(lines, path, columns)
    except OSError as error:
        raise ImageSetError(f"{path}: cannot read this table: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ImageSetError(f"{path}: expected UTF-8 text: {error.reason}") from error
    except csv.Error as error:
        raise ImageSetError(f"{path}: not a table: {error}") from error


def _columns(lines: Any, path: str, columns: dict[str, str]) -> dict[str, list[str]]:
    header = [name.strip() for name in next(lines, [])]
    numbers = {what: _number(name, header, path, what) for what, name in columns.items()}
    values: dict[str, list[str]] = {what: [] for what in columns}
    for line in lines:
        if not line:
            continue
        if len(line) != len(header):
            raise ImageSetError(
                f"{path}, line {lines.line_num}: expected {len(header)} fields, got {len(line)}"
            )
        for what, number in numbers.items():
            # An id is the name of a file, which may end in a blank.
            values[what].append(line[number] if what == "ids" else line[number].strip())
    return values


def _number(name: str, header: list[str], path: str, what: str) -> int:
    """Return the number of a column."""
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        raise ImageSetError(f"{path}: column {name!r} occurs {header.count(name)} times")
    role = what.removesuffix("s")
    raise ImageSetError(
        f"{path}: no column {name!r} for the {role}.{did_you_mean(name, header)} "
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
            f"(first: {first_few(leaving)}). Expected relative paths without '..'"
        )
    missing = [id for id in ids if not os.path.lexists(f"{root}/{id}{suffix}")]
    if missing:
        raise ImageSetError(
            f"{source}: {len(missing)} of {len(ids)} ids have no file "
            f"(first: {first_few(missing)}). Expected {root}/ID{suffix}."
            + ("" if suffix else _suffix_hint(root, missing[0]))
        )


def _suffix_hint(root: str, id: str) -> str:
    """Return a hint where a file of that name has a suffix that was not given."""
    for candidate in sorted(SUFFIXES):
        for spelling in (candidate, candidate.upper()):
            if os.path.exists(f"{root}/{id}{spelling}"):
                return f" There is {id}{spelling}: type --suffix {spelling}"
    return ""
