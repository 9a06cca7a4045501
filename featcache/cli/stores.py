"""Feature files: ``featcache info``, ``verify``, ``audit`` and ``export``."""

from __future__ import annotations

from pathlib import Path

import click

import featcache
from featcache.cli import options
from featcache.cli.command import Command, print_json


@click.command(cls=Command)
@options.path_argument("store")
@options.json_output
def info(store: Path, as_json: bool) -> None:
    """Describe STORE: its images, classes, features and network.

    Images that could not be read are listed with their reasons.
    """
    opened = featcache.FeatureStore.open(store)
    if as_json:
        print_json(opened.describe())
    else:
        click.echo(opened.to_text())


@click.command(cls=Command)
@options.path_argument("store")
@options.json_output
def verify(store: Path, as_json: bool) -> None:
    """Check the features and tables of STORE by their checksums."""
    from featcache.errors import CorruptStore

    report = featcache.FeatureStore.open(store).verify()
    if as_json:
        print_json({"store": str(store), **report.to_dict()})
    elif report.ok:
        click.echo(f"{store}: {report}")
    if not report.ok:
        raise CorruptStore(str(report))


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
