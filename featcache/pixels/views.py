"""Seeded random views of an image: the crops, flips and rotations of fine-tuning, repeatable."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from featcache.fingerprint import Record


class View(NamedTuple):
    """One draw of an `Augmentation` for an image of one size.

    Attributes
    ----------
    angle : float
        Rotation in degrees, counter-clockwise.
    box : tuple of int
        Left, upper, right and lower edge of the crop, in pixels of the rotated image.
    flip : bool
        Whether the crop is mirrored, left to right.
    """

    angle: float
    box: tuple[int, int, int, int]
    flip: bool

    def __call__(
        self, image: Image.Image, size: tuple[int, int], resample: Image.Resampling
    ) -> Image.Image:
        """Rotate, crop, resize to `size` (height, width) and flip an image."""
        if self.angle:
            image = image.rotate(self.angle, resample=Image.Resampling.BILINEAR)
        image = image.crop(self.box).resize(size[::-1], resample)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image


@dataclass(frozen=True, kw_only=True)
class Augmentation(Record):
    """Random views: rotation, random resized crop, horizontal flip, in this order.

    What a view looks like depends on `random_state`, the image's id and the number of the view
    alone: not on the order of the images, on the workers, or on the views beside it. The crop is
    drawn as ``torchvision.transforms.RandomResizedCrop`` draws it.

    Parameters
    ----------
    flip : float
        Probability of a horizontal flip.
    scale : tuple of float
        Smallest and largest share of the image's area that a crop covers.
    ratio : tuple of float
        Smallest and largest ratio of a crop's width to its height.
    rotation : float
        Largest rotation in degrees, to either side. The corners become black.
    random_state : int
        Seed.
    views : int
        Number of views of each image.

    Raises
    ------
    ValueError
        If a value is outside its range.
    """

    flip: float = 0.5
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotation: float = 15.0
    random_state: int = 0
    views: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is a probability between 0 and 1, not {self.flip!r}")
        for name, largest in (("scale", 1.0), ("ratio", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= largest:
                raise ValueError(f"{name} is (low, high) with 0 < low <= high, not {(low, high)!r}")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation is between 0 and 180 degrees, not {self.rotation!r}")
        if self.views < 1:
            raise ValueError(f"views is at least 1, not {self.views!r}")

    def view(self, id: str, index: int, size: tuple[int, int]) -> View:
        """Draw view number `index` of image `id`.

        Parameters
        ----------
        id : str
            The image's id in its `ImageSet`.
        index : int
            Number of the view, from 0.
        size : tuple of int
            Height and width of the image.

        Returns
        -------
        View
            What is to be done with the image.
        """
        seed = hashlib.sha256(f"{self.random_state}\0{index}\0{id}".encode()).digest()
        # Only .random() is used: Python promises its sequence for ever, numpy's may change.
        draw = random.Random(int.from_bytes(seed)).random
        angle = self.rotation * (2 * draw() - 1)
        flip = draw() < self.flip
        return View(angle, self._box(draw, *size), flip)

    def _box(self, draw: Any, height: int, width: int) -> tuple[int, int, int, int]:
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = height * width * _between(draw(), *self.scale)
            ratio = math.exp(_between(draw(), low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, upper = int(draw() * (width - w + 1)), int(draw() * (height - h + 1))
                return left, upper, left + w, upper + h
        return self._central_box(height, width)

    def _central_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the largest central crop within `ratio`: for images too long for any draw."""
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        left, upper = (width - w) // 2, (height - h) // 2
        return left, upper, left + w, upper + h


def _between(u: float, low: float, high: float) -> float:
    return low + (high - low) * u
