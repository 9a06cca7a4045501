"""Stage two: train and compare heads on a study's cached features. Run by `make classify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from featcache.cli.main import Command
from featcache.errors import MissingExtra
from pipelines.study import Study, study_options


@click.command(cls=Command)
@study_options
@click.option("--head", "heads", multiple=True, help="Left out: linear, svm, rbf-svm, forest.")
@click.option("--n-jobs", type=int, default=1, show_default=True)
def classify(heads: tuple[str, ...], n_jobs: int, **options: Any) -> None:
    """Train and compare heads; keep the best by cross-validation as a predictor."""
    from featcache.study.train import train_files

    study = Study(**options)
    result = train_files([study.store], study.predictor, heads=list(heads), n_jobs=n_jobs)
    click.echo(result.to_text())
    if result.up_to_date and study.leaderboard.exists() and study.report.exists():
        click.echo(f"leaderboard: {study.leaderboard}\nreport: {study.report}")
        return
    study.leaderboard.write_text(result.leaderboard.to_csv(), encoding="utf-8")
    click.echo(f"leaderboard: {study.leaderboard}")
    try:
        write_report(study, result)
    except MissingExtra as missing:
        click.echo(f"report: not written. {missing}", err=True)
    else:
        click.echo(f"report: {study.report}")


def write_report(study: Study, result: Any) -> None:
    """Write the page that shows the held-out part."""
    from featcache.report.data import write_report as write_page
    from featcache.store.store import FeatureStore
    from featcache.study.evaluate import evaluate

    store = FeatureStore.open(study.store)
    write_page(
        evaluate(result.predictor, store),
        study.report,
        store=store,
        images=study.image_set(),
        leaderboard=result.leaderboard,
        title=study.name,
    )


if __name__ == "__main__":
    classify()
