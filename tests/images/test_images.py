"""Every source of images gives one ordered list of ids, bytes and labels, or one clear message."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from featcache.errors import DecodeError, ImageSetError
from featcache.images.image_set import ImageSet, content_hash
from featcache.images.sources import stamp


def png(value: int = 0, size: tuple[int, int] = (4, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, value).save(file, "PNG")
    return file.getvalue()


def fill(root: Path, *names: str | bytes) -> Path:
    """Write a file of a distinct content for each name."""
    for k, name in enumerate(names):
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(k))
    return root


# -- class folders -------------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    root = fill(tmp_path / "flowers", "rose/2.JPG", "rose/10.jpg", "daisy/a/b/1.png", "rose/é.webp")
    images = ImageSet.from_folder(root)
    assert list(images.ids) == ["daisy/a/b/1.png", "rose/10.jpg", "rose/2.JPG", "rose/é.webp"]
    assert list(images.labels) == ["daisy", "rose", "rose", "rose"]
    assert images.classes == ["daisy", "rose"]
    assert images.groups is None and images.splits is None
    assert images.read(2) == (root / "rose/2.JPG").read_bytes()
    status = (root / "rose/2.JPG").stat()
    assert images.stat(2) == (status.st_size, stamp(status))
    assert repr(images) == f"ImageSet(4 images, 2 classes, from {root})"
    assert images.source == str(root)


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    images = ImageSet.from_folder(fill(tmp_path, "b.png", "a.png"))
    assert list(images.ids) == ["a.png", "b.png"]
    assert images.labels is None and images.classes == []


def test_images_beside_class_folders_have_no_label(tmp_path: Path) -> None:
    images = ImageSet.from_folder(fill(tmp_path, "z.png", "rose/1.png"))
    assert list(zip(images.ids, images.labels, strict=True)) == [
        ("rose/1.png", "rose"),
        ("z.png", ""),
    ]
    assert images.classes == ["rose"]


def test_other_files_are_ignored_and_counted(tmp_path: Path) -> None:
    fill(
        tmp_path,
        "rose/1.png",
        "README.txt",
        ".DS_Store",
        "rose/Thumbs.db",
        "rose/._1.png",
        "rose/png",
    )
    fill(tmp_path, ".cache/2.png", "rose/.ipynb_checkpoints/3.png")
    images = ImageSet.from_folder(tmp_path)
    assert list(images.ids) == ["rose/1.png"]
    assert images.ignored == 7
    assert "7 other files ignored" in repr(images)
    assert list(ImageSet.from_folder(tmp_path, suffixes=[".TXT"]).ids) == ["README.txt"]


def test_order_is_that_of_the_whole_paths(tmp_path: Path) -> None:
    names = [
        "a/1.png",
        "a-b/1.png",
        "a.png",
        "a0/1.png",
        "a/b/1.png",
        "a/b.png",
        "é/1.png",
        "z.png",
    ]
    images = ImageSet.from_folder(fill(tmp_path, *names))
    assert list(images.ids) == sorted(names, key=str.encode)


@given(st.sets(st.text("ab.-0é", min_size=1, max_size=3).filter(lambda x: x[0] != "."), min_size=1))
def test_order_of_any_names(names: set[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        paths = [f"{a}/{b}.png" for a in names for b in list(names)[:3]]
        images = ImageSet.from_folder(fill(Path(root), *paths))
        assert list(images.ids) == sorted(set(paths), key=str.encode)
        assert list(images.labels) == [id.split("/")[0] for id in images.ids]


def test_split_folders_give_splits_and_labels(tmp_path: Path) -> None:
    fill(tmp_path, "train/ants/1.png", "train/bees/x/2.png", "val/ants/3.png", "val/bees/4.png")
    images = ImageSet.from_folder(tmp_path)
    assert list(images.labels) == ["ants", "bees", "ants", "bees"]
    assert list(images.splits) == ["train", "train", "val", "val"]
    assert "splits train, val" in repr(images)


@pytest.mark.parametrize(
    "names", [["train/1.png", "test/a/2.png"], ["train/a/1.png", "bus/a/2.png"], ["train/a/1.png"]]
)
def test_other_folders_called_train_are_classes(tmp_path: Path, names: list[str]) -> None:
    images = ImageSet.from_folder(fill(tmp_path, *names))
    assert images.splits is None
    assert "train" in images.classes


def test_names_that_are_not_utf8_are_rows_that_cannot_be_read(tmp_path: Path) -> None:
    fill(tmp_path, b"rose/caf\xe9.png", "rose/z.png", b"r\xffse/1.png")
    images = ImageSet.from_folder(tmp_path)
    assert list(images.ids) == ["r\\xffse/1.png", "rose/caf\\xe9.png", "rose/z.png"]
    assert list(images.labels) == ["r\\xffse", "rose", "rose"]
    for index in (0, 1):
        with pytest.raises(DecodeError, match="read: its name is not UTF-8; rename"):
            images.read(index)
        assert images.stat(index) == (-1, -1)
    assert images.read(2) == png(1)
    fill(tmp_path, "rose/caf\\xe9.png")
    with pytest.raises(ImageSetError, match="two names are both written"):
        ImageSet.from_folder(tmp_path)


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    fill(tmp_path / "pool", "1.png", "2.png")
    root = tmp_path / "flowers"
    (root / "rose").mkdir(parents=True)
    (root / "rose/1.png").symlink_to(tmp_path / "pool/1.png")
    (root / "daisy").symlink_to(tmp_path / "pool")
    (root / "rose/again").symlink_to(root)
    (root / "rose/gone.png").symlink_to("nowhere")
    images = ImageSet.from_folder(root)
    assert list(images.ids) == ["daisy/1.png", "daisy/2.png", "rose/1.png", "rose/gone.png"]
    assert images.read(2) == png(0)
    with pytest.raises(DecodeError, match="No such file"):
        images.read(3)
    assert images.stat(3) == (-1, -1)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    fill(tmp_path, "1.png")
    os.mkfifo(tmp_path / "2.png")
    images = ImageSet.from_folder(tmp_path)
    with pytest.raises(DecodeError, match="not a regular file"):
        images.read(1)


def test_empty_missing_and_unreadable_folders(tmp_path: Path) -> None:
    fill(tmp_path, "notes/a.txt")
    with pytest.raises(ImageSetError, match=r"found none among 1 files. Known suffixes: .*\.jpeg"):
        ImageSet.from_folder(tmp_path)
    with pytest.raises(ImageSetError, match="missing: No such file or directory"):
        ImageSet.from_folder(tmp_path / "missing")
    with pytest.raises(ImageSetError, match="Not a directory"):
        ImageSet.from_folder(tmp_path / "notes/a.txt")


# -- tables --------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", "b.jpg", "a.jpg", "x/c.jpg")


def table(tmp_path: Path, text: str, name: str = "labels.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def test_csv_with_all_columns(tmp_path: Path, photos: Path) -> None:
    path = table(
        tmp_path, "\ufeffpath,label,plant,fold\nx/c,rose ,p1,test\nb,,p2,train\na,daisy,p1,train\n"
    )
    images = ImageSet.from_csv(
        path, photos, id_column="path", group_column="plant", split_column="fold", suffix=".jpg"
    )
    assert list(images.ids) == ["a", "b", "x/c"]
    assert list(images.labels) == ["daisy", "", "rose"]
    assert list(images.groups) == ["p1", "p2", "p1"]
    assert list(images.splits) == ["train", "train", "test"]
    assert images.classes == ["daisy", "rose"]
    assert images.read(2) == (photos / "x/c.jpg").read_bytes()
    assert "2 groups, splits test, train" in repr(images)
    assert (
        ImageSet.open(photos, labels_csv=path, id_column="path", suffix=".jpg").classes
        == images.classes
    )


@pytest.mark.parametrize(
    "text",
    [
        "id\tlabel\na.jpg\trose, red\nb.jpg\tdaisy\n",
        'id,label\na.jpg,"rose, red"\nb.jpg,daisy\n',
        "id; label\r\na.jpg; rose, red\r\nb.jpg; daisy\r\n\r\n",
        # As Excel saves: a mark, empty columns and rows, lines without their empty cells.
        "\ufeffid;label;\r\na.jpg;rose, red;\r\nb.jpg;daisy\r\n;;\r\n;\r\n",
        "\ufeffid\tlabel\tnote\r\na.jpg\trose, red\r\nb.jpg\tdaisy\t\r\n\t\t\r\n",
        '"a, note";id;label\n;"a.jpg";"rose, red"\n"x; y";b.jpg;daisy\n',
        "sep=;\nid;label;x,y,z\na.jpg;rose, red;\nb.jpg;daisy;\n",
        "id;label;x,y,z,more\na.jpg;rose, red;\nb.jpg;daisy;\n",
    ],
)
def test_delimiters_and_quotes(tmp_path: Path, photos: Path, text: str) -> None:
    images = ImageSet.from_csv(table(tmp_path, text), photos)
    assert list(images.labels) == ["rose, red", "daisy"]


def test_an_id_has_one_spelling(tmp_path: Path, photos: Path) -> None:
    images = ImageSet.from_csv(table(tmp_path, "id,label\n./x//c.jpg,p\n./a.jpg,q\n"), photos)
    assert list(images.ids) == ["a.jpg", "x/c.jpg"]
    with pytest.raises(ImageSetError, match=r"occur more than once \(first: a.jpg"):
        ImageSet.from_csv(table(tmp_path, "id,label\na.jpg,p\n./a.jpg,q\n"), photos)


def test_table_without_labels(tmp_path: Path, photos: Path) -> None:
    images = ImageSet.from_csv(table(tmp_path, "id\na.jpg\n"), photos, label_column=None)
    assert images.labels is None and len(images) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no column 'id' for the id. Columns: none"),
        ("id,label;x\na.jpg,x;1\n", "got ',' and ';' in .*columns id, label.*such as sep=,"),
        ("file,labels\na.jpg,x\n", "no column 'id' for the id"),
        ("id,Labels\na.jpg,x\n", "Did you mean 'Labels'"),
        ("id,label,label\na.jpg,x,y\n", "column 'label' occurs 2 times"),
        ("id,label\na.jpg,rose,red\n", "line 2: expected 2 fields, got 3"),
        ("id,label\na.jpg,x\nb.jpg\n", "line 3: expected 2 fields, got 1"),
        (
            "id,label\na.jpg,x\na.jpg,y\nb.jpg,z\nb.jpg,z\n",
            r"2 ids occur more than once \(first: a.jpg, b",
        ),
        ("id,label\n", "there are no images"),
        ("id,label\n/etc/passwd,x\n", "1 of 1 ids are not paths below"),
        (
            "id,label\na.jpg,x\nx/../../secret.jpg,x\n",
            r"1 of 2 ids are not paths below .* \(first: x/../../secret",
        ),
        ("id,label\n,x\n", "1 of 1 ids are not paths below"),
        ("id,label\na.jpg,x\nmissing.jpg,y\n", r"1 of 2 ids have no file \(first: missing.jpg\)"),
        ("id,label\na\0.jpg,x\n", "have no file|not a table"),
        ('id,label\n"a.jpg,x\n', "line 2|not a table|expected 2 fields"),
    ],
)
def test_bad_tables(tmp_path: Path, photos: Path, text: str, message: str) -> None:
    path = table(tmp_path, text)
    with pytest.raises(ImageSetError, match=message) as caught:
        ImageSet.from_csv(path, photos)
    assert str(path) in str(caught.value)


def test_unreadable_tables(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(ImageSetError, match="cannot read this table: No such file"):
        ImageSet.from_csv(tmp_path / "none.csv", photos)
    (tmp_path / "latin.csv").write_bytes(b"id,label\na.jpg,caf\xe9\n")
    with pytest.raises(ImageSetError, match="expected UTF-8"):
        ImageSet.from_csv(tmp_path / "latin.csv", photos)
    with pytest.raises(ImageSetError, match="is not a folder"):
        ImageSet.from_csv(table(tmp_path, "id,label\na.jpg,x\n"), tmp_path / "nowhere")


def test_links_in_a_table_are_followed(tmp_path: Path, photos: Path) -> None:
    fill(tmp_path / "pool", "1.jpg")
    (photos / "out.jpg").symlink_to(tmp_path / "pool/1.jpg")
    (photos / "inside.jpg").symlink_to(photos / "a.jpg")
    (photos / "within").symlink_to(photos / "x")
    rows = "id,label\ninside.jpg,x\nwithin/c.jpg,y\nout.jpg,z\n"
    images = ImageSet.from_csv(table(tmp_path, rows), photos)
    assert images.read(0) == (photos / "a.jpg").read_bytes()
    assert images.read(1) == (tmp_path / "pool/1.jpg").read_bytes()
    assert images.read(2) == (photos / "x/c.jpg").read_bytes()
    (tmp_path / "alias").symlink_to(photos)
    assert len(ImageSet.from_csv(table(tmp_path, "id,label\na.jpg,x\n"), tmp_path / "alias")) == 1


# -- files and globs -----------------------------------------------------------------------------


def test_files_keep_their_names(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    images = ImageSet.from_files(["x/c.jpg", Path("a.jpg"), "./a.jpg", photos / "b.jpg"])
    assert list(images.ids) == [str(photos / "b.jpg"), "a.jpg", "x/c.jpg"]
    assert images.labels is None
    monkeypatch.chdir("/")
    assert images.read(1) == (photos / "a.jpg").read_bytes()
    assert images.read(0) == (photos / "b.jpg").read_bytes()
    with pytest.raises(ImageSetError, match=r"no such file: a.jpg"):
        ImageSet.from_files("a.jpg")


def test_globs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(photos, "notes.txt", "[1].png")
    images = ImageSet.from_files(str(photos / "**/*"))
    assert list(images.ids) == ["[1].png", "a.jpg", "b.jpg", "x/c.jpg"]
    assert images.ignored == 1
    monkeypatch.chdir(photos)
    assert list(ImageSet.open("*.jpg").ids) == ["a.jpg", "b.jpg"]
    assert list(ImageSet.open("[1].png").ids) == ["[1].png"]  # a file that looks like a pattern
    with pytest.raises(ImageSetError, match="found none among 1 files"):
        ImageSet.from_files("*.txt")
    with pytest.raises(ImageSetError, match="found none among 0 files"):
        ImageSet.open("*.gif")


def test_bad_files(photos: Path) -> None:
    with pytest.raises(ImageSetError, match=r"Did you mean 'a.jpg'"):
        ImageSet.open(photos / "aa.jpg")
    with pytest.raises(ImageSetError, match="which is a folder"):
        ImageSet.open([photos / "a.jpg", photos / "x"])
    with pytest.raises(ImageSetError, match="no such file"):
        ImageSet.open(photos / "nowhere/at/all.jpg")
    name = f"{photos}/{os.fsdecode(bytes([255]))}.jpg"
    fill(photos, b"\xff.jpg")
    images = ImageSet.from_files([name])
    assert images.ids[0].endswith("/\\xff.jpg")
    with pytest.raises(DecodeError, match="not UTF-8"):
        images.read(0)


# -- tar shards ----------------------------------------------------------------------------------


def shard(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format, errors="surrogateescape") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards_are_read_in_place(tmp_path: Path, format: int) -> None:
    long = "d" * 80 + "/" + "n" * 60
    first = shard(
        tmp_path / "t-0.tar",
        {
            "000.jpg": png(1),
            "000.cls": b"7\n",
            "./001.json": json.dumps({"label": "rose", "cls": 3}).encode(),
            "./001.png": png(2),
            f"{long}.png": png(3),
            f"{long}.cls": b"daisy",
            "README.md": b"hello",
        },
        format,
    )
    second = shard(tmp_path / "t-1.tar", {"000.jpg": png(4), "000.json": b'{"width": 3}'}, format)
    images = ImageSet.from_tar([second, first])
    assert list(images.ids) == [
        "t-0.tar/000.jpg",
        "t-0.tar/001.png",
        f"t-0.tar/{long}.png",
        "t-1.tar/000.jpg",
    ]
    assert list(images.labels) == ["7", "rose", "daisy", ""]
    assert [images.read(k) for k in range(4)] == [png(1), png(2), png(3), png(4)]
    assert images.ignored == 1
    assert images.stat(3) == (len(png(4)), stamp(second.stat()))
    assert list(tmp_path.iterdir()) != [] and len(list(tmp_path.iterdir())) == 2
    assert list(ImageSet.open(str(tmp_path / "t-*.tar")).ids) == list(images.ids)
    assert list(ImageSet.open([first, second]).ids) == list(images.ids)
    assert len(ImageSet.open(first)) == 3


def test_the_image_of_a_sample(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "s.tar",
        {
            "a.jpg": png(1),
            "a.mask.png": png(2),
            "a.cls": b"1",
            "b.left.png": png(3),
            "b.right.png": png(4),
            "._c.jpg": png(5),
        },
    )
    images = ImageSet.from_tar(path)
    assert list(images.ids) == ["s.tar/a.jpg", "s.tar/b.left.png", "s.tar/b.right.png"]
    assert images.ignored == 2


def test_only_regular_members_are_read(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    fill(tmp_path, "secret.jpg")
    with tarfile.open(path, "w") as tar:
        for name, kind, target in (
            ("link.jpg", tarfile.SYMTYPE, str(tmp_path / "secret.jpg")),
            ("hard.jpg", tarfile.LNKTYPE, "real.jpg"),
            ("pipe.jpg", tarfile.FIFOTYPE, ""),
            ("device.jpg", tarfile.CHRTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        info = tarfile.TarInfo("../real.jpg")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
    images = ImageSet.from_tar(path)
    assert list(images.ids) == ["s.tar/../real.jpg"]
    assert images.read(0) == png()
    assert images.ignored == 4


def test_a_shard_that_changes_is_noticed(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {"a.jpg": png(1), "b.jpg": png(2)})
    images = ImageSet.from_tar(path)
    shard(path, {"0.jpg": png(9), "a.jpg": png(1), "b.jpg": png(2)})
    with pytest.raises(DecodeError, match=r"s\.tar has changed"):
        images.read(0)
    path.unlink()
    with pytest.raises(DecodeError, match="No such file"):
        images.read(0)


def test_names_in_shards_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.jpg")
    path = shard(tmp_path / "s.tar", {name: png(1)}, tarfile.GNU_FORMAT)
    images = ImageSet.from_tar(path)
    assert list(images.ids) == ["s.tar/\\xff.jpg"]
    with pytest.raises(DecodeError, match="not UTF-8"):
        images.read(0)


def test_bad_shards(tmp_path: Path) -> None:
    good = shard(tmp_path / "s.tar", {"a.jpg": png(1), "b.jpg": png(2) * 50})
    packed = tmp_path / "p.tar"
    packed.write_bytes(gzip.compress(good.read_bytes()))
    with pytest.raises(ImageSetError, match=r"p\.tar: .*it is compressed.*Decompress it first"):
        ImageSet.from_tar(packed)
    cut = tmp_path / "c.tar"
    cut.write_bytes(good.read_bytes()[:2000])
    with pytest.raises(ImageSetError, match=r"c\.tar: expected a whole tar file"):
        ImageSet.from_tar([good, cut])
    cut.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ImageSetError, match=r"c\.tar: expected a whole tar file"):
        ImageSet.from_tar(cut)
    with pytest.raises(ImageSetError, match=r"none\.tar: cannot read this tar: No such file"):
        ImageSet.open(tmp_path / "none.tar")
    with pytest.raises(ImageSetError, match="found none among 1 files"):
        ImageSet.from_tar(shard(tmp_path / "e.tar", {"a.txt": b"x"}))
    with pytest.raises(ImageSetError, match=r"001.json is not a label"):
        ImageSet.from_tar(shard(tmp_path / "j.tar", {"001.json": b"{", "001.jpg": png()}))
    (tmp_path / "again").mkdir()
    twin = shard(tmp_path / "again/s.tar", {"a.jpg": png(1)})
    with pytest.raises(ImageSetError, match=r"occur more than once \(first: s.tar/a.jpg\)"):
        ImageSet.from_tar([good, twin])


# -- arrays and data sets ------------------------------------------------------------------------


def test_arrays() -> None:
    pixels = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    images = ImageSet.from_arrays(pixels, labels=[1, 0])
    assert list(images.ids) == ["00000000", "00000001"]
    assert list(images.labels) == ["1", "0"]
    assert np.array_equal(images.read(1), pixels[1])
    assert images.stat(0) == (-1, -1)
    named = ImageSet.from_arrays(pixels[..., 0], ids=["b", "a"])
    assert list(named.ids) == ["a", "b"]
    assert np.array_equal(named.read(0), pixels[1, ..., 0])
    assert named.labels is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"images": np.zeros((2, 3, 4))}, "expected uint8 pixels .* got float64"),
        ({"images": np.zeros((2, 3), np.uint8)}, r"got uint8 \(2, 3\)"),
        ({"images": np.zeros((0, 3, 4), np.uint8)}, "there are no images"),
        ({"images": np.zeros((2, 3, 4), np.uint8), "labels": ["a"]}, "expected 2 labels, .* got 1"),
        ({"images": np.zeros((2, 3, 4), np.uint8), "ids": ["a", "a"]}, "more than once"),
    ],
)
def test_bad_arrays(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ImageSetError, match=message):
        ImageSet.from_arrays(**arguments)


def test_array_files(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    np.save(tmp_path / "x.npy", pixels)
    images = ImageSet.open(tmp_path / "x.npy")
    assert np.array_equal(images.read(1), pixels[1]) and images.source.endswith("x.npy")
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.array([4, 5]), ids=np.array(["p", "q"]))
    images = ImageSet.open(tmp_path / "x.npz")
    assert (list(images.ids), list(images.labels)) == (["p", "q"], ["4", "5"])
    np.savez(tmp_path / "y.npz", x=pixels)
    with pytest.raises(ImageSetError, match=r"expected an array 'images', got \['x'\]"):
        ImageSet.open(tmp_path / "y.npz")
    np.save(tmp_path / "z.npy", np.array([{}], object))
    for name, content in (("n.npy", b"nonsense"), ("n.npz", b"PK\3\4nonsense"), ("m.npy", b"")):
        (tmp_path / name).write_bytes(content)
    for name in ("n.npy", "n.npz", "m.npy", "z.npy", "none.npz"):
        with pytest.raises(ImageSetError, match=f"{name}: cannot read this array"):
            ImageSet.open(tmp_path / name)


class Pairs(torch.utils.data.Dataset[Any]):
    """A map-style data set of (PIL image, int)."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


ITEMS = [(Image.new("L", (4, 4), k), k % 2) for k in range(5)]


@pytest.mark.parametrize(
    "attributes, labels",
    [
        ({}, ["0", "1", "0", "1", "0"]),
        ({"classes": ["ant", "bee"]}, ["ant", "bee", "ant", "bee", "ant"]),
        ({"targets": torch.tensor([1, 1, 0, 0, 1])}, ["1", "1", "0", "0", "1"]),
        (
            {"_labels": [1, 1, 0, 0, 1], "classes": ["ant", "bee"]},
            ["bee", "bee", "ant", "ant", "bee"],
        ),
        ({"targets": [1] * 5, "target_transform": lambda y: y}, ["0", "1", "0", "1", "0"]),
    ],
)
def test_any_map_style_data_set(attributes: dict[str, Any], labels: list[str]) -> None:
    dataset = Pairs(ITEMS, **attributes)
    images = ImageSet.from_dataset(dataset)
    assert list(images.labels) == labels
    assert list(images.ids)[:2] == ["00000000", "00000001"]
    assert images.read(3) is ITEMS[3][0]
    assert images.stat(3) == (-1, -1)
    subset = torch.utils.data.Subset(dataset, [4, 1])
    chosen = ImageSet.from_dataset(subset)
    assert list(chosen.labels) == [labels[4], labels[1]]
    assert chosen.read(1) is ITEMS[1][0]


def test_bad_data_sets() -> None:
    with pytest.raises(ImageSetError, match="there are no images"):
        ImageSet.from_dataset(Pairs([]))
    with pytest.raises(ImageSetError, match=r"got \(Tensor, ...\). Make the data set without"):
        ImageSet.from_dataset(Pairs([(torch.zeros(3), 0)]))
    with pytest.raises(ImageSetError, match=r"expected items \(PIL image, int\), got int"):
        ImageSet.from_dataset(Pairs([5]))
    items = [*ITEMS[:1], OSError("gone"), (torch.zeros(3), 0)]
    images = ImageSet.from_dataset(Pairs(items, targets=[0, 0, 0]))
    with pytest.raises(DecodeError, match="read: OSError: gone"):
        images.read(1)
    with pytest.raises(DecodeError, match="read: expected a PIL image, got Tensor"):
        images.read(2)


def test_a_data_set_of_images_that_are_not_loaded_yet() -> None:
    whole = png(5, (64, 64))
    lazy = [Image.open(io.BytesIO(raw)) for raw in (whole, whole[:60])]
    images = ImageSet.from_dataset(Pairs([(image, 0) for image in lazy]))
    assert np.asarray(images.read(0)).max() == 5
    with pytest.raises(DecodeError, match="read: OSError"):
        images.read(1)


def test_damaged_exif_has_a_content_hash() -> None:
    image = Image.new("L", (4, 4))
    image.info["exif"] = b"Exif\0\0II*\0\x08\0\0\0\xff\xff"
    assert content_hash(image) == content_hash(Image.new("L", (4, 4)))


def cifar(root: Path) -> None:
    """Write a CIFAR-10 of three training images a batch and two test images."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        n = 3 if name != "test_batch" else 2
        data = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        (folder / name).write_bytes(
            pickle.dumps({"data": data, "labels": [(k + i) % 10 for i in range(n)]})
        )
    names = [f"class{k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


def test_torchvision_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar(tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *a: True)
    monkeypatch.chdir(tmp_path)
    images = ImageSet.open("CIFAR10", root=tmp_path)
    assert len(images) == 17
    assert set(images.splits) == {"test", "train"}
    assert list(images.ids)[:3] == ["test/00000000", "test/00000001", "train/00000000"]
    assert images.labels[0] == "class5" and images.labels[2] == "class0"
    raw = images.read(0)
    assert isinstance(raw, Image.Image) and raw.size == (32, 32)
    assert list(ImageSet.open(f"CIFAR10:{tmp_path}").ids) == list(images.ids)
    again = ImageSet.open(**images.opened_with)
    assert list(again.ids) == list(images.ids) and list(again.labels) == list(images.labels)


def test_torchvision_names_that_fail(tmp_path: Path) -> None:
    with pytest.raises(
        ImageSetError, match=r"CIFAR10: expected the folder.*CIFAR10:FOLDER"
    ) as none:
        ImageSet.open("CIFAR10")
    assert "Type --root FOLDER" in str(none.value)
    for name in ("CIFAR10", "FashionMNIST", "OxfordIIITPet", "Flowers102"):
        told = f"{name}: expected it in .* type --download"
        with pytest.raises(ImageSetError, match=told) as error:
            ImageSet.open(name, root=tmp_path)
        assert "download=True" not in str(error.value)  # torchvision's advice is for Python


def test_torchvision_download_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def flowers(root: str, *, split: str, download: bool) -> Pairs:
        asked.append((root, split, download))
        return Pairs(ITEMS, _labels=[5] * 5)

    monkeypatch.setattr(torchvision.datasets, "Flowers102", flowers)
    images = ImageSet.open("Flowers102", root=tmp_path, download=True)
    assert asked == [(str(tmp_path), split, True) for split in ("train", "val", "test")]
    assert list(images.ids)[:1] == ["test/00000000"] and images.classes == ["5"]


# -- one set, whatever the source ----------------------------------------------------------------


def sources(tmp_path: Path) -> list[ImageSet]:
    tmp_path.mkdir(exist_ok=True)
    folder = fill(tmp_path / "f", "a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png")
    path = table(tmp_path, "id,label,group\nb/3.png,x,g\na/2.png,y,h\nb/5.png,x,g\na/1.png,y,g\n")
    members = {f"{k}.png": png(k) for k in range(5)} | {"1.cls": b"3"}
    return [
        ImageSet.from_folder(folder),
        ImageSet.from_csv(path, folder, group_column="group"),
        ImageSet.from_files(str(folder / "*/*.png")),
        ImageSet.from_tar(shard(tmp_path / "s.tar", members)),
        ImageSet.from_arrays(np.arange(60, dtype=np.uint8).reshape(5, 3, 4), ids=list("edcba")),
        ImageSet.from_dataset(Pairs(ITEMS)),
    ]


def content(images: ImageSet, index: int) -> bytes:
    return content_hash(images.read(index))


def test_select_parts_and_pickle(tmp_path: Path) -> None:
    for images in sources(tmp_path):
        n = len(images)
        chosen = images.select([3, 1])
        assert list(chosen.ids) == [images.ids[3], images.ids[1]]
        assert content(chosen, 0) == content(images, 3)
        assert content(chosen.select([1]), 0) == content(images, 1)
        assert chosen.stat(1) == images.stat(1)
        if images.labels is not None:
            assert list(chosen.labels) == [images.labels[3], images.labels[1]]
        assert (chosen.groups is None) == (images.groups is None)
        parts = images.parts(3)
        assert [id for part in parts for id in part.ids] == list(images.ids)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert content(parts[2], 0) == content(images, n - len(parts[2]))
        again = pickle.loads(pickle.dumps(chosen))
        assert list(again.ids) == list(chosen.ids)
        assert content(again, 0) == content(images, 3)
        with pytest.raises(ImageSetError, match=f"{n} images cannot make {n + 1} parts"):
            images.parts(n + 1)


def test_a_selection_is_sent_without_the_rest(tmp_path: Path) -> None:
    names = [f"{k:03d}.png" for k in range(200)]
    given = [
        ImageSet.from_folder(fill(tmp_path / "f", *names)),
        ImageSet.from_tar(shard(tmp_path / "s.tar", dict.fromkeys(names, png()))),
    ]
    for images in given:
        chosen = pickle.dumps(images.select([7]))
        assert len(chosen) < len(pickle.dumps(images)) / 4 and len(chosen) < 2000
        assert content(pickle.loads(chosen), 0) == content(images, 7)


def test_ids_are_the_same_in_every_run(tmp_path: Path) -> None:
    pairs = zip(sources(tmp_path / "1"), sources(tmp_path / "2"), strict=True)
    for once, again in pairs:
        assert list(once.ids) == list(again.ids) == sorted(once.ids)
        assert len(set(once.ids)) == len(once)
        assert [content(once, k) for k in range(len(once))] == [
            content(again, k) for k in range(len(again))
        ]


def test_tables_hold_what_the_source_says(tmp_path: Path) -> None:
    expected = [{"labels"}, {"labels", "groups"}, set(), {"labels"}, set(), {"labels"}]
    for images, names in zip(sources(tmp_path), expected, strict=True):
        assert set(images.tables) == {"ids"} | names
        for name, table in images.tables.items():
            assert table.dtype == np.dtypes.StringDType() and table.shape == (len(images),)
            assert getattr(images, name) is table and isinstance(table[0], str)


def test_another_process_lists_the_same_images(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    np.save(tmp_path / "p.npy", np.zeros((2, 3, 4), np.uint8))
    given = [
        *sources(tmp_path / "1")[:4],
        ImageSet.open("../1/f"),
        ImageSet.open("../1/s.tar"),
        ImageSet.open("../1/*.tar"),
        ImageSet.open("../p.npy"),
        ImageSet.open("*.jpg"),
        ImageSet.open("a.jpg"),
        ImageSet.open(["b.jpg", "x/c.jpg"]),
        ImageSet.open("../1/f", labels_csv="../1/labels.csv", group_column="group"),
    ]
    monkeypatch.chdir("/")
    for images in given:
        assert images.opened_with is not None
        again = ImageSet.open(**json.loads(json.dumps(images.opened_with)))
        assert again.opened_with == images.opened_with
        assert again.tables.keys() == images.tables.keys()
        for name, column in images.tables.items():
            assert np.array_equal(column, again.tables[name])
        assert content(again, 0) == content(images, 0)
    assert given[0].select([0]).opened_with is None


def test_what_open_would_not_list_alike_has_no_arguments_for_it(tmp_path: Path) -> None:
    for images in sources(tmp_path / "1")[4:]:
        assert images.opened_with is None
    fill(tmp_path, "a.npy", "b.tar")
    assert ImageSet.from_files(tmp_path / "a.npy").opened_with is None
    assert ImageSet.from_files([tmp_path / "b.tar"]).opened_with is None
    assert ImageSet.from_folder(tmp_path, suffixes=[".npy"]).opened_with is None


@pytest.mark.parametrize("label", ["\ud800", "caf\udce9"])
def test_text_that_is_not_unicode_is_refused(label: str) -> None:
    pixels = np.zeros((2, 3, 4), np.uint8)
    with pytest.raises(ImageSetError, match="is not valid Unicode"):
        ImageSet.from_arrays(pixels, labels=["a", label])


# -- content hashes ------------------------------------------------------------------------------


def test_content_hash_of_a_file_is_that_of_its_bytes() -> None:
    assert content_hash(b"abc") == hashlib.sha256(b"abc").digest()


def test_content_hash_tells_images_apart() -> None:
    pixels = np.arange(24, dtype=np.uint8)
    grey = Image.new("P", (4, 6))
    red = Image.new("P", (4, 6))
    clear, turned = Image.new("L", (4, 6)), Image.new("L", (4, 6))
    clear.info["transparency"] = 0
    turned.getexif()[0x0112] = 6
    grey.putpalette(bytes(range(6)))
    red.putpalette(bytes([255, 0, 0, 0, 0, 0]))
    raws = [
        pixels.reshape(4, 6),
        pixels.reshape(6, 4),
        pixels.reshape(4, 6).view(np.int8),
        Image.new("L", (4, 6)),
        Image.new("L", (6, 4)),
        Image.new("RGB", (4, 6)),
        clear,
        turned,
        grey,
        red,
    ]
    hashes = [content_hash(raw) for raw in raws]
    assert len(set(hashes)) == len(raws) and {len(h) for h in hashes} == {32}
    assert content_hash(pixels.reshape(6, 4).T) == content_hash(pixels.reshape(6, 4).T.copy())
    assert content_hash(red.copy()) == hashes[-1]
