"""From any image file or array to an upright 8-bit picture, or to a reason why there is none.

A picture is what is meant to be seen: rotated as its EXIF data say, transparency on white, the
first frame of an animation, 16-bit grey scaled to 8 bits. Pillow decodes. It takes some care on
arbitrary files: its warnings are kept from the user, its messages lose their addresses, and damaged
EXIF data are not trusted.
"""

from __future__ import annotations

import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from featcache.errors import DecodeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    RawImage: TypeAlias = bytes | NDArray[Any] | Image.Image
else:
    RawImage: TypeAlias = Any

# Pillow logs what it cannot decode; without any handler Python would print that.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSE = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 258  # TIFF tag
_NPY_MAGIC = b"\x93NUMPY"
_NOT_IMAGES = {
    b"version https://git-lfs": "a Git LFS pointer, not the image itself. Type: git lfs pull",
    b"<!doctype html": "an HTML page, as servers send in place of a file",
    b"<html": "an HTML page, as servers send in place of a file",
    b"<svg": "an SVG drawing; convert it to PNG",
    b"<?xml": "an XML file; convert drawings to PNG",
    b"%pdf": "a PDF document; convert its pages to PNG",
}


def decode(raw: RawImage, channels: int = 3) -> NDArray[np.uint8]:
    """Decode one image.

    EXIF orientation is applied; transparent pixels are laid on white; of an animation the first
    frame is taken; 16-bit samples keep their high byte, which is what Pillow itself does to
    16-bit colour.

    Parameters
    ----------
    raw : bytes, ndarray or PIL.Image.Image
        An image file's bytes (of any format that Pillow reads, or ``.npy``), or pixels: bool,
        uint8 or uint16, of shape (h, w) or (h, w, c).
    channels : int
        1 gives grey, 3 RGB, 4 RGBA with its alpha as it is, or the four pages of a TIFF. Any
        other number is taken from an image that has as many bands or (TIFF) grey pages.

    Returns
    -------
    ndarray of uint8, shape (h, w, channels)
        The pixels.

    Raises
    ------
    DecodeError
        If it is not an image, is damaged, is larger than Pillow's limit for decompression bombs,
        or holds pixels that have no known range (floating point, 32-bit) or another number of
        channels. The stage is "decode".
    """
    with decode_errors():
        found = picture(raw, channels)
        return to_array(found, channels) if isinstance(found, Image.Image) else found.copy()


def picture(raw: RawImage, channels: int) -> Image.Image | NDArray[np.uint8]:
    """Decode to an image of mode "L" or "RGB" (channels 1 and 3) or an array (h, w, channels).

    Grey images stay "L" when 3 channels are asked for: whoever resizes them does a third of the
    work, with the same result in each channel.
    """
    if isinstance(raw, bytes):
        npy = raw.startswith(_NPY_MAGIC)
        raw = np.load(io.BytesIO(raw), allow_pickle=False) if npy else _opened(raw)
    if isinstance(raw, np.ndarray):
        pixels = _uint8(raw)
        if channels not in (1, 3) and pixels.shape[2] == channels:
            return pixels
        raw = _image_of(pixels, channels)
    if not isinstance(raw, Image.Image):
        kind = type(raw).__name__
        raise DecodeError("decode", f"expected bytes, an array or a PIL image, got {kind}")
    if channels not in (1, 3):
        return _many_bands(raw, channels)
    image = _coloured(_ranged(_upright(raw)))
    return image.convert("L") if channels == 1 else image


def to_array(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Return an image of mode "L" or "RGB" as a writable uint8 array (h, w, channels)."""
    if channels == 3 and image.mode == "L":
        image = image.convert("RGB")
    array = np.array(image)
    return array if array.ndim == 3 else array[..., None]


@contextmanager
def decode_errors() -> Iterator[None]:
    """Turn every exception into a `DecodeError`, and keep Pillow's warnings from the user."""
    with quiet:
        try:
            yield
        except DecodeError:
            raise
        except Exception as error:
            # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error, EOFError,
            # IndexError, KeyError, NotImplementedError, MemoryError ... : no list is complete.
            raise DecodeError("decode", reason(error)) from error


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image that is loaded: 1 to 8, 1 is upright.

    If the EXIF data are damaged, the picture is taken as it is: the result is 1.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's parser raises whatever the bytes make it raise
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def reason(error: Exception) -> str:
    """Return an exception's type and message on one line, the same in every run."""
    text = " ".join(str(error).split())
    text = re.sub(r" at 0x[0-9a-f]+", "", text)[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Quiet:
    """Context in which Pillow's warnings are ignored; several threads may be in it at once.

    ``warnings.catch_warnings`` saves and restores one list for the whole process, so that threads
    whose blocks overlap would restore it in the wrong order. Here the first thread to come in
    saves, and the last to leave restores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._saved = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                # Some of Pillow's warnings are attributed to its caller, in these packages.
                modules = r"(PIL|pillow_\w+)(\.|$)|featcache\.(images|pixels)\."
                warnings.filterwarnings("ignore", module=modules)
            self._depth += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._saved.__exit__(None, None, None)


quiet = _Quiet()


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise DecodeError("decode", "an empty file (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise DecodeError("decode", _what_it_is(data[:64])) from None
    if image.format == "EPS":  # Pillow would hand the file's program to Ghostscript
        raise DecodeError("decode", "a PostScript program, not pixels; convert it to PNG")
    return image


def _what_it_is(start: bytes) -> str:
    """Return what kind of file this is, by its first bytes, if Pillow does not know it."""
    for prefix, reason in _NOT_IMAGES.items():
        if start.lstrip().lower().startswith(prefix):
            return reason
    if start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1"):
        return "a HEIC image, which Pillow does not read; convert it to JPEG or PNG"
    return f"not an image that Pillow can read, or cut short; it begins with {start[:12]!r}"


def _uint8(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return pixels of shape (h, w, c) in 8 bits."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise DecodeError("decode", f"expected (h, w) or (h, w, c) pixels, got {array.shape}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return (array >> 8).astype(np.uint8)
    raise DecodeError("decode", f"expected bool, uint8 or uint16 pixels, got {array.dtype}")


def _image_of(pixels: NDArray[np.uint8], channels: int) -> Image.Image:
    """Return an array (h, w, 1 | 3 | 4) as an image of mode "L", "RGB" or "RGBA"."""
    bands = pixels.shape[2]
    if bands not in (1, 3, 4):
        raise DecodeError("decode", f"expected {channels} channels, got {bands}")
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels)


def _upright(image: Image.Image) -> Image.Image:
    """Rotate and flip an image as its EXIF data say; damaged EXIF data say nothing."""
    image.load()  # a TIFF applies its orientation while it loads, and then forgets it
    method = _TRANSPOSE.get(orientation(image))
    return image if method is None else image.transpose(method)


def _ranged(image: Image.Image) -> Image.Image:
    """Bring 16-bit grey to 8 bits; refuse pixels whose range nobody knows."""
    if image.mode == "F":
        reason = "floating-point pixels have no known range; save them as 8- or 16-bit integers"
        raise DecodeError("decode", reason)
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    # Mode "I" also holds the 16-bit samples of PGM and of signed TIFF.
    if image.mode == "I" and not (pixels.min() >= 0 and pixels.max() <= 65535):
        reason = (
            f"32-bit pixels from {pixels.min()} to {pixels.max()} have no known range; "
            "save them as 8- or 16-bit integers"
        )
        raise DecodeError("decode", reason)
    grey = (pixels >> (_bits(image) - 8)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[pixels == transparent] = 255
    return Image.fromarray(grey)


def _bits(image: Image.Image) -> int:
    """Return how many bits the samples of a grey image of more than 8 bits have."""
    tags = getattr(image, "tag_v2", {})  # Pillow spreads the 12 bits of other formats over 16
    return 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16


def _coloured(image: Image.Image) -> Image.Image:
    """Return an image as "L" where it is grey and opaque, else as "RGB", transparency on white."""
    if not image.has_transparency_data:
        if image.mode in ("L", "RGB"):
            return image
        return image.convert("L" if image.mode == "1" else "RGB")
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=alpha)
    return white


def _many_bands(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Return an image's own bands, its RGBA (4 channels), or its grey TIFF pages as channels."""
    pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if pages == channels:
        return np.stack([_page(image, index) for index in range(pages)], axis=2)
    image = _upright(image)
    if channels == 4 and image.mode != "RGBX":
        image = _ranged(image).convert("RGBA")
    bands = len(image.getbands())
    if bands != channels:
        reason = f"expected {channels} channels, got {bands}"
        raise DecodeError("decode", reason + (f" on {pages} pages" if pages > 1 else ""))
    return np.asarray(image)


def _page(image: Image.Image, index: int) -> NDArray[np.uint8]:
    image.seek(index)
    page = _coloured(_ranged(_upright(image)))
    if page.mode != "L":
        raise DecodeError("decode", f"page {index} is {image.mode}, not grey")
    return np.asarray(page)
