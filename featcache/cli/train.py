"""Stage two: ``featcache train``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import featcache
from featcache.cli import options
from featcache.cli.command import Command, check_json, print_json, say, show
from featcache.finetuning.settings import SuffixSettings
from featcache.system.files import STDOUT, check_overwrite
from featcache.system.tables import printable


@click.command(cls=Command)
@options.path_argument("stores", nargs=-1, required=True)
@options.output("PREDICTOR", "Predictor file to write.", required=True)
@options.layer(
    "Layer of STORES to train on. May be repeated, to join several. Default: all of STORES, side "
    "by side."
)
@options.training
@options.suffix_training
@options.json_output
def train(
    stores: tuple[Path, ...],
    output: Path,
    layers: tuple[str, ...],
    head: tuple[str, ...],
    backbone: str | None,
    weights: str | None,
    weights_key: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train and compare classifiers on the features in STORES.

    The best by cross-validation is kept as PREDICTOR. Several stores are joined: one below the
    other if their features come from the same network and layers, else side by side, by the ids of
    their images. To compare networks and layers with each other, use "featcache compare".

    The table shows how far each head is from the best, image by image, with a 95 % interval, and
    the simplest head that is not clearly worse. The baseline calls every image by the commonest
    class.

    With --head suffix the rest of the network is trained, on maps that STORES keep (extract them
    with --layer LAYER:input:map). If it is interrupted, the same command resumes after the last
    finished epoch.
    """
    suffix = {name: settings.pop(name) for name in vars(SuffixSettings()) if name in settings}
    given = {name: value for name, value in suffix.items() if value is not None}
    if "suffix" not in head and (given or backbone or weights):
        name = next(iter(given), "backbone" if backbone else "weights")
        name = {"first": "from"}.get(name, name).replace("_", "-")
        raise click.UsageError(f"--{name} is for --head suffix.")
    network = None
    if backbone is not None:
        network = featcache.Backbone(backbone, weights=weights or "auto", weights_key=weights_key)
    elif weights is not None:  # of the network that the features are of
        from featcache.networks.identity import rebuild

        network = rebuild(featcache.FeatureStore.open(stores[0]).fingerprints[0], weights=weights)
    result = featcache.train_files(
        list(stores),
        output,
        head=list(head),
        layers=list(layers) or None,
        suffix=SuffixSettings(**given) if given else None,
        backbone=network,
        **settings,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        say(result.to_text())


@click.command(cls=Command)
@options.path_argument("stores", nargs=-1, required=True)
@options.layer(
    "Layer to compare, of each of STORES that has it. May be repeated. Default: all of STORES, "
    "each alone."
)
@click.option(
    "--head",
    multiple=True,
    metavar="HEAD",
    default=["linear"],
    help='Head to train on each layer, as for "featcache train". May be repeated.',
)
@options.output("FILE.csv", "Table to write; - is standard output.", text=True)
@click.option(
    "--test-size",
    type=options.share,
    help='Share of the images to leave out, those that "featcache train" holds out with the same '
    "seed. Default: what the split column holds out, or none.",
)
@options.comparing
@options.excel
@options.force
@options.json_output
def compare(
    stores: tuple[Path, ...],
    output: Path | None,
    force: bool,
    excel: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compare the networks and layers of STORES.

    Each is trained on alone, with the same folds, on the images that all STORES have. The best is
    first; the others show how far they are from it, with 95 % intervals that hold for all rows at
    once. "featcache train" joins STORES and layers into one classifier instead, and keeps it.
    """
    from featcache.study.compare import KIND, is_comparison

    check_json(as_json, output)
    if output is not None:
        check_overwrite(output, is_comparison, KIND, force=force)
    found = featcache.compare(list(stores), **settings)
    if output is not None:
        found.to_csv(output, force=force, excel=excel)
    written = "" if output in (None, STDOUT) else f"\n\ntable: {printable(str(output))}"
    shown = output if output == STDOUT else None
    show(as_json, found.to_dict(), f"{found}{written}", output=shown)
