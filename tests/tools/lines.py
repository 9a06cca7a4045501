"""Count lines of code, without blank lines, comments and docstrings, and compare with the budgets.

``python tests/tools/lines.py`` prints a line a package. It never fails: a budget is for reading.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "featcache"
FIRST_WING = ("system", "pixels", "images", "networks", "store", "extraction")
NOT_COUNTED = ("networks/surgery.py", "networks/identity.py", "store/splitting.py")
LARGE = ("store/store.py", "store/writer.py")
IGNORED = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def lines_of_code(text: str) -> int:
    """Count the lines that hold a token of code, docstrings left out."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and (ast.get_docstring(node, clean=False) is not None):
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    code = {
        line
        for token in tokens
        if token.type not in IGNORED
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - docstrings)


def main() -> None:
    """Print the lines of each package with its modules, then the budgets."""
    modules = {
        path.relative_to(ROOT).as_posix(): lines_of_code(path.read_text())
        for path in sorted(ROOT.rglob("*.py"))
    }
    for package in sorted({path.rpartition("/")[0] for path in modules}):
        own = {path: n for path, n in modules.items() if path.rpartition("/")[0] == package}
        listed = ", ".join(f"{Path(path).stem} {n}" for path, n in own.items() if n)
        print(f"{sum(own.values()):6,}  {package or 'featcache'}: {listed}")
    wing = {path: n for path, n in modules.items() if path.split("/")[0] in FIRST_WING}
    wing |= {path: modules[path] for path in ("errors.py", "fingerprint.py")}
    first = sum(n for path, n in wing.items() if path not in NOT_COUNTED)
    large = [f"{path} {n}" for path, n in wing.items() if n > 350 and path not in LARGE]
    print(f"{first:6,}  stage one and store (budget 5,700)")
    print(f"{sum(modules.values()):6,}  whole package (budget 15,500)")
    print(f"{len(large):6}  modules of the first wing above 350: {', '.join(large) or 'none'}")


if __name__ == "__main__":
    main()
