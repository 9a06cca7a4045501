"""Small pictures of images for a page: single ones, and sheets of many, within a budget of bytes.

A sheet is one WebP of many tiles: the header is paid for once, and 20,000 images of 32 pixels
take a few megabytes instead of tens.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from featcache.errors import DecodeError
from featcache.images.image_set import ImageSet
from featcache.pixels.decode import decode

__all__ = ["Sheets", "sheets", "thumbnail"]

_COLUMNS = 16  # tiles in a row and in a column of a sheet
_THREADS = 2  # Pillow works without the interpreter's lock


@dataclass(frozen=True)
class Sheets:
    """Tiles of many images.

    Attributes
    ----------
    edge : int
        Side of a tile, in pixels.
    columns : int
        Tiles in a row, and rows in a sheet.
    pictures : list of str
        The sheets: WebP, base64.
    tiles : list of int
        For each image that was asked for, its tile counted through all sheets; -1 where it could
        not be read or the budget was spent.
    """

    edge: int
    columns: int
    pictures: list[str]
    tiles: list[int]


def sheets(images: ImageSet, rows: Sequence[int], *, budget: int) -> Sheets:
    """Make tiles of some images, the first ones first, until the budget is spent.

    Parameters
    ----------
    images : ImageSet
        Where to read.
    rows : list of int
        Images; -1 for one that the set does not have.
    budget : int
        Bytes of all sheets together, in base64.
    """
    edge = 64 if len(rows) <= 2500 else 48 if len(rows) <= 6000 else 32
    pictures: list[str] = []
    tiles = [-1] * len(rows)
    spent = 0
    for start in range(0, len(rows), _COLUMNS * _COLUMNS):
        part = rows[start : start + _COLUMNS * _COLUMNS]
        sheet = Image.new("RGB", (_COLUMNS * edge, _COLUMNS * edge), (128, 128, 128))
        used = []
        for position, small in enumerate(_read_all(images, part, edge)):
            if small is not None:
                left, top = position % _COLUMNS * edge, position // _COLUMNS * edge
                sheet.paste(small, (left, top))
                used.append(position)
        if not used:
            continue
        text = _webp(sheet, quality=55)
        if spent + len(text) > budget:
            break
        spent += len(text)
        for position in used:
            tiles[start + position] = len(pictures) * _COLUMNS * _COLUMNS + position
        pictures.append(text)
    return Sheets(edge, _COLUMNS, pictures, tiles)


def thumbnail(images: ImageSet, row: int, edge: int = 144) -> str | None:
    """Return one image as a WebP in base64, its longer side at most `edge`; None if unreadable."""
    picture = _rgb(images, row)
    if picture is None:
        return None
    picture.thumbnail((edge, edge))
    return _webp(picture, quality=70)


def _read_all(images: ImageSet, rows: Sequence[int], edge: int) -> Iterator[Image.Image | None]:
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda row: _tile(images, row, edge), rows)


def _tile(images: ImageSet, row: int, edge: int) -> Image.Image | None:
    """Return the image's middle square, None without an image."""
    picture = _rgb(images, row)
    if picture is None:
        return None
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.resize(
        (edge, edge), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
    )


def _rgb(images: ImageSet, row: int) -> Image.Image | None:
    """Return an image; None for row -1, and where it cannot be read."""
    if row < 0:
        return None
    try:
        return Image.fromarray(np.ascontiguousarray(decode(images.read(row), channels=3)))
    except DecodeError:
        return None


def _webp(picture: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=4)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
