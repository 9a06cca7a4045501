"""A job in parts: several devices, an engine's tasks, kills and stops; always the same bits."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from featcache.errors import (
    DecodeError,
    DeviceError,
    ExtractionError,
    FingerprintMismatch,
    StoreError,
    TooManyFailures,
)
from featcache.extraction.extract import extract
from featcache.images import sources
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.forward import Runtime
from featcache.store.disk import WriteLock
from featcache.store.file import StoreFile
from featcache.store.store import FeatureStore
from tests.small import backbone, folder, network, photograph

N = 44
OWN = "tests.small:own"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("parts") / "images", N)


@pytest.fixture(scope="module")
def whole(root: Path) -> str:
    """Return the hash of one process's features."""
    return sha256(run(root, root.parent / "whole.h5"))


def sha256(store: FeatureStore) -> str:
    return hashlib.sha256(store.load()[0].tobytes()).hexdigest()


def run(root: Path, path: Path, *, network: str = OWN, **options: Any) -> FeatureStore:
    options = {"batch_size": 4, "workers": 0, "device": "cpu", **options}
    return extract(ImageSet.open(root), Backbone(network, layers=["pool"]), path, **options)


def beside(path: Path) -> list[str]:
    return sorted(other.name for other in path.parent.glob(f"{path.name}*"))


# --- the same bits --------------------------------------------------------------------------------


def test_parts_give_the_bits_of_one_process(root: Path, whole: str, tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    with ThreadPoolExecutor(2) as threads:
        store = run(root, path, executor=threads, parts=5)
    assert sha256(store) == whole
    assert store.verify().ok
    assert list(store.ids) == list(ImageSet.open(root).ids)
    assert (store.extraction.computed, store.extraction.copied) == (N, 0)
    assert store.extraction.seconds["forward"] > 0
    assert beside(path) == ["f.h5"]
    assert run(root, path, device=["cpu", "cpu"]).extraction.skipped
    with h5py.File(path, "a") as file:
        file["mine"] = 1
    with pytest.raises(StoreError, match="did not write: mine"):  # before any part is begun
        run(root, path, executor=Recording(), parts=5, retry_failed=True)
    assert beside(path) == ["f.h5"]


def test_files_of_a_user_that_are_named_like_parts_stay(
    root: Path, whole: str, tmp_path: Path
) -> None:
    names = ["f.h5.part-notes.txt", "f.h5.part-1", "f.h5.old-part-0000.txt"]
    for name in names:
        (tmp_path / name).write_text("mine")
    with ThreadPoolExecutor(2) as threads:
        assert sha256(run(root, tmp_path / "f.h5", executor=threads, parts=3)) == whole
    assert beside(tmp_path / "f.h5") == sorted(["f.h5", *names])


class Recording(Executor):
    """Runs a call when it is submitted, in this thread, and keeps what would travel."""

    def __init__(self, lose: Callable[[int], bool] = lambda number: False) -> None:
        self.calls: list[bytes] = []
        self.lose = lose

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls.append(pickle.dumps((function, args, kwargs)))
        future: Future[Any] = Future()
        if self.lose(len(self.calls)):
            future.set_exception(RuntimeError("the worker was lost"))
            return future
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def test_a_device_that_is_not_there_is_refused_before_anything_is_begun(
    root: Path, tmp_path: Path
) -> None:
    for other in ("cuda", "quantum"):
        with pytest.raises((DeviceError, ExtractionError)):
            run(root, tmp_path / "f.h5", device=["cpu", other])
    with pytest.raises(ExtractionError, match="device is a name or several, not none"):
        run(root, tmp_path / "f.h5", device=[])
    assert not list(tmp_path.glob("f.h5*"))


def test_two_devices_report_what_the_file_holds(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", 8)
    (root / "ant" / "bad.jpg").write_bytes(b"not an image")
    path = tmp_path / "f.h5"
    store = run(root, path, device=["cpu", "cpu"], max_failures=0.5)
    said, kept = store.extraction, store.meta["run"]
    assert (said.images, said.computed, said.copied, said.failed) == (9, 8, 0, 1)
    assert (len(store), len(store.failures)) == (8, 1)
    for name, count in {"images": 9, "computed": 8, "copied": 0, "failed": 1}.items():
        assert kept[name] == count
    assert store.meta["settings"] == said.settings  # every device computed with these
    one = run(root, tmp_path / "one.h5", max_failures=0.5)
    differ = {"threads", "fixed_slots"}
    assert {k: v for k, v in said.settings.items() if k not in differ} == {
        k: v for k, v in one.extraction.settings.items() if k not in differ
    }
    more = run(root, path, device=["cpu", "cpu"], max_failures=0.5, retry_failed=True)
    assert (more.extraction.computed, more.extraction.copied, more.extraction.failed) == (0, 8, 1)


def test_complete_parts_are_read_again_where_that_is_asked_or_a_fault_may_have_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, path, read = folder(tmp_path / "images", N), tmp_path / "f.h5", ImageSet.read
    monkeypatch.setattr(sources, "stamp", lambda status: 1)
    picture = images / "ant" / "0000.bmp"
    Image.new("RGB", (8, 8), "red").save(picture)

    def fault(self: ImageSet, row: int) -> bytes:
        if self.ids[row] == "ant/0002.jpg":
            raise DecodeError("system", "could not be read now")
        return read(self, row)

    with monkeypatch.context() as patch, pytest.raises(ExtractionError):
        patch.setattr(ImageSet, "read", fault)
        run(images, path, executor=Recording(lose=lambda number: number > 2), parts=2)
    assert f"{path.name}.part-0000" in beside(path)
    Image.new("RGB", (8, 8), "blue").save(picture)
    store = run(images, path, executor=Recording(), parts=2, rehash=True)
    assert not store.failures
    assert sha256(store) == sha256(run(images, tmp_path / "fresh.h5"))


UNGUARDED = """
import sys
import featcache as fc

images, backbone = fc.ImageSet.open(sys.argv[1]), fc.Backbone("tests.small:own")
try:
    fc.extract(images, backbone, "f.h5", device=["cpu", "cpu"])
except fc.errors.ExtractionError as error:
    print(error, file=sys.stderr)
"""


def test_a_script_without_its_guard_is_told_so(root: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED)
    said = subprocess.run(
        [sys.executable, "script.py", str(root)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    ).stderr
    assert said == (
        "The processes end as soon as they are started. Name one device, or put what your script "
        'does below if __name__ == "__main__":\n'
    )
    assert beside(tmp_path / "f.h5") == []


# What pip makes of the entry in pyproject.toml.
SCRIPT = """
import sys
from featcache.cli.main import main
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.parametrize("how", [["featcache"], ["-m", "featcache.cli"]], ids=["script", "module"])
def test_the_command_line_computes_on_two_devices(
    root: Path, whole: str, tmp_path: Path, how: list[str]
) -> None:
    (tmp_path / "featcache").write_text(SCRIPT)
    command = f"extract {root} -o f.h5 --backbone {OWN} --layer pool --batch-size 4 --workers 0"
    subprocess.run(
        [sys.executable, *how, *command.split(), "--device", "cpu", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
    )
    assert sha256(FeatureStore.open(tmp_path / "f.h5")) == whole


def test_a_task_is_small(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", 300)
    executor = Recording()
    run(root, tmp_path / "f.h5", executor=executor, parts=3)
    assert len(executor.calls) == 4  # the choice of settings comes first
    assert max(map(len, executor.calls)) < 10_000


# --- the disk says what is done -------------------------------------------------------------------


def test_a_lost_future_is_submitted_again_and_a_complete_part_is_not(
    root: Path, whole: str, tmp_path: Path
) -> None:
    executor = Recording(lose=lambda number: number in (1, 3))  # the settings, and a part
    store = run(root, tmp_path / "f.h5", executor=executor, parts=3)
    assert sha256(store) == whole
    assert len(executor.calls) == 2 + 3 + 1


def test_futures_that_are_lost_every_time_end_the_run_and_cost_nothing(
    root: Path, whole: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.h5"
    executor = Recording(lose=lambda number: number > 2)
    with pytest.raises(ExtractionError, match=r"part 1: .*worker was lost.*same command again"):
        run(root, path, executor=executor, parts=3)
    assert len(executor.calls) == 1 + 3 + 2 + 2
    assert "f.h5.part-0000" in beside(path)
    store = run(root, path, executor=Recording(), parts=3)
    assert sha256(store) == whole
    first = 12  # rows of the part that was complete
    assert (store.extraction.copied, store.extraction.computed) == (first, N - first)
    assert beside(path) == ["f.h5"]


def test_what_was_begun_in_parts_goes_on_in_the_same_parts(
    root: Path, whole: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.h5"
    with pytest.raises(ExtractionError):
        run(root, path, executor=Recording(lose=lambda number: number > 2), parts=3)
    with pytest.warns(UserWarning, match="goes on in 3 parts"):
        store = run(root, path, executor=Recording(), parts=5)
    assert sha256(store) == whole
    assert store.extraction.copied == 12


def test_parts_of_other_images_or_batches_are_copied_from(root: Path, tmp_path: Path) -> None:
    images = folder(tmp_path / "images", N)
    path = tmp_path / "f.h5"
    with pytest.raises(ExtractionError):
        run(images, path, executor=Recording(lose=lambda number: number > 2), parts=3)
    photograph(images / "ant" / "-first.jpg", 1234)  # every other image moves on by one row
    store = run(images, path, executor=Recording(), parts=2)
    assert (store.extraction.copied, store.extraction.computed) == (12, N + 1 - 12)
    assert sha256(store) == sha256(run(images, tmp_path / "fresh.h5"))
    assert beside(path) == ["f.h5"]


def test_a_store_grows_in_parts(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", N)
    path = tmp_path / "f.h5"
    run(images, path)
    photograph(images / "bee" / "9999.jpg", 1234)
    photograph(images / "ant" / "0000.jpg", 4321)
    store = run(images, path, executor=Recording(), parts=3)
    assert (store.extraction.copied, store.extraction.computed) == (N - 1, 2)
    assert sha256(store) == sha256(run(images, tmp_path / "fresh.h5"))


def test_parts_of_other_features_are_refused(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    with pytest.raises(ExtractionError):
        run(root, path, executor=Recording(lose=lambda number: number > 2), parts=3)
    there = beside(path)
    with pytest.raises(FingerprintMismatch, match=r"(?s)store_dtype.*another file with -o"):
        run(root, path, store_dtype="float16")
    assert beside(path) == there


def test_failures_are_left_out_and_tried_again(tmp_path: Path) -> None:
    images = folder(tmp_path / "images", N)
    for name in ("ant/0000.jpg", "ant/0002.jpg", "ant/0004.jpg", "ant/0006.jpg", "bee/0043.jpg"):
        (images / name).write_bytes(b"no image")
    path = tmp_path / "f.h5"
    with pytest.raises(TooManyFailures, match="5 of 44"):
        # none of part 0 can be decoded
        run(images, path, executor=Recording(), parts=11, max_failures=0.01)
    photograph(images / "ant" / "0000.jpg", 0)
    store = run(images, path, executor=Recording(), parts=11, max_failures=0.5)
    assert (len(store), len(store.failures), store.extraction.failed) == (N - 4, 4, 4)
    assert store.extraction.computed == 1
    assert sha256(store) == sha256(run(images, tmp_path / "fresh.h5", max_failures=0.5))
    assert beside(path) == ["f.h5"]


@pytest.mark.parametrize("passes", [9, 13])  # of the second part: for test images, for images
def test_a_part_for_which_memory_runs_out_says_which_batch_would_do(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    path = tmp_path / "f.h5"
    forward, calls = Runtime._forward, []

    def running_out(self: Runtime, batch: torch.Tensor) -> Any:
        calls.append(len(batch))
        if len(calls) > passes and len(batch) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return forward(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Runtime, "_forward", running_out)
        with pytest.raises(ExtractionError, match=r"(?s)batch_size: 4 .*, 2 .*--batch-size 2 "):
            run(root, path, executor=Recording(), parts=2)
    store = run(root, path, executor=Recording(), parts=2, batch_size=2)
    assert store.extraction.settings["batch_size"] == 2
    assert store.extraction.copied == 20  # the first part
    assert sha256(store) == sha256(run(root, tmp_path / "two.h5", batch_size=2))


# --- what an engine cannot take -------------------------------------------------------------------


def test_what_is_only_in_memory_goes_to_processes_of_our_own(root: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 40, 3), dtype=np.uint8)
    arrays = ImageSet.from_arrays(pixels)
    options: dict[str, Any] = {"batch_size": 4, "workers": 0}
    executor = Recording()
    with pytest.raises(ExtractionError, match=r"package\.module:callable"):
        extract(ImageSet.open(root), backbone(), tmp_path / "a.h5", executor=executor, parts=2)
    with pytest.raises(ExtractionError, match=r"np\.save"):
        extract(arrays, Backbone(OWN), tmp_path / "b.h5", executor=executor, parts=2)
    with pytest.raises(ExtractionError, match="parts="):
        extract(ImageSet.open(root), Backbone(OWN), tmp_path / "c.h5", executor=executor)
    assert executor.calls == []
    one = extract(arrays, backbone(), tmp_path / "one.h5", device="cpu", **options)
    two = extract(arrays, backbone(), tmp_path / "two.h5", device=["cpu", "cpu"], **options)
    assert sha256(one) == sha256(two)


def test_a_callable_may_take_its_weights_from_a_file(root: Path, tmp_path: Path) -> None:
    torch.save(network(seed=7).state_dict(), tmp_path / "seven.pt")
    images, options = ImageSet.open(root), {"batch_size": 4, "workers": 0, "device": "cpu"}
    net = Backbone(OWN, weights=tmp_path / "seven.pt", layers=["pool"])
    one = extract(images, net, tmp_path / "one.h5", **options)
    two = extract(images, net, tmp_path / "two.h5", executor=Recording(), parts=2, **options)
    assert sha256(one) == sha256(two)
    assert one.fingerprint.weights == "seven.pt"


@pytest.mark.parametrize("source", ["callable", "torchvision"])
def test_a_plan_does_not_make_a_task_import_anything(
    root: Path, tmp_path: Path, source: str
) -> None:
    path = tmp_path / "f.h5"
    executor = Recording(lose=lambda number: number > 1)
    with pytest.raises(ExtractionError):
        run(root, path, executor=executor, parts=2)
    plan = Path(f"{path}.partial.plan")
    text = plan.read_text().replace(OWN, "tests.small:slow")
    plan.write_text(text.replace('"callable"', f'"{source}"'))
    function, args, _ = pickle.loads(executor.calls[1])
    with pytest.raises(ExtractionError, match=r"tests\.small:slow"):
        function(*args)


def test_a_machine_that_cannot_compute_as_the_job_asks_refuses_to(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.h5"

    def uncompiled(function: Any, **options: Any) -> Any:
        return function

    def without_compiler(function: Any, **options: Any) -> Any:
        def compiling(*inputs: Any) -> Any:
            raise RuntimeError("no C++ compiler here")

        return compiling

    class Mixed(ThreadPoolExecutor):
        """The first call, which chooses the settings, runs on the only machine with a compiler."""

        calls = 0

        def submit(self, *call: Any, **named: Any) -> Future[Any]:
            self.calls += 1
            compiler = uncompiled if self.calls == 1 else without_compiler
            monkeypatch.setattr("torch.compile", compiler)
            return super().submit(*call, **named)

    with (
        Mixed(1) as executor,
        pytest.raises(ExtractionError, match=r"compiled: True .*, False \(here\)\n.*--no-compile"),
    ):
        run(root, path, executor=executor, parts=2, compile=True)
    store = run(root, path, executor=Recording(), parts=2, compile=False)
    assert store.extraction.computed == N
    assert store.extraction.settings["compiled"] is False


def test_a_task_leaves_signal_handlers_alone(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGCHLD]
    seen: list[Any] = []

    class Engine(Recording):
        """Runs tasks in its own thread, as engines do, with handlers of its own."""

        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            def task() -> Any:
                try:
                    return function(*args, **kwargs)
                finally:
                    seen.append([signal.getsignal(number) for number in numbers])

            with ThreadPoolExecutor(1) as thread:
                return thread.submit(task)

    before = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        mine = [signal.getsignal(number) for number in numbers]
        with ThreadPoolExecutor(1) as thread:  # nothing of the main process's own either
            thread.submit(run, root, path, executor=Engine(), parts=2, workers=1).result()
        assert seen == [mine] * 3
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


# --- stopped and killed ---------------------------------------------------------------------------


class Child:
    """``featcache extract`` with two devices and a slow network, in a session of its own."""

    def __init__(self, root: Path, path: Path, devices: int = 2) -> None:
        command = [sys.executable, "-m", "featcache.cli", "extract", str(root), "-o", str(path)]
        command += ["--backbone", "tests.small:slow", "--layer", "pool", "--batch-size", "4"]
        command += ["--workers", "1", *["--device", "cpu"] * devices]
        self.path = path
        self.process = subprocess.Popen(
            command, start_new_session=True, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, rows: int) -> None:
        """Return when tasks have said that so many rows are done, or the parts are merged."""
        deadline = time.monotonic() + 120
        while done(self.path) < rows:
            assert time.monotonic() < deadline
            assert self.process.poll() is None
            time.sleep(0.01)

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal to the main process; return its status and what it said."""
        self.process.send_signal(number)
        _, said = self.process.communicate()
        return self.process.returncode, said

    def is_alone(self) -> None:
        """Return when no process of the session is left."""
        deadline = time.monotonic() + 20
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)
                time.sleep(0.01)
            pytest.fail("a process outlived its parent")


def done(path: Path) -> int:
    """Return how many rows of parts are done."""
    total = 0
    for part in path.parent.glob(f"{path.name}.part-????*"):
        with contextlib.suppress(StoreError):
            if not part.name.endswith(".lock"):
                total += int(np.count_nonzero(StoreFile(str(part)).read("rows")["status"]))
    return total


def test_stopped_and_killed_it_goes_on_at_once(root: Path, whole: str, tmp_path: Path) -> None:
    path = tmp_path / "f.h5"
    child = Child(root, path)
    child.wait_for(4)
    status, said = child.end(signal.SIGINT)
    assert status == 75
    assert [line for line in said.splitlines() if line and "img/s" not in line] == [
        "Interrupted: Stopped by SIGINT. Every finished batch is kept: "
        "run the same command again to go on."
    ]
    kept = done(path)
    assert kept >= 4
    child = Child(root, path)
    child.wait_for(kept + 4)
    kept = done(path)
    child.end(signal.SIGKILL)
    store = run(root, path, network="tests.small:slow", device=["cpu", "cpu"], workers=1)
    child.is_alone()
    assert sha256(store) == whole
    assert store.extraction.copied >= kept
    assert beside(path) == ["f.h5"]


@pytest.mark.campaign
def test_twenty_kills_at_random_moments_change_no_bit(
    root: Path, whole: str, tmp_path: Path
) -> None:
    path, draw = tmp_path / "f.h5", random.Random(0)
    Child(root, path).process.communicate()
    path.unlink()
    kills = finished = 0
    while kills < 20:
        child = Child(root, path)
        try:
            _, said = child.process.communicate(timeout=draw.uniform(1, 15))
        except subprocess.TimeoutExpired:
            child.end(signal.SIGKILL)
            kills += 1
        else:
            assert child.process.returncode == 0, said
            assert sha256(FeatureStore.open(path)) == whole
            path.unlink()
            finished += 1
        child.is_alone()
    assert sha256(run(root, path, network="tests.small:slow", device=["cpu", "cpu"])) == whole
    assert beside(path) == ["f.h5"]
    print(f"{kills} kills, {finished + 1} stores finished, every bit the same")


def test_a_kill_while_merging_loses_nothing(
    root: Path, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.h5"
    unlink, removed = Path.unlink, []

    def unplugged(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok)
        if re.search(r"part-\d+$", self.name):
            removed.append(self)
            if len(removed) == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unplugged)
        with pytest.raises(KeyboardInterrupt):
            run(root, path, executor=Recording(), parts=5)
    assert len([name for name in beside(path) if ".part-" in name]) == 2
    executor = Recording()
    store = run(root, path, executor=executor, parts=5)
    assert executor.calls == []
    assert sha256(store) == whole
    assert (store.extraction.copied, store.extraction.computed) == (N, 0)
    assert beside(path) == ["f.h5"]


def test_a_part_that_an_old_task_fills_is_waited_for(
    root: Path, whole: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.h5"
    lock = WriteLock(f"{path}.part-0001")
    release = threading.Timer(2, lock.release)
    release.start()
    with ThreadPoolExecutor(1) as threads:
        assert sha256(run(root, path, executor=threads, parts=3)) == whole
    release.join()
