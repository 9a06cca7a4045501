"""The canary images are small, whole, and of the kinds that decoders treat in their own ways."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from featcache.pixels import canary
from featcache.pixels.decode import decode
from featcache.pixels.preprocessing import Preprocessing


def test_kinds_sizes_and_order() -> None:
    images = canary.images()
    assert images == canary.images()
    names = [name for name, _ in images]
    assert names == ["exif-rotated", "greyscale", "palette", "cmyk", "16-bit", "jpeg-420"]
    assert all(isinstance(raw, bytes) and len(raw) <= 8192 for _, raw in images)
    opened = {name: Image.open(io.BytesIO(raw)) for name, raw in images}
    assert opened["exif-rotated"].getexif()[0x0112] == 6
    modes = {name: image.mode for name, image in opened.items()}
    assert modes == {
        "exif-rotated": "RGB",
        "greyscale": "L",
        "palette": "P",
        "cmyk": "CMYK",
        "16-bit": "I;16",
        "jpeg-420": "RGB",
    }
    assert opened["palette"].has_transparency_data
    assert opened["jpeg-420"].layer[0][1:3] == (2, 2)  # luminance: two samples for one of colour


def test_every_canary_shows_structure_to_a_network() -> None:
    for name, raw in canary.images():
        assert decode(raw).std() > 30, name
        assert Preprocessing()(raw).std() > 30, name


def test_the_rotated_canary_is_upright() -> None:
    pixels = decode(dict(canary.images())["exif-rotated"])
    assert pixels.shape == (120, 90, 3)
    stored = Image.open(io.BytesIO(dict(canary.images())["exif-rotated"]))
    assert np.array_equal(pixels, stored.transpose(Image.Transpose.ROTATE_270))


def test_the_16_bit_canary_fills_its_range() -> None:
    raw = dict(canary.images())["16-bit"]
    samples = np.asarray(Image.open(io.BytesIO(raw)))
    assert samples.dtype == np.uint16 and samples.max() > 40_000
    assert np.array_equal(decode(raw, 1)[..., 0], samples >> 8)
