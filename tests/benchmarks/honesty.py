"""Whether figures are what they say: ``python tests/benchmarks/honesty.py [SECTION ...]``.

Every section simulates predictions or features whose truth is known, or takes data whose held-out
part is judged by scikit-learn's measures, and prints what the package says of them. Seeds are part
of the lines; the same versions print the same figures. ``--seeds`` shortens a run.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from synthetic import FINGERPRINT, TAP

from featcache import FeatureStore, train
from featcache.results.intervals import Score, rate_scores
from featcache.store.writer import FeatureWriter

HEADS = ("linear", "svm", "ridge", "knn", "rbf-svm")


class Rows:
    """Labels and groups of n images, as a store keeps them."""

    def __init__(self, y: Sequence[str], groups: Sequence[str] | None = None) -> None:
        names = {"ids": [f"{i:06d}.jpg" for i in range(len(y))], "labels": list(y)}
        if groups is not None:
            names["groups"] = list(groups)
        self.tables = {name: np.array(x, np.dtypes.StringDType()) for name, x in names.items()}


def store_of(
    folder: Path, X: np.ndarray, y: Sequence[str], groups: Sequence[str] | None = None
) -> FeatureStore:
    """Write features (n, d) and labels to a store, and open it."""
    rows, images = np.arange(len(y)), Rows(y, groups)
    path = folder / f"{len(list(folder.iterdir()))}.h5"
    hashes = np.random.default_rng(len(y)).integers(0, 256, (len(y), 32), dtype=np.uint8)
    shapes = {TAP: X.shape[1:]}
    with FeatureWriter.begin(path, images.tables, shapes, fingerprint=FINGERPRINT) as writer:
        writer.write(rows, {TAP: X}, sha256=hashes, size=rows + 100, stamp=rows)
        return writer.finish()


def covers(score: Score, truth: float) -> bool:
    """Whether an interval holds the truth."""
    return score.low is not None and score.low <= truth <= score.high


def said(name: str, scores: Sequence[Score], truth: float) -> None:
    """Print mean, coverage and width of scores of one kind."""
    held = np.mean([covers(one, truth) for one in scores])
    width = np.mean([one.high - one.low for one in scores])
    print(
        f"  {name:24} mean {np.mean(scores):.3f} (truth {truth:.3f})  "
        f"coverage {held:.3f}  width {width:.3f}",
        flush=True,
    )


def choice(seeds: int) -> None:
    """Labels of chance, exactly balanced: the best of many settings has .5."""
    print(f"\nthe best of five heads on labels of chance, n = 100, 64 columns, {seeds} seeds")
    rows: dict[str, list[Score]] = {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        y = rng.permutation(np.repeat(["a", "b"], 50))
        X = rng.normal(size=(100, 64)).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            board = train(
                store_of(Path(folder), X, y), head=HEADS, random_state=seed, progress=False
            ).leaderboard
        for row in board:
            rows.setdefault(f"{row.head}, corrected", []).append(row.cv_corrected)
        rows.setdefault("best of all, corrected", []).append(board.best_corrected)
        rows.setdefault("best of all, as it is", []).append(board[0].cv.accuracy)
    for name, scores in rows.items():
        said(name, scores, 0.5)


def guessed(rng: np.random.Generator, y: np.ndarray, share: Any, k: int) -> np.ndarray:
    """Return right guesses with a probability, and otherwise another class."""
    return np.where(rng.random(len(y)) < share, y, (y + rng.integers(1, k, len(y))) % k)


def images(seeds: int) -> None:
    """Intervals over images, of classes of many sizes."""
    print(f"\nintervals over images, {seeds} seeds")
    cases = [
        ("998 + 2 images", [998, 2], [1.0, 0.8]),
        ("100 classes of 5", [5] * 100, [0.99] * 100),
        ("100 classes of 5", [5] * 100, [0.9] * 100),
        ("50 classes of 4", [4] * 50, [0.6] * 50),
        ("2 classes of 15", [15] * 2, [0.9] * 2),
        ("2 classes of 500", [500] * 2, [0.97] * 2),
        ("900 + 100 images", [900, 100], [0.97, 0.7]),
    ]
    for name, counts, recall in cases:
        rng, k = np.random.default_rng(0), len(counts)
        y = np.repeat(np.arange(k), counts)
        share = np.array(recall)
        found = [rate_scores(y, guessed(rng, y, share[y], k), k, None) for _ in range(seeds)]
        print(f" {name}, recall {sorted(set(recall))}")
        said("accuracy", [one[0] for one in found], float(share[y].mean()))
        said("balanced accuracy", [one[1] for one in found], float(share.mean()))
        if len(set(recall)) == 1:
            said("macro F1", [one[2] for one in found], recall[0])


def groups(seeds: int) -> None:
    """Intervals over groups that differ, of 5 to 59 images each."""
    print(f"\nintervals of accuracy over groups (beta-binomial), {seeds} seeds")
    for count in (5, 6, 8, 10, 20, 50):
        for mean, alike in ((0.5, 2.0), (0.8, 4.0), (0.9, 10.0), (0.95, 10.0), (0.98, 20.0)):
            rng, found = np.random.default_rng(count), []
            for _ in range(seeds):
                of = np.repeat(np.arange(count), rng.integers(5, 60, count))
                share = rng.beta(mean * alike, (1 - mean) * alike, count)[of]
                y = rng.integers(0, 2, len(of))
                found.append(rate_scores(y, guessed(rng, y, share, 2), 2, of)[0])
            said(f"{count} groups, spread {alike:g}", found, mean)


SECTIONS = {"choice": choice, "images": images, "groups": groups}
SEEDS = {"choice": 200, "images": 300, "groups": 1000}


def main() -> None:
    """Run the sections that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", nargs="*", choices=[*SECTIONS, []], help="left out: all")
    parser.add_argument("--seeds", type=int, help="seeds of each section")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(machine("numpy", "scipy", "scikit-learn", "torch"))
    for name in arguments.section or SECTIONS:
        SECTIONS[name](arguments.seeds or SEEDS[name])


if __name__ == "__main__":
    main()
