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
from featcache.system.files import STDOUT


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
@options.output(
    "FILE.csv", "Table of findings to write; - is standard output.", text=True, required=True
)
@options.json_output
def audit(store: Path, output: Path, as_json: bool) -> None:
    """List images whose label, copies or features look wrong."""
    from featcache.study.audit import audit as audit_store

    findings = audit_store(featcache.FeatureStore.open(store))
    if not as_json or output != STDOUT:
        findings.to_csv(output)
    if as_json:
        found = [vars(one) for one in findings]
        counts = {"images": findings.n_images, "findings": found, "notes": findings.notes}
        print_json({"store": str(store), "output": str(output), **counts})
    else:
        click.echo(f"{output}: {findings}", err=output == STDOUT)


@click.command(cls=Command)
@options.path_argument("store")
@options.output(
    "FILE",
    "File to write; its ending decides the format. - is CSV on standard output.",
    text=True,
    required=True,
)
@options.json_output
def export(store: Path, output: Path, as_json: bool) -> None:
    """Write the features of STORE as .npz, .npy, .parquet or .csv."""
    from featcache.store.export import export_store

    if as_json and output == STDOUT:
        raise click.UsageError("--json and -o - both write to standard output; name a file.")
    opened = featcache.FeatureStore.open(store)
    export_store(opened, output)
    images, columns = len(opened), opened.width()
    if as_json:
        written = {"store": str(store), "output": str(output)}
        print_json({**written, "images": images, "columns": columns})
    else:
        click.echo(f"{output}: {images:,} images, {columns:,} columns", err=output == STDOUT)
