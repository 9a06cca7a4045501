"""The demo's images, and the study that ``make`` works on: they, or the user's own."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import click

from featcache.cli import options
from featcache.cli.study import Study, both_stages
from featcache.errors import ImageSetError
from featcache.images.image_set import ImageSet

DEMO = "elpv"

study_options = options.stacked(
    click.option("--images", help="Default: the demo's photographs of solar cells."),
    both_stages,
    options.path_option("--out", "FOLDER", "Folder of the results.", default="out"),
)


def open_study(images: str | None, out: Path, **settings: Any) -> Study:
    """Return the study of the user's images, or of the demo."""
    if images is not None:
        return Study(images, out, **settings)
    table, root = demo_table(out)
    return Study(str(root), out, title=DEMO, **settings | {"labels": settings["labels"] or table})


def demo_images(out: Path) -> ImageSet:
    """List the demo's images with their labels; see `demo_table`."""
    return ImageSet.from_csv(*demo_table(out))


def demo_table(out: Path) -> tuple[Path, Path]:
    """Write the table of the demo: 2,624 photographs of solar cells, defective or functional.

    The package ``elpv-dataset`` has a table of path, defect probability (0, 1/3, 2/3 or 1) and cell
    type, separated by blanks and without a header. A cell is *defective* where the probability is
    over one half, as in the paper that published the data (Deitsch et al., Solar Energy 185,
    2019).

    Parameters
    ----------
    out : Path
        Folder for the table of labels, ``elpv-labels.csv``.

    Returns
    -------
    table, root : Path
        The table, and the folder of the photographs.

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
    return table, root
