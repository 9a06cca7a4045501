"""Small stores of known features for tests: everything follows from a seed, nothing from time."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from featcache.fingerprint import Fingerprint
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter

POOL = "avgpool:output:flatten"
MAPS = "layer4:output:map"
CANARIES = [("grey", b"\x89PNG 1"), ("exif", b"\xff\xd8 22")]


class Images:
    """The part of an `ImageSet` that a store reads: its tables."""

    def __init__(
        self,
        ids: Sequence[str],
        labels: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        splits: Sequence[str] | None = None,
    ) -> None:
        self.ids, self.labels, self.groups, self.splits = ids, labels, groups, splits

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tables(self) -> dict[str, np.ndarray]:
        """The columns of text."""
        names = ("ids", "labels", "groups", "splits")
        columns = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {name: np.array(x, np.dtypes.StringDType()) for name, x in columns.items()}


def images(n: int = 12, start: int = 0) -> Images:
    """Return n images of three classes, with an id that is not ASCII."""
    ids = [f"{'abc'[i % 3]}/{i:04d}-é.jpg" for i in range(start, start + n)]
    return Images(ids, labels=[name[0] for name in ids])


def fingerprint(**changes: Any) -> Fingerprint:
    values: dict[str, Any] = {
        "source": "torchvision",
        "backbone": "resnet18",
        "weights": "none",
        "state_sha256": "ab" * 32,
        "taps": (POOL,),
        "preprocessing": {"resize": 256},
    }
    if "views" in changes:
        changes["augmentation"] = {"views": changes.pop("views")}
    return Fingerprint(**(values | changes))


def shapes(f: Fingerprint, d: int = 8) -> dict[str, tuple[int, ...]]:
    """Return the shape of one image's features: d of the pooling layer, 2 x 3 x 3 maps."""
    each = {POOL: (d,), MAPS: (2, 3, 3)}
    views = (f.views,) if f.views > 1 else ()
    return {tap: (*views, *each[tap]) for tap in f.taps}


def sha256(ids: Sequence[str]) -> np.ndarray:
    """Return the content hashes: of an image whose bytes are its id."""
    digests = [hashlib.sha256(name.encode()).digest() for name in ids]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def features(ids: Sequence[str], f: Fingerprint, d: int = 8) -> dict[str, np.ndarray]:
    """Return features that depend on the id alone, float32."""
    found = {}
    for k, (tap, shape) in enumerate(shapes(f, d).items()):
        rows = [
            np.random.default_rng([k, *name.encode()]).standard_normal(shape, np.float32)
            for name in ids
        ]
        found[tap] = np.array(rows, np.float32).reshape(len(ids), *shape)
    return found


def fill(writer: FeatureWriter, imgs: Images, rows: np.ndarray, d: int = 8) -> None:
    """Write rows with their own features."""
    ids = [imgs.ids[i] for i in rows]
    f = writer.fingerprint
    writer.write(rows, features(ids, f, d), sha256=sha256(ids), size=rows + 100, stamp=rows)


def writer(
    path: Path,
    imgs: Images,
    f: Fingerprint | None = None,
    shapes_: dict[str, tuple[int, ...]] | None = None,
    **options: Any,
) -> FeatureWriter:
    f = f or fingerprint()
    options = {"fingerprint": f, "canaries": CANARIES, **options}
    return FeatureWriter.begin(path, imgs.tables, shapes_ or shapes(f), **options)


def store(
    path: Path, imgs: Images | None = None, f: Fingerprint | None = None, failed: Sequence[int] = ()
) -> FeatureStore:
    """Return a finished store."""
    imgs = imgs or images()
    with writer(path, imgs, f) as w:
        for row in failed:
            w.fail(row, "decode", "not an image")
        fill(w, imgs, w.pending)
        return w.finish(max_failures=1)


class Child:
    """A Python process that has imported what writers need."""

    def __init__(self, code: str) -> None:
        head = "import time\nimport numpy as np\nfrom tests import stores\n"
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(
            [sys.executable, "-c", head + textwrap.dedent(code)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )

    def __enter__(self) -> subprocess.Popen[str]:
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


class Stop(BaseException):
    """It stands for a kill."""


@contextmanager
def stopped_at(
    number: int, module: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Raise `Stop` at call `number` of a function of a module."""
    step, calls = getattr(module, name), itertools.count(1)

    def counted(*args: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise Stop
        return step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, counted)
        yield
