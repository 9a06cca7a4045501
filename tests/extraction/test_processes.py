"""How many processes decode, and a run that is not in the main thread."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featcache.extraction.decoding import Batch
from featcache.extraction.extract import extract
from featcache.extraction.features import batches_of
from featcache.extraction.stream import Options, compute
from featcache.images.image_set import ImageSet
from tests.small import TAP, backbone, folder


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    return ImageSet.open(folder(tmp_path / "images", 12))


def started(batches: Iterator[Batch]) -> int:
    """Return how many processes run at the first batch."""
    before = set(multiprocessing.active_children())
    with closing(batches):
        next(batches)
        return len(set(multiprocessing.active_children()) - before)


def test_no_more_processes_decode_than_there_are_batches(images: ImageSet) -> None:
    options: dict[str, Any] = {"batch_size": 4, "workers": 5, "device": "cpu"}
    assert started(batches_of(images.select([0]), backbone(), **options)) == 1
    assert started(batches_of(images, backbone(), **options)) == 3


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux has it")
def test_no_more_processes_decode_than_cores_are_allowed(images: ImageSet) -> None:
    # After a run that ended without a word, processes decode beside a CPU too.
    allowed, options = os.sched_getaffinity(0), Options(batch_size=1, device="cpu")
    runtime = options.runtime(backbone(), len(images))
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert started(compute(images, runtime, np.arange(12), options, crashed=True)) == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("workers", [0, 2])
def test_extract_works_in_any_thread(images: ImageSet, tmp_path: Path, workers: int) -> None:
    def run(name: str) -> np.ndarray:
        store = extract(
            images, backbone(), tmp_path / name, batch_size=4, workers=workers, device="cpu"
        )
        return store.load(TAP)[0]

    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(run, "thread.h5").result()
    np.testing.assert_array_equal(found, run("main.h5"))
