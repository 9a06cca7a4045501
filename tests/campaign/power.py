"""Power cuts: what a disk may hold of a recorded run after the power failed at some moment.

Writes that no fsync followed may be there, be missing, or be there in part; names that no fsync of
their folder followed likewise. What was fsynced is there.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    """The files of one folder: what is on the disk for sure, and what is under way.

    Contents belong to numbers (inodes), names lead to numbers.
    """

    files: dict[int, bytearray] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    pending: dict[int, list[Call]] = field(default_factory=dict)
    renames: list[Call] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> Disk:
        """Return the state of a folder that was synced."""
        disk = cls()
        for path in (p for p in folder.rglob("*") if p.is_file()):
            number = path.stat().st_ino
            disk.names[str(path)] = number
            disk.files[number] = bytearray(path.read_bytes())
        return disk

    def do(self, call: Call, folders: dict[int, str]) -> None:
        """Take a call into account."""
        if call.op == "sync":
            if call.inode in folders:
                kept = []
                for one in self.renames:
                    if str(Path(one.target or one.path).parent) == folders[call.inode]:
                        self._name(one)
                    else:
                        kept.append(one)
                self.renames = kept
            for one in self.pending.pop(call.inode, []):
                self._write(one)
        elif call.op in {"write", "size", "room"}:
            self.pending.setdefault(call.inode, []).append(call)
        elif call.op in {"open", "new", "rename", "link", "unlink", "mkdir", "rmdir"}:
            self.renames.append(call)
            if call.op == "new":
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
        if call.op in {"open", "new"}:
            self.names[call.path] = call.inode
        elif call.op == "rename" and call.path in self.names:
            self.names[call.target] = self.names.pop(call.path)
        elif call.op == "link":
            self.names[call.target] = call.inode
        elif call.op == "unlink":
            self.names.pop(call.path, None)

    def cut(self, draw: random.Random, how: str) -> dict[str, bytes]:
        """Return the files by name as they may be after a power cut now."""
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
        kept = {"dropped": 0, "torn": draw.randint(0, len(self.renames))}
        for number, call in enumerate(self.renames):
            # Names go to the disk in their order, or each for itself.
            if draw.random() < 0.5 if how == "reordered" else number < kept[how]:
                self._name(call)
        return {name: bytes(self.files.get(n, b"")) for name, n in self.names.items()}


def _states(ground: Ground, operation: Operation) -> tuple[Disk, list[Call], dict[int, str], Path]:
    """Run an operation once, recorded; return the folder before, the calls, and its folders."""
    here = ground.root / "recorded"
    ground.begin(operation, here)
    disk = Disk.of(here)
    path = ground.root / "record"
    with path.open("wb") as log:
        attack = Arm(here, process.WRITES, process.RECORD, log=log.fileno())
        ended = process.run(ground.command(operation, here), attack)
    assert ended.status == 0, ended
    folders = {p.stat().st_ino: str(p) for p in [here, *here.rglob("*")] if p.is_dir()}
    return disk, read_record(path), folders, here


def power_cuts(ground: Ground, trials: int, seed: int) -> Iterator[Trial]:
    """Cut the power at every kind of moment; what was acknowledged has to be there."""
    draw = random.Random(seed)
    order = list(OPERATIONS)
    draw.shuffle(order)
    each = -(-trials // len(order))
    done = 0
    for operation in order:
        before, calls, folders, here = _states(ground, operation)
        start, oracle = ground.oracles[operation.name]
        told = [k for k, call in enumerate(calls) if call.op == "told"]
        for number, how in zip(range(each), cycle(("dropped", "torn", "reordered"))):
            if done >= trials:
                return
            done += 1
            # Moments around names and syncs are the dangerous ones.
            weights = [1 + 4 * (call.op in {"rename", "sync", "new", "unlink"}) for call in calls]
            at = draw.choices(range(len(calls) + 1), [*weights, 3])[0]
            disk = Disk({n: bytearray(c) for n, c in before.files.items()}, dict(before.names))
            for call in calls[:at]:
                disk.do(call, folders)
            shutil.rmtree(here)
            here.mkdir()
            for name, content in disk.cut(draw, how).items():
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).write_bytes(content)
            acknowledged = bool(told) and at > told[-1]
            fault = rerun(ground, operation, here, [oracle] if acknowledged else [start, oracle])
            moment = calls[at].op if at < len(calls) else "the end"
            how = f"{how}, seed {seed}, state {number}: before call {at} ({moment})"
            yield Trial("power", operation.name, how, fault)
