"""Stage one: ``featcache layers`` and ``featcache extract``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

import featcache
from featcache.cli import options
from featcache.cli.command import Command, print_json
from featcache.system.tables import text_table


@click.command(cls=Command)
@click.argument("backbone")
@options.weights
@options.image_size
@options.json_output
def layers(backbone: str, weights: str | None, image_size: int | None, as_json: bool) -> None:
    """List the layers of BACKBONE, their shapes and their cost.

    BACKBONE is a torchvision name (resnet50), timm/NAME, or package.module:callable: a function of
    your own, without arguments, that returns (torch.nn.Module, featcache.Preprocessing).

    The cost of a layer is its share of the operations of a forward pass. Any layer of the list may
    be given to "featcache extract" as --layer, alone or as LAYER[#K][:SIDE][:REDUCTION]: K counts
    the runs of a layer that runs several times, SIDE is input or output, and REDUCTION, which makes
    a vector of maps and tokens, is mean, max, flatten, map, cls or patches.
    """
    network = featcache.Backbone(backbone, weights=weights or "none", image_size=image_size)
    table = network.layers()
    if as_json:
        rows = [
            {
                "layer": row.name,
                "kind": row.kind,
                "output_shape": row.output_shape,
                "parameters": row.parameters,
                "share": row.share,
            }
            for row in table
        ]
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
    click.echo(text_table(header, cells, right=(3, 4)))
    click.echo(f"\nDefault tap: {', '.join(network.taps)}")


def extracted(
    images: featcache.ImageSet,
    network: dict[str, Any],
    path: Path,
    *,
    precision: str = "float32",
    store_dtype: str = "float32",
    augmentation: featcache.Augmentation | None = None,
    accept_varying: bool = False,
    retry_failed: bool = False,
    drop_labels: bool = False,
    rehash: bool = False,
    **options: Any,
) -> featcache.FeatureStore:
    """Extract features; where the same command did so before, torch is not even imported.

    The arguments are those of `featcache.extract`, and `network` those of `featcache.Backbone`.
    """
    from featcache.extraction import reuse
    from featcache.networks.asked import as_asked

    asked = as_asked(**network)
    if asked is not None and not retry_failed:
        asked |= {
            "precision": precision,
            "store_dtype": store_dtype,
            "augmentation": augmentation and augmentation.to_dict(),
            "varying": accept_varying,
        }
        store = reuse.up_to_date(
            os.path.realpath(path), images, drop_labels, rehash=rehash, asked=asked
        )
        if store is not None:
            return store
    return featcache.extract(
        images,
        featcache.Backbone(**network),
        path,
        precision=precision,
        store_dtype=store_dtype,
        augmentation=augmentation,
        accept_varying=accept_varying,
        retry_failed=retry_failed,
        drop_labels=drop_labels,
        rehash=rehash,
        **options,
    )


@click.command(cls=Command)
@click.argument("images", nargs=-1, required=True)
@options.output("STORE.h5", "Feature file to write, or to bring up to date.", required=True)
@options.backbone
@options.weights
@options.weights_key
@options.flag("--partial", "Accept a checkpoint that leaves layers before TAP at random.")
@options.layer(
    'Layer to read features from, such as layer4:max; see "featcache layers --help". May be '
    "repeated. Default: the pooling layer, or the input of the network's head."
)
@options.image_size
@click.option(
    "--bit-depth",
    type=click.IntRange(1, 31),
    metavar="N",
    help="Bits that grey images of more than 8 bits fill, such as 12. Default: as files declare.",
)
@click.option(
    "--max-pixels",
    **options.count(),
    help="Number of pixels that an image may have. Default: 178,956,970.",
)
@click.option(
    "--views", **options.count(), default=1, help="Number of augmented views of each image."
)
@options.labels
@options.column(
    "--id-column", "Column of that table with the file name of each image.", default="id"
)
@click.option(
    "--suffix",
    default="",
    show_default=False,
    help="Ending that the file names in that table lack, such as .jpg.",
)
@options.column("--label-column", "Column of that table with the label.", default="label")
@options.column(
    "--group-column", "Column of that table with the group, such as a patient or a site."
)
@options.column(
    "--split-column", "Column of that table with a given split: train, validation or test."
)
@click.option(
    "--label-pattern",
    metavar="REGEX",
    help="Take labels from file names: what the group named label matches, as in "
    "'(?P<label>[a-z]+)[.][0-9]+' for cat.0.jpg.",
)
@options.flag("--drop-labels", "Remove the labels of an earlier run where IMAGES have none now.")
@click.option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Leave out the images whose path below the folder matches, such as '*_mask.png', or that "
    "lie in a folder which does. May be repeated.",
)
@options.path_option("--root", "FOLDER", "Folder of a torchvision data set.")
@options.flag("--download", "Download the torchvision data set if it is not in --root.")
@options.batch_size
@options.workers
@click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="DEVICE",
    help=f"{options.DEVICES}. May be repeated to use several, with a process for each.  "
    "[default: auto]",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    help="Format of the forward pass.",
)
@click.option(
    "--store-dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    help="Format of the stored features.",
)
@click.option("--compile/--no-compile", default=None, help="Use torch.compile.  [default: no]")
@click.option(
    "--on-error",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    help="Leave out an image that cannot be read and record the reason, or stop at it.",
)
@click.option(
    "--max-failures",
    type=options.share,
    help="Fail if a larger share of the images than this cannot be read.  "
    "[default: 1%, at least 5 images, under half]",
)
@options.flag(
    "--allow-removal",
    "Accept that over half of the images of an earlier run are not there any more.",
)
@options.flag("--rehash", "Read the contents of all images, whatever their files' times say.")
@options.flag("--retry-failed", "Try the images again that failed in an earlier run.")
@options.flag(
    "--accept-varying",
    "Accept a network whose features of one image change from run to run or with its batch.",
)
@options.json_output
def extract(
    images: tuple[str, ...],
    output: Path,
    backbone: str,
    weights: str | None,
    labels: Path | None,
    devices: tuple[str, ...],
    views: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compute the features of IMAGES into an HDF5 file.

    IMAGES is a folder (class folders give labels), files, a pattern of files, tars (WebDataset's,
    or of class folders; '{000..099}.tar' is a hundred), or a torchvision data set (CIFAR10,
    FashionMNIST, OxfordIIITPet, Flowers102) with --root. --labels gives labels to any of these.

    Run the same command again to resume after an interruption, or to bring the file up to date with
    a changed folder: only new content is computed.
    """
    listing = {name: settings.pop(name) for name in options.LISTING}
    network = {
        name: settings.pop(name)
        for name in ("layers", "image_size", "partial", "weights_key", "bit_depth", "max_pixels")
    }
    context = click.get_current_context()
    for name in options.OF_LABELS:
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and labels is None:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is for a table of labels; name it with --labels."
            )
    found = featcache.ImageSet.open(images, labels_csv=labels, **listing)
    if not as_json:
        click.echo(found)
    store = extracted(
        found,
        {"network": backbone, "weights": weights or "auto", **network},
        output,
        device=devices[0] if len(devices) == 1 else (list(devices) or "auto"),
        augmentation=featcache.Augmentation(views=views) if views > 1 else None,
        progress=True,
        **settings,
    )
    if as_json:
        listed = {"classes": found.classes, "ignored": found.ignored, "notes": found.notes}
        print_json({"store": str(output), **listed, **store.extraction.to_dict()})
    else:
        click.echo(f"{output}: {store.extraction}")
