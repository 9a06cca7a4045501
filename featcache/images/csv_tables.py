"""Labels, groups and splits that a CSV table gives to images that a source lists."""
# ruff: noqa: PTH112, PTH119, PTH122

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from featcache.errors import ImageSetError
from featcache.images.folders import Files
from featcache.images.sources import (
    SUFFIXES,
    Source,
    did_you_mean,
    first_few,
    leave_out,
    sorted_tables,
)
from featcache.system.files import open_file, unescaped

_MARK = b"\xef\xbb\xbf"  # of UTF-8, by which a table of a spreadsheet is known
_SAVE = "In Excel: Save As, type CSV UTF-8"
_ROLES = ("ids", "labels", "groups", "splits")
_REGRESSION = 0.9  # of labels that are fractions, so many must differ to be no classes


def labelled(
    source: Source, path: str, columns: dict[str, str], suffix: str, excluded: Callable[[str], bool]
) -> Source:
    """Return the images of a source that a table names; see `ImageSet.from_csv`.

    Parameters
    ----------
    source : Source
        The images.
    path, suffix : str
        The table, and what is added to an id to get its file.
    columns : dict of str to str
        For each table that is wanted, "ids" among them, its column.
    excluded : callable
        Tells of an id whether its row is left out, too.
    """
    source, rows = source.excluding(excluded), _read(path, columns)
    kept = [k for k, id in enumerate(rows["ids"]) if not excluded(os.path.normpath(id) + suffix)]
    rows = {what: [texts[k] for k in kept] for what, texts in rows.items()}
    listed = source.tables["ids"].tolist()
    places = _places(rows["ids"], suffix, listed, source, path)
    left_out = dict(source.left_out)
    for place in set(range(len(listed))).difference(places):
        leave_out(left_out, f"without a row in {os.path.basename(path)}", listed[place])
    rows["ids"] = [listed[place] for place in places]
    for what in source.tables.keys() - rows.keys():  # the source knows it, the table does not
        rows[what] = source.tables[what][places].tolist()
    if isinstance(source, Files):
        ending = suffix if all(id.endswith(suffix) for id in rows["ids"]) else ""
        rows["ids"] = [id.removesuffix(ending) for id in rows["ids"]]
        source = replace(source, suffix=ending.encode(), whole_folder=False)
    tables, order = sorted_tables(rows, f"{path}, column {columns['ids']!r}", _twice(rows))
    at = np.array(places, np.int64)[order]
    return replace(
        source,
        tables=tables,
        name=path,
        left_out=left_out,
        notes=source.notes + _regression(rows.get("labels", [])),
        places=source.places[at] if len(source.places) else source.places,
    )


# -- which image a row means ---------------------------------------------------------------------


def _places(ids: list[str], suffix: str, listed: list[str], source: Source, path: str) -> list[int]:
    """Return the number in `listed` of the image that each row names.

    A row of a whole folder may also name a file that is no image by its name: it is added to
    `listed`. Else spellings are compared, from the closest to the loosest.
    """
    home, homes, whole = source.name, [], False
    if isinstance(source, Files):
        home, whole = os.fsdecode(source.root), source.whole_folder
        homes = [home, os.path.realpath(home)]
    place_of = {id: place for place, id in enumerate(listed)}
    # ./a.jpg is a.jpg
    places = [place_of.get(id and os.path.normpath(id) + suffix, -1) for id in ids]
    names = {
        row: _below(os.path.normpath(ids[row].replace("\\", "/")), homes) + suffix
        for row, place in enumerate(places)
        if place < 0
    }
    leaving = [
        ids[row]
        for row, name in names.items()
        if not ids[row] or name.startswith("/") or ".." in re.split(r"[/\\]", ids[row])
    ]
    if leaving:
        raise ImageSetError(
            f"{path}: {len(leaving)} of {len(ids)} ids are not paths below {home} "
            f"(first: {first_few(leaving)}). Expected relative paths without '..'"
        )
    for row, name in names.items():
        file = f"{home}/{name}"
        if whole and name not in place_of and os.path.lexists(file) and not os.path.isdir(file):
            place_of[name] = len(listed)
            listed.append(name)
        places[row] = place_of.get(name, -1)
    wanted = {row: _fold(name) for row, name in names.items() if places[row] < 0}
    for spellings in _SPELLINGS if wanted else ():
        found = defaultdict(list)
        for place, id in enumerate(listed):
            for spelling in set(spellings(_fold(id))):
                found[spelling].append(place)
        for row in [row for row, name in wanted.items() if name in found]:
            near = found[wanted.pop(row)]
            if len(near) > 1:
                several = first_few([listed[place] for place in near])
                raise ImageSetError(
                    f"{path}: {ids[row]} may be {several}. Write the path of each image as it is, "
                    "or give the ending of all by --suffix"
                )
            places[row] = near[0]
    if wanted:
        missing = [ids[row] for row in wanted]
        raise ImageSetError(
            f"{path}: {len(missing)} of {len(ids)} ids have no file "
            f"(first: {first_few(missing)}). Expected {home}/ID{suffix}"
        )
    return places


def _below(name: str, homes: Iterable[str]) -> str:
    """Cut off what a path repeats of the path of the folder: all of it, or its last names."""
    for home in homes:
        for end in (k for k, letter in enumerate(name) if letter == "/"):
            if name[:end] == home or (end and home.endswith("/" + name[:end])):
                return name[end + 1 :]
    return name


def _fold(name: str) -> str:
    """Return a path in one case, with its accents composed."""
    return unicodedata.normalize("NFC", name).casefold()


# Each gives the spellings of an image's id that a table may use, the closest first.
_SPELLINGS: tuple[Callable[[str], list[str]], ...] = (
    lambda id: [id],
    lambda id: [os.path.splitext(id)[0]],
    lambda id: [id.partition("/")[2], os.path.basename(id)],
    lambda id: [os.path.splitext(name)[0] for name in _SPELLINGS[2](id)],
)


# -- what the table holds ------------------------------------------------------------------------


def _read(path: str, columns: dict[str, str]) -> dict[str, list[str]]:
    """Return the wanted columns, line by line."""
    try:
        with open_file(path) as file:
            raw = file.readall()
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ImageSetError(f"{path}: expected UTF-8 text, got UTF-16. {_SAVE}")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ImageSetError(f"{path}: cannot read this table: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ImageSetError(f"{path}, line {line}: expected UTF-8 text. {_SAVE}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ImageSetError(f"{path}, line {line}: not a table: it holds a NUL character. {_SAVE}")
    limit = csv.field_size_limit(len(text) + 1)
    try:
        lines = _lines(text, path, set(columns.values()))
        return _columns(lines, path, columns, marked=raw.startswith(_MARK))
    finally:
        csv.field_size_limit(limit)


def _lines(text: str, path: str, wanted: set[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines that hold anything, and the number at which each begins."""
    lines = list(io.StringIO(text, newline=""))
    start = next((k for k, line in enumerate(lines) if line.strip()), 0)
    delimiter = ""
    if lines and lines[start].startswith("sep="):  # as Excel writes it
        delimiter, start = lines[start][4:5], start + 1
    delimiter = delimiter or _delimiter(lines[start] if start < len(lines) else "", path, wanted)
    reader = csv.reader(lines[start:], delimiter=delimiter, skipinitialspace=True, strict=True)
    number = start + 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield number, fields
            number = start + reader.line_num + 1
    except csv.Error as error:
        raise ImageSetError(
            f"{path}, line {number}: not a table: {error}. Is a quote opened here that nothing "
            "closes?"
        ) from error


def _delimiter(header: str, path: str, wanted: set[str]) -> str:
    """Return what divides the fields of a table: what gives the wanted columns in its header."""
    found = {
        one: {name.strip() for name in next(csv.reader([header], delimiter=one), [])}
        for one in ",\t;"
    }
    dividing = [one for one, names in found.items() if len(names) > 1]
    fitting = [one for one, names in found.items() if wanted <= names] or dividing or [","]
    if len(dividing) > 1 and not wanted <= found[fitting[0]]:
        either = " and ".join(map(repr, dividing))
        raise ImageSetError(
            f"{path}: expected one sign between fields, got {either} in the line "
            f"{header.strip()[:60]!r}, and neither gives the columns {', '.join(sorted(wanted))}. "
            f"Write the right one into a first line of its own, such as sep={dividing[0]}"
        )
    return fitting[0]


def _columns(
    lines: Iterator[tuple[int, list[str]]], path: str, columns: dict[str, str], *, marked: bool
) -> dict[str, list[str]]:
    """Return the wanted columns; a `marked` table was written by a spreadsheet, or for one.

    Such a program leaves out the empty cells at the end of a line, and a formula is no text to it.
    """
    header = [name.strip() for name in next(lines, (0, []))[1]]
    while header and not header[-1]:
        header.pop()
    roles = {what: what[:-1] if what in _ROLES else "--keep-columns" for what in columns}
    numbers = {what: _number(x, header, path, roles[what]) for what, x in columns.items()}
    values: dict[str, list[str]] = {what: [] for what in columns}
    for number, line in lines:
        while len(line) > len(header) and not line[-1].strip():
            line.pop()
        if marked:
            line = [*map(unescaped, line), *[""] * (len(header) - len(line))]
        if len(line) != len(header):
            raise ImageSetError(
                f"{path}, line {number}: expected {len(header)} fields, got {len(line)}"
            )
        for what, column in numbers.items():
            # An id is the name of a file, which may end in a blank.
            field = line[column] if what == "ids" else line[column].strip()
            if "\n" in field or "\r" in field:
                raise ImageSetError(
                    f"{path}, line {number}: the {header[column]} goes on in the next line "
                    f"({field[:40]!r}). A quote is opened there that should not be"
                )
            values[what].append(field)
    return values


def _number(name: str, header: list[str], path: str, role: str) -> int:
    """Return the number of a column."""
    if header.count(name) == 1:
        return header.index(name)
    if name in header:
        raise ImageSetError(f"{path}: column {name!r} occurs {header.count(name)} times")
    if any(os.path.splitext(field)[1].lower() in SUFFIXES for field in header):
        raise ImageSetError(
            f"{path}: no column {name!r} for the {role}: the first line is no header but holds "
            f"{', '.join(header)}. Write the names of the columns above it, such as id,label"
        )
    cure = f"for the {role}", f"Name yours with --{role}-column"
    if role.startswith("--"):
        cure = f"for {role}", f"Name one of them; of several, each with its own {role}"
    raise ImageSetError(
        f"{path}: no column {name!r} {cure[0]}.{did_you_mean(name, header)} "
        f"Columns: {', '.join(header) or 'none'}. {cure[1]}"
    )


def _twice(rows: dict[str, list[str]]) -> str:
    """Return the message for images that several rows name."""
    text = "{count} ids occur more than once (first: {first})"
    seen: dict[str, str] = {}
    for id, label in zip(rows["ids"], rows.get("labels", []), strict=False):
        if seen.setdefault(id, label) != label:
            text += ". Their labels differ: several labels per image are out of scope"
            break
    return text


def _regression(labels: list[str]) -> tuple[str, ...]:
    """Return a note where labels are measurements rather than classes."""
    given = [label for label in labels if label]
    try:
        numbers = {float(label) for label in given}
    except ValueError:
        return ()
    if len(numbers) < max(3, _REGRESSION * len(given)) or all(map(float.is_integer, numbers)):
        return ()
    return (
        f"the labels are numbers, {len(numbers):,} different ones for {len(given):,} images: "
        "each would be a class. Regression is out of scope",
    )
