"""What one study works on: its images, and where its files go. Both stages read it from here."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from featcache.errors import ImageSetError
from featcache.images.image_set import ImageSet

DEMO = "elpv"


@dataclass(frozen=True)
class Study:
    """Images, backbone and taps of a study, and the paths of its results.

    Parameters
    ----------
    images : str or None
        What the command line calls IMAGES; None is the demo.
    labels : Path or None
        CSV or TSV file with the columns ``id`` and ``label``.
    backbone, weights : str, str or None
        As for ``featcache extract``.
    layers : tuple of str
        Taps; empty is the default tap.
    out : Path
        Folder of the results.
    """

    images: str | None
    labels: Path | None
    backbone: str
    weights: str | None
    layers: tuple[str, ...]
    out: Path

    @property
    def name(self) -> str:
        """Name of the result files: images, backbone and taps."""
        images = DEMO if self.images is None else Path(self.images).expanduser().resolve().name
        weights = [] if self.weights is None else [Path(self.weights).stem]
        parts = [images, self.backbone, *weights, *self.layers]
        return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)

    @property
    def store(self) -> Path:
        """The file of features."""
        return self.out / f"{self.name}.h5"

    @property
    def predictor(self) -> Path:
        """The file of the best head."""
        return self.out / f"{self.name}.featcache"

    @property
    def leaderboard(self) -> Path:
        """The comparison of the heads, as CSV."""
        return self.out / f"{self.name}-leaderboard.csv"

    @property
    def report(self) -> Path:
        """The page that shows the results."""
        return self.out / f"{self.name}.html"

    def image_set(self) -> ImageSet:
        """List the images of the study."""
        if self.images is None:
            return demo_images(self.out)
        images = Path(self.images).expanduser()
        return ImageSet.open(str(images), labels_csv=self.labels)


def demo_images(out: Path) -> ImageSet:
    """List the demo: 2,624 photographs of solar cells, labelled defective or functional.

    The package ``elpv-dataset`` has a table of path, defect probability (0, 1/3, 2/3 or 1) and cell
    type, separated by blanks and without a header. A cell is *defective* where the probability is
    over one half, as in the paper that published the data (Deitsch et al., Solar Energy 185,
    2019).

    Parameters
    ----------
    out : Path
        Folder for the table of labels, ``elpv-labels.csv``.

    Raises
    ------
    ImageSetError
        Where the package is not installed.
    """
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise ImageSetError(
            "The demo's photographs are in the package 'elpv-dataset', which is not installed. "
            "Type: make install (or pip install 'featcache[demo]')"
        )
    root = Path(spec.origin).parent / "data"
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines() if line.strip()]
    out.mkdir(parents=True, exist_ok=True)
    table = out / "elpv-labels.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "probability", "type"])
        for path, probability, kind in rows:
            label = "defective" if float(probability) > 0.5 else "functional"
            writer.writerow([path, label, probability, kind])
    return ImageSet.from_csv(table, root)


def study_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that both stages take."""
    options = [
        click.option("--images", help="Left out: the demo's photographs of solar cells."),
        click.option("--labels", type=click.Path(path_type=Path), help="CSV with id and label."),
        click.option("--backbone", default="mobilenet_v2", show_default=True),
        click.option("--weights"),
        click.option("--layer", "layers", multiple=True, metavar="TAP"),
        click.option("--out", type=click.Path(path_type=Path), default="out", show_default=True),
    ]
    for option in reversed(options):
        command = option(command)
    return command
