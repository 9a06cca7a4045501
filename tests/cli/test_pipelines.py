"""What can be typed after `make`: the options of both stages, and what their messages advise."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from featcache.cli.extract import extract
from featcache.cli.main import main
from featcache.cli.study import study
from featcache.cli.train import train
from pipelines.classify import classify
from pipelines.features import features

ROOT = Path(__file__).parent.parent.parent
FAST = "--image-size 64 --head ridge --batch-size 8 --workers 0"


def make(target: str, **variables: object) -> list[Result]:
    """Run the stages of a target of the Makefile, up to the first that fails."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    given = [f"{name}={value}" for name, value in variables.items()]
    shown = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "MAKEFLAGS=", target, *given],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    results = []
    for stage, arguments in re.findall(r"pipelines/(features|classify)\.py (.*) \|\|", shown):
        command = {"features": features, "classify": classify}[stage]
        results.append(CliRunner().invoke(command, shlex.split(arguments)))
        if results[-1].exit_code:
            break
    return results


def table(path: Path, flowers: Path, few: int) -> Path:
    """Write a table with columns of other names, and `few` images of the second class."""
    rows = [f"rose/{k:04d};red;bush{k // 2}" for k in range(12)]
    rows += [f"daisy/{k:04d};white;meadow{k}" for k in range(few)]
    path.write_text("\n".join(["file;colour;site", *rows]) + "\n")
    assert (flowers / "daisy" / "0000.jpg").exists()
    return path


def asked(flowers: Path, folder: Path, few: int) -> dict[str, Any]:
    """Return the variables of make for such a table and an untrained network."""
    return {
        "IMAGES": flowers,
        "LABELS": table(folder / "labels.csv", flowers, few),
        "BACKBONE": "resnet18",
        "WEIGHTS": "none",
        "OUT": folder / "out",
    }


def test_every_option_of_extract_and_train_is_one_of_a_study_too() -> None:
    own = {"output", "as_json", "stores", "images"}
    of_suffix = {one.name for one in train.params if "suffix: " in (getattr(one, "help", "") or "")}
    wanted = {one.name for one in (*extract.params, *train.params)} - own
    for command in (study, features, classify):
        missing = wanted - {one.name for one in command.params}
        assert missing <= of_suffix


def test_make_passes_the_options_of_both_stages_on(flower_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bokeh", reason="pip install 'featcache[report]'")
    columns = "--id-column file --suffix .jpg --label-column colour --group-column site"
    chosen = "--truncated accept --exclude '*/0011.jpg' --group --cv 2 --test-size 20%"
    arguments = {**asked(flower_folder, tmp_path, 8), "ARGS": f"{FAST} {columns} {chosen}"}
    first, second = make("classify", **arguments)
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert "19 computed" in first.output
    assert "2 grouped folds" in second.output
    store = (
        tmp_path / "out" / f"{flower_folder.name}-resnet18-none-image_size_64-truncated_accept.h5"
    )
    described = CliRunner().invoke(main, ["info", str(store)]).output
    assert "red 11, white 8" in described
    first, second = make("classify", **arguments)
    assert "nothing to do" in first.output and "nothing to do" in second.output


def test_a_rare_class_needs_no_flag(flower_folder: Path, tmp_path: Path) -> None:
    arguments = asked(flower_folder, tmp_path, 5)
    columns = f"{FAST} --id-column file --suffix .jpg --label-column colour"
    _, done = make("classify", **arguments, ARGS=columns)
    assert done.exit_code == 0, done.output
    assert "1 class is in fewer than 5 folds, having fewer images" in done.output


def test_make_help_names_the_variables() -> None:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in ("IMAGES", "LABELS", "BACKBONE", "WEIGHTS", "LAYER", "HEAD", "OUT", "ARGS"):
        assert re.search(rf"\b{name}\b", shown)
