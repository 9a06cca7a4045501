"""One trial's result, and the table of many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

FAULTS = ("lost", "silent", "hung", "traceback", "litter", "touched")
# Crashes inside libhdf5, of files that were made to crash it, are counted apart.
OUTCOMES = (*FAULTS, "libhdf5")


@dataclass(frozen=True)
class Trial:
    """What was attacked, how, and what came of it: an outcome, or "" where all is well."""

    stage: str
    attack: str
    how: str
    fault: str = ""

    @property
    def outcome(self) -> str:
        """The first word of the fault, one of `OUTCOMES`."""
        return self.fault.split(":")[0]

    @property
    def is_fault(self) -> bool:
        """Whether featcache did what it may not do."""
        return self.outcome in FAULTS


def table(trials: Iterable[Trial]) -> str:
    """Return the table: a row for each stage and attack, and how many trials ended how."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for trial in trials:
        counts[trial.stage, trial.attack, trial.outcome] += 1
    lines = [f"| {'stage':10} | {'attack':28} | trials | {' | '.join(OUTCOMES)} |"]
    lines.append("|" + "---|" * (3 + len(OUTCOMES)))
    for stage, attack in sorted({key[:2] for key in counts}):
        each = [counts[stage, attack, outcome] for outcome in OUTCOMES]
        total = sum(n for key, n in counts.items() if key[:2] == (stage, attack))
        cells = " | ".join(f"{n:>{len(o)}}" for n, o in zip(each, OUTCOMES, strict=True))
        lines.append(f"| {stage:10} | {attack:28} | {total:6,} | {cells} |")
    return "\n".join(lines)


def write(trial: Trial, file: TextIO) -> None:
    """Write a trial as one line of JSON."""
    print(json.dumps({**asdict(trial), "outcome": trial.outcome}), file=file, flush=True)


def read(path: Path) -> list[Trial]:
    """Return the trials of a file of JSON lines."""
    names = {field.name for field in fields(Trial)}
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [Trial(**{key: row[key] for key in names}) for row in rows]
