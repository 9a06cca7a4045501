"""Peak memory of an extraction of 2,000 and of 20,000 images: it does not grow with their number.

The images are drawn when they are asked for, so that nothing but the extraction takes memory. Each
size runs in a fresh process.

    python tests/benchmarks/memory.py [--images 2000 20000] [--workers 0]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


class Drawn:
    """A data set of grey noise, made image by image."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((100, 75)), index % 10


def extraction(count: int, workers: int | None) -> dict[str, Any]:
    """Extract in this process and return its peak in MB."""
    import featcache as fc

    images = fc.ImageSet.from_dataset(Drawn(count))
    backbone = fc.Backbone("mobilenet_v2", weights=None, image_size=64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.h5"
        # A batch size of one's own: what is measured to choose one depends on the length of a run.
        store = fc.extract(
            images, backbone, path, device="cpu", batch_size=32, workers=workers, compile=False
        )
        assert len(store) == count
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000
    return {"images": count, "peak": own, "workers": children}


def measured(count: int, workers: int | None) -> dict[str, Any]:
    """Extract in a fresh process."""
    command = [sys.executable, __file__, "--one", str(count)]
    if workers is not None:
        command += ["--workers", str(workers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> None:
    """Print the peaks and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, nargs=2, default=(2_000, 20_000))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(extraction(options.one, options.workers)))
        return
    few, many = (measured(count, options.workers) for count in options.images)
    for result in (few, many):
        print(f"{result['images']:>7,} images: {result['peak']:.0f} MB")
    print(f"ratio {many['peak'] / few['peak']:.3f}")


if __name__ == "__main__":
    main()
