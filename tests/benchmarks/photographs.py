"""Photographs of about 500 x 375 pixels, cut from those that scikit-image and scikit-learn ship.

Each is a crop of another place, at another size, mirrored or not, a little brighter or darker, with
the grain of a sensor, and saved as a JPEG with camera-like settings (quality 90 to 97, 4:2:0). The
files come out at about 90 kB, as photographs of that size do, so decoding and resizing cost what
they cost in life.

    python tests/benchmarks/photographs.py FOLDER [COUNT]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

GRAIN = 7.0  # standard deviation, in grey levels
SOURCES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)


def sources() -> Iterator[tuple[str, Image.Image]]:
    """Yield the photographs' names and pixels."""
    import skimage
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.__file__).parent / "data"
    for name in SOURCES:
        yield Path(name).stem, Image.open(folder / name).convert("RGB")
    samples = load_sample_images()
    for name, pixels in zip(samples.filenames, samples.images, strict=True):
        yield Path(name).stem, Image.fromarray(pixels)


def make(folder: Path, count: int = 1000, *, random_state: int = 0) -> Path:
    """Write `count` JPEGs into class folders, one a source; existing ones are kept.

    Returns
    -------
    Path
        The folder.
    """
    rng = np.random.default_rng(random_state)
    photographs = list(sources())
    grain = rng.normal(0, GRAIN, (960, 960, 3)).astype(np.float32)
    for k in range(count):
        name, photograph = photographs[k % len(photographs)]
        target = folder / name / f"{k:05d}.jpg"
        image, quality = _varied(photograph, grain, rng), int(rng.integers(90, 98))
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            image.save(target, quality=quality, subsampling="4:2:0")
    return folder


def _varied(photograph: Image.Image, grain: np.ndarray, rng: np.random.Generator) -> Image.Image:
    width, height = sorted(rng.normal((500, 375), 20).astype(int).clip(300, 640), reverse=True)
    if rng.random() < 0.25:
        width, height = height, width
    # A crop of at most the photograph, of the shape wanted, brought to the size wanted.
    largest = min(photograph.width / width, photograph.height / height)
    scale = largest * rng.uniform(0.6, 1.0)
    w, h = int(width * scale), int(height * scale)
    left = int(rng.integers(0, photograph.width - w + 1))
    upper = int(rng.integers(0, photograph.height - h + 1))
    image = photograph.resize(
        (int(width), int(height)), Image.Resampling.BICUBIC, (left, upper, left + w, upper + h)
    )
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.8, 1.2)))
    y, x = rng.integers(0, 256, 2)
    grained = np.asarray(image) + grain[y : y + image.height, x : x + image.width]
    return Image.fromarray(grained.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    made = make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
    sizes = [path.stat().st_size for path in made.rglob("*.jpg")]
    print(f"{len(sizes)} photographs of {np.mean(sizes) / 1000:.0f} kB in {made}")
