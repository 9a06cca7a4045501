"""Fifty attacks of each stage of the campaign: nothing is lost, silent, hung or a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.__main__ import FULL
from tests.campaign.trial import read

STAGES = list(FULL)


@pytest.mark.skipif(sys.platform != "linux", reason="the shim is written for Linux")
@pytest.mark.parametrize("stages", [STAGES[:4], STAGES[4:]], ids="-".join)
def test_fifty_attacks_of_each_stage_leave_no_fault(tmp_path: Path, stages: list[str]) -> None:
    output = tmp_path / "trials"
    command = [sys.executable, "-m", "tests.campaign", *stages, "--trials", "50"]
    ended = subprocess.run(
        [*command, "--output", str(output)],
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
