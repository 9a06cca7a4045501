"""Stages that disturb a command at one of its calls: kills, errors of the disk, signals."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tests.campaign import process
from tests.campaign.operations import OPERATIONS, Ground, Operation, contents, rerun
from tests.campaign.power import Recording, files_of
from tests.campaign.process import READS, WRITES, Arm, Ended, Process
from tests.campaign.trial import Trial


def _checked(
    ground: Ground,
    operation: Operation,
    here: Path,
    ended: Ended,
    *,
    must_work: bool = False,
    ends: Sequence[int] = (),
) -> str:
    """Return the fault of a disturbed run, then of the same command run again in peace.

    Other exit statuses that are right are `ends`.
    """
    known = ground.undisturbed(operation)
    if ended.fault:
        return ended.fault
    if must_work and ended.status:
        return f"lost: ended with {ended.status}: {ended.said}"
    if ended.status not in {0, 1, 75, -signal.SIGKILL, *ends}:
        return f"traceback: ended with {ended.status}: {ended.said}"
    if ended.status == 1 and not ended.err.strip():
        return "silent: ended with 1 and said nothing"
    possible = [known.after] if ended.status == 0 else [known.before, known.after]
    return rerun(ground, operation, here, possible)


def kills(ground: Ground, trials: int, seed: int) -> Iterator[Trial]:
    """Kill before, inside and after every call that writes; at random moments; ten in a row.

    What is in the page cache outlives a process: a kill leaves all that was written before it, and
    half of a call that it met halfway. Three of four trials therefore rebuild what a kill would
    have left from the record of one run (which, rebuilt to its end, is the folder of that run, byte
    for byte); the fourth kills.
    """
    draw = random.Random(seed)
    ways = {"before": process.KILL_BEFORE, "inside": process.KILL_INSIDE,
            "after": process.KILL_AFTER}  # fmt: skip
    here = ground.root / "trial"
    states: list[tuple[Operation, Recording, int]] = []
    for number in range(trials):
        if number % 4 < 3:
            if not states:
                for operation in OPERATIONS:
                    made = Recording.of(ground, operation)
                    states += [(operation, made, at) for at in range(2 * len(made.calls) + 1)]
                draw.shuffle(states)
            operation, made, at = states.pop()
            half = bool(at % 2)
            made.until(at // 2, half=half).cut(draw, "kept")
            how = f"state {'in' if half else 'before'} call {at // 2} of a record"
            known = ground.undisturbed(operation)
            fault = rerun(ground, operation, made.before.here, [known.before, known.after])
            yield Trial("kills", operation.name, f"{how}, seed {seed}", fault)
            continue
        operation = draw.choice(OPERATIONS)
        ground.begin(operation, here, beside=True)
        run, last = ground.command(operation, here), ground.undisturbed(operation).calls()
        kind = number // 4 % 4
        if kind == 0:
            how = f"ten kills, seed {seed}"
            for _ in range(10):
                way, at = draw.choice(list(ways.values())), draw.randint(1, last)
                ended = process.run(run, Arm(here, WRITES, way, at))
        elif kind == 1:
            moment = draw.uniform(0, 0.3)
            how = f"at {moment:.4f} s"
            one = Process(run)
            time.sleep(moment)
            one.signal(signal.SIGKILL)
            ended = one.wait()
        else:
            word, at = draw.choice(list(ways)), draw.randint(1, last)
            how = f"{word} call {at}"
            ended = process.run(run, Arm(here, WRITES, ways[word], at))
        yield Trial("kills", operation.name, how, _checked(ground, operation, here, ended))


def faults(ground: Ground, trials: int, seed: int) -> Iterator[Trial]:
    """Let the n-th call fail, or all from the n-th on; interrupt or shorten it."""
    draw = random.Random(seed)
    ways = [
        (f"{name} {verb}", kinds, action, number)
        for name, number in (("EIO", errno.EIO), ("ENOSPC", errno.ENOSPC),
                             ("EMFILE", errno.EMFILE))
        for verb, action in (("once", process.FAIL), ("from then on", process.FAIL_FROM))
        for kinds in (WRITES, READS)
        if (number, kinds) != (errno.ENOSPC, READS)
    ]  # fmt: skip
    ways = [way if way[3] != errno.EMFILE else
            (way[0], process.CREATE if way[1] == WRITES else process.OPEN, *way[2:])
            for way in ways]  # fmt: skip
    ways += [("short", kinds, process.SHORT, 0) for kinds in (WRITES, READS)]
    ways += [("EINTR", kinds, process.FAIL, errno.EINTR) for kinds in (WRITES, READS)]
    every = []
    for operation in OPERATIONS:
        count = ground.undisturbed(operation).calls
        every += [(operation, way, at) for way in ways for at in range(1, count(way[1]) + 1)]
    draw.shuffle(every)
    here = ground.root / "trial"
    for operation, (name, kinds, action, error), at in islice(cycle(every), trials):
        ground.begin(operation, here, beside=True)
        ended = process.run(ground.command(operation, here), Arm(here, kinds, action, at, error))
        side = "reading" if kinds & READS else "writing"
        fault = _checked(ground, operation, here, ended, must_work=name in ("short", "EINTR"))
        yield Trial("faults", f"{name}, {side}", f"{operation.name}, call {at}", fault)


# Modules in whose lines a signal is most likely to meet a lock or a half-done step.
_MODULES = ("extraction/stream", "extraction/parts", "extraction/filling", "store/writer",
            "store/disk", "store/format", "system/console", "system/files", "networks/forward",
            "finetuning/checkpoint")  # fmt: skip
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _counted(hit: int, number: int, lines: list[int]) -> Callable[[], None]:
    """Return what makes a process send itself a signal at line `hit` of these modules."""
    import featcache

    names = {str(Path(featcache.__path__[0], f"{name}.py")) for name in _MODULES}

    def on_line(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            lines[0] += 1
            if lines[0] == hit:
                os.kill(os.getpid(), number)
        return on_line if lines[0] < hit else None

    def on_call(frame: Any, event: str, argument: Any) -> Any:
        if lines[0] >= hit:
            sys.settrace(None)  # in this thread; the others see it at their next call
        return on_line if frame.f_code.co_filename in names else None

    def begin() -> None:
        threading.settrace(on_call)
        sys.settrace(on_call)

    return begin


def signals(ground: Ground, trials: int, seed: int) -> Iterator[Trial]:
    """Send signals: at a line of the code that queues, locks and writes, and at random moments."""
    draw = random.Random(seed)
    here = ground.root / "trial"
    totals: dict[str, int] = {}
    for number in range(trials):
        operation = draw.choice(OPERATIONS)
        ground.begin(operation, here, beside=True)
        run = ground.command(operation, here)
        which, first = draw.choice(_SIGNALS), files_of(here)
        if number % 3:
            if operation.name not in totals:
                lines = [0]

                def count(run: Callable[[], None] = run, lines: list[int] = lines) -> int:
                    process.status_of(run)
                    return lines[0]

                ended = process.run(count, before=_counted(1 << 62, 0, lines))
                totals[operation.name] = ended.result or 1
                ground.begin(operation, here, beside=True)
            at = draw.randint(1, totals[operation.name])
            how = f"{which.name} at line {at}, {operation.name}"
            moments = [0.0]
            ended = process.run(run, before=_counted(at, which, [0]))
        else:
            moments = sorted(draw.uniform(0, 0.3) for _ in range(draw.choice((1, 1, 2, 3))))
            how = f"{which.name} at {moments}, {operation.name}"
            one, start = Process(run), time.monotonic()
            for moment in moments:
                time.sleep(max(0.0, start + moment - time.monotonic()))
                one.signal(which)
            ended = one.wait()
        # A second signal ends it at once, as does one before the command begins or after its end.
        begun = len(moments) == 1 and files_of(here) != first
        if begun and ended.status == -which:
            done = ground.undisturbed(operation).after
            begun = contents(here).get(operation.output) != done[operation.output]
        fault = _checked(ground, operation, here, ended, ends=() if begun else [-which])
        if not fault and ended.status == 1:
            fault = f"lost: {which.name} ended with 1, not 75: {ended.said}"
        yield Trial("signals", which.name, how, fault)
