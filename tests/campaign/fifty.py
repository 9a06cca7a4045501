"""Fifty attacks of some stages, as a test."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.campaign.trial import read

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the shim is written for Linux")


def fifty_attacks_leave_no_fault(*stages: str) -> None:
    """Run a small campaign in a process of its own: the shim has to be there from its start."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "trials"
        argv = [*stages, "--trials", "50", "--output", str(output)]
        ended = subprocess.run(
            [sys.executable, "-m", "tests.campaign", *argv],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.stdout.startswith("skipped"):
            pytest.skip(ended.stdout)
        trials = read(output)
    assert {trial.stage for trial in trials} == set(stages), ended.stdout + ended.stderr
    assert not [trial for trial in trials if trial.is_fault], ended.stdout
    assert ended.returncode == 0, ended.stderr
