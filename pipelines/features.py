"""Stage one: images through a frozen backbone into HDF5. Run by `make features`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from featcache.cli.main import Command
from pipelines.study import Study, study_options


@click.command(cls=Command)
@study_options
def features(**options: Any) -> None:
    """Compute the features of a study's images; nothing that has not changed is computed again."""
    from featcache.extraction.extract import extract
    from featcache.networks.backbone import Backbone

    study = Study(**options)
    images = study.image_set()
    backbone = Backbone(study.backbone, weights=study.weights or "auto", layers=study.layers)
    store = extract(images, backbone, study.store)
    click.echo(f"{study.store}: {store.extraction}")


if __name__ == "__main__":
    features()
