"""Where nothing is to be computed, nothing heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import folder

HEAVY = {"torch", "torchvision", "timm", "sklearn", "scipy"}
NETWORK = ["--backbone", "resnet18", "--weights", "none", "--image-size", "64"]


def imported(cwd: Path, *command: str) -> tuple[str, set[str]]:
    """Run a command; return its standard output, and which heavy libraries it imported."""
    code = (
        "import json, sys\nfrom featcache.cli.main import main\n"
        f"try: main({list(command)!r})\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        f"json.dump(sorted({HEAVY!r} & set(sys.modules)), sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, set(json.loads(done.stderr[done.stderr.rindex("[") :]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images, features and a predictor."""
    place = tmp_path_factory.mktemp("prompt")
    folder(place / "images", 24)
    imported(place, "extract", "images", "-o", "s.h5", *NETWORK)
    imported(place, "train", "s.h5", "-o", "p", "--head", "ridge", "--cv", "2")
    return place


def test_nothing_to_do_is_said_without_torch(place: Path) -> None:
    said, heavy = imported(place, "extract", "images", "-o", "s.h5", *NETWORK)
    assert "nothing to do" in said
    assert not heavy


def test_study_asks_for_no_network_either(place: Path) -> None:
    command = ["study", "images", "-o", "out", *NETWORK[:4], "--head", "ridge"]
    imported(place, *command)
    said, heavy = imported(place, *command)
    assert said.count("nothing to do") == 2
    assert "torchvision" not in heavy


@pytest.mark.parametrize(
    "other",
    [["--image-size", "32"], ["--layer", "layer3:mean"], ["--precision", "bfloat16"]],
    ids=lambda other: other[0],
)
def test_what_is_asked_for_otherwise_is_never_taken_for_done(place: Path, other: list[str]) -> None:
    with pytest.raises(AssertionError, match="FingerprintMismatch"):
        imported(place, "extract", "images", "-o", "s.h5", *NETWORK, *other)


@pytest.mark.parametrize(
    "command",
    [["train", "s.h5", "-o", "p2", "--head", "ridge", "--cv", "2"], ["evaluate", "p", "s.h5"]],
)
def test_training_and_evaluation_import_no_torchvision(place: Path, command: list[str]) -> None:
    _, heavy = imported(place, *command)
    assert "torchvision" not in heavy


@pytest.mark.parametrize("where", ["click", "featcache.cli.extract", "parse_args"])
def test_ctrl_c_before_the_command_has_begun_ends_it_with_75(where: str) -> None:
    code = (
        "import importlib.abc, sys\n"
        "class Stop(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *rest):\n"
        f"        if name == {where!r}: raise KeyboardInterrupt\n"
        "def stop(*args): raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from featcache.cli.__main__ import main\n"
        f"if {where == 'parse_args'}:\n"
        "    import click\n"
        "    click.Command.parse_args = stop\n"
        "sys.argv = ['featcache', 'info', 'x.h5']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 75
    assert "Traceback" not in done.stderr and "Aborted" not in done.stderr


def test_ctrl_c_while_python_ends_leaves_a_command_that_is_done_as_it_is() -> None:
    code = (
        "import atexit, os, signal, sys\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT)\n"
        "from featcache.cli.__main__ import main\n"
        "sys.argv = ['featcache', '--version']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
