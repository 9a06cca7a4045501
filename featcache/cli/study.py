"""Both stages in one: ``featcache study``. The stages of ``make`` call the same functions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

import featcache
from featcache.cli import options
from featcache.cli.command import Command, say
from featcache.cli.extract import extracted, listed
from featcache.errors import MissingExtra
from featcache.system.files import check_overwrite, is_table, replacing

both_stages = options.stacked(
    click.option(
        "--backbone", metavar="NETWORK", default="mobilenet_v2", help='As for "featcache extract".'
    ),
    options.network,
    options.listing,
    options.extraction,
    options.training,
)
# What makes other features and stands in the names of the files, unless it is as always.
_NAMED = {
    "weights_key": None,
    "image_size": None,
    "bit_depth": None,
    "truncated": None,
    "views": 1,
    "precision": "float32",
    "store_dtype": "float32",
    "accept_varying": False,
}


class Study:
    """Images, the options of both stages, and a folder for all that is made of them.

    Parameters
    ----------
    images : str
        What ``featcache extract`` calls IMAGES.
    out : Path
        Folder of the results.
    title : str, optional
        What the images are called in the names of the files. Left out: as the folder.
    **settings
        Values of the options `both_stages`.
    """

    def __init__(
        self, images: str, out: Path, *, title: str | None = None, **settings: Any
    ) -> None:
        place = Path(images).expanduser()
        self.training = options.taken(settings, options.training)
        self.images = listed(str(place), settings)
        self.extraction = settings
        weights = settings["weights"] and Path(settings["weights"]).stem
        parts = [title or place.resolve().name, settings["backbone"], weights, *settings["layers"]]
        parts += [f"{k}_{settings[k]}" for k, usual in _NAMED.items() if settings[k] != usual]
        self.stem = out / "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts if part)

    def path(self, ending: str) -> Path:
        """Return the path of a result: images, network and taps in its name."""
        return self.stem.with_name(self.stem.name + ending)

    def extract(self) -> None:
        """Compute the features; nothing that has not changed is computed again."""
        say(self.images)
        store = extracted(self.images, self.path(".h5"), **self.extraction)
        say(f"{self.path('.h5')}: {store.extraction}")

    def classify(self) -> None:
        """Compare heads, keep the best as a predictor, and write leaderboard and report."""
        leaderboard, report = self.path("-leaderboard.csv"), self.path(".html")
        own = leaderboard, _is_leaderboard, "a leaderboard of featcache"
        check_overwrite(*own)
        result = featcache.train_files(self.path(".h5"), self.path(".featcache"), **self.training)
        say(result.to_text())
        if not (result.up_to_date and leaderboard.exists() and report.exists()):
            with replacing(*own, text=True) as file:
                file.write(result.leaderboard.to_csv())
            store = featcache.FeatureStore.open(self.path(".h5"))
            if not result.leaderboard.n_test:
                say(f"leaderboard: {leaderboard}\nreport: not written, as no image was held out")
                return
            try:
                featcache.write_report(
                    # As the leaderboard has it: without --group it scores images of such groups.
                    featcache.evaluate(
                        result.predictor, store, other_groups=not self.training["group"]
                    ),
                    report,
                    store=store,
                    images=self.images,
                    leaderboard=result.leaderboard,
                    title=report.stem,
                )
            except MissingExtra as missing:
                say(f"leaderboard: {leaderboard}")
                say(f"report: not written. {missing}", err=True)
                return
        say(f"leaderboard: {leaderboard}\nreport: {report}")


def _is_leaderboard(path: Path) -> bool:
    return is_table(path, lambda names: names[:3] == ["head", "params", "features"], {})


@click.command(cls=Command)
@click.argument("images")
@options.path_option("--output", "FOLDER", "Folder for all results.", "-o", "out", required=True)
@both_stages
def study(**settings: Any) -> None:
    """Run both stages on IMAGES and write a report.

    FOLDER then holds the features (.h5), the best predictor (.featcache), the leaderboard
    (-leaderboard.csv) and a report (.html). Run the same command again to go on after an
    interruption, or after images have changed: only what is missing is computed.
    """
    made = Study(**settings)
    made.extract()
    made.classify()
