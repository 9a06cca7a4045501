"""Predictors: ``featcache evaluate``, ``predict`` and ``export-model``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import click

import featcache
from featcache.cli import options
from featcache.cli.command import Command, print_json, say, show
from featcache.system.files import STDOUT
from featcache.system.tables import printable


def _load(predictor: Path, **network: Any) -> featcache.Predictor:
    """Open a predictor, with a network of one's own if `backbone` or `weights` is given."""
    loaded = featcache.Predictor.load(predictor)
    given = any(value is not None for value in network.values())
    return loaded.attach(**network) if given else loaded


@click.command(cls=Command)
@options.path_argument("predictor")
@options.path_argument("store")
@options.output("FILE.html", "Write a page with figures, maps and mistakes.", "--report")
@click.option("--images", metavar="IMAGES", help="The images of STORE, to show them in the report.")
@options.flag(
    "--other-groups",
    "Score images of groups named like those trained on: they are other groups in STORE.",
)
@click.option(
    "--by",
    multiple=True,
    metavar="NAME",
    help="Scores for each value of a column that extract --keep-columns kept, or of group or "
    "split; the interval is of that value alone. May be repeated.",
)
@options.choice(
    "--unknown",
    ["refuse", "skip", "wrong"],
    "Refuse images of a class that PREDICTOR was not trained on, leave them out, or count them as "
    "wrong.",
)
@options.own_network("PREDICTOR")
@options.force
@options.json_output
def evaluate(
    predictor: Path,
    store: Path,
    report: Path | None,
    images: str | None,
    other_groups: bool,
    by: tuple[str, ...],
    unknown: Literal["refuse", "skip", "wrong"],
    force: bool,
    as_json: bool,
    **network: Any,
) -> None:
    """Measure PREDICTOR on the images that it was not trained on.

    These are the images of STORE whose content is not among the training images, and whose group
    is not among theirs.
    """
    loaded = _load(predictor, **network)
    opened = featcache.FeatureStore.open(store)
    evaluation = featcache.evaluate(
        loaded, opened, other_groups=other_groups, by=by, unknown=unknown
    )
    if report is not None:
        pictures = None if images is None else featcache.ImageSet.open(images)
        featcache.write_report(
            evaluation,
            report,
            store=opened,
            images=pictures,
            leaderboard=loaded.leaderboard,
            force=force,
        )
    written = "" if report is None else f"\n\nreport: {printable(str(report))}"
    show(as_json, evaluation.to_dict(), f"{evaluation.to_text()}{written}")


@click.command(cls=Command)
@options.path_argument("predictor")
@click.argument("images", nargs=-1, required=True)
@options.output(
    "FILE", "File to write. Default: standard output.", text=True, default="-", show_default=False
)
@options.choice("--format", ["csv", "json"], "Format of the predictions.")
@click.option(
    "--top-k", **options.count(), default=1, help="Number of classes to list for each image."
)
@click.option(
    "--coverage",
    type=options.share,
    help="Add the column 'labels': a set that held the true label of at least this share of the "
    "images, such as 0.95, when folds judged them.",
)
@options.flag(
    "--abstain",
    "Leave the label empty where that set has more than one label.  [--coverage: 0.95]",
)
@options.own_network("PREDICTOR")
@options.batch_size
@options.workers
@options.max_pixels
@options.device
@options.excel
@options.force
@options.json_output
def predict(
    predictor: Path,
    images: tuple[str, ...],
    output: Path,
    format: str,
    top_k: int,
    coverage: float | None,
    abstain: bool,
    backbone: str | None,
    weights: str | None,
    excel: bool,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Label new IMAGES (files or folders) with PREDICTOR.

    An image that cannot be read has an empty label, and the reason in the column 'error'. The ids
    are paths below IMAGES; where several are named, the paths as typed. The label need not be the
    most probable class: probabilities are corrected for how often each class was called by mistake.
    Sets of labels are joined by |; in the name of a class, a backslash stands before it.
    """
    from featcache.predictor.predictions import Prediction, write_predictions
    from featcache.predictor.predictor import USUAL_COVERAGE

    if excel and format == "json":
        raise click.UsageError("--excel is for --format csv.")
    if abstain and coverage is None:
        coverage = USUAL_COVERAGE
    loaded = _load(predictor, backbone=backbone, weights=weights)
    predictions: Iterable[Prediction] = loaded.stream(
        list(images),
        top_k=top_k,
        coverage=coverage,
        abstain=abstain,
        progress=as_json or output != STDOUT,  # not between predictions that go to the terminal
        **settings,
    )
    predictions = list(predictions) if as_json else predictions
    if not as_json or output != STDOUT:
        write_predictions(
            predictions,
            output,
            file_format=format,
            top_k=top_k,
            labels=coverage is not None,
            force=force,
            excel=excel,
        )
    notes = [] if coverage is None else [loaded.coverage_text(coverage)]
    if as_json:
        values = {"predictor": str(predictor), "output": str(output), "coverage": coverage}
        print_json(values | {"notes": notes, "predictions": [one.to_dict() for one in predictions]})
    for note in [] if as_json else notes:
        say(note, err=True)


@click.command("export-model", cls=Command)
@options.path_argument("predictor")
@options.output("FILE", "File to write: .onnx, or .pt2 for torch.export.load.", required=True)
@options.own_network("PREDICTOR")
@options.force
@options.json_output
def export_model(predictor: Path, output: Path, force: bool, as_json: bool, **network: Any) -> None:
    """Write network and head as one model: .onnx or .pt2.

    Its input is images as uint8, decoded, resized and cropped; its output is probabilities. The
    label need not be the most probable class, above all after training with class weights: it has
    the highest log(probability) - calibration.bias, which is in the model's metadata.
    """
    from featcache.predictor.export import export_model as export_predictor

    export_predictor(_load(predictor, **network), output, force=force)
    size = output.stat().st_size
    values = {"predictor": str(predictor), "output": str(output), "bytes": size}
    show(as_json, values, f"network and head, {size / 1e6:,.1f} MB", output=output)
