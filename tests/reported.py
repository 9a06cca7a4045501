"""A small evaluation with its store and images, whose names try to be markup."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.images.image_set import ImageSet
from featcache.report.data import write_report
from featcache.results.evaluation import Evaluation, Figures
from featcache.results.intervals import Score
from featcache.results.leaderboard import Leaderboard, LeaderboardRow
from featcache.store.store import FeatureStore
from tests.labelled import clusters, make_store

CLASSES = ('"><script>document.title="owned"</script>', "a & b's", "tulip")
EVIL_ID = "<img src=x onerror=document.title='owned'></script>"


@dataclass(frozen=True)
class Case:
    evaluation: Evaluation
    store: FeatureStore
    images: ImageSet
    leaderboard: Leaderboard

    def report(self, path: Path, **more: Any) -> None:
        """Write a report of all there is, with two maps."""
        write_report(
            self.evaluation,
            path,
            store=self.store,
            images=self.images,
            leaderboard=self.leaderboard,
            maps=("pca", "tsne"),
            **more,
        )


def case(folder: Path, n: int = 60) -> Case:
    """Return n images of three classes, every other one evaluated, two of these wrong."""
    y = [CLASSES[i % 3] for i in range(n)]
    ids = [f"{i:05d} {EVIL_ID}.png" for i in range(n)]
    X = clusters(y, spread=0.5)
    X[3] = X[0] * 1.001  # an evaluated image, and one trained on, that are nearly equal
    store = make_store(folder / "flowers.h5", X, y, ids=ids)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 40, 50, 3), dtype=np.uint8)
    images = ImageSet.from_arrays(pixels, labels=y, ids=ids)
    return Case(evaluation(store), store, images, leaderboard())


def evaluation(store: FeatureStore) -> Evaluation:
    """Return predictions of every other image of a store: right but for the first two."""
    chosen = store.select(np.arange(0, len(store), 2))
    y_true = np.searchsorted(np.array(sorted(CLASSES)), chosen.labels)
    assert sorted(CLASSES) == list(CLASSES)
    proba = np.full((len(chosen), 3), 0.05)
    said = y_true.copy()
    said[:2] = (said[:2] + 1) % 3
    proba[np.arange(len(chosen)), said] = 0.9
    proba[2::7] = 0.3, 0.3, 0.3
    proba[np.arange(2, len(chosen), 7), said[2::7]] = 0.4
    return Evaluation(chosen.ids, y_true, proba, CLASSES, notes=("30 images are left out",))


def leaderboard() -> Leaderboard:
    def figures(value: float, half: float) -> Figures:
        score = Score(value, value - half, value + half)
        return Figures(
            30, score, score, score, log_loss=0.3, ece=0.05, classwise_ece=0.04, brier=0.1
        )

    def row(head: str, cv: float, held: float, *notes: str) -> LeaderboardRow:
        cross, held_out = figures(cv, 0.02), figures(held, 0.05)
        scores = cv, cross, cross.accuracy, held_out
        measured = (1.5, 0.25, 30.0, 12.0)
        return LeaderboardRow(head, {"C": 10.0}, "pool (8 columns)", *scores, *measured, notes)

    said = ("svm was trained on <20> of 30 images.", "few images")
    rows = (row("svm", 0.9, 0.88, *said), row("linear", 0.86, 0.89))
    best = rows[0].cv_corrected
    return Leaderboard(rows, best, "accuracy", 30, 30, 0, "5 folds", ("as a whole",))
