"""Small HTML tables, all escaped: what a notebook shows of a store, an evaluation, a predictor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["SHOWN", "some", "table"]

SHOWN = 20
"""Classes that are named before the rest is counted."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return an HTML table.

    Parameters
    ----------
    header : list of str
        Names of the columns.
    rows : list of list of str
        Texts; the first of each row names it.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><th>{escape(first)}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def some(texts: Sequence[str]) -> str:
    """Return the first of some texts in one line, and how many more there are."""
    line = ", ".join(texts[:SHOWN])
    return f"{line}, and {len(texts) - SHOWN:,} more" if len(texts) > SHOWN else line
