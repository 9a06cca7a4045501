"""The package as a whole: its names, its imports, and what stands in its files."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.version import Version

import featcache
from tests.tools import constraints

ROOT = Path(featcache.__file__).parent


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert sorted(featcache.__all__) == featcache.__all__
    for name in featcache.__all__:
        assert getattr(featcache, name).__name__ == name


def test_import_loads_no_heavy_library() -> None:
    code = (
        "import featcache, sys\n"
        "assert not {'torch', 'sklearn', 'numpy', 'h5py'} & set(sys.modules)\n"
        "try: featcache.nothing\n"
        "except AttributeError as error: assert 'nothing' in str(error)\n"
        "else: raise AssertionError"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_package_and_no_table_of_options_loads_a_heavy_library() -> None:
    light = [f"featcache.{path.parent.name}" for path in sorted(ROOT.glob("*/__init__.py"))]
    light += ["featcache.cli.options", "featcache.cli.main", "featcache.finetuning.settings"]
    code = (
        f"import sys, {', '.join(light)}\n"
        "heavy = {'torch', 'torchvision', 'sklearn', 'numpy', 'scipy', 'h5py'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_package_says_what_lives_there_and_holds_no_code() -> None:
    for path in ROOT.glob("*/__init__.py"):
        (docstring,) = ast.parse(path.read_text()).body
        assert isinstance(docstring, ast.Expr), path
        said = ast.literal_eval(docstring.value)
        assert all(f"\n{word}" in said for word in ("In:", "Here:", "May import:")), path
        assert "Out:" in said, path


def imports(path: Path) -> set[str]:
    """Return the modules of featcache that a module imports at its top, for types alone as well."""
    found = set()
    nodes = ast.parse(path.read_text()).body
    if path != ROOT / "__init__.py":  # it names what is imported when it is first used
        nodes += [inner for node in nodes if isinstance(node, ast.If) for inner in node.body]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("featcache"):
            if node.module == "featcache":
                found |= {f"featcache.{alias.name}" for alias in node.names}
            else:
                found.add(str(node.module))
    return found


def test_imports_run_in_no_circle() -> None:
    graph = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        graph[name] = imports(path) - {name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_module_unpickles() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = f"{node.value.id}.{node.attr}"
                assert called not in {"pickle.load", "pickle.loads", "joblib.load"}, path


def test_every_package_that_is_asked_for_is_bounded_from_below_and_from_above() -> None:
    asked = constraints.requirements()
    free = {name for name, one in asked.items() if constraints.bound(one, "==") is None}
    above = constraints.upper_bounds()
    assert above.keys() == free
    for name in free:
        lowest = constraints.bound(asked[name], ">=")
        assert lowest is not None and lowest <= above[name], name


def test_bounds_are_raised_to_what_is_installed_and_never_lowered_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constraints, "FILE", tmp_path / "constraints.txt")
    constraints.FILE.write_text("# by hand\nnumpy<=1.0\npytest<=9999\n")
    constraints.refresh()
    above = constraints.upper_bounds()
    assert above["numpy"] == Version(Version(np.__version__).public)
    assert above["pytest"] == Version("9999")
    assert (
        f"pytest {pytest.__version__} is installed: its bound stays 9999" in capsys.readouterr().err
    )
    constraints.refresh(lower=True)
    assert constraints.upper_bounds()["pytest"] == Version(pytest.__version__)
