"""Stage two: train and compare heads on a study's cached features. Run by `make classify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from featcache.cli import Command
from pipelines.study import Study, study_options


@click.command(cls=Command)
@study_options
@click.option("--head", "heads", multiple=True, help="Left out: linear, svm, rbf-svm, forest.")
def classify(heads: tuple[str, ...], **options: Any) -> None:
    """Train and compare heads; keep the best by cross-validation as a predictor."""
    from featcache.training import study as train_study

    study = Study(**options)
    result = train_study([study.store], study.predictor, heads=list(heads), progress=True)
    click.echo(result.to_text())


if __name__ == "__main__":
    classify()
