"""Places: disks that are small, full or read-only, streams that are closed, awkward names."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import resource
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.operations import (
    BY_NAME,
    OPERATIONS,
    Ground,
    Operation,
    contents_here,
    difference,
    facts,
    rerun,
)
from tests.campaign.process import Ended, command, run, status_of
from tests.campaign.trial import Trial

_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000
_READ_ONLY, _BIND, _REMOUNT = 1, 4096, 32
_SIZES = (0, 16, 32, 64, 96, 128, 192, 256, 512, 1024)  # kilobytes
_NAMES = ("a b.h5", "é.h5", "-x.h5", "'\"`$(id).h5", "new\nline.h5", "\x1b[31m.h5", "%s{}.h5",
          "x" * 252 + ".h5", "x" * 240 + ".h5", "\udcff.h5", "日本.h5", "....h5",
          "\x9b31m.h5", "a\rb.h5", "\u202egnp.h5")  # fmt: skip
# What steers a terminal, or turns the order of what is read.
_STEERING = ("\x1b", "\x9b", "\x07", "\u202e")


def _own_mounts() -> None:
    """Give this process mounts of its own, where the system allows it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS) and libc.unshare(_NEW_USERS | _NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "no mounts of one's own")
    _mount(b"none", b"/", None, 1 << 18 | 16384)  # nothing of it is seen outside


def _mount(source: bytes, target: bytes, kind: bytes | None, flags: int, data: bytes = b"") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, target, kind, ctypes.c_ulong(flags), data or None):
        number = ctypes.get_errno()
        raise OSError(number, f"mount of {target!r}: {os.strerror(number)}")


def _tmpfs(here: Path, options: str) -> Callable[[], None]:
    def mount() -> None:
        _own_mounts()
        copies = [(path.name, path.read_bytes()) for path in here.iterdir()]
        _mount(b"tmpfs", os.fsencode(here), b"tmpfs", 0, options.encode())
        with contextlib.suppress(OSError):  # it is full then
            for name, content in copies:
                (here / name).write_bytes(content)

    return mount


def _read_only(here: Path) -> Callable[[], None]:
    def mount() -> None:
        _own_mounts()
        _mount(os.fsencode(here), os.fsencode(here), None, _BIND)
        _mount(os.fsencode(here), os.fsencode(here), None, _BIND | _REMOUNT | _READ_ONLY)

    return mount


def _no_shared_memory() -> None:
    _own_mounts()
    _mount(b"tmpfs", b"/dev/shm", b"tmpfs", _READ_ONLY, b"size=4k")


def _closed(*numbers: int) -> Callable[[], None]:
    def close() -> None:  # as Python begins where they are closed
        for number in numbers:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)

    return close


def _full(number: int) -> Callable[[], None]:
    def replace() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)

    return replace


def _gone(here: Path) -> Callable[[], None]:
    def remove() -> None:
        away = here / "away"
        away.mkdir()
        os.chdir(away)
        away.rmdir()

    return remove


def _limit(which: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def _places(here: Path) -> dict[str, list[tuple[str, Callable[[], None]]]]:
    """Return the places by kind, each with what makes it."""
    return {
        "small tmpfs": [(f"{size} kB", _tmpfs(here, f"size={size}k")) for size in _SIZES[1:]],
        "no inodes": [(f"{n} inodes", _tmpfs(here, f"nr_inodes={n}")) for n in (2, 3, 4)],
        "read-only folder": [("", _read_only(here))],
        "no shared memory": [("", _no_shared_memory)],
        "closed streams": [(str(n), _closed(*n)) for n in ((0,), (1,), (2,), (1, 2), (0, 1, 2))],
        "full streams": [(str(number), _full(number)) for number in (1, 2)],
        "deleted working directory": [("", _gone(here))],
        "limits": [
            *((f"{n} open files", _limit(resource.RLIMIT_NOFILE, n)) for n in (6, 10, 16, 24, 40)),
            *((f"files of {n}", _limit(resource.RLIMIT_FSIZE, n)) for n in (5_000, 60_000)),
        ],
    }


def places(ground: Ground, trials: int, seed: int) -> Iterator[Trial]:
    """Run commands where something is missing; then again where nothing is."""
    draw = random.Random(seed)
    here = ground.root / "place"
    kinds = _places(here)
    others = {"names": _named, "FIFOs": _fifo, "user's partial file": _kept}
    for number in range(trials):
        kind = draw.choice([*kinds, *others])
        if kind in others:
            how, fault = others[kind](ground, draw)
            yield Trial("places", kind, how, fault)
            continue
        what, prepare = draw.choice(kinds[kind])
        operation = draw.choice(OPERATIONS)
        ground.begin(operation, here)
        ended = _there(ground, operation, here, prepare)
        if ended.status == 77:
            yield Trial("places", f"{kind} (not possible here)", what)
            continue
        fault = _fault(ground, operation, here, ended, streams="streams" in kind)
        yield Trial("places", kind, f"{what}, {operation.name}, {number}", fault)


def _there(ground: Ground, operation: Operation, here: Path, prepare: Callable[[], None]) -> Ended:
    """Run an operation in a place; the result is what is there at the end, seen from inside."""

    def go() -> object:
        try:
            prepare()
        except OSError:
            os._exit(77)
        status = status_of(ground.command(operation, here))
        for which in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):
            hard = resource.getrlimit(which)[1]
            resource.setrlimit(which, (hard, hard))
        return status, None if status else contents_here(here)

    return run(go)


def _fault(ground: Ground, operation: Operation, here: Path, ended: Ended, *, streams: bool) -> str:
    if ended.fault:
        return ended.fault
    if ended.result is None:
        return f"traceback: ended with {ended.status}: {ended.said}"
    status, found = ended.result
    if status not in {0, 1, 2}:
        return f"traceback: ended with {status}: {ended.said}"
    if status and not ended.err.strip() and not streams:
        return f"silent: ended with {status} and said nothing"
    known = ground.undisturbed(operation)
    if not status and found is not None:
        wrong = difference(found, [known.after], operation.output)
        if wrong:
            return wrong
    return rerun(ground, operation, here, [known.before, known.after], beside=False)


def _named(ground: Ground, draw: random.Random) -> tuple[str, str]:
    """Write under a strange name; what is printed steers no terminal."""
    here = ground.root / "named"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    name = draw.choice(_NAMES)
    argv = ["extract", str(ground.root / "images"), "-o", str(here / name), "--backbone",
            "tests.campaign.network:own", "--workers", "0", "--batch-size", "4"]  # fmt: skip
    followers = (["info"], ["verify"], ["train", "-o", str(here / "p.featcache"), "--cv", "2",
                                        "--head", "ridge"])  # fmt: skip
    for one in (argv, *([*f, str(here / name)] for f in followers)):
        ended = run(command(*one))
        if ended.fault or ended.status not in {0, 1}:
            return repr(name), ended.fault or f"traceback: {one[0]}: {ended.said}"
        printed = ended.out + ended.err
        steers = [sign for sign in _STEERING if sign in printed]  # a carriage return is a bar's
        if steers or (not name.isprintable() and name in printed):
            return repr(name), f"touched: {one[0]} prints {steers}"
        if ended.status:
            if len(os.fsencode(name)) + len(".partial.lock") > 255:
                break  # no name is left for what lies beside it
            return repr(name), f"lost: {one[0]} ended with {ended.status}: {ended.said}"
        if one is argv:
            shutil.copy(here / name, here / "plain.h5")
            found = run(lambda: facts(here / "plain.h5")).result
            expected = ground.undisturbed(BY_NAME["fresh"]).after["s.h5"]
            if wrong := [key for key in expected if found.get(key) != expected[key]]:
                return repr(name), f"silent: the store differs in {', '.join(wrong)}"
    return repr(name), ""


def _fifo(ground: Ground, draw: random.Random) -> tuple[str, str]:
    """Give a FIFO or a device where a file belongs."""
    here = ground.root / "fifo"
    shutil.rmtree(here, ignore_errors=True)
    (here / "images" / "ant").mkdir(parents=True)
    fifo = Path(draw.choice((str(here / "f.csv"), "/dev/zero", "/dev/null", "/dev/random")))
    if fifo.parent == here:
        os.mkfifo(fifo)
    kind = stat.S_IFMT(fifo.lstat().st_mode)
    os.mkfifo(here / "images" / "ant" / "a.jpg")
    images, store = str(ground.root / "images"), str(ground.root / "store" / "s.h5")
    network = ("--backbone", "tests.campaign.network:own", "--workers", "0")
    argv = draw.choice((
        ("info", str(fifo)),
        ("verify", str(fifo)),
        ("train", str(fifo), "-o", str(here / "p.featcache")),
        ("predict", str(fifo), images),
        ("evaluate", str(fifo), store),
        ("extract", images, "-o", str(here / "s.h5"), "--labels", str(fifo), *network),
        ("extract", images, "-o", str(fifo), *network),
        ("extract", str(here / "images"), "-o", str(here / "s.h5"), *network),
        ("extract", images, "-o", str(here / "s.h5"), *network, "--weights", str(fifo)),
        ("export", store, "-o", str(fifo)),
        ("export", store, "-o", str(here / "f.csv"), "--force"),  # never at a device
    ))  # fmt: skip
    ended = run(command(*argv, "--quiet"), deadline=15)
    fault = ended.fault
    if not fault and ended.status not in {0, 1, 2}:
        fault = f"traceback: ended with {ended.status}: {ended.said}"
    if not fault and stat.S_IFMT(fifo.lstat().st_mode) != kind:
        fault = "touched: it is no longer what it was"
    return f"{fifo.name}: {' '.join(argv)}", fault


def _kept(ground: Ground, draw: random.Random) -> tuple[str, str]:
    """Keep a file where a partial one would be set aside: all is refused, and it stays."""
    here, operation = ground.root / "kept", BY_NAME["set aside"]
    ground.begin(operation, here)
    own = here / "s.h5.partial.old"
    how = draw.choice(("a text", "a store", "a link"))
    if how == "a link":
        own.symlink_to(ground.root / "store" / "s.h5")
    else:
        own.write_bytes((ground.root / "store" / "s.h5").read_bytes() * (how != "a text"))
    before = own.read_bytes()
    ended = run(ground.command(operation, here))
    if ended.fault or ended.status != 1:
        return how, ended.fault or f"lost: ended with {ended.status}: {ended.said}"
    if own.read_bytes() != before or own.is_symlink() != (how == "a link"):
        return how, "touched: what was refused is not what it was"
    own.unlink()
    known = ground.undisturbed(operation)
    return how, rerun(ground, operation, here, [known.before], beside=False)
