"""Peak memory of an extraction of few images and of ten times as many: it must not grow.

    python tests/benchmarks/memory.py [--images 2000]

Each extraction runs in a process of its own, over small synthetic JPEG files. The peak is that of
the process plus the largest of its decoding workers, as the operating system accounts for them.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

EXTRACT = """
import resource, sys
from featcache.backbone import Backbone
from featcache.extraction import extract
from featcache.images import ImageSet
backbone = Backbone.from_torchvision("mobilenet_v2", weights=None, image_size=64)
extract(ImageSet.from_folder(sys.argv[1]), backbone, sys.argv[2], device="cpu", batch_size=16)
whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
print(sum(resource.getrusage(who).ru_maxrss for who in whose) * unit / 1024**2)
"""


def make_images(root: Path, count: int) -> Path:
    """Write `count` different JPEG files of 80 x 64 pixels in two class folders."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (200, 200, 3), np.uint8)
    for k in range(count):
        folder = root / ("even", "odd")[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        top, left = divmod(k, 120)
        Image.fromarray(noise[top % 120 : top % 120 + 64, left : left + 80]).save(
            folder / f"{k:06d}.jpg", quality=60 + k // 14400
        )
    return root


def peak(images: Path, store: Path) -> float:
    """Return the peak memory of one extraction, in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", EXTRACT, str(images), str(store)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    """Print both peaks and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    count = parser.parse_args().images
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}")
    peaks = []
    for n in (count, 10 * count):
        with tempfile.TemporaryDirectory() as folder:
            peaks.append(peak(make_images(Path(folder) / "images", n), Path(folder) / "f.h5"))
        print(f"{n:,} images: peak {peaks[-1]:,.0f} MiB", flush=True)
    print(f"ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
