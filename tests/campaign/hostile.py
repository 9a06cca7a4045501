"""Hostile files: made to be read wrong, to read what they may not, to fill memory, to mislead.

None of them may end a command with a traceback, hang it, take more memory than there is, show a
secret that lies beside it, or change a file that the command did not name.
"""

from __future__ import annotations

import io
import os
import random
import resource
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from tests.campaign.operations import NETWORK, Ground, hash_of
from tests.campaign.process import command, run
from tests.campaign.trial import Trial

_SECRET = "the-secret-of-the-file-beside"
_ROOM = 2 << 30  # bytes of address space beyond what a process has at its start
_SIGNATURES = (b"OHDR", b"OCHK", b"FRHP", b"FHDB", b"FHIB", b"BTHD", b"BTIN", b"BTLF",
               b"\x89HDF\r\n\x1a\n")  # fmt: skip
_TEXTS = ("<script>alert(1)</script>", "=HYPERLINK(\"http://x\")", "\x1b]0;title\x07", "\x9b31m",
          "a\nb", "../../etc/passwd", "\u202egnp.exe", "%s%n{0}", "x" * 60_000, "", " ", "\ufeff",
          "a|b", '"', "'; --", "nan", "-0")  # fmt: skip


# --- HDF5 -------------------------------------------------------------------------------------


def lookup3(data: bytes) -> int:
    """Return the checksum of HDF5's metadata: Bob Jenkins' lookup3, ``hashlittle`` with seed 0.

    https://burtleburtle.net/bob/c/lookup3.c
    """
    mask = 0xFFFFFFFF

    def rotated(x: int, k: int) -> int:
        return ((x << k) | (x >> (32 - k))) & mask

    a = b = c = (0xDEADBEEF + len(data)) & mask
    if not data:
        return c
    blocks = (len(data) - 1) // 12
    for k in range(blocks):
        x, y, z = struct.unpack_from("<3I", data, 12 * k)
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        for shift in (4, 6, 8, 16, 19, 4):
            a = ((a - c) & mask) ^ rotated(c, shift)
            c = (c + b) & mask
            a, b, c = b, c, a
    x, y, z = struct.unpack("<3I", data[12 * blocks :].ljust(12, b"\0"))
    a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
    for shift in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - rotated(b, shift)) & mask
        a, b, c = b, c, a
    return b  # after seven turns it is the reference's c


def sealed_blocks(content: bytes) -> list[tuple[int, int]]:
    """Return (start, length) of each block of HDF5 metadata that a checksum follows."""
    found = []
    for signature in _SIGNATURES:
        start = content.find(signature)
        while start >= 0:
            for length in range(8, 2048):
                end = start + length
                if end + 4 > len(content):
                    break
                (seal,) = struct.unpack_from("<I", content, end)
                if seal and lookup3(content[start:end]) == seal:
                    found.append((start, length))
                    break
            start = content.find(signature, start + 1)
    return sorted(found)


def _mutated(content: bytes, blocks: list[tuple[int, int]], draw: random.Random) -> bytes:
    """Return HDF5 with changed metadata whose checksums are right."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        start, length = draw.choice(blocks)
        at = start + draw.randrange(4, length)
        data[at] = draw.choice((0, 255, data[at] ^ 1 << draw.randrange(8), draw.randrange(256)))
        struct.pack_into("<I", data, start + length, lookup3(bytes(data[start : start + length])))
    return bytes(data)


def _replaced(
    path: Path, name: str, make: Callable[[h5py.File], object], version: str = "v108"
) -> None:
    with h5py.File(path, "r+", libver=(version, version)) as file:
        if name in file:
            del file[name]
        make(file)


def _stores(store: Path, secret: Path) -> dict[str, Callable[[Path, random.Random], None]]:
    """Return what turns a copy of a store into a hostile one, by kind."""
    with h5py.File(store) as file:
        names: list[str] = []
        file.visititems(lambda n, o: names.append(n) if isinstance(o, h5py.Dataset) else None)
        shapes = {name: (file[name].shape, file[name].dtype) for name in names}
    content = store.read_bytes()
    blocks = sealed_blocks(content)
    assert blocks, "no block of metadata was found"

    def link(path: Path, draw: random.Random) -> None:
        name = draw.choice(names)
        target = draw.choice((h5py.SoftLink("/nowhere"), h5py.SoftLink("/rows"),
                              h5py.ExternalLink(str(secret), "/data"),
                              h5py.SoftLink("/" + name)))  # fmt: skip
        _replaced(path, name, lambda f: f.__setitem__(name, target))

    def external(path: Path, draw: random.Random) -> None:
        name = draw.choice(names)
        shape, kind = shapes[name]
        size = int(np.prod(shape)) * kind.itemsize
        where = draw.choice((secret, Path("/etc/passwd"), path))
        _replaced(path, name, lambda f: f.create_dataset(
            name, shape, kind, external=[(str(where), 0, max(size, 1))]))  # fmt: skip

    def virtual(path: Path, draw: random.Random) -> None:
        name = draw.choice([n for n in names if shapes[n][0]])
        shape, kind = shapes[name]
        layout = h5py.VirtualLayout(shape, kind)
        layout[...] = h5py.VirtualSource(str(secret), "data", shape, kind)[...]
        _replaced(path, name, lambda f: f.create_virtual_dataset(name, layout), "latest")

    def bomb(path: Path, draw: random.Random) -> None:
        name = draw.choice([n for n in names if shapes[n][0]])
        shape, kind = shapes[name]
        many = (draw.choice((10**6, 10**9, 10**12)), *shape[1:])
        _replaced(path, name, lambda f: f.create_dataset(
            name, many, kind, chunks=(1000, *shape[1:]), compression="gzip"))  # fmt: skip

    def wrong(path: Path, draw: random.Random) -> None:
        name = draw.choice(names)
        shape, kind = shapes[name]
        shape = draw.choice((shape, (), (0,), (3,), (2, 3), (*shape, 2), shape[:-1]))
        kind = draw.choice((kind, np.dtype("f8"), np.dtype("i1"), np.dtype(">i4"), np.dtype("S1"),
                            np.dtype("S300"), np.dtype([("a", "i4")]), h5py.string_dtype(),
                            h5py.special_dtype(ref=h5py.Reference)))  # fmt: skip
        _replaced(path, name, lambda f: f.create_dataset(name, shape, kind))

    def group(path: Path, draw: random.Random) -> None:
        name = draw.choice(names)
        _replaced(path, name, lambda f: f.create_group(name))

    def gone(path: Path, draw: random.Random) -> None:
        _replaced(path, draw.choice(names), lambda f: None)

    def text(path: Path, draw: random.Random) -> None:
        name = draw.choice([n for n in names if shapes[n][1].kind in "SO"])
        value = draw.choice((*_TEXTS, "[" * 5000, '{"a":' * 5000, "1e999", "[1]", "null", "{}"))
        shape = shapes[name][0]
        raw = value.encode("utf-8", "replace").replace(b"\0", b"") or b" "
        if draw.random() < 0.2:
            raw = b"\xff\xfe" + raw[:50]
        kind = h5py.string_dtype("utf-8", len(raw))
        data = np.full(shape, raw, f"S{len(raw)}").astype(kind)
        _replaced(path, name, lambda f: f.create_dataset(name, shape, kind, data=data))

    def metadata(path: Path, draw: random.Random) -> None:
        path.write_bytes(_mutated(content, blocks, draw))

    def user(path: Path, draw: random.Random) -> None:
        with h5py.File(path, "r+", libver=("v108", "v108")) as file:
            target = draw.choice((file, file["features"], file["ids"]))
            target.attrs["x" * draw.choice((1, 500))] = draw.choice((_TEXTS[2], 1, np.zeros(3)))
            file.create_dataset(draw.choice(("..", "a b", "\x1b[2J", "é")), data=[1])
            if draw.random() < 0.5:
                file["loop"] = h5py.SoftLink("/loop")
                file["again"] = file["features"]

    return {
        "metadata": metadata, "link": link, "external data": external, "virtual data": virtual,
        "bomb": bomb, "wrong type": wrong, "group": group, "missing": gone, "text": text,
        "user's own": user,
    }  # fmt: skip


# --- other files --------------------------------------------------------------------------------


def _predictor(path: Path, draw: random.Random) -> None:
    """Change a predictor: its header, its JSON, or make another kind of file of it."""
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    kind = draw.randrange(6)
    if kind == 0:
        header = bytearray(content[8 : 8 + size])
        for _ in range(draw.choice((1, 3))):
            header[draw.randrange(len(header))] = draw.randrange(32, 127)
        path.write_bytes(content[:8] + bytes(header) + content[8 + size :])
    elif kind == 1:
        length = struct.pack("<Q", draw.choice((0, 1, 2**31, 2**63, 2**64 - 1)))
        path.write_bytes(length + content[8:])
    elif kind == 2:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("data.pkl", bytes(300 << 20))
    elif kind == 3:
        path.write_bytes(b"\x80\x04cos\nsystem\n(X\x07\x00\x00\x00touch xtR.")
    elif kind == 4:
        text = content[8 : 8 + size]
        for old in (b"linear", b"float32", b"F32", b'"shape\\"', b"0."):
            if draw.random() < 0.5:
                text = text.replace(old, draw.choice((b"", b"null", b"F64", b"1e999", b"-1")), 1)
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    else:
        path.write_bytes(draw.choice((b"", b"\0", b"{}", b"PK\3\4", draw.randbytes(500))))


def _image(draw: random.Random) -> bytes:
    """Return a file with the name of an image."""
    out = io.BytesIO()
    kinds = ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "TGA", "ICO", "SGI")
    kind = draw.choice(kinds)
    side = draw.choice((1, 2, 16, 33))
    pixels = np.frombuffer(draw.randbytes(side * side * 3), np.uint8).reshape(side, side, 3)
    Image.fromarray(pixels).save(out, kind)
    data = bytearray(out.getvalue())
    how = draw.randrange(4)
    if how == 0:
        del data[draw.randrange(1, len(data)) :]
    elif how == 1:
        for _ in range(draw.choice((1, 4, 30))):
            data[draw.randrange(len(data))] = draw.randrange(256)
    elif how == 2 and kind == "PNG":  # 60,000 x 60,000 pixels of nothing
        data[16:24] = struct.pack(">II", 60_000, 60_000)
    else:
        data = bytearray(draw.choice((b"", b"\xff\xd8", b"GIF89a", b"<svg/>", bytes(5000),
                                      b"%!PS-Adobe\n(x) run\n", b"II*\0" + bytes(20))))  # fmt: skip
    return bytes(data)


def _images(folder: Path, draw: random.Random) -> None:
    """Fill a folder with images, some hostile, some under strange names, and links."""
    for k in range(8):
        strange = (f"{k} \x1b[31m.png", f"={k}+1.gif", f"-{k}.jpg", f"<b>{k}.jpg", f"{k}\n.jpg")
        name = draw.choice((f"{k}.jpg", *strange, os.fsdecode(b"\xff%d.jpg" % k)))
        target = folder / "ab"[k % 2] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_image(draw))
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "b" / "passwd.jpg").symlink_to("/etc/passwd")


def _tar(path: Path, draw: random.Random) -> None:
    """Write a tar whose members are named after other places, or are no files."""
    with tarfile.open(path, "w") as tar:
        for k in range(6):
            name = draw.choice((f"a/{k}.jpg", f"../{k}.jpg", f"/tmp/{k}.jpg", "a/\x1b[2J.jpg",
                                f"b/{k}.cls", f"a/{k}.png", "a/0.jpg",
                                "x" * 300 + ".jpg"))  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type = draw.choice((tarfile.REGTYPE, tarfile.REGTYPE, tarfile.SYMTYPE,
                                       tarfile.FIFOTYPE, tarfile.CHRTYPE,
                                       tarfile.LNKTYPE))  # fmt: skip
            member.linkname = "/etc/passwd"
            content = _image(draw)
            member.size = len(content) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(content) if member.isreg() else None)
    raw = bytearray(path.read_bytes())
    if draw.random() < 0.4:
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    if draw.random() < 0.2:
        del raw[draw.randrange(len(raw)) :]
    path.write_bytes(bytes(raw))


def _table(path: Path, ids: list[str], draw: random.Random) -> None:
    """Write a table of labels with cells that are formulas, markup, or not cells at all."""
    lines = [
        "id,label" if draw.random() < 0.8 else draw.choice(("label,id", "id", "", "id,label,id"))
    ]
    for name in ids:
        label = draw.choice((*_TEXTS, "ant", "bee"))
        lines.append(f"{name},{label}" if draw.random() < 0.5 else f'{name},"{label}"')
    raw = draw.choice(("\n", "\r\n", "\r")).join(lines).encode("utf-8", "replace")
    if draw.random() < 0.3:
        raw = draw.choice((b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b'"')) + raw
    path.write_bytes(raw)


# --- the stage ----------------------------------------------------------------------------------


def _limited() -> None:
    """Give this process little more memory than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def hostile(ground: Ground, trials: int, seed: int) -> Iterator[Trial]:
    """Give hostile files to every command that reads such files."""
    draw = random.Random(seed)
    here = ground.root / "hostile"
    beside = ground.root / "beside"
    beside.mkdir(exist_ok=True)
    secret = beside / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["data"] = np.frombuffer((_SECRET * 400).encode(), np.uint8)
    store, trained = ground.root / "store" / "s.h5", ground.root / "trained" / "p.featcache"
    makers = _stores(store, secret)
    ids = [f"{p.parent.name}/{p.name}" for p in sorted((ground.root / "images").rglob("*.jpg"))]
    network = ("--backbone", NETWORK, "--workers", "0")
    images = str(ground.root / "images")
    watched = [secret, store, trained]
    before = [hash_of(path.read_bytes()) for path in watched]
    number = 0
    while number < trials:
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        kind = draw.choice([*makers, *["metadata"] * 10, "predictor", "images", "tar", "table"])
        target = here / "x.h5"
        if kind in makers:
            shutil.copy(store, target)
            try:
                makers[kind](target, draw)
            except (OSError, ValueError, TypeError, KeyError, RuntimeError):
                continue  # libhdf5 does not write such a thing
            argv = draw.choice((
                ("info", target), ("verify", target), ("audit", target, "-o", here / "a.csv"),
                ("train", target, "-o", here / "p.featcache", "--cv", "2", "--head", "ridge"),
                ("evaluate", trained, target), ("export", target, "-o", here / "x.csv"),
                ("extract", images, "-o", target, *network, "--batch-size", "4"),
            ))  # fmt: skip
        elif kind == "predictor":
            target = here / "p.featcache"
            shutil.copy(trained, target)
            _predictor(target, draw)
            argv = draw.choice((("info", target), ("verify", target), ("evaluate", target, store),
                                ("predict", target, images, *network)))  # fmt: skip
        elif kind == "images":
            _images(here / "i", draw)
            argv = draw.choice((
                ("extract", here / "i", "-o", here / "s.h5", *network, "--max-failures", "1"),
                ("predict", trained, here / "i", *network),
            ))  # fmt: skip
        elif kind == "tar":
            _tar(here / "t.tar", draw)
            argv = ("extract", here / "t.tar", "-o", here / "s.h5", *network, "--max-failures", "1")
        else:
            _table(here / "l.csv", ids, draw)
            argv = ("extract", images, "-o", here / "s.h5", *network, "--labels", here / "l.csv")
        expected = {path.name for path in here.iterdir()} | {
            "p.featcache",
            "a.csv",
            "x.csv",
            "s.h5",
        }
        ended = run(command(*map(str, argv)), before=_limited, deadline=30)
        printed = ended.err + ended.out * (argv[0] != "predict")  # whose CSV is data
        fault = ended.fault
        if kind == "metadata" and "/h5py/_hl/" in ended.said.partition("\n  File ")[2][:150]:
            fault = f"libhdf5: {ended.said}"
        if not fault and ended.status not in {0, 1}:
            fault = f"traceback: ended with {ended.status}: {ended.said}"
        if not fault and ("\x1b" in printed or "\x9b" in printed or "\x07" in printed):
            fault = f"touched: an escape code was printed: {printed[-500:]!r}"
        if not fault and _SECRET in printed:
            fault = "touched: the secret was printed"
        if not fault and [hash_of(path.read_bytes()) for path in watched] != before:
            fault = "touched: a file that was not named changed"
        fault = fault or _strays(here, expected)
        number += 1
        how = f"seed {seed}, {number}: {argv[0]}"
        yield Trial("hostile", kind, how, fault)


def _strays(here: Path, expected: set[str]) -> str:
    """Return what is wrong with the files that a command left behind."""
    for path in here.rglob("*.csv"):
        if path.is_file() and _SECRET.encode() in path.read_bytes():
            return f"touched: the secret was written to {path.name}"
    strays = {path.name for path in here.iterdir()} - expected
    strays = {name for name in strays if not name.startswith("s.h5.partial")}
    return f"litter: {', '.join(sorted(strays))}" if strays else ""
