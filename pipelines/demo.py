"""The demo's images, and the study that ``make`` works on: they, or the user's own."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import click

from featcache.cli import options
from featcache.cli.study import Study, network_options
from featcache.errors import ImageSetError
from featcache.images.image_set import ImageSet

DEMO = "elpv"

study_options = options.stacked(
    click.option("--images", help="Default: the demo's photographs of solar cells."),
    network_options,
    options.path_option("--out", "FOLDER", "Folder of the results.", default="out"),
)


def open_study(images: str | None, labels: Path | None, out: Path, **settings: Any) -> Study:
    """Return the study of the user's images, or of the demo."""
    if images is None:
        return Study(demo_images(out), DEMO, out, **settings)
    return Study.of(images, labels, out=out, **settings)


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
