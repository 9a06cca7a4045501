"""Commands where the system refuses: closed or full streams, failing disks, limits, odd names."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from featcache.cli.main import main
from featcache.errors import StoreError
from featcache.store.store import FeatureStore
from tests import small, stores

ROOT = Path(__file__).parents[2]
BACKBONE = ["--backbone", "tests.small:own", "--quiet"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    stores.store(tmp_path / "a.h5")
    return tmp_path / "a.h5"


def run(*arguments: object, status: int = 0) -> str:
    """Return what a command says, which ends with this status and no traceback."""
    result = CliRunner().invoke(main, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


def shell(line: str, folder: Path) -> tuple[int, str]:
    """Return the status of a line of the shell and what it says on standard error."""
    python = f"{sys.executable} -m featcache.cli"
    done = subprocess.run(
        ["bash", "-c", line.replace("featcache", python)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    return done.returncode, done.stderr


FULL = "OutputError: Standard output cannot be written: No space left on device"
CLOSED = "OutputError: Standard output cannot be written: Bad file descriptor"


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("featcache --help > /dev/full", 1, FULL),
        ("featcache info a.h5 > /dev/full", 1, FULL),
        ("featcache export a.h5 -o - > /dev/full", 1, FULL),
        ("featcache info a.h5 >&-", 1, CLOSED),
        ("featcache export a.h5 -o a.npz 0<&- 2>&-", 0, ""),
        ("featcache info none.h5 2>&-", 1, ""),
        ("set -o pipefail; featcache export a.h5 -o - | true", 1, ""),
        ("mkdir d; cd d; rmdir ../d; featcache export ../a.h5 -o x.csv", 1, "SystemFault: The fol"),
    ],
)
def test_closed_and_full_streams_and_a_folder_that_is_gone(
    line: str, status: int, said: str, store: Path
) -> None:
    found, message = shell(line, store.parent)
    assert (found, message.count("\n")) == (status, 1 if said else 0), message
    assert message.startswith(said)


def test_a_full_standard_error_ends_no_run(tmp_path: Path) -> None:
    small.folder(tmp_path / "images", 6)
    command = "featcache extract images -o a.h5 --backbone tests.small:own 2> /dev/full"
    assert shell(command, tmp_path) == (0, "")
    assert len(FeatureStore.open(tmp_path / "a.h5")) == 6
    assert shell("featcache info none.h5 2> /dev/full", tmp_path) == (1, "")


def test_names_that_are_not_utf_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = small.folder(tmp_path / "images", 6)
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/\xff\x1b.h5"))
    (images / "ant" / "0000.jpg").rename(Path(os.fsdecode(bytes(images) + b"/ant/\xff.jpg")))
    argv = ["extract", images, "-o", odd, *BACKBONE]
    monkeypatch.setattr(sys, "argv", ["featcache", *map(str, argv)])  # kept in the store
    assert "5 computed" in run(*argv)
    assert "\\xff\\x1b.h5'" in FeatureStore.open(odd).meta["command"]
    assert "intact" in run("verify", odd)
    assert "\\xff.jpg" in run("info", odd)
    assert "5 images" in run("export", odd, "-o", odd.with_suffix(".csv"))
    assert "There is no feature file" in run("info", odd.with_suffix(".no"), status=1)


def test_a_line_break_in_a_name_makes_no_line_of_its_own(tmp_path: Path) -> None:
    images, odd = small.folder(tmp_path / "images", 6), tmp_path / "a\nintact.h5"
    predictor = odd.with_suffix(".featcache")
    for argv in (
        ("extract", images, "-o", odd, *BACKBONE),
        ("info", odd),
        ("verify", odd),
        ("export", odd, "-o", odd.with_suffix(".csv")),
        ("train", odd, "-o", predictor, "--head", "ridge", "--cv", "2"),
    ):
        assert "a\\nintact" in (said := run(*argv)) and "a\nintact" not in said, argv


def test_a_limit_of_open_files_is_not_reported_as_damage(store: Path) -> None:
    run("verify", store)  # what is imported at the first use
    with Path(os.devnull).open() as file:
        free = file.fileno()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    said = []
    for more in range(200):
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, limits[1]))
        try:
            result = CliRunner().invoke(main, ["verify", str(store)])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        if result.exit_code == 0:
            break
        said.append(result.output)
    assert "intact" in result.output and said
    for message in said:
        assert message.startswith("StoreError: Cannot read ")
        assert "Too many open files. Type: ulimit -n 65536" in message


@pytest.mark.parametrize("command", ["verify", "info", "export"])
def test_a_disk_that_cannot_be_read_is_one_message(
    command: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["-o", store.with_suffix(".csv")] if command == "export" else []
    preadv, calls = os.preadv, 0

    def failing(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        if calls >= first:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    for number in range(1, 100):
        first, calls = number, 0
        result = CliRunner().invoke(main, [command, *map(str, (store, *more))])
        if result.exit_code == 0:
            break
        assert f"Cannot read {store}: Input/output error." in result.output
    assert first > 5


def test_what_libhdf5_cannot_write_is_an_error_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Unable to create dataset (file write failed)")

    monkeypatch.setattr(h5py.h5d, "create", fail)
    with pytest.raises(StoreError, match=r"Cannot write .*a\.h5: Input/output error.*Nothing was"):
        stores.store(tmp_path / "a.h5")
    assert [one.name for one in tmp_path.iterdir()] == []


def test_leftovers_that_cannot_be_removed_do_not_fail_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.h5"
    Path(f"{path}.partial.old").write_bytes(b"of an earlier run")

    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        stores.store(path)
    assert FeatureStore.open(path).verify().ok


@pytest.mark.parametrize("options", ["ro", "size=64k"])
def test_without_shared_memory_images_are_decoded_in_the_process(
    options: str, tmp_path: Path
) -> None:
    inside = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not have mounts of his own")
    small.folder(tmp_path / "images", 12)
    command = f"mount -t tmpfs -o {options} none /dev/shm; featcache extract images -o a.h5"
    line = f"{command} --backbone tests.small:own --workers 2"
    status, said = shell(f"{' '.join(inside)} bash -c '{line}'", tmp_path)
    assert status == 0, said
    assert "Warning: Images are decoded in this process: worker processes need more" in said
    run("extract", tmp_path / "images", "-o", tmp_path / "b.h5", *BACKBONE, "--workers", 2)
    a, b = (FeatureStore.open(tmp_path / name).load()[0] for name in ("a.h5", "b.h5"))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["info", "pipe.featcache"], "PredictorError: Cannot read a predictor from pipe.featcache"),
        (["predict", "pipe", "x.jpg"], "PredictorError: Cannot read a predictor from pipe: not a"),
        (["train", "a.h5", "-o", "pipe"], "OutputError: pipe is a pipe or a device; name a file."),
        (
            ["extract", "images", "--labels", "pipe.csv"],
            "ImageSetError: pipe.csv: cannot read this",
        ),
        (["extract", "pipe.tar"], "pipe.tar: cannot read this tar: not a regular file"),
        (["extract", "pipe.parquet"], "not a regular file"),
        (["extract", "pipe.npy"], "ImageSetError: pipe.npy: cannot read this array: "),
        (["extract", "pipe.npz"], "ImageSetError: pipe.npz: cannot read this array: "),
        (["extract", "pipe.jpg"], "pipe.jpg (read: not a regular file)"),
        (["layers", "resnet18", "--weights", "./pipe.pth"], "WeightsError: There is no checkpoint"),
    ],
)
def test_nothing_waits_for_a_pipe(
    arguments: list[str], said: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    small.folder(Path("images"), 4)
    os.mkfifo(next((one for one in arguments if "pipe" in one), ""))
    if arguments[0] == "extract":
        arguments = [*arguments, *BACKBONE, "-o", "new.h5", "--workers", "0"]

    def hang(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    try:
        message = run(*arguments, status=1)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert said in message


def test_what_libhdf5_cannot_read_is_not_reported_as_damage(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Object visitation failed (file read failed: errno = 5, error message = 'Input/output'"

    def fail(*_: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(h5py.File, "visititems", fail)
    assert f"StoreError: Cannot read {store}: Input/output error" in run("info", store, status=1)


def test_a_predictor_that_cannot_be_read_now_is_not_to_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.featcache"
    path.write_bytes(b"content")

    class Failing(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(io, "FileIO", Failing)
    message = run("info", path, status=1)
    assert message.startswith(f"PredictorError: Cannot read {path}: Input/output error.")
    assert "featcache train" not in message


def test_a_signal_while_libhdf5_works_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, create, calls = h5py.File.__init__, h5py.h5f.create, 0

    def interrupted(call: Callable[..., Any]) -> Callable[..., Any]:
        def sometimes(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls in (1, 3):
                raise OSError("unable to open file: errno = 4, error message = 'Interrupted'")
            return call(*arguments, **options)

        return sometimes

    monkeypatch.setattr(h5py.File, "__init__", interrupted(opened))
    monkeypatch.setattr(h5py.h5f, "create", interrupted(create))
    stores.store(tmp_path / "a.h5")
    assert "intact" in run("verify", tmp_path / "a.h5")
    assert calls > 3


@pytest.mark.parametrize("name", ["-x.h5", "a b'c.h5", "\x1b[31mx\n.h5"])
def test_what_is_advised_can_be_typed_whatever_is_in_the_name(
    name: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(store.read_bytes())
    at = content.index(FeatureStore.open(store).load(stores.POOL)[0][3].tobytes())
    content[at] ^= 1
    store.with_name(name).write_bytes(content)
    monkeypatch.chdir(store.parent)
    said = run("verify", "--", name, status=1)
    assert said.count("mv ") - said.count("the mv ") == 1 and "without the mv" in said
    command = said.split("again: ")[1].split(", then")[0]
    assert shell(command, store.parent) == (0, "")
    assert (store.parent / f"{name}.partial").read_bytes() == content


def test_an_empty_output_is_refused_as_such(store: Path) -> None:
    said = run("export", store, "-o", "", status=2)
    assert "name a file" in said and "Move it away" not in said


def test_a_pipe_is_no_place_for_a_predictor(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    said = run("predict", tmp_path / "p", tmp_path, status=1)
    assert "Cannot read a predictor" in said and "Make one" not in said
    assert "Make one with: featcache train" in run("predict", tmp_path / "q", tmp_path, status=1)
