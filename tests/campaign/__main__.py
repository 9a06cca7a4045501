"""``python -m tests.campaign [STAGE ...] [--trials N] [--seed N] [--jobs N] [--output FILE]``."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign import process
from tests.campaign.trial import Trial, read, table, write

# Trials of a full campaign, by stage.
FULL = {
    "kills": 10_000,
    "faults": 4_000,
    "power": 5_000,
    "damage": 100_000,
    "signals": 2_000,
    "hostile": 10_000,
    "races": 2_000,
    "places": 200,
}


def stages() -> dict[str, Callable[..., Iterator[Trial]]]:
    """Return the stages by name; their modules import all of featcache."""
    from tests.campaign import damage, disturbed, hostile, places, power, races

    functions = (
        disturbed.kills, disturbed.faults, power.power_cuts, damage.damage, disturbed.signals,
        hostile.hostile, races.races, places.places,
    )  # fmt: skip
    return dict(zip(FULL, functions, strict=True))


def attack(names: list[str], trials: int | None, seed: int) -> Iterator[Trial]:
    """Yield the trials of some stages; what is wrong is printed at once."""
    from tests.campaign.operations import Ground

    room = "/dev/shm"  # no trial needs a disk
    fast = room if os.access(room, os.W_OK) and shutil.disk_usage(room).free > 1 << 28 else None
    root = Path(tempfile.mkdtemp(prefix="featcache-campaign-", dir=fast))  # forks keep it
    try:
        ground = Ground(root)
        for name in names:
            begun, number = os.times(), FULL[name] if trials is None else trials
            for trial in stages()[name](ground, number, seed):
                if trial.fault:
                    print(f"{name} | {trial.attack} | {trial.how} | seed {seed}\n    {trial.fault}")
                yield trial
            *busy, wall = (end - start for start, end in zip(begun, os.times(), strict=True))
            seconds = f"{wall:.0f} s, {sum(busy):.0f} s of processor"
            print(f"{name}: {number:,} trials, seed {seed}, {seconds}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def share(names: list[str], trials: int | None, seed: int, jobs: int) -> Iterator[Trial]:
    """Yield the trials of several processes, each with its part of them and a seed of its own."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for job in range(jobs):
            for name in names:
                part = -(-(FULL[name] if trials is None else trials) // jobs)
                results = Path(folder) / f"{job} {name}"
                argv = [name, "--trials", part, "--seed", seed + job, "--output", results]
                running.append((name, part, list(map(str, argv)), results))
        for name in names:
            now = [
                (part, subprocess.Popen([sys.executable, "-m", "tests.campaign", *argv]), results)
                for stage, part, argv, results in running
                if stage == name
            ]
            for part, one, results in now:
                status, found = one.wait(), read(results)
                if status not in {0, 1} or len(found) != part:
                    many = f"{len(found)} of {part} trials"
                    raise SystemExit(f"{name}: a job ended with {status} after {many}")
                yield from found


def main(arguments: list[str]) -> int:
    """Run stages; return 1 if a trial found a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("stage", nargs="*", help=f"of {', '.join(FULL)}; default: all")
    parser.add_argument("--trials", type=int, help="of each stage; default: a full campaign's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--output", type=Path, help="results as JSON lines")
    options = parser.parse_args(arguments)
    names = options.stage or list(FULL)
    what = names, options.trials, options.seed
    if options.jobs > 1:
        trials = share(*what, options.jobs)
    else:
        missing = process.preload(arguments)
        if missing:
            print(f"skipped: {missing}")
            return 0
        process.import_everything()
        trials = attack(*what)
    found = []
    for trial in trials:
        found.append(trial)
        if options.output:
            with options.output.open("a") as file:
                write(trial, file)
    print(table(found), flush=True)
    return int(any(trial.is_fault for trial in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
