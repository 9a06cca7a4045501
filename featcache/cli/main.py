"""The `featcache` command: flags become arguments, errors become messages.

Nothing is computed here. Heavy imports stand inside the commands, or happen at the first use of
one of featcache's public names, so that ``featcache --help`` is instant. Results go to standard
output, progress and messages to standard error; ``--json`` prints one JSON object and nothing
else. Exit status: 0 done, 1 a `FeatcacheError` or an end by Ctrl-C or SIGTERM ("Aborted!") where
nothing is kept, 2 wrong usage, 75 interrupted with everything committed (run the same command again
to resume).
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import click
from click import option

import featcache
from featcache.cli import options
from featcache.cli.options import count
from featcache.errors import FeatcacheError
from featcache.finetuning.settings import SuffixSettings
from featcache.system.console import sigterm_as_ctrl_c
from featcache.system.tables import text_table
from featcache.version import __version__

PRECISION = click.Choice(["float32", "bfloat16", "float16"])
STORED = click.Choice(["float32", "float16"])
FORMAT = click.Choice(["csv", "json"])


class Message(click.ClickException):
    """A `FeatcacheError` as the command line shows it: one message, no traceback."""

    def __init__(self, error: FeatcacheError) -> None:
        super().__init__(str(error))
        self.kind = type(error).__name__
        self.exit_code = error.exit_status  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        """Print ``Kind: message`` on standard error."""
        kind = click.style(f"{self.kind}:", fg="red", bold=True)
        click.echo(f"{kind} {self.format_message()}", err=True, color=_colour(sys.stderr))


class Command(click.Command):
    """A command that turns what featcache raises into messages."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a `FeatcacheError` becomes a `Message`, SIGTERM click's "Aborted!"."""
        try:
            with sigterm_as_ctrl_c():
                return super().invoke(ctx)
        except FeatcacheError as error:
            raise Message(error) from error


class Commands(Command, click.Group):
    """A group of such commands; a warning is one line, without a place in the code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of this module, which is that of the work."""
        return list(self.commands)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    title = click.style("Warning:", fg="yellow", bold=True)
    click.echo(f"{title} {message}", err=True, color=_colour(sys.stderr))


def _colour(stream: Any) -> bool:
    import os

    return "NO_COLOR" not in os.environ and stream.isatty()


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
    epilog="""\b
Examples:
  featcache extract flowers -o flowers.h5 --backbone resnet50
  featcache train flowers.h5 -o flowers.featcache
  featcache predict flowers.featcache new_photos
""",
)
@click.version_option(__version__, prog_name="featcache")
def main() -> None:
    """Compute image features once with a frozen network; train on them in seconds."""


@main.command()
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
        _print_json({"backbone": backbone, "default_taps": list(network.taps), "layers": rows})
        return
    cells = [
        (
            row.name or "(network)",
            row.kind,
            _shape(row.output_shape),
            f"{row.parameters:,}",
            f"{row.share:.1%}",
        )
        for row in table
    ]
    header = ("layer", "kind", "output", "parameters", "cost")
    click.echo(text_table(header, cells, right=(3, 4)))
    click.echo(f"\nDefault tap: {', '.join(network.taps)}")


@main.command()
@click.argument("images")
@options.output("STORE.h5", "Feature file to write, or to bring up to date.", required=True)
@options.backbone
@options.weights
@options.flag("--partial", "Accept a checkpoint that fits in part, and record which part.")
@options.layer(
    'Layer to read features from, such as layer4:max; see "featcache layers --help". May be '
    "repeated. Default: the pooling layer, or the input of the network's head."
)
@options.image_size
@option("--views", **count(), default=1, help="Number of augmented views of each image.")
@options.path_option(
    "--labels", "FILE.csv", "CSV or TSV table of ids and labels; IMAGES is a folder."
)
@options.column(
    "--id-column", "Column of that table with the file name of each image.", default="id"
)
@option(
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
@options.path_option("--root", "FOLDER", "Folder of a torchvision data set.")
@options.flag("--download", "Download the torchvision data set if it is not in --root.")
@options.batch_size
@options.workers
@option(
    "--device",
    "devices",
    multiple=True,
    metavar="DEVICE",
    help=f"{options.DEVICES}. May be repeated to use several, with a process for each.  "
    "[default: auto]",
)
@option("--precision", type=PRECISION, default="float32", help="Format of the forward pass.")
@option("--store-dtype", type=STORED, default="float32", help="Format of the stored features.")
@option("--compile/--no-compile", default=None, help="Use torch.compile.  [default: no]")
@option(
    "--on-error",
    type=click.Choice(["skip", "fail"]),
    default="skip",
    help="Leave out an image that cannot be read and record the reason, or stop at it.",
)
@option(
    "--max-failures",
    type=options.share,
    default="1%",
    help="Fail if a larger share of the images than this cannot be read.",
)
@options.flag("--retry-failed", "Try the images again that failed in an earlier run.")
@options.json_output
def extract(
    images: str,
    output: Path,
    backbone: str,
    weights: str | None,
    partial: bool,
    layers: tuple[str, ...],
    image_size: int | None,
    labels: Path | None,
    devices: tuple[str, ...],
    views: int,
    as_json: bool,
    **settings: Any,
) -> None:
    """Compute the features of IMAGES into an HDF5 file.

    IMAGES is a folder (class folders give labels), a folder with --labels, a torchvision data set
    (CIFAR10, FashionMNIST, OxfordIIITPet, Flowers102) with --root, or WebDataset tars.

    Run the same command again to resume after an interruption, or to bring the file up to date with
    a changed folder: only new content is computed.
    """
    listing = {name: settings.pop(name) for name in options.LISTING}
    context = click.get_current_context()
    for name in options.OF_LABELS:
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and labels is None:
            raise click.UsageError(
                f"--{name.replace('_', '-')} is for a table of labels; name it with --labels."
            )
    store = featcache.extract(
        featcache.ImageSet.open(images, labels_csv=labels, **listing),
        featcache.Backbone(
            backbone,
            weights=weights or "auto",
            layers=layers,
            image_size=image_size,
            partial=partial,
        ),
        output,
        device=devices[0] if len(devices) == 1 else (list(devices) or "auto"),
        augmentation=featcache.Augmentation(views=views) if views > 1 else None,
        progress=True,
        **settings,
    )
    if as_json:
        _print_json({"store": str(output), **store.extraction.to_dict()})
    else:
        click.echo(f"{output}: {store.extraction}")


@main.command()
@options.path_argument("store")
@options.json_output
def info(store: Path, as_json: bool) -> None:
    """Describe STORE: its images, classes, features and network.

    Images that could not be read are listed with their reasons.
    """
    opened = featcache.FeatureStore.open(store)
    if as_json:
        _print_json(opened.describe())
    else:
        click.echo(opened.to_text())


@main.command()
@options.path_argument("store")
@options.json_output
def verify(store: Path, as_json: bool) -> None:
    """Check the features and tables of STORE by their checksums."""
    from featcache.errors import CorruptStore

    report = featcache.FeatureStore.open(store).verify()
    if as_json:
        _print_json({"store": str(store), **report.to_dict()})
    elif report.ok:
        click.echo(f"{store}: {report}")
    if not report.ok:
        raise CorruptStore(str(report))


@main.command()
@options.path_argument("stores", nargs=-1, required=True)
@options.output("PREDICTOR", "Predictor file to write.", required=True)
@options.layer(
    "Layer of STORES to train on. May be repeated to use several side by side. Default: all."
)
@option(
    "--head",
    "heads",
    multiple=True,
    metavar="HEAD",
    help="linear, svm, rbf-svm, forest, boosting, knn, mlp, ridge, all, or suffix (the rest of the "
    "network). May be repeated.  [default: linear, svm, rbf-svm, forest]",
)
@option("--cv", **count(2), default=5, help="Number of folds of the cross-validation.")
@option(
    "--test-size",
    type=options.share,
    help="Share of the images to hold out and score once. Default: as the split column says, or "
    "25%.",
)
@options.flag("--group", "Keep the images of a group on one side of every split.")
@option("--scoring", metavar="NAME", default="accuracy", help="Metric, by scikit-learn's name.")
@option(
    "--class-weight",
    type=click.Choice(["balanced"]),
    help="Give rare classes the same total weight as frequent ones.",
)
@option(
    "--memory",
    type=options.size,
    help="Memory to stay within, such as 1GB; features are then read in blocks. Default: what is "
    "free.",
)
@option("--n-jobs", type=int, default=1, help="Number of fits at a time; -1 is one per core.")
@option("--random-state", type=int, default=0, help="Seed of everything that is drawn.")
@options.suffix_training
@options.json_output
def train(
    stores: tuple[Path, ...],
    output: Path,
    layers: tuple[str, ...],
    heads: tuple[str, ...],
    backbone: str | None,
    weights: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train and compare classifiers on the features in STORES.

    The best by cross-validation is kept as PREDICTOR. Several stores are joined: one below the
    other if their features come from the same network and layers, else side by side, by the ids of
    their images.

    With --head suffix the rest of the network is trained, on maps that STORES keep (extract them
    with --layer LAYER:input:map). If it is interrupted, the same command resumes after the last
    finished epoch.
    """
    suffix = {name: settings.pop(name) for name in vars(SuffixSettings()) if name in settings}
    given = {name: value for name, value in suffix.items() if value is not None}
    if "suffix" not in heads and (given or backbone or weights):
        name = next(iter(given), "backbone" if backbone else "weights")
        name = {"first": "from"}.get(name, name).replace("_", "-")
        raise click.UsageError(f"--{name} is for --head suffix.")
    network = None if backbone is None else featcache.Backbone(backbone, weights=weights or "auto")
    result = featcache.train_files(
        list(stores),
        output,
        heads=list(heads),
        layers=list(layers) or None,
        suffix=SuffixSettings(**given),
        backbone=network,
        **settings,
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        click.echo(result.to_text())


@main.command()
@options.path_argument("predictor")
@options.path_argument("store")
@options.output("FILE.html", "Write a page with figures, maps and mistakes.", "--report")
@option("--images", metavar="IMAGES", help="The images of STORE, to show them in the report.")
@options.own_network
@options.json_output
def evaluate(
    predictor: Path,
    store: Path,
    report: Path | None,
    images: str | None,
    backbone: str | None,
    weights: str | None,
    as_json: bool,
) -> None:
    """Measure PREDICTOR on the images that it was not trained on.

    These are the images of STORE whose content is not among the training images.
    """
    opened = featcache.FeatureStore.open(store)
    loaded = featcache.Predictor.load(predictor)
    network = _own_network(loaded, backbone, weights)
    if network is not None:
        loaded.attach(network)
    evaluation = featcache.evaluate(loaded, opened)
    if report is not None:
        pictures = None if images is None else featcache.ImageSet.open(images)
        featcache.write_report(
            evaluation, report, store=opened, images=pictures, leaderboard=loaded.leaderboard
        )
    if as_json:
        _print_json(evaluation.to_dict())
    else:
        click.echo(evaluation.to_text())
        if report is not None:
            click.echo(f"\nreport: {report}")


@main.command()
@options.path_argument("predictor")
@click.argument("images", nargs=-1, required=True)
@options.output("FILE", "File to write. Default: standard output.")
@option("--format", "file_format", type=FORMAT, default="csv", help="Format of the predictions.")
@option("--top-k", **count(), default=1, help="Number of classes to list for each image.")
@options.own_network
@options.batch_size
@options.workers
@option("--device", metavar="DEVICE", default="auto", help=f"{options.DEVICES}.")
def predict(
    predictor: Path,
    images: tuple[str, ...],
    output: Path | None,
    file_format: str,
    top_k: int,
    backbone: str | None,
    weights: str | None,
    **settings: Any,
) -> None:
    """Label new IMAGES (files or folders) with PREDICTOR.

    An image that cannot be read has an empty label, and the reason in the column 'error'.
    """
    from featcache.predictor.predictions import write_predictions

    loaded = featcache.Predictor.load(predictor)
    predictions = loaded.stream(
        list(images),
        top_k=top_k,
        backbone=_own_network(loaded, backbone, weights),
        progress=output is not None,  # not between predictions that go to the terminal
        **settings,
    )
    write_predictions(predictions, output, file_format=file_format, top_k=top_k)


@main.command()
@options.path_argument("store")
@options.output("FILE.csv", "Table of findings to write.", required=True)
def audit(store: Path, output: Path) -> None:
    """List images whose label, copies or features look wrong."""
    from featcache.study.audit import audit as audit_store

    findings = audit_store(featcache.FeatureStore.open(store))
    findings.to_csv(output)
    click.echo(f"{output}: {findings}")


@main.command()
@options.path_argument("store")
@options.output("FILE", "File to write; its ending decides the format.", required=True)
def export(store: Path, output: Path) -> None:
    """Write the features of STORE as .npz, .npy, .parquet or .csv."""
    from featcache.store.export import export_store

    export_store(featcache.FeatureStore.open(store), output)
    click.echo(str(output))


@main.command("export-model")
@options.path_argument("predictor")
@options.output("FILE", "File to write: .onnx, or .pt2 for torch.export.load.", required=True)
@options.own_network
def export_model(predictor: Path, output: Path, backbone: str | None, weights: str | None) -> None:
    """Write network and head as one model: .onnx or .pt2."""
    from featcache.predictor.export import export_model as export_predictor

    loaded = featcache.Predictor.load(predictor)
    export_predictor(loaded, output, backbone=_own_network(loaded, backbone, weights))
    click.echo(str(output))


def _own_network(
    predictor: featcache.Predictor, backbone: str | None, weights: str | None
) -> featcache.Backbone | None:
    if backbone is None and weights is None:
        return None
    return predictor.rebuild_backbone(backbone=backbone, weights=weights)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(str(side) for side in shape)


if __name__ == "__main__":
    main()
