"""Draw the README's picture, the map, from what `make features` wrote.

Type: .venv/bin/python tests/pictures.py [out]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import featcache as fc
from featcache.report.plots import plot_embedding

PICTURE = Path(__file__).parent.parent / "notebooks" / "pictures" / "map.png"


def main(out: Path) -> None:
    """Write ``map.png``, on white, so that it can be read on a dark page too."""
    store = fc.FeatureStore.open(out / "elpv-mobilenet_v2.h5")
    figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
    plot_embedding(store, method="tsne", ax=ax, s=8)
    ax.set_title(f"{len(store):,} photographs of solar cells: t-SNE of MobileNetV2's features")
    figure.savefig(PICTURE, dpi=130, facecolor="white")
    print(PICTURE)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
