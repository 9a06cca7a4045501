"""Power cuts: what a disk may hold of a recorded run after the power failed at some moment.

Writes that no fsync followed may be there, be missing, or be there in part; names that no fsync of
their folder followed likewise, those of new folders with all that is in them. What was fsynced is
there. The same record gives what a kill leaves: all that was done before it.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path

from tests.campaign import process
from tests.campaign.operations import OPERATIONS, Ground, Operation, rerun
from tests.campaign.process import Arm
from tests.campaign.trial import Trial

_PAGE = 4096
_HEAD = struct.Struct("8sQqqqq")  # as struct record in shim.c


@dataclass(frozen=True)
class Call:
    """One recorded call."""

    op: str
    inode: int
    offset: int
    path: str
    target: str
    data: bytes


def read_record(path: Path) -> list[Call]:
    """Return the calls that the shim wrote down."""
    raw, at, found = path.read_bytes(), 0, []
    while at < len(raw):
        op, inode, offset, *lengths = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        parts = []
        for length in lengths:
            parts.append(raw[at : at + length])
            at += length
        names = [os.fsdecode(part) for part in parts[:2]]
        found.append(Call(op.rstrip(b"\0").decode(), inode, offset, *names, parts[2]))
    return found


@dataclass
class Disk:
    """The files below one folder: what is on the disk for sure, and what is under way.

    Contents belong to numbers (inodes), names lead to numbers; those of `folders` have no content.
    """

    here: Path
    files: dict[int, bytearray] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    folders: dict[int, str] = field(default_factory=dict)
    pending: dict[int, list[Call]] = field(default_factory=dict)
    renames: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, here: Path) -> Disk:
        """Return the state of a folder that was synced."""
        disk = cls(here, folders={here.stat().st_ino: str(here)})
        for path in (p for p in here.rglob("*") if not p.is_symlink()):
            number = disk.names[str(path)] = path.stat().st_ino
            if path.is_file():
                disk.files[number] = bytearray(path.read_bytes())
            else:
                disk.folders[number] = str(path)
        return disk

    def copy(self) -> Disk:
        """Return a copy that may be changed."""
        files = {number: bytearray(content) for number, content in self.files.items()}
        return Disk(self.here, files, dict(self.names), dict(self.folders))

    def do(self, call: Call) -> None:
        """Take a call into account."""
        if call.op == "sync":
            folder, waiting, self.renames = self.folders.get(call.inode), self.renames, []
            for one in waiting:
                if folder and str(Path(one.target or one.path).parent) == folder:
                    self._name(one)
                else:
                    self.renames.append(one)
            for one in self.pending.pop(call.inode, []):
                self._write(one)
        elif call.op in {"write", "size", "room"}:
            self.pending.setdefault(call.inode, []).append(call)
        elif call.op != "told":
            self.renames.append(call)
            if call.op == "mkdir":
                self.folders[call.inode] = call.path
            elif call.op == "new":
                truncated = Call("size", call.inode, 0, "", "", b"")
                self.pending.setdefault(call.inode, []).append(truncated)

    def _write(self, call: Call, keep: slice | None = None) -> None:
        content = self.files.setdefault(call.inode, bytearray())
        if call.op == "size":
            del content[call.offset :]
            content.extend(bytes(call.offset - len(content)))
        elif call.op == "room":
            content.extend(bytes(max(0, call.offset - len(content))))
        else:
            data = call.data if keep is None else call.data[keep]
            start = call.offset + (keep.start or 0 if keep else 0)
            content.extend(bytes(max(0, start + len(data) - len(content))))
            content[start : start + len(data)] = data

    def _name(self, call: Call) -> None:
        if call.op in {"open", "new", "mkdir"}:
            self.names[call.path] = call.inode
        elif call.op == "rename" and call.path in self.names:
            self.names[call.target] = self.names.pop(call.path)
        elif call.op == "link":
            self.names[call.target] = call.inode
        elif call.op in {"unlink", "rmdir"}:
            self.names.pop(call.path, None)

    def cut(self, draw: random.Random, how: str) -> None:
        """Make the folder what it may be after a power cut now, or after a kill ("kept")."""
        for calls in self.pending.values():
            for call in calls:
                if how == "dropped" or (how == "torn" and draw.random() < 0.3):
                    continue
                if how == "reordered" and draw.random() < 0.5:
                    continue
                if call.op == "write" and how == "torn" and draw.random() < 0.5:
                    pages = -(-len(call.data) // _PAGE)
                    for page in range(pages):
                        if draw.random() < 0.5:
                            self._write(call, slice(page * _PAGE, (page + 1) * _PAGE))
                else:
                    self._write(call)
        number = len(self.renames)
        kept = {"dropped": 0, "torn": draw.randint(0, number), "kept": number}
        for number, call in enumerate(self.renames):
            # Names go to the disk in their order, or each for itself.
            if draw.random() < 0.5 if how == "reordered" else number < kept[how]:
                self._name(call)
        shutil.rmtree(self.here)
        self.here.mkdir()
        for name, number in sorted(self.names.items()):  # a folder before what is in it
            if not Path(name).parent.exists():
                continue  # its folder's own name was not kept
            if number in self.folders:
                Path(name).mkdir()
            else:
                Path(name).write_bytes(self.files.get(number, b""))


@dataclass(frozen=True)
class Recording:
    """The folder before a run, and each call that changed it."""

    before: Disk
    calls: list[Call]

    @classmethod
    def of(cls, ground: Ground, operation: Operation) -> Recording:
        """Run an operation once, recorded."""
        here, path = ground.root / "recorded", ground.root / "record"
        ground.begin(operation, here, beside=True)
        before = Disk.of(here)
        with path.open("wb") as log:
            attack = Arm(here, process.WRITES, process.RECORD, log=log.fileno())
            ended = process.run(ground.command(operation, here), attack)
        assert ended.status == 0, ended
        made = cls(before, read_record(path))
        after = files_of(here)
        made.until(len(made.calls)).cut(random.Random(0), "kept")
        assert files_of(here) == after, f"the record of {operation.name} is not what it did"
        return made

    def until(self, at: int, *, half: bool = False) -> Disk:
        """Return the disk before call number `at`, or when half of it is done."""
        disk = self.before.copy()
        for call in self.calls[:at]:
            disk.do(call)
        if half:
            call = self.calls[at]
            disk.do(replace(call, data=call.data[: len(call.data) // 2]))
        return disk


def files_of(here: Path) -> dict[Path, bytes | None]:
    """Return the contents of all files below a folder but links; None for folders."""
    paths = [path for path in here.rglob("*") if not path.is_symlink()]
    return {p.relative_to(here): p.read_bytes() if p.is_file() else None for p in paths}


def power_cuts(ground: Ground, trials: int, seed: int) -> Iterator[Trial]:
    """Cut the power at every kind of moment; what was acknowledged has to be there."""
    draw = random.Random(seed)
    order = list(OPERATIONS)
    draw.shuffle(order)
    each = -(-trials // len(order))
    done = 0
    for operation in order:
        recording = Recording.of(ground, operation)
        calls, known = recording.calls, ground.undisturbed(operation)
        told = [k for k, call in enumerate(calls) if call.op == "told"]
        for number, how in zip(range(each), cycle(("dropped", "torn", "reordered"))):
            if done >= trials:
                return
            done += 1
            # Moments around names and syncs are the dangerous ones.
            weights = [1 + 4 * (call.op in {"rename", "sync", "new", "unlink"}) for call in calls]
            at = draw.choices(range(len(calls) + 1), [*weights, 3])[0]
            recording.until(at).cut(draw, how)
            possible = [known.after] if told and at > told[-1] else [known.before, known.after]
            fault = rerun(ground, operation, recording.before.here, possible)
            moment = calls[at].op if at < len(calls) else "the end"
            how = f"{how}, seed {seed}, state {number}: before call {at} ({moment})"
            yield Trial("power", operation.name, how, fault)
