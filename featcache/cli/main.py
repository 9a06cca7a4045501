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
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

import featcache
from featcache.errors import FeatcacheError
from featcache.finetuning.settings import SCHEDULES, SuffixSettings
from featcache.system.console import sigterm_as_ctrl_c
from featcache.version import __version__

DEVICES = "auto, cpu, cuda, cuda:1, mps"


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


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    title = click.style("Warning:", fg="yellow", bold=True)
    click.echo(f"{title} {message}", err=True, color=_colour(sys.stderr))


def _colour(stream: Any) -> bool:
    import os

    return "NO_COLOR" not in os.environ and stream.isatty()


class Percent(click.ParamType[float]):
    """A share: ``1%`` or ``0.01``."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the share as a number from 0 to 1."""
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"{text!r} is not a share; type 1% or 0.01", param, ctx)
        if not 0 <= share <= 1:
            self.fail(f"{text!r} is not between 0% and 100%", param, ctx)
        return share


class Memory(click.ParamType[int]):
    """A number of bytes: ``500MB``, ``1GB``, ``2GiB``."""

    name = "size"
    _units = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}  # noqa: RUF012

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is not a size; type 500MB or 1GB", param, ctx)
        number, unit, binary = match.groups()
        power = "kmgt".find(unit) + 1 if unit else 0
        return int(float(number) * (1024**power if binary else self._units[unit]))


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Stack option decorators in the order in which help shall list them."""

    def apply(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
_weights = click.option(
    "--weights",
    default=None,
    metavar="W",
    help="A weights name (IMAGENET1K_V2), a checkpoint file, or 'none' for random weights. "
    "Left out: the newest pinned name.",
)
_image_size = click.option(
    "--image-size", type=click.IntRange(min=1), help="Side of the crop, in pixels."
)
_batch_size = click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images in one forward pass.  [8 on a CPU, 128 with CUDA]",
)
_workers = click.option(
    "--workers", type=click.IntRange(min=0), help="Decoding workers. Left out: chosen."
)
_layers = click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="TAP",
    help="Where features are read: LAYER[#K][:input|:output][:mean|:max|:flatten|:map|:cls|"
    ":patches]. May be repeated. Left out: the pooling layer, or the head's input.",
)

_suffix_options = _options(
    click.option(
        "--from", "first", metavar="LAYER", help="suffix: first layer to train. Left out: all."
    ),
    click.option(
        "--epochs",
        type=click.IntRange(min=1),
        help=f"suffix: at most so many.  [{SuffixSettings.epochs}]",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=2),
        help=f"suffix: images a step.  [{SuffixSettings.batch_size}]",
    ),
    click.option(
        "--lr",
        type=float,
        help=f"suffix: highest learning rate of the new layer.  [{SuffixSettings.lr:g}]",
    ),
    click.option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        help=f"suffix: of the learning rate.  [{SuffixSettings.schedule}]",
    ),
    click.option(
        "--unfreeze-every",
        type=click.IntRange(min=0),
        metavar="EPOCHS",
        help="suffix: unfreeze one block more every so many epochs; 0: all at once.  "
        f"[{SuffixSettings.unfreeze_every}]",
    ),
    click.option(
        "--patience",
        type=click.IntRange(min=0),
        metavar="EPOCHS",
        help="suffix: stop after so many without a better validation loss; 0: never.  "
        f"[{SuffixSettings.patience}]",
    ),
    click.option(
        "--validation",
        type=Percent(),
        metavar="SHARE",
        help="suffix: images set aside to stop by; 0: train on all, to the last epoch.  "
        f"[{SuffixSettings.validation:.0%}]",
    ),
    click.option("--device", help=f"suffix: {DEVICES}.  [{SuffixSettings.device}]"),
    click.option("--backbone", help="suffix: the network, where it is package.module:callable."),
    click.option("--weights", help="suffix: the network's checkpoint file, where it has one."),
)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="featcache")
def main() -> None:
    r"""Compute image features once with a frozen network; train on them in seconds.

    \b
    featcache extract flowers -o flowers.h5 --backbone resnet50
    featcache train flowers.h5 -o flowers.featcache
    featcache predict flowers.featcache new_photos
    """


@main.command()
@click.argument("backbone")
@_weights
@_image_size
@_json
def layers(backbone: str, weights: str | None, image_size: int | None, as_json: bool) -> None:
    """List the layers of BACKBONE: output shape, parameters, share of the forward cost.

    BACKBONE is a torchvision name (resnet50), timm/NAME, or package.module:callable.
    """
    network = _backbone(backbone, weights or "none", (), image_size)
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
    _print_table(header, cells, right=(3, 4))
    click.echo(f"\nDefault tap: {', '.join(network.taps)}")


@main.command()
@click.argument("images")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="STORE.h5")
@click.option("--backbone", required=True, help="resnet50, timm/NAME, or package.module:callable.")
@_weights
@click.option("--partial", is_flag=True, help="Take a checkpoint that fits in part; record which.")
@_layers
@_image_size
@click.option("--views", type=click.IntRange(min=1), default=1, help="Augmented views an image.")
@click.option("--labels", type=click.Path(path_type=Path), help="A CSV or TSV file of labels.")
@click.option("--id-column", default="id", show_default=True)
@click.option("--label-column", default="label", show_default=True)
@click.option("--group-column", help="Images of one group never fall on both sides of a split.")
@click.option("--split-column", help="A predefined split: train, validation, test.")
@click.option("--suffix", default="", help="Appended to each id to make a file name: .jpg")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of a torchvision data set.")
@click.option("--download", is_flag=True, help="Let torchvision fetch the data set.")
@_batch_size
@_workers
@click.option(
    "--device", "devices", multiple=True, help=f"{DEVICES}. Repeated: one process each.  [auto]"
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
)
@click.option(
    "--store-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True
)
@click.option("--compile/--no-compile", "compiled", default=None, help="Use torch.compile.")
@click.option("--on-error", type=click.Choice(["skip", "fail"]), default="skip", show_default=True)
@click.option("--max-failures", type=Percent(), default="1%", show_default=True)
@click.option("--retry-failed", is_flag=True, help="Try the images again that failed before.")
@_json
def extract(
    images: str,
    output: Path,
    backbone: str,
    weights: str | None,
    partial: bool,
    layers: tuple[str, ...],
    image_size: int | None,
    views: int,
    labels: Path | None,
    id_column: str,
    label_column: str,
    group_column: str | None,
    split_column: str | None,
    suffix: str,
    root: Path | None,
    download: bool,
    batch_size: int | None,
    workers: int | None,
    devices: tuple[str, ...],
    precision: str,
    store_dtype: str,
    compiled: bool | None,
    on_error: Literal["skip", "fail"],
    max_failures: float,
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Stage one: compute the features of IMAGES and keep them in an HDF5 file.

    IMAGES is a folder (class folders give labels), a folder with --labels, a torchvision data set
    (CIFAR10, FashionMNIST, OxfordIIITPet, Flowers102) with --root, or WebDataset tars. Run the same
    command again to resume, or to bring the file up to date with a changed folder.
    """
    image_set = featcache.ImageSet.open(
        images,
        labels_csv=labels,
        id_column=id_column,
        label_column=label_column,
        group_column=group_column,
        split_column=split_column,
        suffix=suffix,
        root=root,
        download=download,
    )
    store = featcache.extract(
        image_set,
        _backbone(backbone, weights, layers, image_size, partial=partial),
        output,
        batch_size=batch_size,
        workers=workers,
        device=devices[0] if len(devices) == 1 else (list(devices) or "auto"),
        precision=precision,
        store_dtype=store_dtype,
        compile=compiled,
        views=views,
        on_error=on_error,
        max_failures=max_failures,
        retry_failed=retry_failed,
        progress=True,
    )
    if as_json:
        _print_json({"store": str(output), **store.extraction.to_dict()})
    else:
        click.echo(f"{output}: {store.extraction}")


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
@_json
def info(store: Path, as_json: bool) -> None:
    """Say what STORE holds: images, classes, taps and shapes, size, fingerprint, failures."""
    opened = featcache.FeatureStore.open(store)
    if as_json:
        _print_json(opened.describe())
    else:
        click.echo(opened.to_text())


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
@_json
def verify(store: Path, as_json: bool) -> None:
    """Read every byte of STORE again and check it against its checksums."""
    from featcache.errors import CorruptStore

    report = featcache.FeatureStore.open(store).verify()
    if as_json:
        _print_json({"store": str(store), **report.to_dict()})
    elif report.ok:
        click.echo(f"{store}: {report}")
    if not report.ok:
        raise CorruptStore(f"{store}: {report}")


@main.command()
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="PREDICTOR")
@_layers
@click.option(
    "--head",
    "heads",
    multiple=True,
    help="linear, svm, rbf-svm, forest, boosting, knn, mlp, ridge, all, or suffix: the rest of the "
    "network. May be repeated.  [linear, svm, rbf-svm, forest]",
)
@click.option("--cv", type=click.IntRange(min=2), default=5, show_default=True, help="Folds.")
@click.option(
    "--test-size",
    type=Percent(),
    help="Share held out, scored once. Left out: the split column, else 25%.",
)
@click.option("--group", is_flag=True, help="Keep the images of a group on one side of a split.")
@click.option("--scoring", default="accuracy", show_default=True, help="scikit-learn's name.")
@click.option("--class-weight", type=click.Choice(["balanced"]))
@click.option("--memory", type=Memory(), help="Train in blocks within this much: 1GB.")
@click.option("--n-jobs", type=int, default=1, show_default=True)
@click.option("--random-state", type=int, default=0, show_default=True)
@_suffix_options
@_json
def train(
    stores: tuple[Path, ...],
    output: Path,
    layers: tuple[str, ...],
    heads: tuple[str, ...],
    cv: int,
    test_size: float | None,
    group: bool,
    scoring: str,
    class_weight: str | None,
    memory: int | None,
    n_jobs: int,
    random_state: int,
    backbone: str | None,
    weights: str | None,
    as_json: bool,
    **suffix: Any,
) -> None:
    """Stage two: train and compare heads on the features in STORE, keep the best as PREDICTOR.

    Several stores are joined: by rows where they share a fingerprint, else by image id.

    With --head suffix the rest of the network is trained, on maps that STORE keeps (extract with
    --layer LAYER:input:map). Interrupted, it resumes from its last epoch by the same command.
    """
    given = {name: value for name, value in suffix.items() if value is not None}
    if "suffix" not in heads and (given or backbone or weights):
        name = next(iter(given), "backbone" if backbone else "weights")
        option = {"first": "from"}.get(name, name).replace("_", "-")
        raise click.UsageError(f"--{option} is for --head suffix.")
    result = featcache.train_files(
        list(stores),
        output,
        heads=list(heads),
        layers=list(layers) or None,
        cv=cv,
        test_size=test_size,
        group=group,
        scoring=scoring,
        class_weight=class_weight,
        memory=memory,
        n_jobs=n_jobs,
        random_state=random_state,
        suffix=SuffixSettings(**given),
        backbone=None if backbone is None else _backbone(backbone, weights, (), None),
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        click.echo(result.to_text())


@main.command()
@click.argument("predictor", type=click.Path(path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE.html")
@click.option("--images", help="IMAGES that STORE was extracted from: pictures for the report.")
@click.option("--backbone", help="Needed by a suffix of a network that is package.module:callable.")
@_weights
@_json
def evaluate(
    predictor: Path,
    store: Path,
    report: Path | None,
    images: str | None,
    backbone: str | None,
    weights: str | None,
    as_json: bool,
) -> None:
    """Score PREDICTOR on the rows of STORE that it was not trained on."""
    opened = featcache.FeatureStore.open(store)
    loaded = featcache.Predictor.load(predictor)
    if backbone is not None or weights is not None:
        loaded.attach(loaded.rebuild_backbone(backbone=backbone, weights=weights))
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
@click.argument("predictor", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Left out: standard output.")
@click.option("--format", "file_format", type=click.Choice(["csv", "json"]), default="csv")
@click.option("--top-k", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--backbone", help="Needed where the predictor's is package.module:callable.")
@_weights
@_batch_size
@_workers
@click.option("--device", default="auto", show_default=True, help=DEVICES)
def predict(
    predictor: Path,
    images: tuple[str, ...],
    output: Path | None,
    file_format: str,
    top_k: int,
    backbone: str | None,
    weights: str | None,
    batch_size: int | None,
    workers: int | None,
    device: str,
) -> None:
    """Label new IMAGES (files or folders) with PREDICTOR.

    An image that cannot be read has an empty label and its reason in the column 'error'.
    """
    from featcache.predictor.predictions import write_predictions

    loaded = featcache.Predictor.load(predictor)
    network = None
    if backbone is not None or weights is not None:
        network = loaded.rebuild_backbone(backbone=backbone, weights=weights)
    predictions = loaded.stream(
        list(images),
        top_k=top_k,
        backbone=network,
        batch_size=batch_size,
        workers=workers,
        device=device,
        progress=output is not None,  # not between predictions that go to the terminal
    )
    write_predictions(predictions, output, file_format=file_format, top_k=top_k)


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE.csv")
def audit(store: Path, output: Path) -> None:
    """List the images of STORE whose label, copies or features look wrong."""
    opened = featcache.FeatureStore.open(store)
    from featcache.study.audit import audit as audit_store

    findings = audit_store(opened)
    findings.to_csv(output)
    click.echo(f"{output}: {findings}")


@main.command()
@click.argument("store", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE")
def export(store: Path, output: Path) -> None:
    """Write the features of STORE as .npz, .npy, .parquet or .csv."""
    from featcache.store.export import export_store

    export_store(featcache.FeatureStore.open(store), output)
    click.echo(str(output))


@main.command("export-model")
@click.argument("predictor", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE")
@click.option("--backbone", help="Needed where the predictor's is package.module:callable.")
@_weights
def export_model(predictor: Path, output: Path, backbone: str | None, weights: str | None) -> None:
    """Write network and head as one model for serving: .onnx or .pt2."""
    loaded = featcache.Predictor.load(predictor)
    network = None
    if backbone is not None or weights is not None:
        network = loaded.rebuild_backbone(backbone=backbone, weights=weights)
    from featcache.predictor.export import export_model as export_predictor

    export_predictor(loaded, output, backbone=network)
    click.echo(str(output))


def _backbone(
    spec: str,
    weights: str | None,
    layers: tuple[str, ...],
    image_size: int | None,
    *,
    partial: bool = False,
) -> featcache.Backbone:
    return featcache.Backbone.from_name(
        spec,
        weights={"none": None, None: "auto"}.get(weights, weights),
        layers=list(layers) or None,
        image_size=image_size,
        partial=partial,
    )


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(str(side) for side in shape)


def _print_table(
    header: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, right: tuple[int, ...] = ()
) -> None:
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    for row in [header, *rows]:
        cells = [
            cell.rjust(width) if k in right else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
