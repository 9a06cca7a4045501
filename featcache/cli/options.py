"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from featcache.finetuning.settings import SCHEDULES, SuffixSettings
from featcache.system.files import check_folder

Decorator = Callable[[Any], Any]

DEVICES = "auto, cpu, cuda, cuda:1 or mps"
# Parameters of `ImageSet.open` with an option of the same name.
OF_LABELS = ("id_column", "label_column", "group_column", "split_column", "suffix")
LISTING = (*OF_LABELS, "root", "download", "exclude", "label_pattern")


def share(text: str) -> float:
    """Read a share, ``1%`` or ``0.01``, as a number from 0 to 1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a share; type 1% or 0.01") from None
    if not 0 <= value <= 1:
        raise click.BadParameter(f"{text!r} is not between 0% and 100%")
    return value


def size(text: str) -> int:
    """Read a number of bytes: ``500MB``, ``1GB``, ``2GiB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if match is None:
        raise click.BadParameter(f"{text!r} is not a size; type 500MB or 1GB")
    number, unit, binary = match.groups()
    power = "kmgt".find(unit) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def count(minimum: int = 1) -> dict[str, Any]:
    """Return the type of an option that is a whole number, as keywords of `click.option`."""
    return {"type": click.IntRange(min=minimum), "metavar": "N"}


def stacked(*options: Decorator) -> Decorator:
    """Return one decorator for several options, which help lists in this order."""

    def apply(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


def path_argument(name: str, **more: Any) -> Decorator:
    """Return an argument that is a path."""
    return click.argument(name, type=click.Path(path_type=Path), **more)


def path_option(name: str, metavar: str, help: str, *names: str, **more: Any) -> Decorator:
    """Return an option that is a path."""
    path = click.Path(path_type=Path)
    return click.option(name, *names, type=path, metavar=metavar, help=help, **more)


def output(metavar: str, help: str, *names: str, **more: Any) -> Decorator:
    """Return an option that names a file to write, whose folder is there."""
    names = names or ("-o", "--output")
    return path_option(names[0], metavar, help, *names[1:], callback=_in_a_folder, **more)


def _in_a_folder(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a folder that is missing before anything is computed: it may be a typing error."""
    if path is not None:
        check_folder(path)
    return path


def flag(name: str, help: str) -> Decorator:
    """Return an option without a value."""
    return click.option(name, is_flag=True, help=help)


def column(name: str, help: str, default: str | None = None) -> Decorator:
    """Return an option that names a column of the table of labels."""
    return click.option(name, metavar="NAME", default=default, help=help)


def layer(help: str) -> Decorator:
    """Return the option that names layers."""
    return click.option("--layer", "layers", multiple=True, metavar="TAP", help=help)


json_output = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
)
backbone = click.option(
    "--backbone",
    required=True,
    metavar="NETWORK",
    help='A torchvision name (resnet50), timm/NAME, or package.module:callable; see "featcache '
    'layers --help".',
)
weights = click.option(
    "--weights",
    metavar="WEIGHTS",
    help="Name of pretrained weights (IMAGENET1K_V2), a checkpoint file, or 'none' for random "
    "weights. Default: the newest of torchvision (of mobilenet_v2: IMAGENET1K_V1), or timm's own "
    "choice.",
)
weights_key = click.option(
    "--weights-key",
    metavar="NAME",
    help="Dictionary or prefix in the checkpoint to take, where several fit, such as teacher.",
)
image_size = click.option(
    "--image-size", **count(), help="Side of the square crop in pixels. Default: as for WEIGHTS."
)
labels = path_option("--labels", "FILE.csv", "CSV or TSV table of ids and labels of IMAGES.")
n_jobs = click.option(
    "--n-jobs", type=int, default=1, help="Number of fits at a time; -1 is one per core."
)
batch_size = click.option(
    "--batch-size", **count(), help="Images per forward pass. Default: 8 on a CPU, 128 with CUDA."
)
workers = click.option(
    "--workers",
    **count(0),
    help="Number of processes that decode images; 0 decodes in this one. Default: by processor.",
)
heads = click.option(
    "--head",
    "head",
    multiple=True,
    metavar="HEAD",
    help="linear, svm, rbf-svm, forest, boosting, ridge, knn, mlp, all, or suffix (the rest of the "
    "network). May be repeated.  [default: linear, svm, rbf-svm, forest]",
)
own_network = stacked(
    click.option(
        "--backbone",
        metavar="MODULE:CALLABLE",
        help="Import path of the network, if PREDICTOR was trained on a network of your own.",
    ),
    click.option(
        "--weights",
        metavar="FILE",
        help="Checkpoint of the network, if PREDICTOR was trained with weights of your own.",
    ),
)


def _suffix(one: Field[Any]) -> Decorator:
    """Return the option of one of the settings of ``--head suffix``, which shows its default."""
    name, default = one.name, one.default
    names = ("--from", name) if name == "first" else (f"--{name.replace('_', '-')}",)
    kinds: dict[str, dict[str, Any]] = {
        "first": {"metavar": "LAYER"},
        "lr": {"type": float},
        "schedule": {"type": click.Choice(SCHEDULES)},
        "validation": {"type": share},
        "device": {"metavar": "DEVICE"},
    }
    shown = (
        ""
        if default is None
        else f"  [{default:.0%}]"
        if name == "validation"
        else f"  [{default}]"
    )
    kind = kinds[name] if name in kinds else count(one.metadata["least"])
    return click.option(*names, help=f"suffix: {one.metadata['help']}{shown}", **kind)


suffix_training = stacked(
    *(_suffix(one) for one in fields(SuffixSettings) if one.metadata),
    click.option(
        "--backbone",
        metavar="MODULE:CALLABLE",
        help="suffix: import path of the network, if it is one of your own.",
    ),
    click.option(
        "--weights", metavar="FILE", help="suffix: checkpoint of the network, if it has one."
    ),
    weights_key,
)
