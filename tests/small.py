"""A network that computes in a millisecond, and folders of images, for tests of extraction."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.pixels.preprocessing import Preprocessing

SIDE = 32
TAP = "pool:output:flatten"


class Network(nn.Module):
    """Two convolutions with batch normalisation, a pool, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 16, 3)
        self.norm2 = nn.BatchNorm2d(16)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.relu(self.norm2(self.body(x)))
        return self.head(torch.flatten(self.pool(x), 1))


def network(kind: type[nn.Module] = Network, seed: int = 0) -> nn.Module:
    """Return a network with seeded weights, and statistics unlike the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind().eval()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None and part.running_var is not None
                part.running_mean.normal_(0, 0.2)
                part.running_var.uniform_(0.5, 1.5)
    return module


def own() -> tuple[nn.Module, Preprocessing]:
    """Return the network for ``--backbone tests.small:own``."""
    return network(), Preprocessing(resize=SIDE, crop=SIDE)


class Slow(Network):
    """It takes its time: something may happen meanwhile."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.2)
        return super().forward(x)


def slow() -> tuple[nn.Module, Preprocessing]:
    """Return the slow network for ``--backbone tests.small:slow``."""
    return network(Slow), Preprocessing(resize=SIDE, crop=SIDE)


def backbone(
    kind: type[nn.Module] = Network, layers: Sequence[str] | None = ("pool",), **options: Any
) -> Backbone:
    """Return such a network as a backbone for 32 x 32 images."""
    preprocessing = Preprocessing(resize=SIDE, crop=SIDE)
    return Backbone(network(kind, **options), preprocessing=preprocessing, layers=layers)


def photograph(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> Path:
    """Write a JPEG that no other seed gives."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path, quality=92)
    return path


def folder(root: Path, n: int, classes: Sequence[str] = ("ant", "bee")) -> Path:
    """Write `n` photographs into class folders."""
    for i in range(n):
        photograph(root / classes[i % len(classes)] / f"{i:04d}.jpg", i)
    return root


def plainest(images: ImageSet, module: nn.Module, layer: str) -> np.ndarray:
    """Return the flattened output of a layer by the plainest loop: one image at a time."""
    preprocessing = Preprocessing(resize=SIDE, crop=SIDE)
    found: list[np.ndarray] = []
    part = module.get_submodule(layer)
    hook = part.register_forward_hook(lambda m, i, o: found.append(o.flatten().numpy().copy()))
    with torch.no_grad():
        for i in range(len(images)):
            pixels = torch.from_numpy(preprocessing(images.read(i)))
            module(preprocessing.normalize(pixels[None]))
    hook.remove()
    return np.stack(found)


def put_into_hub_cache(cache: Path, name: str, state: Mapping[str, Tensor]) -> Path:
    """Put weights where huggingface_hub keeps what it has downloaded of timm; return the file."""
    from safetensors.torch import save_file  # children import this module, and need none

    snapshot = cache / f"models--timm--{name}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    save_file(dict(state), snapshot / "model.safetensors")
    return snapshot / "model.safetensors"
