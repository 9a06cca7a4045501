"""Train the linear head from a store on disk, and print what it took; run by ``heads.py``.

A process of its own without the rivals, so that its peak memory is ours.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedKFold

from featcache.heads.linear import LinearHead
from featcache.heads.rows import FeatureBlocks, TrainingRows
from featcache.heads.search import SearchOptions, search
from featcache.store.store import FeatureStore


def peak_megabytes() -> float:
    """Return the most memory this process has had, not what its parent had when it began."""
    if Path("/proc/self/status").exists():
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def train_from_disk(path: str, memory: int) -> None:
    """Run in a process of its own, whose peak memory is printed."""
    store = FeatureStore.open(path)
    y = np.asarray(store.labels)
    blocks = FeatureBlocks((len(store), store.width(None)), lambda rows: store.blocks(None, rows))
    before = peak_megabytes()
    begin = time.perf_counter()
    split = StratifiedKFold(5, shuffle=True, random_state=0)
    rows = TrainingRows.check(blocks, y, list(split.split(np.zeros(len(y)), y)), None)
    # The same penalty a row whatever their number, so that the problems are equally hard.
    Cs = [c / len(y) for c in (0.3, 3.0, 30.0)]
    options = SearchOptions(memory=memory)
    found = search(LinearHead(options, treatments=("standard",), Cs=Cs, refine=False), rows)
    seconds = time.perf_counter() - begin
    print(f"{seconds} {peak_megabytes()} {before} {found.score}")


if __name__ == "__main__":
    train_from_disk(sys.argv[1], 1_000_000_000)
