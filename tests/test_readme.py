"""Every command of README.md runs, and prints what README.md shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("readme", Path(__file__).with_name("readme.py"))
assert spec is not None
assert spec.loader is not None
readme = importlib.util.module_from_spec(spec)
import sys  # noqa: E402

sys.modules["readme"] = readme
spec.loader.exec_module(readme)

PAGE = (readme.ROOT / "README.md").read_text()


def test_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    pytest.importorskip("elpv_dataset", reason="pip install 'featcache[demo]'")
    results = readme.run_page(PAGE, readme.workplace(tmp_path))
    assert results
    assert readme.differences(results) == ""
