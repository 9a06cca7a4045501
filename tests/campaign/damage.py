"""Damage: a bit, a page, an end of a finished file is wrong, and nobody says so."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.campaign.operations import (
    BY_NAME,
    HEADS,
    NETWORK,
    Contents,
    Ground,
    contents_here,
    difference,
    facts,
)  # fmt: skip
from tests.campaign.process import Process, command, run, status_of
from tests.campaign.trial import Trial

_PAGE = 4096
_BATCH = 100  # of damages that one process reads
_SUFFIX = BY_NAME["suffix"].argv
WAYS = ("bit flips", "zeroed page", "truncated", "swapped pages", "random bytes")


def damaged(content: bytes, way: str, draw: random.Random) -> bytes:
    """Return the content with one kind of damage somewhere."""
    data, size = bytearray(content), len(content)
    if way == "bit flips":
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            data[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif way == "zeroed page":
        start = draw.randrange(-(-size // _PAGE)) * _PAGE
        data[start : start + _PAGE] = bytes(len(data[start : start + _PAGE]))
    elif way == "truncated":
        del data[draw.randrange(size) :]
    elif way == "swapped pages":
        pages = max(1, size // _PAGE)
        a, b = (draw.randrange(pages) * _PAGE for _ in range(2))
        data[a : a + _PAGE], data[b : b + _PAGE] = data[b : b + _PAGE], data[a : a + _PAGE]
    else:
        start = draw.randrange(size)
        length = min(draw.choice((2, 16, 300)), size - start)
        data[start : start + length] = draw.randbytes(length)
    return bytes(data)


def _targets(ground: Ground) -> dict[str, Path]:
    """Return the files that are damaged: stores, a predictor of every head, checkpoints."""
    found = {"store": ground.root / "store" / "s.h5"}
    for name in ("failures", "relabelling"):
        here = ground.root / f"damage {name}"
        ground.begin(BY_NAME[name], here)
        ground.must(BY_NAME[name], here)
        found[f"store, {name}"] = here / "s.h5"
    folder = ground.root / "heads"
    folder.mkdir(exist_ok=True)
    for head in HEADS:
        path = folder / f"{head}.featcache"
        argv = ("train", ground.root / "store" / "s.h5", "-o", path, "--cv", "2", "--head", head)
        ended = run(command(*map(str, argv), "--quiet"))
        assert ended.status == 0, ended
        found[f"predictor, {head}"] = path
    return found


def _read_many(
    original: Path, here: Path, ways: list[tuple[str, bytes]], oracle: Any
) -> Callable[[], list[str]]:
    """Return the function that reads damaged copies, and says of each what was silent."""

    def read() -> list[str]:
        import traceback

        faults = []
        for _, content in ways:
            path = here / original.name
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            try:
                found = facts(path)
            except Exception:
                faults.append(f"traceback: {traceback.format_exc()[-1500:]}")
                continue
            if found == oracle or "error" in found:
                faults.append("")
            else:
                wrong = [key for key in found if found[key] != oracle.get(key)]
                faults.append(f"silent: {', '.join(wrong) or 'something is missing'}")
        return faults

    return read


def damage(ground: Ground, trials: int, seed: int) -> Iterator[Trial]:
    """Read damaged files as training and prediction do; each is as it was, or refused."""
    draw = random.Random(seed)
    here = ground.root / "damaged"
    here.mkdir(exist_ok=True)
    targets = _targets(ground)
    oracles = {name: run(lambda path=path: facts(path)).result for name, path in targets.items()}
    commands = trials // 50  # the dear ones: whole commands on damaged files
    left = trials - commands
    names = list(targets)
    draw.shuffle(names)
    while left > 0:
        name = names[0]
        names.append(names.pop(0))
        content = targets[name].read_bytes()
        ways = []
        for _ in range(min(left, _BATCH, max(1, -(-trials // len(names))))):
            way = draw.choice(WAYS)
            ways.append((way, damaged(content, way, draw)))
        left -= len(ways)
        ended = Process(_read_many(targets[name], here, ways, oracles[name]), deadline=120).wait()
        faults = ended.result or [ended.fault or f"traceback: {ended.said}"] * len(ways)
        for number, ((way, _), fault) in enumerate(zip(ways, faults, strict=True)):
            yield Trial("damage", name, f"{way}, seed {seed}, {number}", fault)
    yield from _commands(ground, commands, draw, targets["store"], here)


def _commands(
    ground: Ground, trials: int, draw: random.Random, store: Path, here: Path
) -> Iterator[Trial]:
    """Run whole commands on damaged stores: they give what they would, or say what is wrong."""
    trained = ground.root / "trained" / "p.featcache"
    images = ("extract", "{ground}/{of}", "-o", "{here}/s.h5", "--backbone", NETWORK, "--workers",
              "0", "--batch-size", "4")  # fmt: skip
    plans = {
        "train": (("train", "{here}/s.h5", "-o", "{here}/p.featcache", "--cv", "2", "--head",
                   "ridge", "--head", "knn"), "p.featcache", "train"),
        "relabelled": ((*images, "--labels", "{ground}/labels.csv"), "s.h5", "relabelling"),
        "grown": (images, "s.h5", "growing"),
        "moved": (images, "s.h5", "fresh"),
        "evaluate": (("evaluate", str(trained), "{here}/s.h5"), "", ""),
        "export": (("export", "{here}/s.h5", "-o", "{here}/x.npz"), "x.npz", "export npz"),
        "audit": (("audit", "{here}/s.h5", "-o", "{here}/a.csv"), "a.csv", "audit"),
        "predict": (("predict", "{here}/p.featcache", *BY_NAME["predict"].argv[2:]),
                    "predictions.csv", "predict"),
        "checkpoint": (_SUFFIX, "p.featcache", "suffix"),
    }  # fmt: skip
    half = _half_trained(ground)
    said = run(command("evaluate", str(trained), str(store), "--quiet")).out
    assert said
    for number in range(trials):
        name = draw.choice(list(plans))
        argv, output, oracle = plans[name]
        shutil.rmtree(here)
        here.mkdir()
        way = draw.choice(WAYS)
        if name == "checkpoint":
            shutil.copytree(half, here, dirs_exist_ok=True)
            path = draw.choice(sorted(here.rglob("*.pt")))
            content = path.read_bytes()
        else:  # moved: as the advice of `verify` is
            content = (trained if name == "predict" else store).read_bytes()
            of_kind = {"moved": "s.h5.partial", "predict": "p.featcache"}
            path = here / of_kind.get(name, "s.h5")
        content = damaged(content, way, draw)
        path.write_bytes(content)
        of = "more" if name == "grown" else "images"
        filled = [part.format(ground=ground.root, here=here, of=of) for part in argv]

        def go(filled: list[str] = filled, here: Path = here) -> tuple[int, Contents]:
            return status_of(command(*filled, "--quiet")), contents_here(here)

        ended = run(go)
        fault = ended.fault
        if not fault and ended.result is None:
            fault = f"traceback: ended with {ended.status}: {ended.said}"
        elif not fault:
            status, found = ended.result
            if status == 0 and not output:
                fault = "" if ended.out == said else f"silent: {name} said {ended.out}"
            elif status == 0:
                fault = difference(found, [ground.undisturbed(BY_NAME[oracle]).after], output)
            elif not ended.err.strip():
                fault = f"silent: {name} ended with {status} and said nothing"
            elif path.read_bytes() != content:
                fault = f"touched: {name} refused a file and changed it: {ended.said}"
        yield Trial("damage", f"command: {name}", f"{way}, {number}", fault)


def _half_trained(ground: Ground) -> Path:
    """Return a folder with the checkpoints of a training that was killed halfway."""
    here = ground.root / "half trained"
    ground.kill_until(
        BY_NAME["suffix"], here, lambda x: len(list(x.rglob("fold-*.pt"))) > 1, share=2 / 3
    )
    return here
