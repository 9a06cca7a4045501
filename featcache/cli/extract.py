"""Stage one: ``featcache layers`` and ``featcache extract``."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import featcache
from featcache.cli import options
from featcache.cli.command import Command, print_json, say
from featcache.system.console import doing
from featcache.system.tables import printable, text_table


@click.command(cls=Command)
@click.argument("backbone")
@options.weights
@options.weights_key
@options.partial
@options.image_size
@options.json_output
def layers(backbone: str, weights: str | None, as_json: bool, **settings: Any) -> None:
    """List the layers of BACKBONE, their shapes and their cost.

    BACKBONE is a torchvision name (resnet50), timm/NAME, or package.module:callable: a function of
    your own, without arguments, that returns (torch.nn.Module, featcache.Preprocessing).

    The cost of a layer is its share of the operations of a forward pass. Any layer of the list may
    be given to "featcache extract" as --layer, alone or as LAYER[#K][:SIDE][:REDUCTION]: K counts
    the runs of a layer that runs several times, SIDE is input or output, and REDUCTION, which makes
    a vector of maps and tokens, is mean, max, flatten, map, cls or patches.
    """
    network = featcache.Backbone(backbone, weights=weights or "none", **settings)
    table = network.layers()
    if as_json:
        rows = [{"layer": values.pop("name"), **values} for values in map(asdict, table)]
        print_json({"backbone": backbone, "default_taps": list(network.taps), "layers": rows})
        return
    cells = [
        (
            row.name or "(network)",
            row.kind,
            " x ".join(map(str, row.output_shape or "-")),
            f"{row.parameters:,}",
            f"{row.share:.1%}",
        )
        for row in table
    ]
    header = ("layer", "kind", "output", "parameters", "cost")
    say(text_table(header, cells, right=(3, 4)))
    say(f"\nDefault tap: {', '.join(network.taps)}")


def listed(images: str | tuple[str, ...], settings: dict[str, Any]) -> featcache.ImageSet:
    """List IMAGES as the options say, and take those options out of `settings`."""
    listing = options.taken(settings, options.listing)
    labels = listing.pop("labels")
    context = click.get_current_context()
    for name in options.OF_LABELS if labels is None else ():
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is for a table of labels; name it with --labels."
            )
    opened = featcache.ImageSet.open  # loads libraries, which is said by itself
    with doing(None, "listing the images"):
        return opened(images, labels_csv=labels, **listing)


def extracted(
    images: featcache.ImageSet,
    path: Path,
    *,
    backbone: str,
    views: int,
    devices: tuple[str, ...],
    **settings: Any,
) -> featcache.FeatureStore:
    """Extract features; where the same command did so before, torch is not even imported.

    The arguments are the options of the network and of the extraction.
    """
    from featcache.extraction import reuse
    from featcache.networks.asked import as_asked

    network = {"network": backbone, **options.taken(settings, options.network)}
    network["weights"] = network["weights"] or "auto"
    augmentation = featcache.Augmentation(views=views) if views > 1 else None
    asked = as_asked(**network)
    before = reuse.finished_store(os.path.realpath(path))
    if asked and before and not settings["retry_failed"]:
        keys = ("precision", "store_dtype", "accept_varying", "drop_labels", "rehash")
        precision, dtype, varying, drop_labels, rehash = (settings[key] for key in keys)
        asked |= reuse.wanted(precision, dtype, augmentation, varying)
        store = reuse.up_to_date(before, images, drop_labels, rehash=rehash, asked=asked)
        if store is not None:
            return store
    return featcache.extract(
        images,
        featcache.Backbone(**network),
        path,
        device=devices[0] if len(devices) == 1 else (list(devices) or "auto"),
        augmentation=augmentation,
        progress=True,
        **settings,
    )


@click.command(cls=Command)
@click.argument("images", nargs=-1, required=True)
@options.output("STORE.h5", "Feature file to write, or to bring up to date.", required=True)
@options.backbone
@options.network
@options.listing
@options.extraction
@options.json_output
def extract(
    images: tuple[str, ...], output: Path, backbone: str, as_json: bool, **settings: Any
) -> None:
    """Compute the features of IMAGES into an HDF5 file.

    IMAGES is a folder (class folders give labels), files, a pattern of files, tars (WebDataset's,
    or of class folders; '{000..099}.tar' is a hundred), Parquet files of images as Hugging Face
    exports data sets, or a torchvision data set (CIFAR10, FashionMNIST, OxfordIIITPet, Flowers102)
    with --root. --labels gives labels to any of these.

    Run the same command again to resume after an interruption, or to bring the file up to date with
    a changed folder: only new content is computed.
    """
    found = listed(images, settings)
    if not as_json:
        say(found)
    store = extracted(found, output, backbone=backbone, **settings)
    if as_json:
        about = {"classes": found.classes, "ignored": found.ignored, "notes": found.notes}
        print_json({"store": str(output), **about, **store.extraction.to_dict()})
    else:
        say(f"{printable(str(output))}: {store.extraction}")
