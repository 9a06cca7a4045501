"""The feature file as specified: plain HDF5, exact bytes, and no damage that goes unseen."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import h5py
import numpy as np
import pytest

from featcache.errors import (
    CorruptStore,
    DiskFull,
    FeatcacheError,
    FormatVersionError,
    MissingStore,
    StoreError,
)
from featcache.fingerprint import Fingerprint
from featcache.store.file import StoreFile
from featcache.store.store import FeatureStore
from featcache.store.writer import relabel
from tests import stores
from tests.stores import MAPS, POOL

TABLES = ("ids", "labels", "rows", "failures", "digest")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.h5"


# --- plain HDF5 ---------------------------------------------------------------------------------


def test_plain_h5py_reads_everything(path: Path) -> None:
    f = stores.fingerprint(taps=(POOL, MAPS), store_dtype="float16")
    imgs = stores.images(12)
    imgs.groups, imgs.splits = ["g"] * 12, ["train"] * 8 + ["test"] * 4
    stores.store(path, imgs, f, failed=[3])
    good = [name for i, name in enumerate(imgs.ids) if i != 3]
    expected = stores.features(good, f)
    with h5py.File(path) as file:
        assert list(file["ids"].asstr()) == good
        assert list(file["labels"].asstr()) == [name[0] for name in good]
        assert list(file["groups"].asstr()) == ["g"] * 11
        assert list(file["splits"].asstr()) == ["train"] * 7 + ["test"] * 4
        for tap in f.taps:
            assert file["features"][tap].dtype == np.float16
            np.testing.assert_array_equal(
                file["features"][tap][:], expected[tap].astype(np.float16)
            )
        assert file["rows"]["sha256"].tobytes() == stores.sha256(good).tobytes()
        assert (file["rows"]["status"] == 1).all()
        assert list(file["failures/id"].asstr()) == [imgs.ids[3]]
        assert list(file["failures/reason"].asstr()) == ["not an image"]
        assert file["failures/size"][:].tolist() == [-1]
        assert json.loads(file["meta/fingerprint"][()]) == json.loads(f.to_json())
        assert json.loads(file["meta/classes"][()]) == ["a", "b", "c"]
        assert json.loads(file["meta/versions"][()])["format"] == 4
        assert list(file["canaries/names"].asstr()) == ["grey", "exif"]
        assert file["canaries/images/1"][:].tobytes() == b"\xff\xd8 22"


def test_layout_is_contiguous_aligned_unfiltered_and_readable_since_hdf5_1_8(path: Path) -> None:
    stores.store(path, f=stores.fingerprint(taps=(POOL, MAPS)))
    names = []

    def check(name: str, node: h5py.Dataset | h5py.Group) -> None:
        if isinstance(node, h5py.Dataset):
            names.append(name)
            plist = node.id.get_create_plist()
            assert plist.get_layout() == h5py.h5d.CONTIGUOUS
            assert plist.get_nfilters() == 0
            if node.nbytes:
                assert node.id.get_offset() % 4096 == 0
            for base in node.dtype.fields or {"": (node.dtype,)}:
                kind = node.dtype[base] if base else node.dtype
                assert kind.kind == "S" or kind.base.byteorder in "<|="

    with h5py.File(path) as file:
        file.visititems(check)
        assert h5py.check_string_dtype(file["ids"].dtype).encoding == "utf-8"
    assert {name.split("/")[0] for name in names} == {*TABLES, "features", "meta", "canaries"}
    superblock = path.read_bytes()[:9]
    assert superblock == b"\x89HDF\r\n\x1a\n\x02"  # version 2: checksummed, HDF5 1.8


def without_stamps(rows: np.ndarray) -> bytes:
    """Return the bytes of rows whose stamps are 0: they only say when to read a file again."""
    rows = rows.copy()
    rows["stamp"] = 0
    return rows.tobytes()


def test_checksums_are_those_of_the_specification(path: Path) -> None:
    f = stores.fingerprint(taps=(POOL, MAPS))
    stores.store(path, f=f)
    with h5py.File(path) as file:
        rows = file["rows"][:]
        assert rows.dtype.itemsize == 32 + 8 + 8 + 4 * 2 + 1 + 4
        for i, row in enumerate(rows):
            seed = zlib.crc32(row["sha256"].tobytes())
            for k, tap in enumerate(f.taps):
                stored = file["features"][tap][i].tobytes()
                assert row["crc32"][k] == zlib.crc32(stored, seed)
            name_seed = zlib.crc32(file["ids"][i])
            assert row["entry_crc"] == zlib.crc32(row.tobytes()[:-12], name_seed)
        digest = hashlib.sha256()
        names: list[str] = []
        file.visit(
            lambda name: names.append(name) if isinstance(file[name], h5py.Dataset) else None
        )
        for name in sorted(names):
            if name != "digest" and not name.startswith("features/"):
                offset, size = file[name].id.get_offset() or 0, file[name].nbytes
                content = path.read_bytes()[offset : offset + size]
                if name == "rows":
                    content = without_stamps(np.frombuffer(content, rows.dtype))
                digest.update(name.encode() + b"\0" + size.to_bytes(8, "little") + content)
        assert file["digest"][:].tobytes() == digest.digest()


def test_the_same_features_give_the_same_bytes(tmp_path: Path) -> None:
    f = stores.fingerprint(taps=(POOL, MAPS))
    for name in "ab":
        stores.store(tmp_path / name, f=f, failed=[5])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_names_that_hdf5_reads_otherwise(path: Path) -> None:
    taps = ("a/b%2F:output:flatten", "ünï.0:output:mean", "a%2Fb%2F:output:flatten")
    f = stores.fingerprint(taps=taps)
    imgs = stores.images(3)
    values = {tap: np.full((3, 2), k, np.float32) for k, tap in enumerate(taps)}
    with stores.writer(path, imgs, f, dict.fromkeys(taps, (2,))) as writer:
        writer.write([0, 1, 2], values, sha256=stores.sha256(imgs.ids))
        store = writer.finish()
    assert list(store.taps) == list(taps)
    for tap in taps:
        np.testing.assert_array_equal(store.load(tap)[0], values[tap])
    with h5py.File(path) as file:
        assert set(file["features"]) == {
            "a%2Fb%252F:output:flatten",
            "ünï.0:output:mean",
            "a%252Fb%252F:output:flatten",
        }


# --- damage -------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    """Return what h5py reads from a file, by dataset."""
    found = {}

    def visit(name: str, node: h5py.Dataset | h5py.Group) -> None:
        if isinstance(node, h5py.Dataset):
            values = np.asarray(node[()])
            found[name] = without_stamps(values) if name == "rows" else values.tobytes()

    with h5py.File(path) as file:
        file.visititems(visit)
    return found


def is_seen(path: Path) -> bool:
    """Say whether opening or verifying a file reports damage."""
    try:
        return not FeatureStore.open(path).verify().ok
    except FeatcacheError:
        return True


def test_every_flipped_bit_is_seen_or_changes_nothing(path: Path) -> None:
    stores.store(path, f=stores.fingerprint(taps=(POOL, MAPS)), failed=[5])
    whole, before = path.read_bytes(), contents(path)
    assert not is_seen(path)
    used = [i for i in range(0, len(whole), 16) if any(whole[i : i + 16])]
    rng = np.random.default_rng(0)
    seen = 0
    for block in rng.choice(used, 400):
        position, bit = int(block) + int(rng.integers(16)), int(rng.integers(8))
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        if is_seen(path):
            seen += 1
        else:  # a gap between datasets
            assert contents(path) == before, f"bit {bit} of byte {position} went unseen"
    assert seen > 200


def test_every_flipped_bit_of_features_and_rows_is_seen(path: Path) -> None:
    stores.store(path)
    whole = path.read_bytes()
    with h5py.File(path) as file:
        places = [
            range(file[name].id.get_offset(), file[name].id.get_offset() + file[name].nbytes)
            for name in (f"features/{POOL}", "rows", "ids", "labels")
        ]
        rows, size = places[1], file["rows"].dtype.itemsize
        places[1] = [at for at in rows if (at - rows.start) % size < size - 8]  # but the stamps
    rng = np.random.default_rng(1)
    for place in places:
        for position in rng.choice(place, 25):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            assert is_seen(path), position


def damage(path: Path, name: str, source: slice, target: slice) -> None:
    """Copy rows of a dataset over others, behind libhdf5's back."""
    with h5py.File(path) as file:
        dataset = file[name]
        offset, row = dataset.id.get_offset(), dataset.nbytes // len(dataset)
    data = bytearray(path.read_bytes())
    a, b = (slice(offset + s.start * row, offset + s.stop * row) for s in (source, target))
    data[a], data[b] = data[b], data[a]
    path.write_bytes(data)


def test_swapped_rows_are_seen_and_named(path: Path) -> None:
    store = stores.store(path)
    damage(path, f"features/{POOL}", slice(2, 3), slice(7, 8))
    report = FeatureStore.open(path).verify()
    assert report.bad_rows == [store.ids[2], store.ids[7]]
    assert "mv " in str(report)
    # with their entries too: the entries are signed with the ids
    damage(path, "rows", slice(2, 3), slice(7, 8))
    assert FeatureStore.open(path).verify().bad_rows == [store.ids[2], store.ids[7]]


def test_swapped_taps_are_seen(path: Path) -> None:
    """Two taps of one shape whose bytes changed places."""
    f = stores.fingerprint(taps=("a:output:mean", "b:output:mean"))
    imgs = stores.images(3)
    values = {tap: np.full((3, 2), k, np.float32) for k, tap in enumerate(f.taps)}
    with stores.writer(path, imgs, f, dict.fromkeys(f.taps, (2,))) as w:
        w.write([0, 1, 2], values, sha256=stores.sha256(imgs.ids))
        w.finish()
    with h5py.File(path) as file:
        a, b = (file[f"features/{tap}"].id.get_offset() for tap in f.taps)
    data = bytearray(path.read_bytes())
    data[a : a + 8], data[b : b + 8] = data[b : b + 8], data[a : a + 8]
    path.write_bytes(data)
    assert FeatureStore.open(path).verify().bad_rows == [imgs.ids[0]]


def test_a_row_without_features_is_seen_though_it_is_signed(path: Path) -> None:
    imgs = stores.images()
    with stores.writer(path, imgs) as writer:
        writer.fail(4, "decode", "no")
        stores.fill(writer, imgs, writer.pending)
    partial = StoreFile(f"{path}.partial", writable=True)
    partial.seal()
    Path(f"{path}.partial").rename(path)
    assert FeatureStore.open(path).verify().bad_rows == [imgs.ids[4]]


def test_lost_and_torn_writes_are_seen(path: Path) -> None:
    store = stores.store(path)
    with h5py.File(path) as file:
        offset = file[f"features/{POOL}"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset + 32 : offset + 64] = bytes(32)  # row 1 never reached the disk
    data[offset + 5 * 32 + 16 : offset + 6 * 32] = bytes(16)  # half of row 5 did
    path.write_bytes(data)
    assert FeatureStore.open(path).verify().bad_rows == [store.ids[1], store.ids[5]]


def test_only_damaged_rows_are_computed_again(path: Path) -> None:
    imgs = stores.images()
    stores.store(path, imgs)
    whole = path.read_bytes()
    damage(path, f"features/{POOL}", slice(2, 3), slice(7, 8))
    path.rename(f"{path}.partial")  # what verify's message says
    with stores.writer(path, imgs) as writer:
        assert writer.pending.tolist() == [2, 7]
        stores.fill(writer, imgs, writer.pending)
        assert writer.finish().verify().ok
    assert path.read_bytes() == whole


def test_truncation_at_any_length_is_one_clear_error(path: Path) -> None:
    stores.store(path)
    whole = path.read_bytes()
    for length in [*range(0, 600, 37), *range(600, len(whole), 4099), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptStore) as error:
            FeatureStore.open(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"hello" * 1000],
    ids=["empty", "png", "text"],
)
def test_what_is_not_hdf5_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(CorruptStore, match="HDF5"):
        FeatureStore.open(path)
    if content:
        with pytest.raises(CorruptStore, match="HDF5"):
            stores.writer(path, stores.images())
    assert path.read_bytes() == content


def test_somebody_elses_hdf5_is_refused_and_left_alone(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(10)
    with pytest.raises(CorruptStore, match="not a feature file"):
        FeatureStore.open(path)
    with pytest.raises(CorruptStore):
        stores.writer(path, stores.images())
    with h5py.File(path) as file:
        assert list(file) == ["x"]


def change_meta(path: Path, key: str, old: str, new: str, copies: str) -> None:
    """Replace a text in what is kept twice: the "first" copy, the "second" one, or the "hash"."""
    datasets, data = StoreFile(str(path)).datasets, bytearray(path.read_bytes())

    def replace(name: str, change: Callable[[str], str]) -> str:
        place = slice(datasets[name].offset, datasets[name].offset + datasets[name].nbytes)
        data[place] = change(data[place].decode()).encode()
        return data[place].decode()

    if "first" in copies:
        replace(f"meta/{key}", lambda text: text.replace(old, new))
    if "second" in copies:
        copy = replace("meta/copy", lambda text: text.replace(old, new))
        sha256 = hashlib.sha256(copy.encode()).hexdigest()
        if "right hash" in copies:
            replace("meta/sha256", lambda _: f'"{sha256}"')
    if "wrong hash" in copies:
        replace("meta/sha256", lambda text: text.translate(str.maketrans("0123", "1230")))
    path.write_bytes(data)


@pytest.mark.parametrize("copies", ["first", "second", "wrong hash"])
@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("versions", '"format":4', '"format":5'),
        ("versions", '{"', '("'),
        ("fingerprint", "resnet18", "resnet19"),
        ("fingerprint", '"backbone"', '"backbond"'),
        ("fingerprint", '"taps":[', '"taps":{'),
        ("datasets", '"labels"', '"lebels"'),
    ],
)
def test_one_damaged_copy_of_what_tells_how_to_read_costs_no_row(
    path: Path, key: str, old: str, new: str, copies: str
) -> None:
    imgs = stores.images()
    stores.store(path, imgs, failed=[5])
    whole = path.read_bytes()
    change_meta(path, key, old, new, copies)
    store = FeatureStore.open(path)
    assert store.fingerprint == stores.fingerprint()
    assert len(store.load()[0]) == len(store.labels) == 11  # it can be used
    (problem,) = store.verify().problems
    assert "The others agree" in problem and f"mv {path} {path}.partial" in problem
    again = relabel(store, imgs.tables)
    assert again.verify().ok and path.read_bytes() == whole
    change_meta(path, key, old, new, copies)
    path.rename(f"{path}.partial")
    with stores.writer(path, imgs) as writer:
        [earlier] = writer.earlier_stores
        rows = np.array([imgs.ids.index(name) for name in earlier.ids.tolist()])
        writer.copy_rows(earlier, np.arange(len(rows)), rows)
        assert writer.pending.tolist() == [5]
        writer.fail(5, "decode", "not an image")
        writer.finish(max_failures=1)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("copies", ["first", "second", "wrong hash"])
def test_a_damaged_copy_in_an_unfinished_file_costs_no_row_and_is_not_sealed(
    path: Path, copies: str
) -> None:
    imgs, partial = stores.images(), path.with_name("a.h5.partial")
    with stores.writer(path, imgs) as writer:
        stores.fill(writer, imgs, np.arange(7))
    change_meta(partial, "fingerprint", "resnet18", "resnet19", copies)
    with stores.writer(path, imgs) as writer:
        [earlier] = writer.earlier_stores
        writer.copy_rows(earlier, np.arange(7), np.arange(7))
        stores.fill(writer, imgs, writer.pending)
        assert writer.finish().verify().ok
    assert b"resnet19" not in path.read_bytes()


@pytest.mark.parametrize("copies", ["first, second", "first, wrong hash", "second, wrong hash"])
def test_features_of_a_network_that_nothing_tells_are_refused(path: Path, copies: str) -> None:
    stores.store(path)
    for copy in copies.split(", "):
        change_meta(path, "fingerprint", "resnet18", "resnet" + copy[:2], copy)
    with pytest.raises(CorruptStore, match="nothing tells which network"):
        FeatureStore.open(path)


def sign(path: Path) -> None:
    """Write the digest that the specification asks for."""
    digest, data = hashlib.sha256(), bytearray(path.read_bytes())
    with h5py.File(path) as file:
        names: list[str] = []
        file.visit(names.append)
        for name in sorted(names):
            if name == "digest" or name.startswith("features") or not hasattr(file[name], "shape"):
                continue
            start, size = file[name].id.get_offset() or 0, file[name].nbytes
            content = bytes(data[start : start + size])
            if name == "rows" and "stamp" in (file[name].dtype.names or ()):
                content = without_stamps(np.frombuffer(content, file[name].dtype))
            digest.update(name.encode() + b"\0" + size.to_bytes(8, "little") + content)
        start = file["digest"].id.get_offset()
    data[start : start + 32] = digest.digest()
    path.write_bytes(data)


ROWS = [("sha256", "u1", 32), ("size", "<i8"), ("crc32", "<u4", 1), ("status", "u1")]
WRONG = {
    "ids": [np.arange(12), np.array(["a"] * 11, "S"), np.full((12, 1), "a", "S1"), b"abc"],
    "labels": [np.array(["a", "b"], "S"), np.arange(12.0), np.array([], "S1")],
    "rows": [
        np.zeros(12, "u1"),
        np.zeros(12, ROWS),
        np.zeros(11, [*ROWS, ("entry_crc", "<u4"), ("stamp", "<i8")]),
        np.zeros(12, [*ROWS, ("entry_crc", "<u4"), ("stamp", "<f8")]),
        np.zeros(
            12, [*ROWS[:2], ("crc32", "<u4", 3), *ROWS[3:], ("entry_crc", "<u4"), ("stamp", "<i8")]
        ),
    ],
    f"features/{POOL}": [
        np.zeros((11, 8), "<f4"),
        np.zeros((12, 8), "<f2"),
        np.zeros((12, 8), ">f4"),
        np.zeros((12, 8), "<i4"),
        np.float32(3),
    ],
    "failures/size": [np.zeros(2, "<i8"), np.zeros(1, "<f8"), np.array(["x"], "S")],
    "failures/reason": [np.zeros(1), np.array(["a", "b"], "S")],
    "meta/run": [np.arange(3), np.int64(9), np.array(["{}"], "S2")],
    "canaries/names": [np.zeros(2), np.array(["a"] * 3, "S"), np.array(["a"] * 3000, "S")],
    "canaries/images/1": [np.zeros(4, "<f4"), np.zeros((2, 2), "u1"), np.uint8(2)],
    f"canaries/features/{POOL}": [
        np.zeros((2, 7), "<f4"),
        np.zeros((3, 8), "<f4"),
        np.zeros((2, 8)),
    ],
    "digest": [np.ones(31, "u1"), np.ones((32, 1), "u1"), np.ones(32, "<u2")],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_structure_that_is_not_the_formats_is_refused_though_it_is_signed(
    path: Path, name: str, value: np.ndarray
) -> None:
    stores.store(path, stores.images(13), failed=[5])
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = value
    if name != "digest":
        sign(path)
    for refused in (FeatureStore.open, lambda path: stores.writer(path, stores.images(14))):
        with pytest.raises(CorruptStore, match="damaged: "):
            refused(path)
    partial = path.rename(f"{path}.partial")
    with pytest.raises(CorruptStore):
        stores.writer(path, stores.images(13))
    assert partial.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("taps", "avgpool"),
        ("taps", [3]),
        ("taps", []),
        ("store_dtype", "object"),
        ("store_dtype", 3),
        ("augmentation", {"views": "four"}),
        ("augmentation", [1]),
        ("preprocessing", None),
        ("backbone", 7),
        ("checkpoint", "x.pt"),
        ("varying", None),
    ],
)
def test_a_fingerprint_that_is_none_is_refused(field: str, value: object) -> None:
    fields = stores.fingerprint().to_dict()
    with pytest.raises(CorruptStore, match=f"fingerprint's {field} cannot be"):
        Fingerprint.from_dict({**fields, field: value})


def test_tables_that_are_nothing_but_holes_are_not_read(path: Path) -> None:
    stores.store(path)
    with h5py.File(path, "a") as file:
        del file["canaries/images/1"]
        early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((1 << 42,))
        h5py.h5d.create(file.id, b"canaries/images/1", h5py.h5t.STD_U8LE, space, early)
    assert path.stat().st_size > 1 << 42
    with pytest.raises(CorruptStore, match=r"said to have 4,398,0\d\d,\d\d\d,\d\d\d bytes"):
        FeatureStore.open(path)


def test_what_h5py_cannot_name_is_a_users_own(path: Path) -> None:
    stores.store(path)
    with h5py.File(path, "a") as file:
        file["nothing"] = h5py.Empty("f4")
        time = h5py.h5t.UNIX_D32LE
        h5py.h5d.create(file.id, b"time", time, h5py.h5s.create_simple((3,)))
        file["links"] = np.array([file["ids"].ref], h5py.ref_dtype)
        file["texts"] = ["a", "bc"]
        file[b"\xff"] = [1]
    store = FeatureStore.open(path)
    assert store.verify().ok and "\\xff, links, nothing, texts, time" in str(store.verify())
    assert store.load()[0].shape == (12, 8)


@pytest.mark.parametrize(("version", "advice"), [(5, "pip install"), (2, "featcache extract")])
def test_other_format_versions_are_refused(path: Path, version: int, advice: str) -> None:
    stores.store(path)
    change_meta(path, "versions", '"format":4', f'"format":{version}', "first second right hash")
    with pytest.raises(FormatVersionError, match=advice) as error:
        FeatureStore.open(path)
    assert f"version {version}" in str(error.value)


def test_missing_file_and_folder(path: Path) -> None:
    with pytest.raises(MissingStore, match="featcache extract"):
        FeatureStore.open(path)
    path.mkdir()
    with pytest.raises(StoreError, match="folder"):
        FeatureStore.open(path)
    with pytest.raises(StoreError, match="folder"):
        stores.writer(path, stores.images())


# --- full disks and other refusals --------------------------------------------------------------


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )


def test_full_disk_is_found_before_any_row(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the same refusal, at the same places."""
    code = f"""
import resource
from featcache.errors import DiskFull
from tests import stores
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, 10_000_000))
f = stores.fingerprint()
try:
    stores.writer(
        {str(tmp_path / "a.h5")!r}, stores.images(100), f, {{stores.POOL: (100_000,)}}
    )
except DiskFull as error:
    print(error)
"""
    result = run(code)
    assert "needs 42." in result.stdout, result.stderr
    assert "Nothing was computed" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_full_disk_found_by_reservation(
    tmp_path: Path, full_disk: Callable[..., AbstractContextManager[None]]
) -> None:
    with full_disk(), pytest.raises(DiskFull, match="--store-dtype float16"):
        stores.writer(tmp_path / "a.h5", stores.images())
    assert list(tmp_path.iterdir()) == []


def test_without_reservation_zeros_are_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores.store(path)
    expected = path.read_bytes()
    path.unlink()

    def missing(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", missing, raising=False)
    stores.store(path)
    assert path.read_bytes() == expected
    path.unlink()
    test_space_is_reserved_at_the_start(path)


def test_space_is_reserved_at_the_start(path: Path) -> None:
    f = stores.fingerprint()
    with stores.writer(path, stores.images(50), f, {POOL: (10_000,)}):
        status = Path(f"{path}.partial").stat()
        assert status.st_blocks * 512 >= status.st_size > 50 * 10_000 * 4


def test_read_only_folder_is_said_in_words() -> None:
    code = """
import os, sys
from featcache.errors import StoreError
from tests import stores
if os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere: be nobody
try:
    stores.writer(sys.argv[1], stores.images())
except StoreError as error:
    print(error)
"""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to other users
        Path(folder).chmod(0o555)
        result = run(code, f"{folder}/a.h5")
        Path(folder).chmod(0o755)
    assert f"Cannot write in {folder}" in result.stdout, result.stderr
    assert "-o" in result.stdout
