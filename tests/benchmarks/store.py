"""How fast features are written, checked and read: ``python tests/benchmarks/store.py``.

200,000 rows of 2,048 float16 (0.8 GB), in batches of 64 as an extraction writes them. Every figure
is gigabytes of stored features a second; "write" includes the checksums, and "write, on the
disk" the final fsync. "copy" is the yardstick: the same bytes with ``os.pwrite`` alone.

``--nearest FOLDER`` measures instead how fast `FeatureStore.nearest` is on a million rows of 512
float32 (2 GB, written to FOLDER and deleted), beside one numpy pass over the same array, mapped;
``FOLDER`` may be ``/dev/shm``. Memory is that of the process which only searches.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # converts types; here, so that importing it is not timed
from synthetic import FINGERPRINT, TAP, Images

from featcache.store import disk
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter


def timed(what: str, size: int, call: Callable[[], Any]) -> Any:
    """Run, print gigabytes a second, by the clock and of processor time, and return the result."""
    begin, processor = time.perf_counter(), time.process_time()
    result = call()
    clock, processor = time.perf_counter() - begin, time.process_time() - processor
    print(
        f"{what:30s} {size / clock / 1e9:7.2f} GB/s   {size / processor / 1e9:7.2f} GB a CPU s",
        flush=True,
    )
    return result


FLOATS = dataclasses.replace(FINGERPRINT, store_dtype="float32")
SEARCH = """
import resource, sys, time
import numpy as np
from featcache.store.store import FeatureStore
import torch
store = FeatureStore.open(sys.argv[1])
queries = np.random.default_rng(1).standard_normal((int(sys.argv[2]), store.width()), np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(5):
    if sys.argv[3] == "pass":
        mapped = store._mapped(next(iter(store.taps)))
    clock, processor = time.perf_counter(), time.process_time()
    mapped @ queries[0] if sys.argv[3] == "pass" else store.nearest(queries)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    print(f"  {sys.argv[3]:8} {len(queries):4} queries {clock:7.3f} s, {processor:7.3f} s of CPU")
    sys.stdout.flush()
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"  peak {most / 1e6:.2f} GB, {before / 1e6:.2f} GB of it before the search")
"""


def nearest(folder: str) -> None:
    """Compare the search for nearest rows with one pass over the mapped array."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        path, n, d, batch = Path(place) / "a.h5", 1_000_000, 512, 10_000
        rng = np.random.default_rng(0)
        with FeatureWriter.begin(path, Images(n).tables, {TAP: (d,)}, fingerprint=FLOATS) as writer:
            for start in range(0, n, batch):
                sha256 = rng.integers(0, 256, (batch, 32), dtype=np.uint8)
                values = rng.standard_normal((batch, d), np.float32)
                writer.write(np.arange(start, start + batch), {TAP: values}, sha256=sha256)
            writer.finish()
        for queries, what in ((1, "pass"), (1, "nearest"), (1, "pass"), (10, "nearest")):
            subprocess.run([sys.executable, "-c", SEARCH, path, str(queries), what], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--nearest", metavar="FOLDER")
    options = parser.parse_args()
    if options.nearest:
        nearest(options.nearest)
        return
    torch.set_num_threads(1)
    n, d, batch = options.rows, options.width, options.batch
    rng = np.random.default_rng(0)
    # a new array each batch, as a network gives; 32 of them, more than the processor's cache
    pool = [rng.random((batch, d), np.float32) for _ in range(32)]
    halves = [x.astype(np.float16) for x in pool]
    sha256 = rng.integers(0, 256, (batch, 32), dtype=np.uint8)
    size = n * d * 2
    starts = range(0, n, batch)

    def fill(writer: FeatureWriter, arrays: list[np.ndarray]) -> None:
        for k, start in enumerate(starts):
            rows = np.arange(start, min(start + batch, n))
            values = arrays[k % len(arrays)][: len(rows)]
            writer.write(rows, {TAP: values}, sha256=sha256[: len(rows)])

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5"

        def opened() -> FeatureWriter:
            return FeatureWriter.begin(path, Images(n).tables, {TAP: (d,)}, fingerprint=FINGERPRINT)

        with (Path(folder) / "raw").open("wb") as raw:
            disk.reserve(raw.fileno(), 0, size, zeros=True)

            def copy() -> None:
                for k, start in enumerate(starts):
                    os.pwrite(raw.fileno(), halves[k % 32][: n - start].data, start * d * 2)

            timed("copy (pwrite alone)", size, copy)
        (Path(folder) / "raw").unlink()

        with opened() as writer:
            timed("write float32 as float16", size, lambda: fill(writer, pool))
        with opened() as writer:

            def write_and_sync() -> None:
                fill(writer, halves)
                writer.commit()

            timed("write float16", size, lambda: fill(writer, halves))
            timed("write float16, on the disk", size, write_and_sync)
        with timed("resume (check all rows)", size, opened) as writer:
            store: FeatureStore = timed("finish", size, writer.finish)
        assert timed("verify", size, store.verify).ok
        block = np.ones((8192, d), np.float32)
        half = store.select(np.flatnonzero(rng.random(n) < 0.5))
        timed("blocks as float32", size, lambda: sum(1 for _ in store.blocks(out=block)))
        timed(
            "blocks of every other row", size // 2, lambda: sum(1 for _ in half.blocks(out=block))
        )


if __name__ == "__main__":
    main()
