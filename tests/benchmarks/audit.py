"""How good an audit is where the truth is known: ``python tests/benchmarks/audit.py STORE TRUTH``.

STORE holds features of images with the labels that people gave and with a split column. TRUTH is a
CSV file with the right labels and the pairs that are known: ``id,label,near_duplicate_of,kind``.
What is printed was measured after the rules were made, and chose none of them.
"""

from __future__ import annotations

import csv
import resource
import sys
import time
from pathlib import Path

import numpy as np

from featcache.store.store import FeatureStore
from featcache.study.audit import audit


def main(path: str, truth: str) -> None:
    with Path(truth).open(newline="") as file:
        rows = list(csv.DictReader(file))
    store = FeatureStore.open(path)
    clock, processor = time.perf_counter(), time.process_time()
    found = audit(store)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{found}\n{clock:.0f} s, {processor:.0f} s of processor, {peak:.2f} GB")
    pairs = [
        (frozenset((Path(one.id).name, Path(one.other_id).name)), one.split != one.other_split)
        for one in found.of("near-duplicate")
    ]
    print(f"pairs: {len(pairs)}, of them across splits {sum(across for _, across in pairs)}")
    for kind in sorted({row["kind"] for row in rows} - {""}):
        known = [{row["id"], row["near_duplicate_of"]} for row in rows if row["kind"] == kind]
        print(f"  {kind}: {sum(pair in known for pair, _ in pairs)} of {len(known)}")
    right = {row["id"]: row["label"] for row in rows}
    names = [Path(id).name for id in store.ids]
    wrong = sum(right[id] != label for id, label in zip(names, store.labels, strict=True))
    hits = np.array([right[Path(one.id).name] != one.label for one in found.of("label")])
    print(
        f"labels: {len(hits)} flagged, {wrong} wrong; precision {hits.mean():.3f}, recall "
        f"{hits.sum() / wrong:.3f}, {hits[:100].sum()} of the first 100 wrong"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
