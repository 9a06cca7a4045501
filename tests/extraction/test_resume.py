"""Stopped at any moment by anything, an extraction goes on and ends with the same bits."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache.errors import Interrupted, StoreError, StoreLocked
from featcache.extraction import stream
from featcache.extraction.decoding import Decoder, Loader
from featcache.extraction.extract import extract
from featcache.images.image_set import ImageSet
from featcache.networks.forward import Runtime
from featcache.store.file import StoreFile
from featcache.store.format import DONE
from featcache.store.store import FeatureStore
from tests.small import TAP, backbone, folder, photograph

N = 60

# Children come from a process that has imported everything and computed nothing: those forked from
# this one, whose matrix library has threads, may wait for these threads for ever.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("resume") / "images", N)


@pytest.fixture(scope="module")
def whole(root: Path) -> np.ndarray:
    """Return the features of an uninterrupted run."""
    store = run(root, root.parent / "whole.h5")
    return store.load(TAP)[0].copy()


def run(root: Path, path: Path, **options: Any) -> FeatureStore:
    options = {"batch_size": 4, "workers": 0, "device": "cpu", **options}
    return extract(ImageSet.from_folder(root), backbone(), path, **options)


def done(path: Path) -> int:
    """Return how many rows of the partial file are done."""
    try:
        file = StoreFile(f"{path}.partial")
    except StoreError:
        return 0
    return int(np.count_nonzero(file.read("rows")["status"] == DONE))


def slowly(root: Path, path: Path, options: dict[str, Any]) -> None:
    """Run an extraction that takes its time; ends with the exit status of the command line."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    forward = Runtime._forward

    def slow(self: Runtime, batch: Any) -> Any:
        time.sleep(0.05)
        return forward(self, batch)

    Runtime._forward = slow  # type: ignore[method-assign]
    try:
        run(root, path, **options)
    except Interrupted as error:
        sys.exit(error.exit_status)


class Child:
    """An extraction in a process of its own."""

    def __init__(self, root: Path, path: Path, **options: Any) -> None:
        self.path = path
        self.process = PROCESSES.Process(target=slowly, args=(root, path, options))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def wait_for(self, rows: int) -> None:
        """Return when so many rows are done."""
        deadline = time.monotonic() + 60
        while done(self.path) < rows:
            assert time.monotonic() < deadline
            assert self.process.is_alive()
            time.sleep(0.01)

    def end(self, number: int, *, everybody: bool = False) -> int | None:
        """Send a signal and return the exit status."""
        (os.killpg if everybody else os.kill)(self.pid, number)
        self.process.join(30)
        return self.process.exitcode


# --- killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "workers"), [(1, 0), (9, 2), (30, 0), (52, 1)])
def test_killed_and_resumed_it_equals_an_uninterrupted_run(
    root: Path, whole: np.ndarray, tmp_path: Path, rows: int, workers: int
) -> None:
    path = tmp_path / "f.h5"
    child = Child(root, path, workers=workers)
    child.wait_for(rows)
    assert child.end(signal.SIGKILL) == -signal.SIGKILL
    kept = done(path)
    store = run(root, path, batch_size=None)  # the recorded batch size
    np.testing.assert_array_equal(store.load(TAP)[0], whole)
    assert store.extraction.copied == kept
    assert store.extraction.computed == N - kept
    assert store.meta["settings"]["batch_size"] == 4
    assert store.verify().ok
    assert list(tmp_path.iterdir()) == [path]


def test_killed_where_there_is_no_shared_memory_it_goes_on(
    root: Path, whole: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill, images are decoded one by one in another process, if that can be had."""
    path = tmp_path / "f.h5"
    child = Child(root, path)
    child.wait_for(9)
    child.end(signal.SIGKILL)

    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to open shared memory object </torch_1> in read-write mode")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.warns(UserWarning, match="Images are decoded in this process"):
        store = run(root, path, batch_size=None, workers=0)
    np.testing.assert_array_equal(store.load(TAP)[0], whole)


def test_killed_again_and_again_it_gets_there(
    root: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "f.h5"
    for rows in (5, 20, 45):
        child = Child(root, path, workers=1)
        child.wait_for(rows)
        child.end(signal.SIGKILL)
        time.sleep(0.2)  # its workers die with it, and let go of the lock
    np.testing.assert_array_equal(run(root, path).load(TAP)[0], whole)


def test_settings_of_the_first_run_count_in_the_second(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    child = Child(root, path, batch_size=7)
    child.wait_for(14)
    child.end(signal.SIGKILL)
    assert run(root, path, batch_size=None).meta["settings"]["batch_size"] == 7


def test_an_image_replaced_between_the_runs_is_computed_again(root: Path, tmp_path: Path) -> None:
    images = folder(tmp_path / "images", N)
    child = Child(images, tmp_path / "f.h5")
    child.wait_for(12)
    child.end(signal.SIGKILL)
    photograph(images / "ant" / "0000.jpg", 1234)
    store = run(images, tmp_path / "f.h5")
    fresh = run(images, tmp_path / "fresh.h5")
    np.testing.assert_array_equal(store.load(TAP)[0], fresh.load(TAP)[0])
    assert store.sha256.tolist() == fresh.sha256.tolist()


def test_images_added_between_the_runs_do_not_cost_the_rows_that_are_done(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", N)
    child = Child(images, tmp_path / "f.h5")
    child.wait_for(24)
    child.end(signal.SIGKILL)
    kept = done(tmp_path / "f.h5")
    photograph(images / "ant" / "9999.jpg", 1234)
    store = run(images, tmp_path / "f.h5")
    assert store.extraction.copied == kept
    fresh = run(images, tmp_path / "fresh.h5")
    np.testing.assert_array_equal(store.load(TAP)[0], fresh.load(TAP)[0])


def test_what_was_killed_before_finishing_needs_no_network(
    root: Path, whole: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featcache.store.writer import FeatureWriter

    path = tmp_path / "f.h5"
    with monkeypatch.context() as patch:
        patch.setattr(FeatureWriter, "finish", _broken)
        with pytest.raises(OSError, match="unplugged"):
            run(root, path)
    monkeypatch.setattr(Runtime, "_prepare", _broken)
    store = run(root, path)
    assert (store.extraction.computed, store.extraction.copied) == (0, N)
    np.testing.assert_array_equal(store.load(TAP)[0], whole)


def _broken(*_: object) -> None:
    raise OSError("unplugged")


# --- stopped --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "workers", "everybody"),
    [
        (signal.SIGTERM, 0, False),
        (signal.SIGHUP, 2, True),
        (signal.SIGINT, 2, True),
        (signal.SIGTERM, 2, True),
    ],
)
def test_a_signal_commits_and_ends_with_status_75(
    root: Path, whole: np.ndarray, tmp_path: Path, number: int, workers: int, everybody: bool
) -> None:
    path = tmp_path / "f.h5"
    child = Child(root, path, workers=workers)
    child.wait_for(8)
    assert child.end(number, everybody=everybody) == 75
    kept = done(path)
    assert 8 <= kept < N
    store = run(root, path)
    assert store.extraction.copied == kept
    np.testing.assert_array_equal(store.load(TAP)[0], whole)


def at_every_line(root: Path, path: Path) -> None:
    """Send SIGINT at one line after the other of what queues a batch, until there is none left."""
    submit, left = stream.WriterThread.submit, 0

    def line(frame: Any, event: str, _: object) -> Any:
        nonlocal left
        if event == "line":
            if left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            left -= 1
        return line

    def call(frame: Any, event: str, _: object) -> Any:
        file = frame.f_code.co_filename
        queues = file.endswith(("futures/thread.py", "futures/_base.py", "extraction/stream.py"))
        return line if queues else None

    def traced(self: Any, batch: Any) -> None:
        sys.settrace(call)
        try:
            submit(self, batch)
        finally:
            sys.settrace(None)

    stream.WriterThread.submit = traced  # type: ignore[method-assign]
    for number in range(10_000):
        left = number
        try:
            run(root, path.with_name(f"{number}.h5"))
        except Interrupted:
            continue
        sys.exit(75 if number > 20 else 1)  # there are lines to stop at


def test_a_signal_at_any_line_that_queues_a_batch_stops_and_hangs_nothing(
    root: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    few = folder(tmp_path / "few", 12)
    process = PROCESSES.Process(target=at_every_line, args=(few, tmp_path / "f.h5"))
    process.start()
    process.join(240)
    hung = process.is_alive()
    process.kill()
    assert not hung and process.exitcode == 75
    for k in (0, 7, 20):
        assert done(tmp_path / f"{k}.h5") >= 4
        assert len(run(few, tmp_path / f"{k}.h5")) == 12


def test_a_second_signal_ends_the_process_at_once(
    root: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "f.h5"
    process = PROCESSES.Process(target=stuck, args=(root, path))
    process.start()
    deadline = time.monotonic() + 60
    while done(path) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert process.is_alive()  # it waits for the batch
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == -signal.SIGTERM
    np.testing.assert_array_equal(run(root, path).load(TAP)[0], whole)


def stuck(root: Path, path: Path) -> None:
    """Run an extraction whose forward pass does not end once eight rows are done."""
    forward = Runtime._forward

    def slow(self: Runtime, batch: Any) -> Any:
        deadline = time.monotonic() + 600 * (done(path) >= 8)
        while time.monotonic() < deadline:
            time.sleep(0.1)
        return forward(self, batch)

    Runtime._forward = slow  # type: ignore[method-assign]
    run(root, path)


def test_an_interruption_says_how_to_go_on_and_gives_the_handlers_back(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Runtime._forward, []

    def pressing(self: Runtime, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 16:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "_forward", pressing)
        with pytest.raises(Interrupted, match=r"SIGINT.*same command again") as caught:
            run(root, tmp_path / "f.h5")
    assert caught.value.exit_status == 75
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert 0 < done(tmp_path / "f.h5") < N


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_ignored_at_the_start_stays_ignored(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """As SIGINT is in ``command &`` of a script, and SIGHUP under nohup."""
    forward = Runtime._forward

    def pressing(self: Runtime, batch: Any) -> Any:
        os.kill(os.getpid(), number)
        return forward(self, batch)

    before = signal.signal(number, signal.SIG_IGN)
    try:
        monkeypatch.setattr(Runtime, "_forward", pressing)
        assert len(run(root, tmp_path / "f.h5")) == N
    finally:
        signal.signal(number, before)


def test_a_stop_keeps_what_is_computed_of_the_images_that_were_decoded_together(
    root: Path, whole: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls, path = Runtime._forward, [], tmp_path / "f.h5"

    def pressing(self: Runtime, batch: Any) -> Any:
        if StoreFile(f"{path}.partial").meta("run"):  # and not of the test images
            calls.append(len(batch))
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGINT)
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "_forward", pressing)
        with pytest.raises(Interrupted, match="Every finished batch is kept"):
            run(root, path)
    assert done(path) == sum(calls) == 12
    store = run(root, path)
    assert store.extraction.copied == 12
    np.testing.assert_array_equal(store.load(TAP)[0], whole)


def test_a_thread_may_extract_too(root: Path, whole: np.ndarray, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        store = pool.submit(run, root, tmp_path / "f.h5", workers=1).result()
    np.testing.assert_array_equal(store.load(TAP)[0], whole)


def test_a_second_run_beside_the_first_says_who_holds_the_file(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    child = Child(root, path)
    child.wait_for(4)
    with pytest.raises(StoreLocked, match=rf"process {child.pid} on "):
        run(root, path)
    child.process.join(60)
    assert child.process.exitcode == 0
    assert run(root, path).extraction.skipped


def test_after_a_crash_other_processes_decode(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    init = Loader.__init__

    def noting(self: Loader, decoder: Any, *, workers: int, **options: Any) -> None:
        counts.append(workers)
        init(self, decoder, workers=workers, **options)

    for number in (signal.SIGKILL, signal.SIGTERM):
        path = tmp_path / f"{number}.h5"
        child = Child(root, path, workers=None)
        child.wait_for(4)
        child.end(number)
        with monkeypatch.context() as patch:
            patch.setattr(Loader, "__init__", noting)
            run(root, path, workers=None)
    assert counts[0] >= 1  # killed: an image may have done it
    assert counts[1] == 0  # stopped


# --- decoding processes ---------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def open_files(pid: int) -> list[Path]:
    """Return what a process has open; files come and go meanwhile."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(descriptor.readlink())
    return found


def runs(pid: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_hold_no_lock_and_die_with_their_parent(
    root: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "f.h5"
    for rows in (4, 20):
        child = Child(root, path, workers=2)
        child.wait_for(rows)
        workers = children(child.pid)
        assert len(workers) == 2
        held = [target for pid in workers for target in open_files(pid)]
        assert held
        assert not [target for target in held if target.suffix == ".lock"]
        child.end(signal.SIGKILL)
        if rows == 4:  # the next run begins at once
            continue
        deadline = time.monotonic() + 30
        while any(runs(pid) for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    np.testing.assert_array_equal(run(root, path).load(TAP)[0], whole)


class Crashing(Decoder):
    """Ends the process that decodes image 13."""

    def decode(self, batch: Any, k: int, raw: Any) -> None:
        if batch.rows[k] == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        super().decode(batch, k, raw)


def as_an_engine(root: Path, path: Path, decoder: type[Decoder]) -> None:
    """Run an extraction in a process that may have no children, as Dask's workers are."""
    assert multiprocessing.current_process().daemon
    stream.Decoder = decoder  # type: ignore[misc]
    run(root, path, workers=2, max_failures=0.1)
    assert multiprocessing.current_process().daemon


def test_a_daemonic_process_decodes_in_threads_and_finds_the_image_that_crashed_it(
    root: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    def ended(path: Path, decoder: type[Decoder]) -> int | None:
        process = PROCESSES.Process(target=as_an_engine, args=(root, path, decoder), daemon=True)
        process.start()
        process.join()
        return process.exitcode

    assert ended(tmp_path / "good.h5", Decoder) == 0
    np.testing.assert_array_equal(FeatureStore.open(tmp_path / "good.h5").load(TAP)[0], whole)
    path = tmp_path / "bad.h5"
    assert ended(path, Crashing) == -signal.SIGKILL
    assert ended(path, Crashing) == 0
    store = FeatureStore.open(path)
    assert [failure.id for failure in store.failures] == [ImageSet.from_folder(root).ids[13]]
    assert "killed by SIGKILL" in store.failures[0].reason
    np.testing.assert_array_equal(store.load(TAP)[0], np.delete(whole, 13, 0))


# --- a campaign -----------------------------------------------------------------------------------

SCRIPT = """
import sys
from featcache.networks.backbone import Backbone
from featcache.extraction.extract import extract
from featcache.images.image_set import ImageSet
backbone = Backbone("mobilenet_v2", weights=None, image_size=96)
extract(ImageSet.from_folder(sys.argv[1]), backbone, sys.argv[2], device="cpu", batch_size=8)
"""


@pytest.mark.campaign
def test_fifty_kills_at_random_moments_change_no_bit(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", 400)
    command = [sys.executable, "-c", SCRIPT, str(images)]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole.h5")], check=True)
    length = time.monotonic() - started
    whole = FeatureStore.open(tmp_path / "whole.h5").load()[0]
    draw = random.Random(0)
    path = tmp_path / "killed.h5"
    kills = 0
    finished = 0
    while kills < 50:
        process = subprocess.Popen([*command, str(path)], start_new_session=True)
        try:
            process.wait(draw.uniform(0.2, 1.1) * length)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        else:
            assert process.returncode == 0
            np.testing.assert_array_equal(FeatureStore.open(path).load()[0], whole)
            assert FeatureStore.open(path).verify().ok
            path.unlink()
            finished += 1
    subprocess.run([*command, str(path)], check=True)
    np.testing.assert_array_equal(FeatureStore.open(path).load()[0], whole)
    print(f"{kills} kills, {finished + 1} stores finished, every bit the same")
