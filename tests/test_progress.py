"""What a person sees while a run goes on: in a notebook, and in the first seconds in a terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

NETWORK = '"resnet18", weights="none", image_size=64'


def test_bars_are_shown_in_a_notebook(flower_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel", reason="pip install 'featcache[notebook]'")
    nbformat = pytest.importorskip("nbformat", reason="pip install 'featcache[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'featcache[notebook]'")
    cells = [
        f"import featcache as fc\nimages = fc.ImageSet.open({str(flower_folder)!r})",
        f"store = fc.extract(images, fc.Backbone({NETWORK}), 'a.h5', workers=0, batch_size=8)",
        "fc.train(store, head='forest', cv=2)",
        "fc.train(store, head='forest', cv=2, progress=False)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    _, extracted, trained, silent = (
        "".join(one.text for one in cell.outputs if one.get("name") == "stderr")
        for cell in notebook.cells
    )
    texts = ["libraries of featcache.extract ...", "loading the network ...", "resnet18: ", "36/36"]
    places = [extracted.find(text) for text in texts]
    assert -1 not in places and places == sorted(places), extracted
    fits = {int(count) for count in re.findall(r"forest \(head 1 of 1\): (\d+) fits", trained)}
    assert len(fits) > 3, trained
    assert silent == ""


def test_a_terminal_says_at_once_what_is_being_done(flower_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "featcache.cli", "extract", str(flower_folder)]
    command += ["-o", "a.h5", "--backbone", "resnet18", "--weights", "none", "--image-size", "64"]
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (24, 100))
    with subprocess.Popen(command, cwd=tmp_path, stderr=writer, stdout=subprocess.PIPE) as run:
        os.close(writer)
        said = b""
        while True:
            try:
                said += os.read(reader, 4096)
            except OSError:  # the other end is closed
                break
        assert run.wait() == 0
    os.close(reader)
    texts = [
        b"listing the images ...",
        b"loading the libraries of featcache.extract ...",
        b"loading the network ...",
        b"checking the network ...",
        b"resnet18: ",
        b"36/36",
    ]
    places = [said.find(text) for text in texts]
    assert -1 not in places and places == sorted(places), said
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert again.stderr == b""  # nothing to do, and no terminal
