"""Stores of features that a head can learn, for tests: made of arrays, seeded, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featcache.fingerprint import Fingerprint
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter
from tests.stores import CANARIES, Images, sha256

POOL = "avgpool:output:flatten"


def clusters(
    y: Sequence[str], d: int = 12, spread: float = 1.0, seed: int = 0, views: int = 1
) -> np.ndarray:
    """Return features around one centre a class: float32, (n, d) or (n, views, d)."""
    rng = np.random.default_rng(seed)
    names = sorted(set(y))
    centres = rng.normal(size=(len(names), d)) * 2
    own = centres[[names.index(name) for name in y]]
    shape = (len(y), d) if views == 1 else (len(y), views, d)
    noise = rng.normal(scale=spread, size=shape)
    return ((own if views == 1 else own[:, None]) + noise).astype(np.float32)


def fingerprint(taps: Sequence[str] = (POOL,), **changes: Any) -> Fingerprint:
    values: dict[str, Any] = {
        "source": "torchvision",
        "backbone": "resnet18",
        "weights": "none",
        "state_sha256": "ab" * 32,
        "taps": tuple(taps),
        "preprocessing": {"resize": 256},
    }
    if "views" in changes:
        changes["augmentation"] = {"views": changes.pop("views")}
    return Fingerprint(**(values | changes))


def make_store(
    path: Path,
    X: np.ndarray | Mapping[str, np.ndarray],
    y: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    hashes: np.ndarray | None = None,
    canaries: bool = False,
    **fingerprint_changes: Any,
) -> FeatureStore:
    """Write features (n, ...) and labels to a store, and open it."""
    names = list(ids) if ids is not None else [f"{i:05d}.jpg" for i in range(len(y))]
    images = Images(names, list(y), groups, splits)
    by_tap = X if isinstance(X, Mapping) else {POOL: X}
    f = fingerprint(tuple(by_tap), **fingerprint_changes)
    shapes = {tap: array.shape[1:] for tap, array in by_tap.items()}
    rows = np.arange(len(y))
    with FeatureWriter.begin(
        path, images.tables, shapes, fingerprint=f, canaries=CANARIES if canaries else ()
    ) as writer:
        writer.write(
            rows,
            dict(by_tap),
            sha256=sha256(names) if hashes is None else hashes,
            size=rows + 100,
            stamp=rows,
        )
        if canaries:
            writer.set_canaries({tap: array[: len(CANARIES)] for tap, array in by_tap.items()})
        return writer.finish()
