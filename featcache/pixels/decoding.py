"""From the bytes of an image file to the uint8 pixels that a network expects.

There are two steps. `decode` gives the picture as it is meant to be seen: rotated as its EXIF data
say, transparency on white, the first frame of an animation, 16-bit grey scaled to 8 bits. A
`Preprocessing` resizes and crops it exactly as the network's own transform does, stopping before
the conversion to floating point; `Preprocessing.normalize` does that for a whole batch, on any
device.

Pillow resizes. Its results are the definition of every torchvision and timm transform, so nothing
faster that differs by a bit (JPEG's own scaling, ``reducing_gap``, tensor kernels) is used. What is
saved is only what cannot change a bit: grey images are resized as one band, pixels outside the
crop are not computed where the arithmetic of the rest stays the same, and no copy is made that
Pillow does not force.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from featcache.errors import DecodeError
from featcache.pixels import pillow
from featcache.pixels.views import Augmentation, View

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    RawImage: TypeAlias = bytes | NDArray[Any] | Image.Image
else:
    RawImage: TypeAlias = Any

__all__ = ["Augmentation", "Preprocessing", "RawImage", "View", "decode"]

Interpolation: TypeAlias = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Fit: TypeAlias = Literal["stretch", "cover", "contain"]

_RESAMPLING: dict[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_UNSMOOTHED = ("nearest", "bilinear", "bicubic")  # what Pillow can also do without antialiasing
_FITS = ("stretch", "cover", "contain")

_TRANSPOSE = {  # by EXIF orientation, as in PIL.ImageOps.exif_transpose
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
    with _decoding():
        picture = _picture(raw, channels)
        return _pixels(picture, channels) if isinstance(picture, Image.Image) else picture.copy()


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes what a network expects. Data, not code: stored, compared, printed.

    Parameters
    ----------
    resize : int, (int, int) or None
        An int is the new length of the shorter side; a pair (height, width) is used as `fit`
        says; None leaves the size.
    crop : int, (int, int) or None
        Height and width of the central crop. An image that is smaller is padded with `fill`.
        None needs a `resize` to a pair.
    interpolation : str
        "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos".
    antialias : bool
        Whether resizing to a smaller size averages over the pixels left out.
    mean, std : tuple of float
        Of each channel, where pixels lie between 0 and 1.
    channels : int
        1 is grey, 3 RGB; see `decode` for others.
    fit : str
        What `resize` to a pair does: "stretch" gives exactly this size, "cover" the smallest
        image of the same shape that covers it, "contain" the largest that fits in it.
    fill : tuple of int
        Colour of the padding, one value a channel; empty is black.

    Raises
    ------
    ValueError
        If values do not go together, or leave the output's size to the image.

    Examples
    --------
    >>> preprocessing = Preprocessing(resize=256, crop=224)
    >>> preprocessing.output_shape
    (3, 224, 224)
    """

    resize: int | tuple[int, int] | None = 256
    crop: int | tuple[int, int] | None = 224
    interpolation: Interpolation = "bilinear"
    antialias: bool = True
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: int = 3
    fit: Fit = "stretch"
    fill: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            _check_size(name, getattr(self, name))
        if self.interpolation not in _RESAMPLING:
            expected = ", ".join(_RESAMPLING)
            raise ValueError(f"interpolation is one of {expected}, not {self.interpolation!r}")
        if not self.antialias and self.interpolation not in _UNSMOOTHED:
            raise ValueError(f"{self.interpolation} interpolation is always antialiased")
        if self.fit not in _FITS:
            raise ValueError(f"fit is one of {', '.join(_FITS)}, not {self.fit!r}")
        if self.channels < 1:
            raise ValueError(f"channels is at least 1, not {self.channels}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"mean and std need one value for each of {self.channels} channels, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be positive, got {self.std}")
        if self.fill and len(self.fill) != self.channels:
            raise ValueError(f"fill needs {self.channels} values, got {len(self.fill)}")
        if self.crop is None and not (isinstance(self.resize, tuple) and self.fit == "stretch"):
            raise ValueError("all outputs must have one size: give crop, or resize=(height, width)")

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what a call returns."""
        size = self.resize if self.crop is None else self.crop
        height, width = (size, size) if isinstance(size, int) else size or (0, 0)
        return self.channels, height, width

    def __call__(self, raw: RawImage) -> NDArray[np.uint8]:
        """Decode, resize and crop one image.

        Parameters
        ----------
        raw : bytes, ndarray or PIL.Image.Image
            As for `decode`.

        Returns
        -------
        ndarray of uint8, shape (channels, h, w)
            The pixels that the network's own transform gives before it converts them to floating
            point. In memory the channels of a pixel lie side by side (the strides are those of an
            (h, w, channels) array), so that copying rows into a batch of that layout costs
            nothing extra and gives PyTorch's channels_last format. A strip that would be larger
            than Pillow's limit for decompression bombs once it is resized may differ in a last
            bit: only what the crop needs of it is computed.

        Raises
        ------
        DecodeError
            As `decode` does.
        """
        with _decoding():
            picture = _picture(raw, self.channels)
            bands = _bands(picture)
            fills = (
                [self.fill]
                if len(bands) == 1
                else [self.fill[k : k + 1] for k in range(len(bands))]
            )
            return self._finish([self._fitted(*pair) for pair in zip(bands, fills, strict=True)])

    def views(
        self, raw: RawImage, augmentation: Augmentation, id: str, count: int
    ) -> NDArray[np.uint8]:
        """Decode one image and draw augmented views of it.

        Parameters
        ----------
        raw : bytes, ndarray or PIL.Image.Image
            As for `decode`.
        augmentation : Augmentation
            What the views look like. They are cropped from the whole image, at the size and with
            the interpolation of this preprocessing.
        id : str
            The image's id, which seeds the views.
        count : int
            Number of views.

        Returns
        -------
        ndarray of uint8, shape (count, channels, h, w)
            The views; the memory layout is that of a single image.

        Raises
        ------
        DecodeError
            As `decode` does.
        """
        _, height, width = self.output_shape
        resample = _RESAMPLING[self.interpolation]
        with _decoding():
            bands = _bands(_picture(raw, self.channels))
            size = bands[0].height, bands[0].width
            views = [augmentation.view(id, index, size) for index in range(count)]
            return np.stack(
                [
                    self._finish(
                        [view(band, (height, width), resample) for band in bands]
                    ).transpose(1, 2, 0)
                    for view in views
                ]
            ).transpose(0, 3, 1, 2)

    def _fitted(self, image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
        """Resize and crop one image, or one of its bands."""
        _, height, width = self.output_shape
        size = self._resized_size(image.width, image.height)
        left, upper = _centre(size[0], width), _centre(size[1], height)
        if size != image.size:
            image, left, upper = self._resized(image, size, left, upper)
        if (left, upper) == (0, 0) and image.size == (width, height):
            return image
        box = (left, upper, left + width, upper + height)
        outside = left < 0 or upper < 0 or box[2] > image.width or box[3] > image.height
        if outside and any(fill):
            return self._padded(image, left, upper, fill)
        return image.crop(box)  # what lies outside the image is black

    def _resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height after resizing, rounded as torchvision and timm do."""
        if self.resize is None:
            return width, height
        if isinstance(self.resize, int):
            if width <= height:
                return self.resize, int(self.resize * height / width)
            return int(self.resize * width / height), self.resize
        if self.fit == "stretch":
            return self.resize[1], self.resize[0]
        ratios = height / self.resize[0], width / self.resize[1]
        ratio = min(ratios) if self.fit == "cover" else max(ratios)
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _resized(
        self, image: Image.Image, size: tuple[int, int], left: int, upper: int
    ) -> tuple[Image.Image, int, int]:
        """Resize to `size`, or to as much of it as the crop at (left, upper) needs.

        Returns
        -------
        tuple
            The image, and where the crop begins in it.
        """
        resample = _RESAMPLING[self.interpolation]
        if not self.antialias:
            extent = (0, 0, image.width, image.height)
            return image.transform(size, Image.Transform.EXTENT, extent, resample), left, upper
        x, y = self._windows(image.size, size, (left, upper))
        box = (x.source[0], y.source[0], x.source[1], y.source[1])
        image = image.resize((x.length, y.length), resample, box)
        return image, left - x.start, upper - y.start

    def _windows(
        self, old: tuple[int, int], new: tuple[int, int], start: tuple[int, int]
    ) -> tuple[_Window, _Window]:
        """Choose the columns and rows to compute, so that those in the crop keep all their bits.

        Parameters
        ----------
        old, new, start : tuple of int
            Width and height before and after resizing; left and upper edge of the crop.
        """
        length = self.output_shape[:0:-1]
        # A strip of 1 x 60,000 pixels would become 15 million pixels long before the crop.
        huge = new[0] * new[1] > (Image.MAX_IMAGE_PIXELS or math.inf)
        edges = list(zip(old, new, start, length, strict=True))
        some_x, some_y = (_Window.of(*edge, inexact=huge) for edge in edges)
        all_x, all_y = (_Window.whole(a, b) for a, b in zip(old, new, strict=True))
        order = _vertical_first(old, new)
        for x, y in ((some_x, some_y), (all_x, some_y), (some_x, all_y)):
            if huge or _vertical_first(old, (x.length, y.length)) == order:
                return x, y
        return all_x, all_y

    def _padded(
        self, image: Image.Image, left: int, upper: int, fill: tuple[int, ...]
    ) -> Image.Image:
        _, height, width = self.output_shape
        if image.mode == "L" and len(set(fill)) > 1:
            image = image.convert("RGB")
        colour = fill if image.mode == "RGB" else fill[0]
        canvas = Image.new(image.mode, (width, height), colour)
        canvas.paste(image, (-left, -upper))
        return canvas

    def _finish(self, bands: list[Image.Image]) -> NDArray[np.uint8]:
        """Return fitted bands as one array (channels, h, w) in channels-last memory."""
        if len(bands) == 1:
            return _pixels(bands[0], self.channels).transpose(2, 0, 1)
        return np.stack([np.asarray(band) for band in bands], axis=2).transpose(2, 0, 1)

    def normalize(self, batch: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Convert a batch of pixels to what the network takes, on the batch's device.

        The arithmetic is that of torchvision's ``convert_image_dtype`` and ``normalize``, in
        float32: on a CPU the results are equal bit for bit.

        Parameters
        ----------
        batch : torch.Tensor of uint8, shape (b, channels, h, w)
            Pixels, in any memory format; it is kept.
        dtype : torch.dtype, optional
            Type of the result, float32 if left out. The conversion to it comes last.

        Returns
        -------
        torch.Tensor, shape (b, channels, h, w)
            ``(batch / 255 - mean) / std``.
        """
        import torch

        pixels = batch.to(torch.float32, copy=True).div_(255)  # (b, c, h, w)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=batch.device)
            for values in (self.mean, self.std)
        )
        if pixels.is_contiguous(memory_format=torch.channels_last):
            # A row of pixels against a row of means: five times as fast as broadcasting along an
            # innermost axis of three.
            size, _, height, width = pixels.shape
            rows = pixels.permute(0, 2, 3, 1).view(size, height, -1)  # (b, h, w c)
            rows.sub_(mean.repeat(width)).div_(std.repeat(width))
        else:
            pixels.sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
        return pixels if dtype is None else pixels.to(dtype)

    def with_image_size(self, size: int) -> Self:
        """Return this preprocessing for images of another size; resize and crop keep their ratio.

        Parameters
        ----------
        size : int
            New height and width.

        Returns
        -------
        Preprocessing
            A copy; `output_shape` is (channels, size, size).
        """
        if size < 1:
            raise ValueError(f"the image size is at least 1, not {size}")
        _, height, width = self.output_shape
        resize: int | tuple[int, int] | None
        if isinstance(self.resize, tuple):
            resize = (round(size * self.resize[0] / height), round(size * self.resize[1] / width))
        elif self.resize is None:
            resize = None
        else:
            resize = round(size * self.resize / min(height, width))
        return replace(self, resize=resize, crop=None if self.crop is None else size)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; part of the fingerprint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a preprocessing of what `to_dict` gave.

        Raises
        ------
        ValueError
            If a field is unknown or a value is impossible.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown fields of a preprocessing: {', '.join(unknown)}")
        fixed: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**fixed)

    @classmethod
    def from_torchvision(cls, preset: Any) -> Self:
        """Read the transform of a torchvision classification model.

        Parameters
        ----------
        preset : ImageClassification or a torchvision weights entry
            What ``weights.transforms()`` gives, or `weights` itself.

        Returns
        -------
        Preprocessing
            The same, pixel by pixel.

        Raises
        ------
        ValueError
            If it is another kind of transform.
        """
        if hasattr(preset, "transforms"):
            preset = preset.transforms()
        try:
            resize, crop = list(preset.resize_size), list(preset.crop_size)
            mean, std = tuple(map(float, preset.mean)), tuple(map(float, preset.std))
            interpolation = preset.interpolation.value
        except AttributeError:
            raise ValueError(
                f"expected the transform of a classification model, got {preset!r}"
            ) from None
        return cls(
            resize=resize[0] if len(resize) == 1 else (resize[0], resize[1]),
            crop=crop[0] if len(crop) == 1 else (crop[0], crop[1]),
            interpolation=interpolation,
            mean=mean,
            std=std,
            channels=len(mean),
        )

    @classmethod
    def from_timm(cls, data_config: Mapping[str, Any]) -> Self:
        """Read the evaluation transform of a timm model.

        Parameters
        ----------
        data_config : mapping
            What ``timm.data.resolve_model_data_config(model)`` gives.

        Returns
        -------
        Preprocessing
            The same as ``timm.data.create_transform(**data_config)``, pixel by pixel.

        Raises
        ------
        ValueError
            If the configuration asks for what is not known here.
        """
        channels, height, width = data_config["input_size"]
        crop_pct = data_config.get("crop_pct") or 0.875
        mean = tuple(map(float, data_config["mean"]))
        scaled = math.floor(height / crop_pct), math.floor(width / crop_pct)
        mode = data_config.get("crop_mode") or "center"
        resize: int | tuple[int, int] = scaled
        fit: Fit = "stretch"
        if mode == "border":
            fit = "contain"
        elif mode != "squash":  # timm treats every other name as "center"
            if scaled[0] == scaled[1]:
                resize = scaled[0]
            else:
                fit = "cover"
        return cls(
            resize=resize,
            crop=height if height == width else (height, width),
            interpolation=data_config.get("interpolation") or "bilinear",
            mean=mean,
            std=tuple(map(float, data_config["std"])),
            channels=channels,
            fit=fit,
            fill=tuple(round(255 * value) for value in mean) if mode == "border" else (),
        )


@dataclass(frozen=True)
class _Window:
    """The part of one axis of a resized image that is computed.

    Attributes
    ----------
    start, length : int
        In pixels of the resized image.
    source : tuple of float
        The same interval in pixels of the image that is resized.
    """

    start: int
    length: int
    source: tuple[float, float]

    @classmethod
    def of(cls, old: int, new: int, start: int, length: int, *, inexact: bool) -> _Window:
        """Choose the window [start, start + length) where that changes no bit, else everything.

        Pillow keeps the edges of its window as float32 and computes its coefficients in float64.
        Both are exact where old / new is a fraction with a power of two below (resizing to 256,
        above all) and the edges fit into float32; then every coefficient is the same number as
        without a window. `inexact` takes the window in any case: a last bit may differ.
        """
        end = min(start + length, new)
        start = max(start, 0)
        denominator = new // math.gcd(old, new)
        edges = start * old / new, end * old / new
        exact = denominator & (denominator - 1) == 0 and all(
            float(np.float32(edge)) == edge for edge in edges
        )
        if exact or inexact:
            return cls(start, end - start, (edges[0], min(edges[1], float(old))))
        return cls.whole(old, new)

    @classmethod
    def whole(cls, old: int, new: int) -> _Window:
        """Return the window that is all of the axis."""
        return cls(0, new, (0.0, float(old)))


def _vertical_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Tell whether Pillow, at these sizes, resizes the height of an image before its width.

    It rounds to 8 bits in between, so the order decides bits. This is the rule in Pillow's
    ``ImagingResampleInner``; versions that always begin with the width satisfy it too.
    """
    return old[1] - new[1] > max(0, 2 * (old[0] - new[0]))


def _centre(size: int, crop: int) -> int:
    """Return where a central crop begins, rounded as torchvision does; negative is padding."""
    return -((crop - size) // 2) if crop > size else round((size - crop) / 2)


def _check_size(name: str, size: int | tuple[int, int] | None) -> None:
    values = size if isinstance(size, tuple) else () if size is None else (size,)
    fits = all(isinstance(value, int) and value > 0 for value in values)
    if not fits or (isinstance(size, tuple) and len(size) != 2):
        raise ValueError(f"{name} is a positive int, a pair (height, width) or None, not {size!r}")


def _picture(raw: RawImage, channels: int) -> Image.Image | NDArray[np.uint8]:
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
    """Say what a file is that Pillow does not take for an image, by its first bytes."""
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
    method = _TRANSPOSE.get(pillow.orientation(image))
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


def _bands(picture: Image.Image | NDArray[np.uint8]) -> list[Image.Image]:
    """Return what is resized: the image, or each channel of an array by itself.

    Pillow would multiply colour by alpha before it resizes RGBA; channels that are data of their
    own must not mix.
    """
    if isinstance(picture, Image.Image):
        return [picture]
    return [Image.fromarray(np.ascontiguousarray(picture[..., k])) for k in range(picture.shape[2])]


def _pixels(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Return an image of mode "L" or "RGB" as a writable array (h, w, channels)."""
    if channels == 3 and image.mode == "L":
        image = image.convert("RGB")
    array = np.array(image)
    return array if array.ndim == 3 else array[..., None]


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn every exception into a `DecodeError`, and keep Pillow's warnings from the user."""
    with pillow.quiet:
        try:
            yield
        except DecodeError:
            raise
        except Exception as error:
            # Pillow's plugins raise OSError, ValueError, SyntaxError, struct.error, EOFError,
            # IndexError, KeyError, NotImplementedError, MemoryError ... : no list is complete.
            raise DecodeError("decode", pillow.reason(error)) from error
