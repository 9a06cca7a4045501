"""Whatever moment a writer is killed or stopped at, the store that comes of it is the same."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from featcache.store import checksums, disk, format
from featcache.store.store import FeatureStore
from tests import stores


def beside(path: Path) -> list[str]:
    """Return what lies in the store's folder."""
    return sorted(p.name for p in path.parent.iterdir())


STOPS = [
    (format, "_write_layout"),
    (disk, "reserve"),
    (disk, "fsync"),
    (disk, "rename"),
    (disk, "pwrite_all"),
    (checksums, "row_checksums"),
]


@pytest.mark.parametrize("bad", [-1, 4], ids=["no failure", "a failure"])
@pytest.mark.parametrize(("module", "name"), STOPS, ids=[name for _, name in STOPS])
def test_stopped_at_every_step_the_file_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, bad: int
) -> None:
    """Stop at every call of a step of the writer, one after the other, as a kill would."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power cuts here; it is slow
    imgs = stores.images(6)

    def extract(path: Path) -> None:
        with stores.writer(path, imgs) as writer:
            for rows in np.array_split(writer.pending, 3):
                for row in rows[rows == bad]:
                    writer.fail(int(row), "decode", "no")
                stores.fill(writer, imgs, rows[rows != bad])
            writer.finish(max_failures=1)

    extract(tmp_path / "quiet.h5")
    expected = (tmp_path / "quiet.h5").read_bytes()
    for stop_at in range(1, 200):
        path = tmp_path / f"{stop_at}.h5"
        try:
            with stores.stopped_at(stop_at, module, name, monkeypatch):
                extract(path)
        except stores.Stop:
            pass
        else:
            break
        if path.exists():
            FeatureStore.open(path)  # a finished name means a finished file
        extract(path)
        assert path.read_bytes() == expected
        path.unlink()
    assert stop_at > 1
    path.unlink()
    assert beside(tmp_path / "quiet.h5") == ["quiet.h5"]
