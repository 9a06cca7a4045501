"""Whatever moment a writer is killed or stopped at, the store that comes of it is the same."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest

from featcache.store import checksums, disk, format
from featcache.store.store import FeatureStore
from tests import stores


def beside(path: Path) -> list[str]:
    """Return what lies in the store's folder."""
    return sorted(p.name for p in path.parent.iterdir())


ROWS, BATCH = 600, 8

EXTRACTION = f"""
def extract(path, pause):
    imgs = stores.images({ROWS})
    f = stores.fingerprint(taps=(stores.POOL, stores.MAPS), store_dtype="float16")
    with stores.writer(path, imgs, f) as writer:
        pending = writer.pending
        for start in range(0, len(pending), {BATCH}):
            rows = pending[start : start + {BATCH}]
            for row in rows[rows % 97 == 5]:
                writer.fail(int(row), "decode", "not an image")
            stores.fill(writer, imgs, rows[rows % 97 != 5])
            time.sleep(pause)
        writer.set_meta("run", {{"text": "x" * 20000}})
        return writer.finish(max_failures=1)
"""


def killed_runs_equal_a_quiet_one(folder: Path, kills: int, seed: int) -> None:
    """Kill extractions at random moments; each, resumed, must give the quiet run's bytes."""
    scope: dict[str, Any] = {"stores": stores, "time": time}
    exec(EXTRACTION, scope)
    scope["extract"](folder / "quiet.h5", 0)
    expected = (folder / "quiet.h5").read_bytes()
    rng = np.random.default_rng(seed)
    moments = []
    for k in range(kills):
        path = folder / f"killed{k}.h5"
        code = EXTRACTION + f"print(flush=True)\nextract({str(path)!r}, 0.001)\nprint(flush=True)"
        with stores.Child(code) as process:
            process.stdout.readline()
            begin = time.monotonic()
            # From before the file is there until after it has its name.
            time.sleep(rng.uniform(0, 0.5))
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            moments.append(time.monotonic() - begin)
        if path.exists():
            FeatureStore.open(path)  # a finished name means a finished file
        done = rows_done(path)
        scope["extract"](path, 0)
        assert path.read_bytes() == expected, f"killed after {moments[-1]:.3f} s with {done} rows"
        assert FeatureStore.open(path).verify().ok
        path.unlink()
    assert beside(folder / "quiet.h5") == ["quiet.h5"]


def rows_done(path: Path) -> int:
    """Return how many rows a partial file has, read with plain h5py: it must be valid HDF5."""
    partial = Path(f"{path}.partial")
    if not partial.exists():
        return 0
    with h5py.File(partial) as file:
        return int((file["rows"]["status"] == 1).sum())


def test_killed_at_random_moments_the_file_is_the_same(tmp_path: Path) -> None:
    killed_runs_equal_a_quiet_one(tmp_path, kills=8, seed=0)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(1, 5))
def test_killed_at_many_random_moments_the_file_is_the_same(tmp_path: Path, seed: int) -> None:
    killed_runs_equal_a_quiet_one(tmp_path, kills=50, seed=seed)


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
