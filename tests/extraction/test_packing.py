"""New images fill whole batches, and an image's features do not depend on who shares its batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from featcache.extraction.extract import extract
from featcache.images.image_set import ImageSet
from featcache.networks.forward import Runtime
from featcache.pixels.views import Augmentation
from tests.small import TAP, Network, backbone, folder, photograph

OLD, NEW = 40, 20


class Uneven(Network):
    """Adds to every image a little that depends on its place in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.arange(len(x)).view(-1, 1, 1, 1) * 1e-5)


def run(root: Path, path: Path, **options: Any) -> np.ndarray:
    options = {"batch_size": 8, "workers": 0, "device": "cpu", **options}
    images = ImageSet.open(root)
    return extract(images, backbone(Uneven), path, **options).load(TAP)[0].copy()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """Return ``passes(stop)``, a list that grows with each forward pass; number `stop` fails."""

    def begin(stop: float = np.inf) -> list[int]:
        counted: list[int] = []

        def forward(self: Runtime, batch: Tensor) -> Any:
            counted.append(len(batch))
            if len(counted) >= stop:
                raise OSError("stopped")
            return right(self, batch)

        monkeypatch.setattr(Runtime, "_forward", forward)
        return counted

    right = Runtime._forward
    return begin


def test_new_images_fill_whole_batches_and_an_interrupted_growth_is_the_same(
    tmp_path: Path, passes: Callable[..., list[int]]
) -> None:
    root, path = folder(tmp_path / "images", OLD), tmp_path / "a.h5"
    run(root, path)
    shutil.copy(path, tmp_path / "b.h5")
    for k in range(NEW):  # between the others
        photograph(root / "ant" / f"{2 * k:04d}-new.jpg", 1000 + k)
    grown = passes()
    whole = run(root, path)
    canaries = 2
    assert len(grown) == canaries + -(-NEW // 8)
    for stop in (4, 3):
        passes(stop)
        with pytest.raises(OSError, match="stopped"):
            run(root, tmp_path / "b.h5")
    passes()
    np.testing.assert_array_equal(run(root, tmp_path / "b.h5"), whole)


def test_views_that_do_not_divide_the_batch_keep_their_places(
    tmp_path: Path, passes: Callable[..., list[int]]
) -> None:
    root = folder(tmp_path / "images", 43)
    options = {"batch_size": 16, "augmentation": Augmentation(views=5)}
    whole = run(root, tmp_path / "a.h5", **options)
    np.testing.assert_array_equal(run(root, tmp_path / "b.h5", workers=2, **options), whole)
    for stop in (6, 12):
        passes(stop)
        with pytest.raises(OSError, match="stopped"):
            run(root, tmp_path / "c.h5", **options)
    passes()
    np.testing.assert_array_equal(run(root, tmp_path / "c.h5", **options), whole)
