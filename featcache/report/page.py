"""The report's page: a template, its style and its scripts, and the data that they show as JSON.

The page's script sets all text by ``textContent``, so that no label or file name becomes markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

__all__ = ["GENERATOR", "render"]

GENERATOR = '<meta name="generator" content="featcache">'


def render(
    data: Mapping[str, Any], map_item: Mapping[str, Any] | None, bokeh: Sequence[str]
) -> str:
    """Return the page.

    Parameters
    ----------
    data : mapping
        JSON values that the page's script shows; "title" among them.
    map_item : mapping or None
        Bokeh's JSON of the map; None without one.
    bokeh : list of str
        Bokeh's scripts.
    """
    scripts = [*bokeh, _asset("page.js")]
    blocks = {"data": data} | ({} if map_item is None else {"map-item": map_item})
    return Template(_asset("page.html")).substitute(
        policy=_policy(scripts),
        title=escape(data["title"]),
        style=_asset("page.css"),
        data="\n".join(_json_block(name, value) for name, value in blocks.items()),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def _asset(name: str) -> str:
    """Return the text of a file beside this module."""
    return resources.files("featcache.report").joinpath("assets", name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Return the content policy: these very scripts, no network, no frames, no forms.

    Styles may be inline: Bokeh writes its own into the page, and a style cannot run anything.
    """
    hashes = " ".join(
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _json_block(name: str, value: Mapping[str, Any]) -> str:
    """Return data for a script. No text in it can end the block or start a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json" id="{name}">{text}</script>'
