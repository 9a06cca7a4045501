"""Both stages in one: ``featcache study``. The stages of ``make`` call the same functions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import featcache
from featcache.cli import options
from featcache.cli.command import Command
from featcache.cli.extract import extracted
from featcache.errors import MissingExtra

__all__ = ["Study", "head_options", "network_options", "study"]

network_options = options.stacked(
    options.labels,
    click.option(
        "--backbone", metavar="NETWORK", default="mobilenet_v2", help='As for "featcache extract".'
    ),
    options.weights,
    options.layer("Layer to read features from. May be repeated. Default: the pooling layer."),
)
head_options = options.stacked(options.heads, options.n_jobs)


@dataclass(frozen=True)
class Study:
    """Images, a network, and a folder for all that is made of them.

    Attributes
    ----------
    images : ImageSet
        The labelled images.
    title : str
        What the images are called in the names of the files.
    out : Path
        Folder of the results.
    backbone, weights : str, str or None
        As for ``featcache extract``.
    layers : tuple of str
        Taps; empty is the default tap.
    """

    images: featcache.ImageSet
    title: str
    out: Path
    backbone: str
    weights: str | None
    layers: tuple[str, ...]

    @classmethod
    def of(cls, images: str, labels: Path | None, **settings: Any) -> Study:
        """Return the study of a folder (or whatever the command line calls IMAGES)."""
        place = Path(images).expanduser()
        opened = featcache.ImageSet.open(str(place), labels_csv=labels)
        return cls(opened, place.resolve().name, **settings)

    def path(self, ending: str) -> Path:
        """Return the path of a result: images, backbone and taps in its name."""
        weights = [] if self.weights is None else [Path(self.weights).stem]
        parts = [self.title, self.backbone, *weights, *self.layers]
        return self.out / ("-".join(re.sub(r"[^\w.]+", "_", part) for part in parts) + ending)

    def extract(self) -> None:
        """Compute the features; nothing that has not changed is computed again."""
        network = {
            "network": self.backbone,
            "weights": self.weights or "auto",
            "layers": self.layers,
        }
        click.echo(self.images)
        store = extracted(self.images, network, self.path(".h5"))
        click.echo(f"{self.path('.h5')}: {store.extraction}")

    def classify(self, head: tuple[str, ...], n_jobs: int) -> None:
        """Compare heads, keep the best as a predictor, and write leaderboard and report."""
        result = featcache.train_files(
            [self.path(".h5")], self.path(".featcache"), head=list(head), n_jobs=n_jobs
        )
        click.echo(result.to_text())
        leaderboard, report = self.path("-leaderboard.csv"), self.path(".html")
        if not (result.up_to_date and leaderboard.exists() and report.exists()):
            leaderboard.write_text(result.leaderboard.to_csv(), encoding="utf-8")
            store = featcache.FeatureStore.open(self.path(".h5"))
            try:
                featcache.write_report(
                    featcache.evaluate(result.predictor, store),
                    report,
                    store=store,
                    images=self.images,
                    leaderboard=result.leaderboard,
                    title=report.stem,
                )
            except MissingExtra as missing:
                click.echo(f"leaderboard: {leaderboard}")
                click.echo(f"report: not written. {missing}", err=True)
                return
        click.echo(f"leaderboard: {leaderboard}\nreport: {report}")


@click.command(cls=Command)
@click.argument("images")
@options.path_option("--output", "FOLDER", "Folder for all results.", "-o", "out", required=True)
@network_options
@head_options
def study(
    images: str, labels: Path | None, head: tuple[str, ...], n_jobs: int, **settings: Any
) -> None:
    """Run both stages on IMAGES and write a report.

    FOLDER then holds the features (.h5), the best predictor (.featcache), the leaderboard
    (-leaderboard.csv) and a report (.html). Run the same command again to go on after an
    interruption, or after images have changed: only what is missing is computed.
    """
    made = Study.of(images, labels, **settings)
    made.extract()
    made.classify(head, n_jobs)
