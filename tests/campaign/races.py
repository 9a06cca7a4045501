"""Races: several processes at the same files, in every order and in none."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.campaign import process
from tests.campaign.operations import BY_NAME, Contents, Ground, Operation, contents, contents_here
from tests.campaign.process import Arm, Ended, Process, command
from tests.campaign.trial import Trial

# Commands that work on the same file, by the state of their folder.
_RIVALS = {
    "empty": ("fresh", "failures", "two workers"),
    "stored": ("fresh", "growing", "relabelling"),
    "begun": ("resuming", "set aside"),
}
_PREDICTOR = "raced.featcache"


def _oracles(ground: Ground, start: str) -> dict[str, Contents]:
    """Return what each rival leaves behind, whatever ran before it, by name."""
    found = {}
    for name in _RIVALS[start]:
        here = ground.root / "rival"
        ground.begin(BY_NAME[name], here)
        ended = process.run(ground.command(BY_NAME[name], here))
        assert ended.status == 0, ended
        found[name] = contents(here)
    return found


def _fault(
    ground: Ground,
    here: Path,
    ran: list[tuple[str, Ended]],
    oracles: dict[str, Contents],
    last: Operation,
    began: Operation,
) -> str:
    """Return what is wrong after all have ended, and after one more, quiet run."""
    for name, ended in ran:
        if ended.fault:
            return f"{ended.fault} ({name})"
        if ended.status not in {0, 1}:
            return f"traceback: {name} ended with {ended.status}: {ended.said}"
        if ended.status == 1 and not ended.err.strip():
            return f"silent: {name} ended with 1 and said nothing"
    made = [oracles[name] for name, ended in ran if ended.status == 0 and name in oracles]

    def look_run_look() -> tuple[Contents, Contents]:
        found = contents_here(here)
        status = process.status_of(ground.command(last, here))
        if status:
            raise SystemExit(status)
        return found, contents_here(here)

    ended = process.run(look_run_look)
    if ended.fault or ended.result is None:
        return ended.fault or f"lost: the quiet run at the end: {ended.status}: {ended.said}"
    found, after = ended.result
    if not made:  # then what was there is there
        made = [ground.undisturbed(last).before]
    stores = [one["s.h5"] for one in made if "s.h5" in one]
    if stores and "s.h5" not in found:
        return f"lost: there is no store, only {', '.join(found)}"
    wrong = [_other(found["s.h5"], store) for store in stores]
    if wrong and all(wrong):
        return f"silent: the store is none of those that the commands make: {wrong}"
    predictor = found.get(_PREDICTOR, {})
    if "error" in predictor:
        return f"lost: {predictor['error']}"
    if any(name == "train" and not ended.status for name, ended in ran) and not predictor:
        return "lost: train succeeded and left no predictor"
    if wrong := _other(after["s.h5"], oracles[last.name]["s.h5"]):
        return f"silent: the quiet run at the end made another store: {wrong}"
    if touched := ground.touched(began, here):
        return touched
    litter = sorted(after.keys() - {"s.h5", _PREDICTOR})
    return f"litter: {', '.join(litter)}" if litter else ""


def _other(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Return in what a store differs; features that other batches gave may by their rounding."""
    if "error" in found:
        return [found["error"]]
    taps = [name for name, value in expected.items() if ":" in name and isinstance(value, bytes)]
    wrong = [name for name in expected if name not in taps and found.get(name) != expected[name]]
    for tap in taps:
        one, other = (np.frombuffer(x[tap], np.float32) for x in (found, expected))
        if one.shape != other.shape or not np.allclose(one, other, rtol=0, atol=2e-6):
            wrong.append(tap)
    return wrong


def races(ground: Ground, trials: int, seed: int) -> Iterator[Trial]:
    """Stop one command before a call, run another, let the first go on; or let many run."""
    draw = random.Random(seed)
    here = ground.root / "raced"
    oracles = {start: _oracles(ground, start) for start in _RIVALS}
    kinds = process.NAME | process.CREATE | process.SYNC | process.OPEN
    counts = {
        (start, name): ground.undisturbed(BY_NAME[name]).calls(kinds)
        for start, names in _RIVALS.items()
        for name in names
    }
    readers = [
        ("info", "{here}/s.h5"),
        ("verify", "{here}/s.h5"),
        ("train", "{here}/s.h5", "-o", f"{{here}}/{_PREDICTOR}", "--head", "ridge", "--cv", "2"),
    ]
    for number in range(trials):
        start = draw.choice(list(_RIVALS))
        names = _RIVALS[start]
        ground.begin(BY_NAME[names[-1]], here, beside=True)
        if number % 2:
            first, second = draw.choice(names), draw.choice(names)
            at = draw.randint(1, counts[start, first])
            one = Process(
                ground.command(BY_NAME[first], here), Arm(here, kinds, process.STOP_BEFORE, at)
            )
            stopped = one.wait_stopped()
            between = process.run(ground.command(BY_NAME[second], here), deadline=20)
            one.signal(process.signal.SIGCONT)
            ran = [(second, between), (first, one.wait())]
            attack = "scripted"
            how = f"{start}: {first} stopped at {at} ({stopped}), {second}, {first} goes on"
        else:
            running: list[tuple[str, Process]] = []
            for _ in range(draw.randint(2, 8)):
                time.sleep(draw.uniform(0, 0.1))
                if start == "stored" and draw.random() < 0.4:
                    argv = [part.format(here=here) for part in draw.choice(readers)]
                    running.append((argv[0], Process(command(*argv, "--quiet"))))
                else:
                    name = draw.choice(names)
                    running.append((name, Process(ground.command(BY_NAME[name], here))))
            ran = [(name, one.wait()) for name, one in running]
            attack = f"{len(ran)} processes"
            how = f"{start}: {', '.join(name for name, _ in ran)}"
        last = BY_NAME[draw.choice(names)]
        fault = _fault(ground, here, ran, oracles[start], last, BY_NAME[names[-1]])
        yield Trial("races", attack, f"seed {seed}, {number}: {how}", fault)
