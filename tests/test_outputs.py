"""Files that a user keeps are never lost to an output: what is replaced, and what is refused."""

from __future__ import annotations

import csv
import errno
import importlib
import io
import os
import secrets
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import featcache
from featcache.cli.main import main
from featcache.errors import FeatcacheError, OutputError
from featcache.finetuning.checkpoint import Checkpoint
from featcache.predictor.predictions import Prediction, write_predictions
from featcache.store.export import export_store
from featcache.study.audit import Finding, Findings
from featcache.system.files import atomic_write
from tests import small, stores

GOOD = Prediction("a,b.jpg", "cat", 0.75, (("cat", 0.75), ("dog", 0.25)))
FAILED = Prediction.failed("b.jpg", "not an image")
FOUND = Finding("copy", "a.jpg", "cat", "", 1.0, other_id="b.jpg")


def predictions(path: Path, *, force: bool = False, top_k: int = 1) -> None:
    write_predictions([GOOD, FAILED], path, top_k=top_k, force=force)


def json_predictions(path: Path, *, force: bool = False) -> None:
    write_predictions([GOOD, FAILED], path, file_format="json", force=force)


def findings(path: Path, *, force: bool = False) -> None:
    Findings((FOUND,), 2).to_csv(path, force=force)


def export(path: Path, *, force: bool = False) -> None:
    source = path.parent / "source"
    source.mkdir(exist_ok=True)
    f = stores.fingerprint(taps=(stores.POOL, stores.MAPS), views=2)
    if not (source / "a.h5").exists():
        stores.store(source / "a.h5", f=f)
    export_store(featcache.FeatureStore.open(source / "a.h5"), path, force=force)


def other_export(path: Path) -> None:
    """Write the features of other images."""
    export_store(stores.store(path.parent / "other.h5", stores.images(4)), path)


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


def parquet(path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'featcache[parquet]'")
    export(path)
    table = pq.read_table(path)  # with the metadata of the export
    pq.write_table(table.append_column("mine", table["label"]), path)


def npz(*names: str) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **dict.fromkeys(names, np.zeros(3)))


HEADER = "id,label,probability,typicality,error\n"
FINDINGS = "kind,id,label,split,score,suggested,other_id,other_label,other_split,note\n"
FEATURES = "id,label,avgpool:output:flatten[0],avgpool:output:flatten[1]\n"
# What is written, over what: True is replaced, False is refused and left byte for byte.
TABLE = [
    ("p.csv", predictions, predictions, True),
    ("p.csv", predictions, lambda path: predictions(path, top_k=2), True),
    ("p.csv", predictions, json_predictions, True),
    ("p.json", json_predictions, json_predictions, True),
    ("p.csv", predictions, text("id,label\na.jpg,cat\n"), False),
    ("p.csv", predictions, text("id,label,probability,type\na.jpg,cat,0.500000,x\n"), False),
    ("p.csv", predictions, text(f"{HEADER}a.jpg,cat,certain,,\n"), False),
    ("p.csv", predictions, text(f"{HEADER}a.jpg,cat,0.500000,,,mine\n"), False),
    ("p.csv", predictions, text("x" * 300_000), False),
    ("p.csv", predictions, findings, False),
    ("p.json", json_predictions, text('[\n {"id": "a", "label": "cat"}\n]\n'), False),
    ("p.json", json_predictions, text('[\n {"id": '), False),
    ("f.csv", findings, findings, True),
    ("f.csv", findings, text(f"{FINDINGS}mine,a,b,,1.000000,,,,,\n"), False),
    ("f.csv", findings, text(f"{FINDINGS}copy,a,b,,1.000000,,,,,,mine\n"), False),
    ("f.csv", findings, predictions, False),
    ("e.csv", export, export, True),
    ("e.csv", export, other_export, True),
    ("e.csv", export, text("id,label\na.jpg,cat\n"), False),
    ("e.csv", export, text("id,label,notes\na.jpg,cat,[0]\n"), False),
    ("e.csv", export, text(f"{FEATURES}a.jpg,cat,1.5,mine\n"), False),
    ("e.csv", export, predictions, False),
    ("e.npz", export, other_export, True),
    ("e.npz", export, npz("ids", "labels"), False),
    ("e.npz", export, npz("ids", "labels", "fingerprints", "mine"), False),
    ("e.npy", export, export, True),
    ("e.npy", export, other_export, False),
    ("e.npy", export, lambda path: np.save(path, np.zeros((2, 2), np.float32)), False),
    ("e.parquet", export, other_export, True),
    ("e.parquet", export, parquet, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "there", "replaced"), TABLE)
def test_what_is_replaced_and_what_is_refused(
    name: str, write: Callable[..., None], there: Callable[[Path], None], replaced: bool,
    tmp_path: Path,
) -> None:  # fmt: skip
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="pip install 'featcache[parquet]'")
    path = tmp_path / name
    write(path)
    expected = path.read_bytes()
    path.unlink()
    there(path)
    before = path.read_bytes()
    if replaced:
        write(path)
    else:
        with pytest.raises(OutputError, match=r"is there already and is not .*It is left as it"):
            write(path)
        assert path.read_bytes() == before
        write(path, force=True)
    assert path.read_bytes() == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return images, their store, and a predictor."""
    root = tmp_path_factory.mktemp("trained")
    images = featcache.ImageSet.open(small.folder(root / "images", 24))
    featcache.extract(images, featcache.Backbone("tests.small:own"), root / "a.h5")
    featcache.train_files(root / "a.h5", root / "a.featcache", head="ridge", cv=2)
    return root / "images", root / "a.h5", root / "a.featcache"


OWN = ["--backbone", "tests.small:own"]
COMMANDS = {
    "export": ("x.npz", lambda images, store, predictor: [store, "-o"]),
    "predict": ("x.csv", lambda images, store, predictor: [predictor, images, *OWN, "-o"]),
    "audit": ("x.csv", lambda images, store, predictor: [store, "-o"]),
    "evaluate": ("x.html", lambda images, store, predictor: [predictor, store, "--report"]),
    "export-model": ("x.pt2", lambda images, store, predictor: [predictor, *OWN, "-o"]),
}


@pytest.mark.parametrize(
    ("command", "late"),
    [("evaluate", "featcache.report.page.render"), ("export-model", "torch.export.export")],
)
def test_what_came_while_the_output_was_made_is_left(
    command: str, late: str, trained: tuple[Path, Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    name, arguments = COMMANDS[command]
    module, _, function = late.rpartition(".")
    owner = importlib.import_module(module)
    original = getattr(owner, function)

    def written(*args: Any, **options: Any) -> Any:
        (tmp_path / name).write_text("mine")
        return original(*args, **options)

    monkeypatch.setattr(owner, function, written)
    argv = [command, *arguments(*trained), tmp_path / name]
    result = CliRunner().invoke(main, [*map(str, argv)])
    assert result.exit_code == 1 and "is left as it is" in result.output
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("command", COMMANDS)
def test_force_replaces_what_is_not_ours_and_no_folder(
    command: str, trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    name, arguments = COMMANDS[command]
    path = tmp_path / name
    path.write_text("id,label\nmy own work\n")

    def run(*more: object) -> str:
        result = CliRunner().invoke(
            main, [command, *map(str, (*arguments(*trained), path, *more))], catch_exceptions=False
        )
        assert result.exit_code == (path.is_dir() or not more), result.output
        return result.stderr

    assert "is there already and is not a" in run()
    assert path.read_text() == "id,label\nmy own work\n"
    run("--force")
    assert "my own work" not in path.read_text(errors="replace")
    path.unlink()
    path.mkdir()
    assert "is a folder" in run("--force")


def test_a_study_leaves_a_table_that_is_no_leaderboard(
    trained: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    table = tmp_path / "images-tests.small_own-leaderboard.csv"
    table.write_text("head,mine\nsvm,good\n")
    arguments = ["study", str(trained[0]), *OWN, "-o", str(tmp_path), "--head", "ridge"]
    for more, status in (([], 1), (["--cv", "2"], 0)):
        result = CliRunner().invoke(main, [*arguments, *more])
        assert result.exit_code == status, result.output
        if status:
            assert "is not a leaderboard of featcache" in result.stderr
            assert table.read_text() == "head,mine\nsvm,good\n"
            table.unlink()


# --- how a file comes to its place --------------------------------------------------------------


def checkpoint(path: Path) -> None:
    Checkpoint(path, "this").write({"best": 3})


WRITERS = {"p.csv": predictions, "f.csv": findings, "e.npz": export, "c.pt": checkpoint}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_durable_when_it_is_said_to_be_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / name, []
    export(tmp_path / "e.npz")  # makes the store
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        fsync(descriptor)
        steps.append(kind)

    def recorded_replace(source: Path, target: Path) -> None:
        replace(source, target)
        steps.append("rename")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    WRITERS[name](path)
    assert steps[-3:] == ["file", "rename", "folder"]


def folders_fail(descriptor: int) -> None:
    """Take the place of `os.fsync` on a disk that is dying."""
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("name", [*WRITERS, "a.h5"])
def test_a_folder_that_cannot_be_synced_is_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "e.npz")
    monkeypatch.setattr(os, "fsync", folders_fail)
    with pytest.raises(FeatcacheError, match="Input/output error"):
        WRITERS.get(name, stores.store)(tmp_path / name)


def test_links_beside_an_output_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "p.csv"
    victim.write_text("precious")
    (tmp_path / f".p.csv.{os.getpid()}.tmp").symlink_to(victim)
    predictions(path)
    assert victim.read_text() == "precious"
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0" * 2 * n)
    (tmp_path / f".p.csv.{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(OutputError, match=r"p\.csv cannot be written: File exists"):
        predictions(path)
    assert victim.read_text() == "precious"


def test_the_bits_of_a_file_that_is_replaced_stay(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    predictions(path)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    path.chmod(0o440)
    predictions(path, top_k=2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o440


def test_what_a_killed_command_leaves_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    code = (
        "import os, pathlib, signal, sys\n"
        "from featcache.system.files import atomic_write\n"
        "with atomic_write(pathlib.Path(sys.argv[1])) as file:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, path], check=False)
    assert killed.returncode == -signal.SIGKILL
    (litter,) = tmp_path.iterdir()
    with atomic_write(path) as file:
        (mine,) = tmp_path.iterdir()
        assert mine != litter
        predictions(path)  # another writer leaves alone what is being written
        assert mine.exists()
        file.write(b"last")
    assert path.read_bytes() == b"last"
    assert list(tmp_path.iterdir()) == [path]


def test_pipes_devices_and_names_that_cannot_be_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for force in (False, True):
        with pytest.raises(OutputError, match="is a pipe or a device"):
            predictions(tmp_path / "pipe", force=force)
    longest = tmp_path / f"{'é' * 125}.csv"
    predictions(longest)
    predictions(longest)
    (tmp_path / "loop").symlink_to("loop")
    for name in (f"{'x' * 300}.csv", "a\0b.csv", "loop"):
        with pytest.raises(OutputError, match="cannot be written"):
            predictions(tmp_path / name)


# --- what stands in it --------------------------------------------------------------------------

HOSTILE = ["=cmd|'/C calc'!A0", "+1", "-1", "@SUM(1)", "\tx", "\rx", "a\x1b]0;title\x07", "\x9b2J"]


def hostile_store(path: Path) -> featcache.FeatureStore:
    """Return a store whose ids and labels are formulas and steer a terminal."""
    return stores.store(path, stores.Images(HOSTILE, labels=HOSTILE))


def hostile_findings(path: Path, **how: bool) -> None:
    Findings(tuple(Finding("outlier", id, id, "", 1.5) for id in HOSTILE), 8).to_csv(path, **how)


def hostile_predictions(path: Path, **how: bool) -> None:
    write_predictions([Prediction(id, id, 0.5, ((id, 0.5),)) for id in HOSTILE], path, **how)


def hostile_export(path: Path, **how: bool) -> None:
    export_store(hostile_store(path.parent / "a.h5"), path, **how)


@pytest.mark.parametrize("write", [hostile_findings, hostile_predictions, hostile_export])
def test_for_spreadsheets_formulas_become_text(write: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for excel in (False, True, True):
        write(path, excel=excel)
        content = path.read_bytes()
        assert content.startswith(b"\xef\xbb\xbf") == excel
        lines = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))
        expected = [f"'{id}" if excel and id[0] in "=+-@\t\r" else id for id in HOSTILE]
        assert [line["id"] for line in lines] == [line["label"] for line in lines] == expected
        for name, cell in lines[0].items():
            assert not name.endswith("]") or float(cell) is not None


def test_tables_for_spreadsheets_come_back_as_labels(tmp_path: Path) -> None:
    ids = ["-1.png", "=2.png", "'-3.png", "'4.png", "plain.png"]
    labels = ["+1", "@home", "'=x", "'quoted'", "a; b"]
    for name in ids:
        Image.new("L", (4, 4)).save(tmp_path / name)
    store = stores.store(tmp_path / "s.h5", stores.Images(ids, labels=labels))
    export_store(store, tmp_path / "export.csv", excel=True)
    found = [
        Prediction(id, label, 0.5, ((label, 0.5),)) for id, label in zip(ids, labels, strict=True)
    ]
    write_predictions(found, tmp_path / "predicted.csv", excel=True)
    resaved = (tmp_path / "predicted.csv").read_text("utf-8-sig")
    rows = list(csv.reader(io.StringIO(resaved)))
    with (tmp_path / "resaved.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=";").writerows([*rows, [""] * 5, [""]])
    for table in ("export.csv", "predicted.csv", "resaved.csv"):
        images = featcache.ImageSet.from_csv(tmp_path / table, tmp_path)
        assert dict(zip(images.ids, images.labels, strict=True)) == dict(
            zip(ids, labels, strict=True)
        )
    plain = tmp_path / "plain.csv"  # without the mark, cells are what they are
    plain.write_text("id,label\nplain.png,'=x\n")
    assert featcache.ImageSet.from_csv(plain, tmp_path).classes == ["'=x"]


def test_help_says_why_spreadsheets_have_an_option_of_their_own() -> None:
    for command in ("export", "predict", "audit"):
        text = " ".join(CliRunner().invoke(main, [command, "--help"]).output.split())
        assert "--excel Write CSV for spreadsheets" in text and "it changes ids such as -1" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("write", [hostile_findings, hostile_predictions, export_store])
def test_nothing_in_a_store_steers_a_terminal(
    write: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = hostile_store(tmp_path / "a.h5")
    monkeypatch.setattr(sys, "stdout", Terminal())
    given = [store] if write is export_store else []
    write(*given, Path("-"))
    assert sys.stdout.getvalue().replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "arguments",
    [["info"], ["info", "--json"], ["verify"], ["train", "-o", "x"], ["audit", "-o", "-"]],
)
def test_no_command_steers_a_terminal(arguments: list[str], tmp_path: Path) -> None:
    hostile_store(tmp_path / "a\x1b.h5")
    found = CliRunner().invoke(main, [arguments[0], str(tmp_path / "a\x1b.h5"), *arguments[1:]])
    said = found.stderr if arguments[0] == "audit" else found.output
    assert said.replace("\n", "").isprintable()
