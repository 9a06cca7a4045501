"""Options that several commands share, and the types of their values."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from featcache.finetuning.settings import SCHEDULES, SuffixSettings
from featcache.system.files import STDOUT, check_folder

Decorator = Callable[[Any], Any]

DEVICES = "auto, cpu, cuda, cuda:1 or mps"
OF_LABELS = ("id_column", "label_column", "group_column", "split_column", "keep_columns", "suffix")


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


def taken(settings: dict[str, Any], stack: Decorator) -> dict[str, Any]:
    """Take the values of a stack's options out of the settings of a command."""

    def command() -> None: ...

    options = stack(command).__click_params__
    return {option.name: settings.pop(option.name) for option in options}


def path_argument(name: str, **more: Any) -> Decorator:
    """Return an argument that is a path."""
    return click.argument(name, type=click.Path(path_type=Path), **more)


def path_option(name: str, metavar: str, help: str, *names: str, **more: Any) -> Decorator:
    """Return an option that is a path."""
    path = click.Path(path_type=Path)
    return click.option(name, *names, type=path, metavar=metavar, help=help, **more)


def output(metavar: str, help: str, *names: str, text: bool = False, **more: Any) -> Decorator:
    """Return an option that names a file to write, whose folder is there, or - for text."""

    def check(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
        """Refuse a folder that is missing before anything is computed: it may be a mistyped one."""
        if path == STDOUT and not text:
            raise click.BadParameter("standard output takes only text; name a file.")
        if path is not None and not path.name:
            raise click.BadParameter("name a file.")
        if path is not None:
            check_folder(path)
        return path

    names = names or ("-o", "--output")
    return path_option(names[0], metavar, help, *names[1:], callback=check, **more)


def flag(name: str, help: str) -> Decorator:
    """Return an option without a value."""
    return click.option(name, is_flag=True, help=help)


def column(name: str, help: str, default: str | None = None) -> Decorator:
    """Return an option that names a column of the table of labels."""
    return click.option(name, metavar="NAME", default=default, help=help)


def choice(name: str, words: list[str], help: str) -> Decorator:
    """Return an option that is one of some words, by default the first."""
    return click.option(name, type=click.Choice(words), default=words[0], help=help)


def layer(help: str) -> Decorator:
    """Return the option that names layers."""
    return click.option("--layer", "layers", multiple=True, metavar="TAP", help=help)


force = flag("--force", "Replace the file to write even if featcache did not write it.")
excel = flag(
    "--excel",
    "Write CSV for spreadsheets: with the mark of UTF-8, and with ' before texts that they would "
    "run as formulas, which begin with = + - or @. Not the default, as it changes ids such as -1.",
)
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
partial = flag("--partial", "Accept a checkpoint that leaves layers before TAP at random.")
image_size = click.option(
    "--image-size", **count(), help="Side of the square crop in pixels. Default: as for WEIGHTS."
)
batch_size = click.option(
    "--batch-size", **count(), help="Images per forward pass. Default: 8 on a CPU, 128 with CUDA."
)
workers = click.option(
    "--workers",
    **count(0),
    help="Number of processes that decode images; 0 decodes in this one. Default: by processor.",
)
max_pixels = click.option(
    "--max-pixels", **count(), help="Number of pixels that an image may have. Default: 178,956,970."
)
# Arguments of `Backbone`, but for the name.
network = stacked(
    weights,
    weights_key,
    partial,
    layer(
        'Layer to read features from, such as layer4:max; see "featcache layers --help". May be '
        "repeated. Default: the pooling layer, or the input of the network's head."
    ),
    image_size,
    click.option(
        "--bit-depth",
        type=click.IntRange(1, 31),
        metavar="N",
        help="Bits that grey images of more than 8 bits fill, such as 12. Default: as files "
        "declare.",
    ),
    click.option(
        "--truncated",
        type=click.Choice(["refuse", "accept"]),
        help="Refuse images that are cut off before their end, or read what there is of them.  "
        "[default: refuse]",
    ),
)
# Arguments of `ImageSet.open`.
listing = stacked(
    path_option(
        "--labels",
        "FILE.csv",
        "Table of ids and labels of IMAGES: CSV, TSV, or what Excel saves as CSV UTF-8.",
    ),
    column("--id-column", "Column of that table with the file name of each image.", default="id"),
    click.option(
        "--suffix",
        default="",
        show_default=False,
        help="Ending that the file names in that table lack, such as .jpg.",
    ),
    column("--label-column", "Column of that table with the label.", default="label"),
    column("--group-column", "Column of that table with the group, such as a patient or a site."),
    column("--split-column", "Column of that table with a given split: train, validation or test."),
    click.option(
        "--keep-columns",
        multiple=True,
        metavar="NAME",
        help='Further column of that table to keep, such as a camera, for "featcache evaluate '
        '--by". May be repeated. Like groups, it is dropped where a later run has labels but does '
        "not name it.",
    ),
    click.option(
        "--label-pattern",
        metavar="REGEX",
        help="Take labels from file names: what the group named label matches, as in "
        "'(?P<label>[a-z]+)[.][0-9]+' for cat.0.jpg.",
    ),
    click.option(
        "--exclude",
        multiple=True,
        metavar="GLOB",
        help="Leave out the images whose path below the folder matches, such as '*_mask.png', or "
        "that lie in a folder which does. May be repeated.",
    ),
    path_option("--root", "FOLDER", "Folder of a torchvision data set."),
    flag("--download", "Download the torchvision data set if it is not in --root."),
)
# Arguments of `featcache.extract`.
extraction = stacked(
    click.option("--views", **count(), default=1, help="Number of augmented views of each image."),
    flag("--drop-labels", "Remove the labels of an earlier run where IMAGES have none now."),
    batch_size,
    workers,
    max_pixels,
    click.option(
        "--device",
        "devices",
        multiple=True,
        metavar="DEVICE",
        help=f"{DEVICES}. May be repeated to use several, with a process for each.  "
        "[default: auto]",
    ),
    choice("--precision", ["float32", "bfloat16", "float16"], "Format of the forward pass."),
    choice("--store-dtype", ["float32", "float16"], "Format of the stored features."),
    click.option("--compile/--no-compile", default=None, help="Use torch.compile.  [default: no]"),
    choice(
        "--on-error",
        ["skip", "fail"],
        "Leave out an image that cannot be read and record the reason, or stop at it.",
    ),
    click.option(
        "--max-failures",
        type=share,
        help="Fail if a larger share of the images than this cannot be read.  "
        "[default: 1%, at least 5 images, under half]",
    ),
    flag(
        "--allow-removal",
        "Accept that over half of the images of an earlier run are not there any more.",
    ),
    flag("--rehash", "Read the contents of all images, whatever their files' times say."),
    flag("--retry-failed", "Try the images again that failed in an earlier run."),
    flag(
        "--accept-varying",
        "Accept a network whose features of one image change from run to run or with its batch.",
    ),
)
# What heads are compared under, in `train` and `compare`.
comparing = stacked(
    click.option(
        "--cv",
        **count(2),
        default=5,
        help="Number of folds of the cross-validation; fewer where classes have fewer images.",
    ),
    click.option(
        "--min-images",
        **count(),
        default=1,
        help="Leave out, and list, classes of fewer images (with --group: of fewer groups).",
    ),
    flag("--group", "Keep the images of a group on one side of every split."),
    flag(
        "--drop-crossing-groups",
        "With --group: leave images out of training whose group is in the validation or test part "
        "of the split column too, instead of refusing that column.",
    ),
    flag(
        "--nested",
        "Choose the settings anew inside every fold: a figure that their choice does not flatter, "
        "for several times the time.",
    ),
    click.option(
        "--scoring",
        metavar="NAME",
        help="Metric that decides, by scikit-learn's name. Default: accuracy, with --class-weight "
        "balanced_accuracy.",
    ),
    click.option(
        "--class-weight",
        type=click.Choice(["balanced"]),
        help="Give rare classes the same total weight as frequent ones.",
    ),
    click.option(
        "--memory",
        type=size,
        help="Memory to stay within, such as 1GB. Where features do not fit, linear, svm and ridge "
        "read them in blocks, and the others take a random part of each class. Default: what is "
        "free.",
    ),
    click.option(
        "--n-jobs",
        type=int,
        default=1,
        help="Number of fits of rbf-svm and boosting, and of trees of forest, at a time; -1 is one "
        "per core. The other heads use all cores for each fit.",
    ),
    click.option(
        "--random-state",
        type=click.IntRange(min=0),
        default=0,
        help="Seed of everything that is drawn.",
    ),
)
# Arguments of `train_files`, but for the layers and the suffix.
training = stacked(
    click.option(
        "--head",
        "head",
        multiple=True,
        metavar="HEAD",
        help="linear, svm, rbf-svm, forest, boosting, ridge, knn, mlp, all, or suffix (the rest of "
        "the network); knn compares by cosine. May be repeated.  "
        "[default: linear, svm, rbf-svm, forest]",
    ),
    click.option(
        "--test-size",
        type=share,
        help="Share of the images to hold out and score once; 0 trains on all of them. Default: as "
        "the split column says, or 25%.",
    ),
    comparing,
)
device = click.option("--device", metavar="DEVICE", default="auto", help=f"{DEVICES}.")


def own_network(file: str) -> Decorator:
    """Return the options that name the network of a file's features, where it is one's own."""
    return stacked(
        click.option(
            "--backbone",
            metavar="MODULE:CALLABLE",
            help=f"Import path of the network, if {file} is of a network of your own.",
        ),
        click.option(
            "--weights",
            metavar="FILE",
            help=f"Checkpoint of the network, if {file} is of weights of your own.",
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
    kind = kinds[name] if name in kinds else count(one.metadata["least"])
    usual = f"{default:.0%}" if name == "validation" else default
    shown = "" if default is None else f"  [{usual}]"
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
