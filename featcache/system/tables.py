"""Small tables for people: aligned text for terminals, HTML for notebooks."""

from __future__ import annotations

import os
import re
import shlex
import string
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

T = TypeVar("T")

_KEPT = "column:"  # begins the name of a table

SHOWN = 20
"""Names that are listed before the rest is counted."""


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = ()
) -> str:
    """Return lines of aligned columns, two spaces apart.

    Parameters
    ----------
    header : list of str
        Names of the columns.
    rows : list of list of str
        Texts.
    right : collection of int
        Numbers of the columns that are aligned on the right, as numbers are.
    """
    header, rows = [*map(printable, header)], [[*map(printable, row)] for row in rows]
    lines = []
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [
            cell.rjust(width) if k in right else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def kept_table(column: str) -> str:
    """Return the name of the table that keeps a further column of a user's table."""
    return _KEPT + column.replace("%", "%25").replace("/", "%2F")


def kept_columns(tables: Mapping[str, T]) -> dict[str, T]:
    """Return those among tables that `kept_table` named, by the names of their columns."""
    return {unquote(x[len(_KEPT) :]): one for x, one in tables.items() if x.startswith(_KEPT)}


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table, all of it escaped; the first text of each row names it."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><th>{escape(first)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def printable(text: str, escaped: Callable[[str], str] = ascii) -> str:
    """Return a text with line breaks and what else would steer a terminal as Python escapes.

    ``escaped=json.dumps`` makes escapes of JSON.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else escaped(c)[1:-1] for c in text)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return names and values, numbers with four digits: ``alpha 56.9, treatment l2``."""
    texts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in settings.items()}
    return ", ".join(f"{name} {text}" for name, text in texts.items())


def quoted(argument: str) -> str:
    """Return an argument as it is typed into a shell, whatever is in it."""
    if argument.isprintable():
        return shlex.quote(argument)
    plain = set(string.ascii_letters + string.digits + "./-_")
    codes = (c if c in plain else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in argument)
    return f"$'{''.join(codes)}'"


def typed(command: str, *paths: str | Path) -> str:
    """Return a command with paths as they are typed into a shell, whatever is in their names."""
    names = (f"./{name}" if name.startswith("-") else name for name in map(str, paths))
    return " ".join([command, *map(quoted, names)])


def in_order(names: Iterable[str]) -> list[str]:
    """Return names as they are listed: by value where all are numbers, otherwise as texts.

    Examples
    --------
    >>> in_order({"10", "2", "-1.5"}), in_order({"10", "2", "b"})
    (['-1.5', '2', '10'], ['10', '2', 'b'])
    """
    known = sorted(names)
    numbers = all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name, re.ASCII) for name in known)
    return sorted(known, key=float) if numbers else known


def counted(n: int, one: str, many: str = "") -> str:
    """Return a number of things for people: ``1 image``, ``2,000 images``."""
    return f"{n:,} {one if n == 1 else many or f'{one}s'}"


def first_names(names: Sequence[str], most: int = SHOWN) -> str:
    """Return the first of some names in one line, and how many more there are."""
    line = ", ".join(map(printable, names[:most]))
    return f"{line}, and {len(names) - most:,} more" if len(names) > most else line
