"""How an image becomes what a network expects: resized, cropped, normalised.

A `Preprocessing` resizes and crops a picture exactly as the network's own transform does, stopping
before the conversion to floating point; `Preprocessing.normalize` does that for a whole batch, on
any device.

Pillow resizes. Its results are the definition of every torchvision and timm transform, so nothing
faster that differs by a bit (JPEG's own scaling, ``reducing_gap``, tensor kernels) is used. What is
saved is only what cannot change a bit: grey images are resized as one band, and no copy is made
that Pillow does not force.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, get_args

import numpy as np
from PIL import Image

from featcache.fingerprint import Record
from featcache.pixels.decode import RawImage, Truncated, decode_errors, picture, to_array
from featcache.pixels.views import Augmentation

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Interpolation: TypeAlias = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Fit: TypeAlias = Literal["stretch", "cover"]

_RESAMPLING = {name: Image.Resampling[name.upper()] for name in get_args(Interpolation)}


@dataclass(frozen=True, kw_only=True)
class Preprocessing(Record):
    """How an image becomes what a network expects. Data, not code: stored, compared, printed.

    Parameters
    ----------
    resize : int, (int, int) or None
        An int is the new length of the shorter side; a pair (height, width) is used as `fit`
        says; None leaves the size.
    crop : int, (int, int) or None
        Height and width of the central crop. An image that is smaller is padded with black.
        None needs a `resize` to a pair.
    interpolation : str
        "nearest", "box", "bilinear", "hamming", "bicubic" or "lanczos".
    mean, std : tuple of float
        Mean and standard deviation of each channel, of pixels between 0 and 1.
    channels : int
        1 is grey, 3 RGB; see `decode` for others.
    fit : str
        What `resize` to a pair does: "stretch" gives exactly this size, "cover" the smallest
        image of the same shape that covers it.
    bit_depth, truncated
        As for `decode`.

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
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channels: int = 3
    fit: Fit = "stretch"
    bit_depth: int | None = None
    truncated: Truncated = "refuse"

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            _check_size(name, getattr(self, name))
        words = {"interpolation": Interpolation, "fit": Fit, "truncated": Truncated}
        for name, kind in words.items():
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name} is one of {', '.join(get_args(kind))}, not {value!r}")
        if self.channels < 1:
            raise ValueError(f"channels is at least 1, not {self.channels}")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(
                f"mean and std need one value for each of {self.channels} channels, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if not (self.bit_depth is None or 1 <= self.bit_depth <= 31):
            raise ValueError(f"bit_depth is from 1 to 31, not {self.bit_depth}")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be positive, got {self.std}")
        if self.crop is None and not (isinstance(self.resize, tuple) and self.fit == "stretch"):
            raise ValueError("all outputs must have one size: give crop, or resize=(height, width)")

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what a call returns."""
        size = self.resize if self.crop is None else self.crop
        height, width = (size, size) if isinstance(size, int) else size or (0, 0)
        return self.channels, height, width

    def __call__(self, raw: RawImage, *, max_pixels: int | None = None) -> NDArray[np.uint8]:
        """Decode, resize and crop one image.

        Parameters
        ----------
        raw, max_pixels
            As for `decode`.

        Returns
        -------
        ndarray of uint8, shape (channels, h, w)
            The pixels that the network's own transform gives before it converts them to floating
            point. In memory the channels of a pixel lie side by side (the strides are those of an
            (h, w, channels) array), so that copying rows into a batch of that layout costs
            nothing extra and gives PyTorch's channels_last format. Of a strip that would be larger
            than Pillow's limit for decompression bombs once it is resized, only what the crop
            needs is computed, and a last bit may differ.

        Raises
        ------
        DecodeError
            As `decode` does.
        """
        with decode_errors():
            return self._finish([self._fit(band) for band in self._bands(raw, max_pixels)])

    def views(
        self, raw: RawImage, augmentation: Augmentation, id: str, *, max_pixels: int | None = None
    ) -> NDArray[np.uint8]:
        """Decode one image and draw augmented views of it.

        Parameters
        ----------
        raw, max_pixels
            As for `decode`.
        augmentation : Augmentation
            What the views look like, and how many there are. They are cropped from the whole
            image, at the size and with the interpolation of this preprocessing.
        id : str
            The image's id, which seeds the views.

        Returns
        -------
        ndarray of uint8, shape (views, channels, h, w)
            The views; the memory layout is that of a single image.

        Raises
        ------
        DecodeError
            As `decode` does.
        """
        size, resample = self.output_shape[1:], _RESAMPLING[self.interpolation]
        with decode_errors():
            bands = self._bands(raw, max_pixels)
            whole = bands[0].height, bands[0].width
            views = []
            for index in range(augmentation.views):
                view = augmentation.view(id, index, whole)
                pixels = self._finish([view(band, size, resample) for band in bands])  # (c, h, w)
                views.append(pixels.transpose(1, 2, 0))
            return np.stack(views).transpose(0, 3, 1, 2)  # (views, h, w, c) -> (views, c, h, w)

    def _bands(self, raw: RawImage, max_pixels: int | None) -> list[Image.Image]:
        """Return what is resized: the image, or each channel of an array by itself.

        Pillow would multiply colour by alpha before it resizes RGBA; channels that are data of
        their own must not mix.
        """
        found = picture(raw, self.channels, self.bit_depth, self.truncated, max_pixels)
        if isinstance(found, Image.Image):
            return [found]
        # (h, w, c) -> c times (h, w)
        return [Image.fromarray(np.ascontiguousarray(found[..., k])) for k in range(found.shape[2])]

    def _fit(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image, or one of its bands."""
        _, height, width = self.output_shape
        resample = _RESAMPLING[self.interpolation]
        size = self._resized_size(image.width, image.height)
        left, upper = _centre(size[0], width), _centre(size[1], height)
        huge = size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf)
        if huge and size != image.size:
            # A strip of 1 x 60,000 pixels would become 15 million pixels long before the crop.
            x, y = max(left, 0), max(upper, 0)
            right, lower = min(left + width, size[0]), min(upper + height, size[1])
            w, h = image.size
            part = x * w / size[0], y * h / size[1], right * w / size[0], lower * h / size[1]
            image = image.resize((right - x, lower - y), resample, part)
            left, upper = left - x, upper - y
        elif size != image.size:
            image = image.resize(size, resample)
        if (left, upper, *image.size) == (0, 0, width, height):
            return image
        return image.crop((left, upper, left + width, upper + height))  # black outside the image

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
        ratio = min(height / self.resize[0], width / self.resize[1])
        return max(1, round(width / ratio)), max(1, round(height / ratio))

    def _finish(self, bands: list[Image.Image]) -> NDArray[np.uint8]:
        """Return fitted bands as one array (channels, h, w) in channels-last memory."""
        if len(bands) == 1:
            return to_array(bands[0], self.channels).transpose(2, 0, 1)
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
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float32, device=batch.device)
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
        resize = self.resize
        if isinstance(resize, tuple):
            resize = round(size * resize[0] / height), round(size * resize[1] / width)
        elif resize is not None:
            resize = round(size * resize / min(height, width))
        return replace(self, resize=resize, crop=None if self.crop is None else size)

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
            If the configuration asks for what is not known here, such as the crop mode "border".
        """
        channels, height, width = data_config["input_size"]
        crop_pct = data_config.get("crop_pct") or 0.875
        scaled = math.floor(height / crop_pct), math.floor(width / crop_pct)
        mode = data_config.get("crop_mode") or "center"
        if mode == "border":
            raise ValueError(
                "crop_mode 'border' pads images with the mean colour, which is not done here. "
                "Hand over another one: preprocessing=Preprocessing(resize=256, crop=224)"
            )
        squash = mode == "squash"  # timm treats every other name as "center"
        square = scaled[0] == scaled[1]
        return cls(
            resize=scaled[0] if square and not squash else scaled,
            crop=height if height == width else (height, width),
            interpolation=data_config.get("interpolation") or "bilinear",
            mean=tuple(map(float, data_config["mean"])),
            std=tuple(map(float, data_config["std"])),
            channels=channels,
            fit="stretch" if square or squash else "cover",
        )


def _centre(size: int, crop: int) -> int:
    """Return where a central crop begins, rounded as torchvision does; negative is padding."""
    return -((crop - size) // 2) if crop > size else round((size - crop) / 2)


def _check_size(name: str, size: int | tuple[int, int] | None) -> None:
    values = size if isinstance(size, tuple) else () if size is None else (size,)
    fits = all(isinstance(value, int) and value > 0 for value in values)
    if not fits or (isinstance(size, tuple) and len(size) != 2):
        raise ValueError(f"{name} is a positive int, a pair (height, width) or None, not {size!r}")
