"""Draw the README's two pictures from what `make classify` wrote: the map and the leaderboard.

Type: .venv/bin/python tests/pictures.py [out]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import featcache as fc
from featcache.report.plots import plot_embedding, plot_leaderboard

PICTURES = Path(__file__).parent.parent / "notebooks" / "pictures"


def main(out: Path) -> None:
    """Write ``map.png`` and ``leaderboard.png``."""
    PICTURES.mkdir(exist_ok=True)
    store = fc.FeatureStore.open(out / "elpv-mobilenet_v2.h5")
    predictor = fc.Predictor.load(out / "elpv-mobilenet_v2.featcache")
    _, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    plot_embedding(store, method="tsne", ax=ax, s=8)
    ax.set_title(f"{len(store):,} photographs of solar cells: t-SNE of MobileNetV2's features")
    save(ax, "map.png")
    if predictor.leaderboard is not None:
        _, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
        plot_leaderboard(predictor.leaderboard, ax=ax)
        save(ax, "leaderboard.png")


def save(ax: plt.Axes, name: str) -> None:
    """Write a picture on white, so that it can be read on a dark page too."""
    assert ax.figure is not None
    ax.figure.savefig(PICTURES / name, dpi=130, facecolor="white")
    print(PICTURES / name)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
