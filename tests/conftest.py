"""Fixtures that several test modules share."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Two pytest workers on two cores: one thread each, set before torch or numpy start their pools.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
from PIL import Image

from pipelines.demo_weights import PACKAGE, link_weights

# In the background of a script it is ignored, and then featcache leaves it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure: no example has a deadline.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def torch_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache of torch's own for the tests, which holds the demo's weights alone."""
    home = tmp_path_factory.mktemp("torch")
    os.environ["TORCH_HOME"] = str(home)
    if importlib.util.find_spec(PACKAGE):
        link_weights(home / "hub" / "checkpoints")
    return home


@pytest.fixture
def full_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., AbstractContextManager[None]]:
    """Return ``full_disk(at=1)``: within it, space is refused from reservation number `at` on."""
    allocate = getattr(os, "posix_fallocate", None)

    @contextmanager
    def full_disk(at: int = 1) -> Iterator[None]:
        calls = itertools.count(1)

        def reserve(*args: int) -> None:
            if next(calls) >= at:
                raise OSError(errno.ENOSPC, "No space left on device")
            allocate(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", reserve, raising=False)
            yield

    return full_disk


@pytest.fixture(scope="session")
def elpv_root() -> Path:
    """Return the folder of the demo's photographs (``images/cellNNNN.png``)."""
    package = pytest.importorskip("elpv_dataset", reason="pip install 'featcache[demo]'")
    return Path(package.__file__).parent / "data"


@pytest.fixture(scope="session")
def flower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a class folder of 3 classes x 12 small JPEGs that a network can tell apart.

    Made of coloured noise: cheap, seeded, and decoded by the real decoder.
    """
    root = tmp_path_factory.mktemp("flowers")
    rng = np.random.default_rng(0)
    for k, name in enumerate(["daisy", "rose", "tulip"]):
        (root / name).mkdir()
        for i in range(12):
            base = np.zeros((48, 64, 3), np.float64)
            base[..., k] = 180
            noise = rng.normal(0, 30, base.shape)
            pixels = np.clip(base + noise + 40, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:04d}.jpg", quality=90)
    return root
