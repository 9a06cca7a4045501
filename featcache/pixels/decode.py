"""From any image file or array to an upright 8-bit picture, or to a reason why there is none.

A picture is what is meant to be seen: rotated as its EXIF data say, transparency on white, the
first frame of an animation, 16-bit grey scaled to 8 bits. Pillow decodes. It takes some care on
arbitrary files: its warnings are kept from the user, its messages lose their addresses, and damaged
EXIF data are not trusted.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from featcache.errors import DecodeError, MissingExtra

if TYPE_CHECKING:
    from numpy.typing import NDArray

    RawImage: TypeAlias = bytes | NDArray[Any] | Image.Image
else:
    RawImage: TypeAlias = Any

Truncated: TypeAlias = Literal["refuse", "accept"]

NO_RANGE = "have no known range: type --bit-depth N"
"""Part of the reason for which a 32-bit image cannot be read without a bit depth."""

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
_KIND_OF_PAGE, _BITS_PER_SAMPLE = 254, 258  # TIFF tags
_JPEG_END = b"\xff\xd9"
_no_limit = threading.Lock()  # of Pillow's, which is one for the whole process
_NPY_MAGIC = b"\x93NUMPY"
_HEIF = re.compile(rb".{4}ftyp(he[a-z]{2}|m[is]f1)", re.DOTALL)
_NOT_IMAGES = {
    b"version https://git-lfs": "a Git LFS pointer, not the image itself. Type: git lfs pull",
    b"<!doctype html": "an HTML page, as servers send in place of a file",
    b"<html": "an HTML page, as servers send in place of a file",
    b"<svg": "an SVG drawing; convert it to PNG",
    b"<?xml": "an XML file; convert drawings to PNG",
    b"%pdf": "a PDF document; convert its pages to PNG",
}


def decode(
    raw: RawImage,
    channels: int = 3,
    *,
    bit_depth: int | None = None,
    truncated: Truncated = "refuse",
    max_pixels: int | None = None,
) -> NDArray[np.uint8]:
    """Decode one image.

    EXIF orientation is applied; transparent pixels are laid on white; of an animation the first
    frame is taken, of a TIFF the first page that is not marked as a smaller copy; samples keep
    their highest eight bits, of as many as the file declares. A JPEG may lack its end marker.

    Parameters
    ----------
    raw : bytes, ndarray or PIL.Image.Image
        An image file's bytes (of any format that Pillow reads, or ``.npy``), or pixels: bool,
        uint8 or uint16, of shape (h, w) or (h, w, c).
    channels : int
        1 gives grey, 3 RGB, 4 RGBA with its alpha as it is, or the four pages of a TIFF. Any
        other number is taken from an image that has as many bands or (TIFF) grey pages.
    bit_depth : int, optional
        Bits that the samples of grey images of more than 8 bits fill, such as 12. Left out: those
        that the file declares; 32-bit integers must then be below 256.
    truncated : {"refuse", "accept"}
        What to do with an image that is cut off before its end: refuse it, or read what there is
        (JPEG, PNG, GIF, and formats that are not compressed); the rest is black, or grey.
    max_pixels : int, optional
        Number of pixels that an image may have. Left out: Pillow's limit, about 179 million.

    Returns
    -------
    ndarray of uint8, shape (h, w, channels)
        The pixels.

    Raises
    ------
    DecodeError
        If it is not an image, is damaged, has more than `max_pixels`, holds pixels that have no
        known range (floating point, 32-bit) or more bits than `bit_depth`, or another number of
        channels. The stage is "decode".
    """
    with decode_errors():
        found = picture(raw, channels, bit_depth, truncated, max_pixels)
        return to_array(found, channels) if isinstance(found, Image.Image) else found.copy()


def picture(
    raw: RawImage,
    channels: int,
    bit_depth: int | None = None,
    truncated: Truncated = "refuse",
    max_pixels: int | None = None,
) -> Image.Image | NDArray[np.uint8]:
    """Decode to an image of mode "L" or "RGB" (channels 1 and 3) or an array (h, w, channels).

    Grey images stay "L" when 3 channels are asked for: whoever resizes them does a third of the
    work, with the same result in each channel.
    """
    if isinstance(raw, bytes):
        raw = _read(raw, truncated, max_pixels)
    if isinstance(raw, np.ndarray):
        pixels = _uint8(raw, bit_depth)
        if channels not in (1, 3) and pixels.shape[2] == channels:
            return pixels
        if (bands := pixels.shape[2]) not in (1, 3, 4):
            raise DecodeError("decode", f"expected {channels} channels, got {bands}")
        raw = Image.fromarray(pixels[..., 0] if bands == 1 else pixels)
    if not isinstance(raw, Image.Image):
        kind = type(raw).__name__
        raise DecodeError("decode", f"expected bytes, an array or a PIL image, got {kind}")
    if channels not in (1, 3):
        return _many_bands(raw, channels, bit_depth)
    image = _coloured(_ranged(_upright(raw), bit_depth))
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


def bits_in_use(raw: RawImage) -> int:
    """Return how many bits the samples of a grey image fill that declares 16; 0 for others."""
    with decode_errors():
        found: Any = _read(raw) if isinstance(raw, bytes) else raw
        bits = None
        if isinstance(found, np.ndarray):
            bits = 16 if found.dtype == np.uint16 else None
        elif found.mode.startswith("I"):
            bits = _bits(found, None)
        return int(np.max(np.asarray(found))).bit_length() if bits == 16 else 0


def _read(data: bytes, truncated: Truncated = "refuse", max_pixels: int | None = None) -> Any:
    """Return the pixels of an ``.npy`` file, or the first whole page of an image, loaded."""
    if data.startswith(_NPY_MAGIC):
        return np.load(io.BytesIO(data), allow_pickle=False)
    image: Any = _opened(data, max_pixels)
    if image.format == "TIFF":
        _to_first_whole_page(image)
    elif image.format == "PPM" and image.tile:
        # Of grey images Pillow spreads the values over 16 bits, from the file's own largest one.
        largest = image.tile[0].args
        image.info["spread"] = isinstance(largest, tuple) and largest[-1] != 65535
    try:
        image.load()
    except OSError as error:
        if "truncated" not in str(error):
            raise
        found = _what_there_is(image, data, truncated == "accept", max_pixels)
        if found is None:
            hint = "with --truncated accept, and another file for -o, what there is of it is read"
            raise DecodeError("decode", f"{reason(error)}; {hint}") from None
        return found
    return image


def _what_there_is(image: Any, data: bytes, accepted: bool, max_pixels: int | None) -> Any:
    """Return an image that is cut off, if that is accepted, or if only an end marker is missing."""
    if image.format in ("JPEG", "MPO"):
        # A progressive image is refined to the end: nothing tells whether it is whole.
        refused = data.endswith(_JPEG_END) or "progressive" in image.info
        # What stands behind the pixels' data does not change the pixels, if these are whole.
        data = data.removesuffix(_JPEG_END[:1])
        image, other = (_opened(data + more + _JPEG_END, max_pixels) for more in (b"", b"U" * 4096))
        with contextlib.suppress(OSError):
            image.load()
            if accepted or not (refused or np.any(np.asarray(image) != np.asarray(other))):
                return image
    if not accepted:
        return None
    image.tile = []  # Pillow has kept the rows that there were, and shall not read again
    image.load_end()
    return image if image.getbbox() else None


def _opened(data: bytes, max_pixels: int | None) -> Image.Image:
    if not data:
        raise DecodeError("decode", "an empty file (0 bytes)")
    try:
        image = _open(data, max_pixels)
    except UnidentifiedImageError:
        if _HEIF.match(data) and "HEIF" not in Image.OPEN:
            _learn_heif()
            return _opened(data, max_pixels)
        raise DecodeError("decode", _what_it_is(data[:64])) from None
    if image.format == "EPS":  # Pillow would hand the file's program to Ghostscript
        raise DecodeError("decode", "a PostScript program, not pixels; convert it to PNG")
    return image


def _learn_heif() -> None:
    """Have Pillow read HEIC images by the package that does, where it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        needed = MissingExtra("pillow-heif", "heif", "A HEIC image")
        again = "and then the same command with --retry-failed"
        raise DecodeError("decode", f"{needed}, {again}") from None
    register_heif_opener(decode_threads=1)  # each image is decoded in one thread


def _open(data: bytes, max_pixels: int | None) -> Image.Image:
    """Open an image; of more pixels than Pillow allows only where that was asked for."""
    allowed = Image.MAX_IMAGE_PIXELS
    limit = max_pixels or 2 * (allowed or 2**62)
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        with _no_limit:
            allowed, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(io.BytesIO(data))
            finally:
                Image.MAX_IMAGE_PIXELS = allowed
    if (pixels := image.width * image.height) > limit:
        raise DecodeError(
            "decode",
            f"DecompressionBombError: {pixels:,} pixels are more than {limit:,}, as in a "
            f"decompression bomb. To read it, type --max-pixels {pixels} --retry-failed "
            f"(max_pixels={pixels})",
        )
    return image


def _to_first_whole_page(image: Any) -> None:
    """Go to the first page of a TIFF that is not marked as a smaller copy of another."""
    with contextlib.suppress(EOFError):
        while image.tag_v2.get(_KIND_OF_PAGE, 0) & 1:
            image.seek(image.tell() + 1)
        return
    image.seek(0)


def _what_it_is(start: bytes) -> str:
    """Return what kind of file this is, by its first bytes, if Pillow does not know it."""
    for prefix, reason in _NOT_IMAGES.items():
        if start.lstrip().lower().startswith(prefix):
            return reason
    return f"not an image that Pillow can read, or cut short; it begins with {start[:12]!r}"


def _uint8(array: NDArray[Any], bit_depth: int | None) -> NDArray[np.uint8]:
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
        return _eight_bits(array, bit_depth or 16)
    raise DecodeError("decode", f"expected bool, uint8 or uint16 pixels, got {array.dtype}")


def _upright(image: Image.Image) -> Image.Image:
    """Rotate and flip an image as its EXIF data say; damaged EXIF data say nothing."""
    image.load()  # a TIFF applies its orientation while it loads, and then forgets it
    method = _TRANSPOSE.get(orientation(image))
    return image if method is None else image.transpose(method)


def _ranged(image: Image.Image, bit_depth: int | None) -> Image.Image:
    """Bring grey of more than 8 bits to 8 bits; refuse pixels whose range nobody knows."""
    if image.mode == "F":
        reason = "floating-point pixels have no known range; save them as 8- or 16-bit integers"
        raise DecodeError("decode", reason)
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    grey = _eight_bits(pixels, _bits(image, bit_depth))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[pixels == transparent] = 255
    return Image.fromarray(grey)


def _bits(image: Image.Image, bit_depth: int | None) -> int | None:
    """Return how many bits the samples of a grey image of modes "I..." fill; None if unknown."""
    if image.info.get("spread"):
        return 16
    # Mode "I" holds the 16-bit samples of PGM and of signed TIFF, and 32-bit ones.
    known = 16 if image.mode != "I" or image.format == "PPM" else 32
    declared = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (known,))[0]
    return bit_depth or (declared if declared <= 16 else None)


def _eight_bits(pixels: NDArray[Any], bits: int | None) -> NDArray[np.uint8]:
    """Return the highest eight bits of samples that fill so many bits; None is unknown."""
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high >= 2 ** (bits or 8):
        raise DecodeError(
            "decode",
            f"32-bit pixels from {low} to {high} {NO_RANGE} (bit_depth=N) if "
            "they fill N bits, or save them as 8- or 16-bit integers"
            if bits is None
            else f"pixels from {low} to {high} do not fit into {bits} bits (--bit-depth)",
        )
    shift = (bits or 8) - 8
    return (pixels >> shift if shift >= 0 else pixels << -shift).astype(np.uint8)


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


def _many_bands(image: Image.Image, channels: int, bit_depth: int | None) -> NDArray[np.uint8]:
    """Return an image's own bands, its RGBA (4 channels), or its grey TIFF pages as channels."""
    pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
    if pages == channels:
        return np.stack([_page(image, index, bit_depth) for index in range(pages)], axis=2)
    image = _upright(image)
    if channels == 4 and image.mode != "RGBX":
        image = _ranged(image, bit_depth).convert("RGBA")
    bands = len(image.getbands())
    if bands != channels:
        reason = f"expected {channels} channels, got {bands}"
        raise DecodeError("decode", reason + (f" on {pages} pages" if pages > 1 else ""))
    return np.asarray(image)


def _page(image: Image.Image, index: int, bit_depth: int | None) -> NDArray[np.uint8]:
    image.seek(index)
    page = _coloured(_ranged(_upright(image), bit_depth))
    if page.mode != "L":
        raise DecodeError("decode", f"page {index} is {image.mode}, not grey")
    return np.asarray(page)
