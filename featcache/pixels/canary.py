"""Six small images that show when another machine no longer decodes, resizes or computes alike.

Their files and their features are kept in a store. When an extraction is resumed, or a predictor
used, the same bytes go through decoder, resize and network again: a difference beyond the promised
tolerance means that new features would not fit the old ones. Each image is of a kind that decoders
treat in their own ways.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROTATED = 6  # EXIF orientation: the camera was held upright


def images() -> list[tuple[str, bytes]]:
    """Make the canary images.

    Returns
    -------
    list of (str, bytes)
        Names and image files of at most 8 KB: a JPEG with EXIF rotation, a grey JPEG, a palette
        PNG with a transparent colour, a CMYK JPEG, a 16-bit grey PNG, and a JPEG of odd size with
        4:2:0 subsampled colour. The encoder of the installed Pillow makes the bytes: compare
        features of the same bytes only, those that a store keeps.
    """
    exif = Image.Exif()
    exif[0x0112] = _ROTATED
    colour = Image.fromarray(_scene(90, 120))
    grey16 = _scene(48, 64)[..., 1].astype(np.uint16) * 251 + np.arange(64, dtype=np.uint16)
    palette = colour.quantize(32, dither=Image.Dither.NONE)
    return [
        ("exif-rotated", _file(colour, "JPEG", quality=85, exif=exif)),
        ("greyscale", _file(colour.convert("L"), "JPEG", quality=85)),
        ("palette", _file(palette, "PNG", transparency=0)),
        ("cmyk", _file(colour.convert("CMYK"), "JPEG", quality=75)),
        ("16-bit", _file(Image.fromarray(grey16), "PNG")),
        ("jpeg-420", _file(Image.fromarray(_scene(93, 125)), "JPEG", quality=80, subsampling=2)),
    ]


def _scene(height: int, width: int) -> NDArray[np.uint8]:
    """Draw slopes, a disc, stripes and sharp edges: shape (height, width, 3)."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    y, x = y / height, x / width
    disc = (x - 0.35) ** 2 + (y - 0.45) ** 2 < 0.07
    stripes = 0.5 + 0.5 * np.sin(40 * x * (0.5 + y))
    red = np.where(disc, 0.9 - 0.5 * y, 0.2 + 0.6 * x)
    green = np.where(x > 0.7, stripes, np.where(disc, 0.1, 0.4 + 0.6 * y))
    blue = np.where(disc, 0.15, 0.8 - 0.6 * x * y)
    scene = np.stack([red, green, blue], axis=2)
    return np.round(255 * scene).astype(np.uint8)


def _file(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()
