"""Stage one: images through a frozen backbone into HDF5. Run by `make features`."""

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
def features(**options: Any) -> None:
    """Compute the features of a study's images; nothing that has not changed is computed again."""
    open_study(**options).extract()


if __name__ == "__main__":
    features()
