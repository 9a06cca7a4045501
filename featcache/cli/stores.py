"""Feature files: ``featcache info``, ``verify``, ``audit``, ``similar`` and ``export``.

The first two describe predictors too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

import featcache
from featcache.cli import options
from featcache.cli.command import Command, check_json, show
from featcache.errors import CorruptStore
from featcache.system.files import STDOUT
from featcache.system.tables import counted, printable


def _opened(path: Path) -> featcache.FeatureStore | featcache.Predictor:
    """Open a feature file, or a predictor."""
    if path.suffix == ".featcache":
        return featcache.Predictor.load(path)
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
    show(as_json, opened.describe(), opened.to_text())


@click.command(cls=Command)
@options.path_argument("file")
@options.json_output
def verify(file: Path, as_json: bool) -> None:
    """Check FILE, features or a predictor, by its checksums."""
    opened = _opened(file)
    found, text = {"ok": True}, "a predictor, intact"  # it was checked when it was opened
    if isinstance(opened, featcache.FeatureStore):
        report = opened.verify()
        found, text = report.to_dict(), str(report)
    if as_json or found["ok"]:
        show(as_json, {"file": str(file), **found}, f"{printable(str(file))}: {text}")
    if not found["ok"]:
        raise CorruptStore(text)


@click.command(cls=Command)
@options.path_argument("store")
@options.output(
    "FILE.csv", "Table of findings to write; - is standard output.", text=True, required=True
)
@options.excel
@options.force
@options.json_output
def audit(store: Path, output: Path, as_json: bool, **how: bool) -> None:
    """List images whose label, copies or features look wrong.

    The strongest findings are printed, all of them are written. A label is doubted where a head
    that has not seen the image finds another class ten times as probable. Images are
    near-duplicates where they are more alike than chance explains among the images of STORE.
    """
    from featcache.study.audit import audit as audit_store

    findings = audit_store(featcache.FeatureStore.open(store))
    if not as_json or output != STDOUT:
        findings.to_csv(output, **how)
    values = {"store": str(store), "output": str(output), "images": findings.n_images}
    values |= {"wrong_labels": findings.wrong_labels, "head": findings.head}
    known = {name: getattr(findings, name) for name in ("accuracy", "accuracy_without_twins")}
    values |= {name: None if math.isnan(one) else one for name, one in known.items()}
    values |= {"findings": [vars(one) for one in findings], "notes": findings.notes}
    show(as_json, values, str(findings), output=output)


@click.command(cls=Command)
@options.path_argument("store")
@click.argument("images", metavar="IMAGE|ID...", nargs=-1, required=True)
@click.option(
    "--top-k", **options.count(), default=10, help="Number of images to list for each one."
)
@options.layer("Layer of STORE to compare. May be repeated. Default: all of STORE, side by side.")
@options.own_network("STORE")
@options.batch_size
@options.workers
@options.max_pixels
@options.device
@options.json_output
def similar(
    store: Path,
    images: tuple[str, ...],
    top_k: int,
    layers: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """List the images of STORE that look most like others.

    The others are ids of STORE, or image files or folders. What is both an id and a file is taken
    as the id; for the file, type ./FILE. Images are compared by the cosine of their features; those
    of files are computed by the network of STORE.
    """
    opened = featcache.FeatureStore.open(store)
    found = featcache.similar(opened, images, top_k, layers=list(layers) or None, **settings)
    values = {"store": str(store), "similar": [one.to_dict() for one in found]}
    show(as_json, values, "\n\n".join(map(str, found)))


@click.command(cls=Command)
@options.path_argument("store")
@options.output(
    "FILE",
    "File to write; its ending decides the format. - is CSV on standard output.",
    text=True,
    required=True,
)
@options.excel
@options.force
@options.json_output
def export(store: Path, output: Path, as_json: bool, **how: bool) -> None:
    """Write the features of STORE as .npz, .npy, .parquet or .csv."""
    from featcache.store.export import export_store

    check_json(as_json, output)
    opened = featcache.FeatureStore.open(store)
    export_store(opened, output, **how)
    n, d = len(opened), opened.width()
    values = {"store": str(store), "output": str(output), "images": n, "columns": d}
    show(as_json, values, f"{counted(n, 'image')}, {counted(d, 'column')}", output=output)
