"""Draw the test images anew: ``python tests/tools/canaries.py`` writes featcache/pixels/canaries/.

Other bytes are other test images: stores that hold the earlier ones are then compared on theirs.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "featcache" / "pixels" / "canaries"
_ROTATED = 6  # EXIF orientation: the camera was held upright


def main() -> None:
    exif = Image.Exif()
    exif[0x0112] = _ROTATED
    colour, odd = Image.fromarray(_scene(90, 120)), Image.fromarray(_scene(93, 125))
    grey16 = _scene(48, 64)[..., 1].astype(np.uint16) * 251 + np.arange(64, dtype=np.uint16)
    palette = colour.quantize(32, dither=Image.Dither.NONE)
    for file, image in [
        ("0-exif-rotated.jpg", _file(colour, "JPEG", quality=85, exif=exif)),
        ("1-greyscale.jpg", _file(colour.convert("L"), "JPEG", quality=85)),
        ("2-palette.png", _file(palette, "PNG", transparency=0)),
        ("3-cmyk.jpg", _file(colour.convert("CMYK"), "JPEG", quality=75)),
        ("4-16-bit.png", _file(Image.fromarray(grey16), "PNG")),
        (
            "5-jpeg-420.jpg",
            _file(odd, "JPEG", quality=80, subsampling=2),
        ),
    ]:
        (FOLDER / file).write_bytes(image)


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


if __name__ == "__main__":
    main()
