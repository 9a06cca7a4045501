"""Six small images that show when another machine no longer decodes, resizes or computes alike.

Their files and their features are kept in a store. When an extraction is resumed, or a predictor
used, the same bytes go through decoder, resize and network again: a difference beyond the promised
tolerance means that new features would not fit the old ones. Each image is of a kind that decoders
treat in their own ways. The bytes come with the package, so they are the same on every machine
(``tests/tools/canaries.py`` drew them).
"""

from __future__ import annotations

import io
from importlib import resources

import numpy as np


def images() -> list[tuple[str, bytes]]:
    """Return the canary images.

    Returns
    -------
    list of (str, bytes)
        Names and image files of at most 8 KB: a JPEG with EXIF rotation, a grey JPEG, a palette
        PNG with a transparent colour, a CMYK JPEG, a 16-bit grey PNG, and a JPEG of odd size with
        4:2:0 subsampled colour.
    """
    folder = resources.files("featcache.pixels") / "canaries"
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    # 0-exif-rotated.jpg -> exif-rotated
    return [(file.name[2:].rpartition(".")[0], file.read_bytes()) for file in files]


def noise(channels: int) -> tuple[str, bytes]:
    """Return name and ``.npy`` file of a canary for networks that take no photographs."""
    file = io.BytesIO()
    np.save(file, np.random.default_rng(0).integers(0, 256, (48, 64, channels), np.uint8))
    return "noise", file.getvalue()
