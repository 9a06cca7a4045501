"""Stage two: train and compare heads on a study's cached features. Run by `make classify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from featcache.cli.command import Command
from pipelines.demo import open_study, study_options


@click.command(cls=Command)
@study_options
def classify(**options: Any) -> None:
    """Train and compare heads; keep the best by cross-validation as a predictor."""
    open_study(**options).classify()


if __name__ == "__main__":
    classify()
