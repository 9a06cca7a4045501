"""Write tests/constraints.txt: the newest versions that the tests passed with, as upper bounds.

Run it (or ``make constraints``) where the tests have passed with newer versions. A bound is never
lowered, unless ``--lower`` is given. ``--lowest`` prints the lowest versions that pyproject.toml
allows instead, for ``pip install -c``.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "constraints.txt"
HEADER = """\
# The newest versions that the tests passed with. Written by `make constraints`.
"""


def requirements() -> dict[str, Requirement]:
    """Return what pyproject.toml asks for, extras included, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(text) for texts in lists for text in texts]
    return {one.name: one for one in sorted(found, key=lambda one: one.name.lower())}


def bound(requirement: Requirement, operator: str) -> Version | None:
    """Return the version that a requirement states with an operator."""
    stated = [Version(one.version) for one in requirement.specifier if one.operator == operator]
    return stated[0] if stated else None


def upper_bounds() -> dict[str, Version]:
    """Return the bounds that the file states, by name."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    stated = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {one.name: found for one in stated if (found := bound(one, "<="))}


def installed(name: str) -> Version | None:
    """Return the version of a package, without its local part (2.15.0+cpu)."""
    try:
        return Version(Version(version(name)).public)
    except PackageNotFoundError:
        return None


def refresh(*, lower: bool = False) -> None:
    """Write the file anew, and say on standard error what changes."""
    old, text = upper_bounds(), HEADER
    for name, requirement in requirements().items():
        if bound(requirement, "==") is not None:
            continue
        stands, new = old.get(name), installed(name)
        if new is None or (stands is not None and new < stands and not lower):
            print(f"{name} {new or 'none'} is installed: its bound stays {stands}", file=sys.stderr)
            new = stands
        elif new != stands:
            print(f"{name}: {stands} -> {new}", file=sys.stderr)
        text += f"{name}<={new}\n" if new is not None else ""
    FILE.write_text(text)


def main() -> None:
    """Write the file, or print the lowest versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lower", action="store_true", help="lower bounds too")
    parser.add_argument("--lowest", action="store_true", help="print the lowest versions allowed")
    arguments = parser.parse_args()
    if arguments.lowest:
        for name, requirement in requirements().items():
            print(f"{name}=={bound(requirement, '>=') or bound(requirement, '==')}")
    else:
        refresh(lower=arguments.lower)


if __name__ == "__main__":
    main()
