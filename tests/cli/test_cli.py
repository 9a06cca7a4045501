"""The command line as a user meets it: outputs, exit statuses, and messages for mistakes."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from PIL import Image

from featcache import FeatureStore, train
from featcache.cli.main import main
from featcache.finetuning.settings import SuffixSettings
from featcache.heads.table import HEADS

NETWORK = ["--backbone", "resnet18", "--weights", "none", "--image-size", "64"]
FAST = ["--batch-size", "8", "--workers", "0", "--no-compile", "--device", "cpu"]


def featcache(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> str:
    result = featcache(*arguments)
    assert result.exit_code == 0, result.stderr + repr(result.exception)
    return result.stdout


def fail(*arguments: object, status: int = 1) -> str:
    """Run a command that must end with one message, and return the message."""
    result = featcache(*arguments)
    assert result.exit_code == status, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result.stderr


def extract(images: object, store: Path, *more: object) -> str:
    return succeed("extract", images, "-o", store, *NETWORK, *FAST, *more)


@pytest.fixture(scope="module")
def store(flower_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "flowers.h5"
    extract(flower_folder, path)
    return path


@pytest.fixture(scope="module")
def predictor(store: Path) -> Path:
    path = store.with_suffix(".featcache")
    succeed("train", store, "-o", path, "--head", "svm", "--cv", "3")
    return path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["extract", "--help"], ["train", "--help"], ["--version"]]
)
def test_help_imports_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom featcache.cli.main import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'torchvision', 'sklearn', 'numpy', 'h5py', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_help_text_is_whole_and_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name, command in [("", main), *main.commands.items()]:
        text = succeed(*name.split(), "--help")
        assert "\\" not in text
        assert max(map(len, text.splitlines())) <= 80
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, (name, option.name)
    listed = succeed("--help")
    for name in main.commands:
        assert re.search(rf"^  {name} +[A-Z].*[^.]\.$", listed, re.MULTILINE), name


def test_processes_say_nothing_on_standard_error_but_what_featcache_says(
    flower_folder: Path, tmp_path: Path
) -> None:
    def run(*arguments: object, status: int = 0) -> str:
        command = [sys.executable, "-m", "featcache.cli", *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stderr

    assert run("layers", "resnet18", "--image-size", "64") == ""
    bar = run("extract", flower_folder, "-o", "s.h5", *NETWORK)
    assert re.fullmatch(r"(\s*resnet18: +\d+%\|.*\| \d+/36 \[.*img/s\]\s*)+", bar)
    assert run("train", "s.h5", "-o", "p", "--head", "forest", "--cv", "2") == ""
    assert run("predict", "p", flower_folder / "rose") == ""
    usage = run("layers", status=2)
    assert re.fullmatch(
        r"Usage: featcache layers \[OPTIONS\] BACKBONE\nTry 'featcache layers .*' for help\.\n\n"
        r"Error: Missing argument 'BACKBONE'\.\n",
        usage,
    )
    message = run("layers", "resnet8", status=1)
    assert re.fullmatch(r"UnknownBackbone: .* Near names: .*\n", message)


def test_help_shows_the_defaults_of_the_suffix() -> None:
    text = " ".join(succeed("train", "--help").split())
    settings = vars(SuffixSettings())
    for name in ["epochs", "batch_size", "lr", "schedule", "unfreeze_every", "patience", "device"]:
        assert re.search(rf"--{name.replace('_', '-')} .*? \[{settings[name]}\] ", text), name
    assert f"to the last epoch. [{settings['validation']:.0%}]" in text


def test_layers_lists_every_layer_with_its_cost() -> None:
    table = json.loads(succeed("layers", "resnet18", "--json"))
    by_name = {row["layer"]: row for row in table["layers"]}
    assert by_name["avgpool"]["output_shape"] == [512, 1, 1]
    assert by_name["fc"]["parameters"] == 513_000
    assert table["default_taps"] == ["avgpool:output:flatten"]
    assert "avgpool:output:flatten" in succeed("layers", "resnet18")


def test_extract_says_what_it_did_and_then_that_nothing_is_to_do(
    flower_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s.h5"
    first = json.loads(extract(flower_folder, path, "--json"))
    written = path.stat().st_mtime_ns
    second = json.loads(extract(flower_folder, path, "--json"))
    assert (first["computed"], first["failed"], first["skipped"]) == (36, 0, False)
    assert (second["computed"], second["skipped"]) == (0, True)
    assert path.stat().st_mtime_ns == written


def test_a_second_extract_loads_no_weights(flower_folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.pth"
    import torch
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), weights)
    path = tmp_path / "s.h5"
    command = ["extract", flower_folder, "-o", path, "--backbone", "resnet18", "--weights", weights]
    succeed(*command, "--image-size", "64", *FAST)
    # Same size and time, other bytes: reading the file would be noticed.
    stat = weights.stat()
    weights.write_bytes(bytes(stat.st_size))
    import os

    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "nothing to do" in succeed(*command, "--image-size", "64", *FAST)


def test_csv_labels_groups_and_splits_reach_the_store(flower_folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.tsv"
    rows = [f"{k}\trose/{k:04d}\t{'red' if k % 2 else 'white'}\tbush{k // 4}" for k in range(12)]
    table.write_text("n\tname\tcolour\tbush\n" + "\n".join(rows) + "\n")
    path = tmp_path / "s.h5"
    columns = ["--id-column", "name", "--label-column", "colour", "--group-column", "bush"]
    extract(flower_folder, path, "--labels", table, *columns, "--suffix", ".jpg")
    described = json.loads(succeed("info", path, "--json"))
    assert described["images"] == 12
    assert described["classes"] == {"red": 6, "white": 6}


def test_info_is_readable_at_a_glance(store: Path) -> None:
    text = succeed("info", store)
    for part in ["36 images", "daisy 12", "avgpool:output:flatten", "(512,) float32", "resnet18"]:
        assert part in text


def test_info_and_verify_describe_a_predictor(predictor: Path, tmp_path: Path) -> None:
    text = succeed("info", predictor)
    for part in [
        "svm", "3 (daisy, rose, tulip)", "resnet18", "avgpool:output:flatten", "fingerprint",
        "27 images", "held out", "cross-validation",
    ]:  # fmt: skip
        assert part in text, part
    described = json.loads(succeed("info", predictor, "--json"))
    assert described["classes"] == ["daisy", "rose", "tulip"]
    assert described["metrics"]["held_out"]["images"] == 9
    assert described["fingerprints"][0]["backbone"] == "resnet18"
    assert "intact" in succeed("verify", predictor)
    assert json.loads(succeed("verify", predictor, "--json"))["ok"] is True

    damaged = tmp_path / "damaged.featcache"
    content = bytearray(predictor.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    for command in ("info", "verify"):
        assert "It is damaged: its SHA-256" in fail(command, damaged)


def test_a_feature_file_and_a_predictor_are_told_apart(store: Path, predictor: Path) -> None:
    for command in (["predict", store, "x.jpg"], ["evaluate", store, predictor]):
        message = fail(*command)
        assert f"{store} is not a usable predictor: It is an HDF5 file, as feature files" in message
    message = fail("audit", predictor, "-o", "-")
    assert f"{predictor} is not a feature file" in message and "move it away" not in message


def featcache_ids(path: Path) -> list[str]:
    return FeatureStore.open(path).ids.tolist()


def test_what_could_not_be_read_and_what_has_no_label_is_told(
    flower_folder: Path, tmp_path: Path
) -> None:
    images, path = tmp_path / "images", tmp_path / "s.h5"
    shutil.copytree(flower_folder, images)
    (images / "rose" / "broken.jpg").write_bytes(b"")
    said = succeed("extract", images, "-o", path, *NETWORK, *FAST)
    assert "not read: rose/broken.jpg (an empty file (0 bytes))" in said
    table = tmp_path / "labels.csv"
    names = featcache_ids(path)
    lines = [f"{name},{name[0] if k else ''}" for k, name in enumerate(names)]
    table.write_text("\n".join(["id,label", *lines, "rose/broken.jpg,r"]))
    succeed("extract", images, "-o", path, *NETWORK, *FAST, "--labels", table)
    said = succeed("train", path, "-o", tmp_path / "p.featcache", "--head", "ridge", "--cv", "2")
    assert "1 without a label left out" in said
    assert "1 image has no features, such as rose/broken.jpg" in said
    notes = train(FeatureStore.open(path), head="ridge", cv=2).leaderboard.notes
    assert "1 image has no features, such as rose/broken.jpg" in notes


def test_a_file_without_features_stops_no_other_command(
    flower_folder: Path, tmp_path: Path
) -> None:
    broken, path = tmp_path / "broken.jpg", tmp_path / "s.h5"
    broken.write_bytes(b"")
    fail("extract", broken, "-o", path, *NETWORK, *FAST)
    succeed("extract", flower_folder, "-o", path, *NETWORK, *FAST, "--image-size", "40")
    message = fail("info", f"{path}.partial")
    assert f"There is no {path}.partial: {path} is there, and finished." in message


def test_info_of_a_partial_file_names_the_command_that_goes_on(
    flower_folder: Path, tmp_path: Path
) -> None:
    images, path = tmp_path / "images", tmp_path / "s.h5"
    shutil.copytree(flower_folder, images)
    for name in "ab":
        (images / "rose" / f"{name}.jpg").write_bytes(b"")
    fail("extract", images, "-o", path, *NETWORK, *FAST, "--max-failures", "1%")
    for name in (path, f"{path}.partial"):
        for command in ("info", "verify"):
            message = fail(command, name)
            assert f"{path} is not finished: 36 of 38 images are done in {path}.partial" in message
            assert "run the same command again: featcache extract" in message
    assert "featcache extract IMAGES -o x.h5\n" in fail("info", "x.h5.partial")
    assert "featcache train STORE.h5 -o x.featcache" in fail("info", "x.featcache")
    Path(f"{path}.partial").unlink()
    Path(f"{path}.partial.plan").touch()
    for name in (path, f"{path}.partial"):
        message = fail("info", name)
        assert f"{path} is not finished: it is computed in parts" in message


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (
            "urls.txt",
            "a text file. IMAGES are the images themselves: if it lists their files, type",
        ),
        ("data.csv", "a table. To label images with it, name their folder and type: --labels data"),
        ("other.h5", "a feature file: its images are computed. To train on it, type: featcache tr"),
    ],
)
def test_what_is_no_image_is_refused_with_what_to_type(
    predictor: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("https://example.org/a.jpg\n")
    for command in (["extract", name, "-o", "new.h5", *NETWORK], ["predict", predictor, name]):
        assert f"{name} is {what}" in " ".join(fail(*command).split())
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_train_predict_and_evaluate(predictor: Path, store: Path, flower_folder: Path) -> None:
    out = succeed("predict", predictor, flower_folder / "rose", "--top-k", "2", *FAST[:4])
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["id"] for row in rows[:2]] == ["0000.jpg", "0001.jpg"]
    assert {"label", "probability", "label_2", "probability_2", "error"} <= set(rows[0])
    assert {row["label"] for row in rows} == {"rose"}
    scores = json.loads(succeed("evaluate", predictor, store, "--json"))
    assert scores["accuracy"] > 0.8
    assert scores["images"] == 9  # a quarter of 36: the rows that it was not trained on


def test_train_again_is_nothing_to_do(predictor: Path, store: Path) -> None:
    before = predictor.stat().st_mtime_ns
    assert "nothing to do" in succeed("train", store, "-o", predictor, "--head", "svm", "--cv", "3")
    assert predictor.stat().st_mtime_ns == before


def test_study_does_both_stages_and_nothing_twice(flower_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bokeh", reason="pip install 'featcache[report]'")
    out = tmp_path / "out"
    arguments = ["study", flower_folder, "-o", out, "--backbone", "resnet18", "--weights", "none"]
    arguments += ["--head", "ridge"]
    first = succeed(*arguments)
    name = f"{flower_folder.name}-resnet18-none"
    endings = (".h5", ".featcache", "-leaderboard.csv", ".html")
    assert {path.name for path in out.iterdir()} == {name + ending for ending in endings}
    assert "36 computed" in first and "best by cross-validation: ridge" in first
    assert first.splitlines()[-1] == f"report: {out / name}.html"
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = succeed(*arguments)
    assert again.count("nothing to do") == 2
    assert again.splitlines()[-1] == f"report: {out / name}.html"
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_the_bar_of_predict_names_the_network(
    predictor: Path, flower_folder: Path, tmp_path: Path
) -> None:
    result = featcache("predict", predictor, flower_folder / "rose", "-o", tmp_path / "p.csv")
    assert result.exit_code == 0 and "resnet18: " in result.stderr


def test_help_names_the_heads_in_the_order_of_messages() -> None:
    text = " ".join(succeed("train", "--help").split())
    assert f"{', '.join(HEADS)}, all, or suffix" in text
    assert "the others take a random part of each class" in text


def test_train_says_which_layers_it_joined(flower_folder: Path, tmp_path: Path) -> None:
    assert "Default: all of STORES, side by side." in " ".join(succeed("train", "--help").split())
    path = tmp_path / "s.h5"
    extract(flower_folder, path, "--layer", "layer1", "--layer", "layer3")
    trained = ["train", path, "-o", tmp_path / "p", "--head", "ridge", "--cv", 2]
    joined = "features: layer1:output:mean + layer3:output:mean (320 columns)"
    assert joined in succeed(*trained)
    assert joined in succeed(*trained)  # nothing to do
    assert "features: layer3:output:mean (256 columns)" in succeed(*trained, "--layer", "layer3")


def test_help_says_what_a_network_of_ones_own_returns() -> None:
    said = " ".join(succeed("layers", "--help").split())
    assert "without arguments, that returns (torch.nn.Module, featcache.Preprocessing)" in said
    assert 'see "featcache layers --help"' in " ".join(succeed("extract", "--help").split())


def test_predict_reports_an_unreadable_image_instead_of_dropping_it(
    predictor: Path, flower_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(flower_folder / "rose" / "0000.jpg", tmp_path / "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"")
    output = tmp_path / "labels.csv"
    succeed("predict", predictor, tmp_path, "-o", output, *FAST[:4])
    rows = list(csv.DictReader(output.read_text().splitlines()))
    assert [(row["id"], row["label"]) for row in rows] == [("a.jpg", "rose"), ("b.jpg", "")]
    assert rows[1]["error"]


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".csv"])
def test_export_writes_features_that_other_tools_read(
    store: Path, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"features{suffix}"
    succeed("export", store, "-o", path)
    if suffix == ".npy":
        assert np.load(path).shape == (36, 512)
    elif suffix == ".npz":
        with np.load(path) as archive:
            assert any(array.shape == (36, 512) for array in archive.values())
    else:
        assert len(path.read_text().splitlines()) == 37


def test_evaluate_refuses_features_of_another_network_and_says_what_differs(
    predictor: Path, flower_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.h5"
    extract(flower_folder, other, "--layer", "layer3:mean")
    message = fail("evaluate", predictor, other)
    assert "FingerprintMismatch:" in message
    assert "layer3" in message
    assert "avgpool" in message


def test_extract_refuses_to_replace_features_of_another_network(
    store: Path, flower_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "flowers.h5"
    shutil.copy(store, path)
    before = path.read_bytes()
    message = fail("extract", flower_folder, "-o", path, *NETWORK, *FAST, "--layer", "layer3:mean")
    assert "layer3" in message
    assert path.read_bytes() == before


def test_mistakes_get_one_message(flower_folder: Path, store: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    new = tmp_path / "new.h5"
    assert "empty" in fail("extract", empty, "-o", new, *NETWORK)
    assert "nowhere" in fail("extract", tmp_path / "nowhere", "-o", new, *NETWORK)
    assert "resnet18" in fail("extract", flower_folder, "-o", new, "--backbone", "resnet8")
    message = fail("extract", flower_folder, "-o", new, *NETWORK, *FAST, "--layer", "avgpol")
    assert "avgpool" in message
    assert "missing.h5" in fail("info", tmp_path / "missing.h5")
    (tmp_path / "junk.h5").write_bytes(b"junk" * 100)
    assert "junk.h5" in fail("info", tmp_path / "junk.h5")
    assert "junk.h5" in fail("predict", tmp_path / "junk.h5", flower_folder)
    assert "lineer" in fail("train", store, "-o", tmp_path / "p.featcache", "--head", "lineer")
    assert not new.exists()
    assert not (tmp_path / "p.featcache").exists()


def test_no_command_makes_a_folder_for_its_file(
    flower_folder: Path, store: Path, predictor: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "typed wrong"
    for command, name in (
        (["extract", flower_folder, *NETWORK, "-o"], "f.h5"),
        (["train", store, "-o"], "f.featcache"),
        (["predict", predictor, flower_folder, "-o"], "f.csv"),
        (["evaluate", predictor, store, "--report"], "f.html"),
        (["audit", store, "-o"], "f.csv"),
        (["export", store, "-o"], "f.npz"),
        (["export-model", predictor, "-o"], "f.onnx"),
    ):
        message = fail(*command, missing / name)
        assert f"There is no folder {missing} to write {name} in" in message
        assert f"mkdir -p '{missing}'" in message
        assert not missing.exists()


def test_verify_finds_a_flipped_bit(store: Path, tmp_path: Path) -> None:
    assert "intact" in succeed("verify", store)
    import h5py

    damaged = tmp_path / "damaged.h5"
    shutil.copy(store, damaged)
    with h5py.File(damaged, "r") as file:
        offset = file["features/avgpool:output:flatten"].id.get_offset()
    with damaged.open("r+b") as file:
        file.seek(offset + 5)
        byte = file.read(1)
        file.seek(offset + 5)
        file.write(bytes([byte[0] ^ 1]))
    assert "daisy/0000.jpg" in fail("verify", damaged)


def test_one_class_is_refused_and_a_small_one_is_said(flower_folder: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    shutil.copytree(flower_folder / "rose", one / "rose")
    extract(one, tmp_path / "one.h5")
    message = fail("train", tmp_path / "one.h5", "-o", tmp_path / "p", "--head", "svm")
    assert "rose" in message
    shutil.copytree(flower_folder / "tulip", one / "tulip")
    for path in sorted((one / "tulip").iterdir())[3:]:
        path.unlink()
    extract(one, tmp_path / "few.h5")
    said = succeed("train", tmp_path / "few.h5", "-o", tmp_path / "p", "--head", "svm")
    assert "fewer than 5 folds, having fewer images: 'tulip'" in said


def test_too_many_failures_end_the_run_and_keep_the_good_rows(
    flower_folder: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(flower_folder, images)
    (images / "rose" / "zero.jpg").write_bytes(b"")
    (images / "rose" / "text.jpg").write_text("not an image")
    path = tmp_path / "s.h5"
    message = fail("extract", images, "-o", path, *NETWORK, *FAST, "--max-failures", "1%")
    assert "TooManyFailures:" in message
    assert "--max-failures" in message
    summary = json.loads(extract(images, path, "--max-failures", "10%", "--json"))
    assert summary["failed"] == 2
    assert summary["computed"] == 0  # the 36 good rows were kept
    failures = json.loads(succeed("info", path, "--json"))["failures"]
    assert len(failures) == 2


def test_columns_without_a_table_are_a_usage_error(flower_folder: Path, tmp_path: Path) -> None:
    command = ["extract", flower_folder, "-o", tmp_path / "f.h5", *NETWORK]
    for flag in ("--id-column", "--label-column", "--group-column", "--split-column", "--suffix"):
        message = fail(*command, flag, "label", status=2)
        assert f"{flag} is for a table of labels; name it with --labels" in message


def test_usage_errors_exit_with_2(tmp_path: Path) -> None:
    assert featcache("extract").exit_code == 2
    assert featcache("extract", tmp_path, "-o", tmp_path / "x.h5").exit_code == 2
    assert "1%" in fail(
        "extract", tmp_path, "-o", "x", *NETWORK, "--max-failures", "many", status=2
    )
    assert "1GB" in fail("train", "x", "-o", "y", "--memory", "lots", status=2)


def test_an_interrupted_run_exits_with_75(
    monkeypatch: pytest.MonkeyPatch, flower_folder: Path, tmp_path: Path
) -> None:
    from featcache.errors import Interrupted

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted("interrupted after 8 of 36 images; run the same command again to resume")

    monkeypatch.setattr("featcache.extract", interrupted)
    message = fail("extract", flower_folder, "-o", tmp_path / "s.h5", *NETWORK, status=75)
    assert "resume" in message


def test_a_dash_is_standard_output_wherever_text_is_written(
    store: Path,
    predictor: Path,
    flower_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("-").write_text("a file of this name is left alone")
    for command, ending in (
        (["audit", store], ".csv"),
        (["export", store], ".csv"),
        (["predict", predictor, flower_folder / "rose", *FAST[:4]], ".csv"),
        (["predict", predictor, flower_folder / "rose", *FAST[:4], "--format", "json"], ".json"),
    ):
        written = Path(command[0] + ending)
        succeed(*command, "-o", written)
        result = featcache(*command, "-o", "-")
        assert (result.exit_code, result.stdout) == (0, written.read_text())
        assert "-:" not in result.stderr
    for command in (
        ["extract", flower_folder, *NETWORK],
        ["train", store],
        ["export-model", predictor],
        ["export", store, "--json"],
    ):
        assert "name a file" in fail(*command, "-o", "-", status=2)
    assert Path("-").read_text() == "a file of this name is left alone"


def test_json_is_one_object_for_every_command_that_writes_a_file(
    store: Path, predictor: Path, flower_folder: Path, tmp_path: Path
) -> None:
    predict = ["predict", predictor, flower_folder / "rose", *FAST[:4], "--json"]
    found = json.loads(succeed(*predict))
    assert found["predictor"] == str(predictor) and len(found["predictions"]) == 12
    assert found["predictions"][0]["id"] == "0000.jpg"
    assert found["predictions"][0]["label"] == "rose"
    written = json.loads(succeed(*predict, "-o", tmp_path / "p.csv"))
    assert written == found | {"output": str(tmp_path / "p.csv")}
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 13

    found = json.loads(succeed("audit", store, "-o", tmp_path / "a.csv", "--json"))
    assert found["images"] == 36
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert [one["id"] for one in found["findings"]] == [row["id"] for row in rows]

    found = json.loads(succeed("export", store, "-o", tmp_path / "f.npy", "--json"))
    assert found["output"] == str(tmp_path / "f.npy")
    assert (found["images"], found["columns"]) == (36, 512)
    assert "36 images, 512 columns" in succeed("export", store, "-o", tmp_path / "f.npy")

    found = json.loads(succeed("export-model", predictor, "-o", tmp_path / "m.pt2", "--json"))
    assert found["output"] == str(tmp_path / "m.pt2")
    assert found["bytes"] == (tmp_path / "m.pt2").stat().st_size


def test_quiet_leaves_errors_alone_on_standard_error(
    flower_folder: Path, predictor: Path, tmp_path: Path
) -> None:
    assert all(
        "quiet" in {one.name for one in command.params} for command in main.commands.values()
    )
    images = tmp_path / "images"
    shutil.copytree(flower_folder, images / "train")
    for name in ("daisy", "rose", "tulip"):
        (images / "test" / name).mkdir(parents=True)
        shutil.copy(flower_folder / name / "0003.jpg", images / "test" / name)
    for command in (
        ["extract", images, "-o", tmp_path / "s.h5", *NETWORK, *FAST],
        ["train", tmp_path / "s.h5", "-o", tmp_path / "p", "--head", "svm", "--cv", "3"],
        ["predict", predictor, flower_folder / "rose", "-o", tmp_path / "p.csv"],
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            result = featcache(*command, "--quiet")
        assert (result.exit_code, result.stderr) == (0, ""), result.exception
    assert featcache(*command).stderr  # the bar
    assert "There is no feature file nowhere.h5" in fail("info", "nowhere.h5", "--quiet")
    assert "No such option" in fail("--quiet", "info", "--nothing", status=2)


@pytest.fixture
def foreground() -> Iterator[None]:
    """Let signals work: a job in the background, or under nohup, inherits that they are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hangup)


@pytest.mark.usefixtures("foreground")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_where_nothing_is_kept_a_command_says_one_line(
    monkeypatch: pytest.MonkeyPatch, store: Path, tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr("featcache.train_files", lambda *_, **__: signal.raise_signal(number))
    message = fail("train", store, "-o", tmp_path / "p", "--head", "forest", status=75)
    assert message.strip() == "Interrupted: Stopped by a signal. Run the same command again."
    assert signal.getsignal(number) is before


def test_a_warning_is_one_line(flower_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(flower_folder, tmp_path / "images" / "train")
    for name in ("daisy", "rose", "tulip"):
        (tmp_path / "images" / "test" / name).mkdir(parents=True)
        shutil.copy(flower_folder / name / "0003.jpg", tmp_path / "images" / "test" / name)
    extract(tmp_path / "images", tmp_path / "s.h5")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = featcache(
            "train", tmp_path / "s.h5", "-o", tmp_path / "p.featcache", "--head", "svm", "--cv", "3"
        )
    assert result.exit_code == 0
    warned = [line for line in result.stderr.splitlines() if "byte for byte" in line]
    assert len(warned) == 1 and warned[0].startswith("Warning: 3 training images are")
    assert ".py" not in result.stderr


def test_a_predictor_never_replaces_a_file_of_another_kind(store: Path, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    fail("train", store, "-o", precious, "--head", "svm", "--cv", "3")
    assert precious.read_text() == "years of work"


def test_bfloat16_and_float16_storage_are_recorded(flower_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    extract(flower_folder, path, "--precision", "bfloat16", "--store-dtype", "float16")
    text = succeed("info", path)
    assert "bfloat16" in text
    assert "float16" in text


def test_views_give_the_features_an_axis(flower_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.h5"
    extract(flower_folder, path, "--views", "3")
    assert "(3, 512)" in succeed("info", path)


def test_one_image_of_another_size(predictor: Path, tmp_path: Path) -> None:
    Image.new("L", (7, 300), 200).save(tmp_path / "strip.png")
    rows = list(csv.DictReader(succeed("predict", predictor, tmp_path / "strip.png").splitlines()))
    assert rows[0]["id"].endswith("strip.png")
    assert rows[0]["label"]


def test_predict_gives_sets_of_labels_and_abstains(predictor: Path, flower_folder: Path) -> None:
    command = ["predict", predictor, flower_folder / "rose", *FAST[:4]]
    result = featcache(*command, "--coverage", "80%")
    assert result.stdout.startswith("id,label,probability,labels,typicality,error\n")
    assert (
        "labels: the sets held the true label of at least 80.0% of 27 images when" in result.stderr
    )
    made = json.loads(succeed(*command, "--abstain", "--json"))
    assert made["coverage"] == 0.95 and len(made["notes"]) == 1
    for one in made["predictions"]:
        assert 0 <= one["typicality"] <= 1
        assert one["label"] == ("" if len(one["labels"]) > 1 else one["labels"][0])
    message = fail(*command, "--coverage", "0.99")
    assert "told from 99 images on" in message and "has 27: ask for 0.964 or less" in message


def test_the_rest_of_the_network_is_trained_from_its_maps(
    store: Path, flower_folder: Path, tmp_path: Path
) -> None:
    message = fail("train", store, "-o", tmp_path / "p", "--head", "suffix", "--from", "layer4")
    assert "--layer layer4:input:map" in message
    maps, target = tmp_path / "maps.h5", tmp_path / "p.featcache"
    extract(flower_folder, maps, "--layer", "layer4:input:map", "--store-dtype", "float16")
    options = ["--head", "suffix", "--from", "layer4.1", "--cv", "2", "--device", "cpu"]
    options += ["--epochs", "2", "--batch-size", "8", "--lr", "0.01", "--unfreeze-every", "1"]
    assert "suffix (from layer4.1" in succeed("train", maps, "-o", target, *options)
    assert "nothing to do" in succeed("train", maps, "-o", target, *options)
    assert "accuracy" in succeed("evaluate", target, maps)
    lines = succeed("predict", target, flower_folder / "rose", "--workers", "0").splitlines()
    assert len(lines) == 13 and lines[0] == "id,label,probability,typicality,error"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps.h5", "p.featcache"]


def test_weights_of_the_suffix_are_those_of_the_network_that_the_features_are_of(
    flower_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    mine, other = tmp_path / "mine.pt", tmp_path / "other.pt"
    for file in (mine, other):
        torch.save(torchvision.models.resnet18(num_classes=3).state_dict(), file)
    maps, target = tmp_path / "maps.h5", tmp_path / "p.featcache"
    network = ["--backbone", "resnet18", "--weights", mine, "--image-size", "64"]
    taps = ["--layer", "layer4:input:map", "--partial"]
    succeed("extract", flower_folder, "-o", maps, *network, *FAST, *taps)
    command = ["train", maps, "-o", target, "--head", "suffix", "--from", "layer4.1", "--cv", "2"]
    command += ["--epochs", "1", "--device", "cpu"]
    assert "with --weights FILE" in fail(*command)
    assert "state_sha256" in fail(*command, "--weights", other)
    assert "suffix (from layer4.1" in succeed(*command, "--weights", mine)


@pytest.mark.parametrize("option", [["--from", "layer4"], ["--lr", "0.1"], ["--backbone", "a:b"]])
def test_options_of_the_suffix_are_refused_for_other_heads(
    store: Path, tmp_path: Path, option: list[str]
) -> None:
    message = fail("train", store, "-o", tmp_path / "p", "--head", "linear", *option, status=2)
    assert f"{option[0]} is for --head suffix" in message
