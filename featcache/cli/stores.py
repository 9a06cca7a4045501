"""Feature files: ``featcache info``, ``verify``, ``audit`` and ``export``.

The first two describe predictors too.
"""

from __future__ import annotations

from pathlib import Path

import click

import featcache
from featcache.cli import options
from featcache.cli.command import Command, print_json
from featcache.errors import CorruptStore


def _opened(path: Path) -> featcache.FeatureStore | featcache.Predictor:
    """Open a feature file, or a predictor."""
    try:
        return featcache.FeatureStore.open(path)
    except CorruptStore:
        from featcache.predictor.file import is_predictor

        if not is_predictor(path):
            raise
        return featcache.Predictor.load(path)


@click.command(cls=Command)
@options.path_argument("file")
@options.json_output
def info(file: Path, as_json: bool) -> None:
    """Describe FILE: features or a predictor.

    Of features these are the images, classes and network, and the images that could not be read
    with their reasons; of a predictor the head, classes, network and figures.
    """
    opened = _opened(file)
    if as_json:
        print_json(opened.describe())
    else:
        click.echo(opened.to_text())


@click.command(cls=Command)
@options.path_argument("file")
@options.json_output
def verify(file: Path, as_json: bool) -> None:
    """Check FILE, features or a predictor, by its checksums."""
    opened = _opened(file)
    if isinstance(opened, featcache.FeatureStore):
        report = opened.verify()
        found, text, problems = report.to_dict(), str(report), "\n".join(report.problems)
    else:  # all of it was checked when it was opened
        found, text, problems = {"ok": True}, "a predictor, intact", ""
    if as_json:
        print_json({"file": str(file), **found})
    elif not problems:
        click.echo(f"{file}: {text}")
    if problems:
        raise CorruptStore(problems)


@click.command(cls=Command)
@options.path_argument("store")
@options.output("FILE.csv", "Table of findings to write.", required=True)
def audit(store: Path, output: Path) -> None:
    """List images whose label, copies or features look wrong."""
    from featcache.study.audit import audit as audit_store

    findings = audit_store(featcache.FeatureStore.open(store))
    findings.to_csv(output)
    click.echo(f"{output}: {findings}")


@click.command(cls=Command)
@options.path_argument("store")
@options.output("FILE", "File to write; its ending decides the format.", required=True)
def export(store: Path, output: Path) -> None:
    """Write the features of STORE as .npz, .npy, .parquet or .csv."""
    from featcache.store.export import export_store

    export_store(featcache.FeatureStore.open(store), output)
    click.echo(str(output))
