"""Run the commands of README.md, and compare or rewrite the output that it shows.

``python tests/readme.py`` prints what differs; ``--write`` puts the real output into README.md.

A block that starts with ```` ```console ```` holds commands after ``$ `` and what they print; a
block that starts with ```` ```python ```` is run as it is. All run in one folder, in the order of
the page, so that a later block may use what an earlier one made. Numbers differ between machines
and runs, so that a comparison reads every number as ``#``; words, files and columns must agree.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass
class Step:
    """One command of the page, and the output that the page shows below it."""

    command: str
    shown: str


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (kind, body) of every block that is run."""
    return [(match[1], match[2]) for match in BLOCK.finditer(text)]


def steps(body: str) -> list[Step]:
    """Split a console block into its commands; a trailing backslash joins lines."""
    found: list[Step] = []
    joining = False
    for line in body.splitlines():
        if joining:
            found[-1].command += "\n" + line
        elif line.startswith("$ "):
            found.append(Step(line[2:], ""))
        else:
            found[-1].shown += line + "\n"
        joining = (joining or line.startswith("$ ")) and line.endswith("\\")
    return found


def masked(text: str) -> str:
    """Replace what differs between machines: numbers, the width of columns, and which head wins."""
    text = re.sub(r"\b[0-9a-f]{16}\b", "#", text)  # a fingerprint
    text = re.sub(r"(best by cross-validation: )[^)]*\)", r"\1#", text)
    text = re.sub(r"\d[\d,]*(\.\d+)?(e-?\d+)?", "#", text)
    lines = [re.sub(r"[ ─-]+", " ", line).strip() for line in text.strip().splitlines()]
    for k, line in enumerate(lines):
        if line.startswith("head CV"):  # a leaderboard, up to a blank line
            end = lines.index("", k)
            lines[k + 1 : end] = sorted(lines[k + 1 : end])
    return "\n".join(lines)


def workplace(folder: Path) -> Path:
    """Copy what git tracks (and would track) to `folder`, with this checkout's ``.venv``.

    A folder ``flowers`` of small class folders and a folder ``new_photos`` stand in for the
    reader's own images.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    # The Makefile's stamps must be there too, and be newer, so that nothing is installed again.
    (folder / ".venv").symlink_to(Path(sys.prefix))
    for name in ("pyproject.toml", "tests/constraints.txt"):
        os.utime(folder / name, (0, 0))
    make_photographs(folder)
    return folder


def make_photographs(folder: Path) -> None:
    """Cut class folders from the two photographs that scikit-learn ships, seeded."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_image

    rng = np.random.default_rng(0)
    photographs = {"dahlia": "flower.jpg", "palace": "china.jpg"}
    for label, file in photographs.items():
        photograph = Image.fromarray(load_sample_image(file))
        for i in range(45):
            side = int(rng.integers(150, 260))
            left = int(rng.integers(0, photograph.width - side))
            top = int(rng.integers(0, photograph.height - side))
            crop = photograph.crop((left, top, left + side, top + side))
            new = i >= 40
            target = folder / "new_photos" if new else folder / "flowers" / label
            target.mkdir(parents=True, exist_ok=True)
            crop.save(target / (f"{label}-{i:02d}.jpg" if new else f"{i:02d}.jpg"), quality=90)


def run(command: str, folder: Path) -> str:
    """Run one command as the reader would; return what it prints on standard output."""
    # Under `make test` the variables of that make would have an inner one announce its folders.
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("MAKELEVEL", "MAKEFLAGS", "MFLAGS")
    }
    environment = {
        **inherited,
        "PATH": f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise AssertionError(
            f"{command!r} exits with {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def run_page(text: str, folder: Path) -> list[tuple[str, Step | None, str]]:
    """Run every block; return (kind, step, real output) for each command of the page."""
    results: list[tuple[str, Step | None, str]] = []
    for kind, body in blocks(text):
        if kind == "python":
            script = folder / "readme_block.py"
            script.write_text(body)
            results.append((kind, None, run(f"python {script.name}", folder)))
        else:
            results.extend((kind, step, run(step.command, folder)) for step in steps(body))
    return results


def rewritten(text: str, results: list[tuple[str, Step | None, str]]) -> str:
    """Return the page with the real outputs."""
    outputs = iter(results)

    def replace(match: re.Match[str]) -> str:
        if match[1] == "python":
            next(outputs)
            return match[0]
        parts = []
        for step in steps(match[2]):
            _, _, output = next(outputs)
            ellipsis = step.shown.startswith("...\n")
            body = output.rstrip("\n") + "\n" if output.strip() and not ellipsis else step.shown
            parts.append(f"$ {step.command}\n{body}")
        return "```console\n" + "".join(parts) + "```"

    return BLOCK.sub(replace, text)


def differences(results: list[tuple[str, Step | None, str]]) -> str:
    """Return what the page shows otherwise than it is; empty where all agrees."""
    found = []
    for _, step, output in results:
        if step is not None and masked(step.shown) != masked(output):
            found += [f"$ {step.command}"]
            found += difflib.unified_diff(
                masked(step.shown).splitlines(),
                masked(output).splitlines(),
                "README.md",
                "real output",
                lineterm="",
            )
    return "\n".join(found)


def main() -> int:
    """Compare, or rewrite with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the real output into README.md")
    arguments = parser.parse_args()
    page = ROOT / "README.md"
    with tempfile.TemporaryDirectory() as folder:
        results = run_page(page.read_text(), workplace(Path(folder)))
    if arguments.write:
        page.write_text(rewritten(page.read_text(), results))
        return 0
    print(differences(results) or "README.md shows what its commands print")
    return 1 if differences(results) else 0


if __name__ == "__main__":
    sys.exit(main())
