"""Class folders, splits, tables and patterns: which images there are, and their labels."""

from __future__ import annotations

import json
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from featcache.cli.main import main
from featcache.errors import DecodeError, ImageSetError
from featcache.images.image_set import ImageSet
from tests.images.test_images import fill, png, shard, table

NETWORK = ["--backbone", "resnet18", "--weights", "none", "--image-size", "64"]


def featcache(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def labelled(images: ImageSet) -> dict[str, str]:
    return dict(zip(images.ids.tolist(), images.labels.tolist(), strict=True))


# -- folders of splits ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, labels, splits, left_out",
    [
        (
            ["Training/glioma/1.png", "Training/none/2.png", "Testing/none/3.png"],
            ["none", "glioma", "none"],
            ["Testing", "Training", "Training"],
            0,
        ),
        (["Train/a/1.png", "DEV/a/2.png"], ["a", "a"], ["DEV", "Train"], 0),
        (["test/1.png", "train/cat/2.png"], ["", "cat"], ["test", "train"], 0),
        (
            ["sample/a/0.png", "train/a/1.png", "valid/a/2.png", "over.png", "train/view.png"],
            ["a", "a"],
            ["train", "valid"],
            3,
        ),
    ],
)
def test_folders_of_splits(
    tmp_path: Path, names: list[str], labels: list[str], splits: list[str], left_out: int
) -> None:
    images = ImageSet.from_folder(fill(tmp_path, *names))
    assert (list(images.labels), list(images.splits)) == (labels, splits)
    assert images.ignored == left_out
    if left_out:
        assert "3 left out: outside the class folders of the splits (first: over.png)" in (
            images.notes
        )


def test_folders_named_like_splits_that_are_classes(tmp_path: Path) -> None:
    images = ImageSet.from_folder(fill(tmp_path / "vehicles", "train/1.png", "car/2.png"))
    assert images.classes == ["car", "train"] and images.splits is None
    images = ImageSet.from_folder(fill(tmp_path / "flat", "train/1.png", "test/2.png"))
    assert images.classes == ["test", "train"]
    assert "named like parts of a data set" in images.notes[0]


def test_a_folder_too_high_is_told(tmp_path: Path) -> None:
    images = ImageSet.from_folder(fill(tmp_path, "images/cat/1.png", "images/dog/2.png"))
    assert images.classes == ["images"]
    assert "the only class is images, a folder that holds folders (cat, dog)" in images.notes[0]


def test_folders_of_systems_are_left_out(tmp_path: Path) -> None:
    of_systems = ["@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "__MACOSX"]
    fill(tmp_path, "cat/1.png", "cat/@eaDir/2.png", *(f"{name}/3.png" for name in of_systems))
    images = ImageSet.from_folder(tmp_path)
    assert list(images.ids) == ["cat/1.png"] and images.ignored == 6


def test_exclude(tmp_path: Path) -> None:
    fill(tmp_path, "cat/1.png", "cat/1_mask.png", "cat/thumbs/1.png", "old/2.png")
    wanted = {"exclude": ["*_mask.png", "*/thumbs", "old"]}
    images = ImageSet.open(tmp_path, **wanted)
    assert list(images.ids) == ["cat/1.png"]
    assert images.notes == ["3 left out: excluded (first: cat/1_mask.png)"]
    assert list(ImageSet.open(**images.opened_with).ids) == list(images.ids)
    assert list(ImageSet.from_folder(tmp_path, **wanted).ids) == list(images.ids)
    path = table(tmp_path, "id,label\ncat/1.png,a\nold/2.png,b\n")
    assert list(ImageSet.open(tmp_path, labels_csv=path, exclude="old").ids) == ["cat/1.png"]


def test_extract_prints_the_classes_and_what_was_left_out(tmp_path: Path) -> None:
    root = fill(tmp_path / "f", "cat/1.png", "dog/2.png", "dog/3.png", "4.png", "x.txt", "no/5.png")
    done = featcache("extract", root, "-o", tmp_path / "s.h5", *NETWORK, "--exclude", "no")
    assert done.stdout.startswith(
        f"{root}: 4 images in 2 classes (cat 1, dog 2)\n"
        "  1 left out: no image by its name (first: x.txt)\n"
        "  1 left out: excluded (first: no/5.png)\n"
        "  1 without a label (first: 4.png)\n"
    )
    told = json.loads(
        featcache("extract", root, "-o", tmp_path / "s.h5", *NETWORK, "--json").stdout
    )
    assert told["classes"] == ["cat", "dog", "no"] and told["ignored"] == 1 and told["notes"]


# -- tables --------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", "A.JPG", "b.png", "x/c.png")


@pytest.mark.parametrize(
    "text",
    [
        "id,label\n{root}/A.JPG,a\n{root}/b.png,b\n{root}/x/c.png,c\n",
        "id,label\nphotos/A.JPG,a\nphotos/b.png,b\nphotos/x/c.png,c\n",
        "id,label\nA.JPG,a\nb.png,b\nx\\c.png,c\n",
        "id,label\nA.JPG,a\nb.png,b\nc.png,c\n",
        "id,label\nA,a\nb,b\nx/c,c\n",
        "id,label\nA,a\nb,b\nc,c\n",
        "id,label\na.jpg,a\nB.PNG,b\nx/C.png,c\n",
        "\n\nid,label\nA.JPG,a\nb.png,b\nx/c.png,c\n,\n,\n",
        "sep=;\r\nid;label\r\nA.JPG;a\r\nb.png;b\r\nx/c.png;c\r\n",
        "id,label,\nA.JPG,a,\nb.png,b,\nx/c.png,c\n",
        "id,label\nA.JPG,a,\nb.png,b,,\nx/c.png,c\n",
        "id,label,text\nA.JPG,a," + "x" * 140_000 + "\nb.png,b,\nx/c.png,c,\n",
    ],
)
def test_spellings_that_can_mean_one_image_only(tmp_path: Path, root: Path, text: str) -> None:
    path = table(tmp_path, text.replace("{root}", str(root)))
    images = ImageSet.from_csv(path, root)
    assert labelled(images) == {"A.JPG": "a", "b.png": "b", "x/c.png": "c"}
    assert images.read(2) == (root / "x/c.png").read_bytes()


def test_spellings_that_can_mean_several_images(tmp_path: Path, root: Path) -> None:
    fill(root, "y/c.png", "b.gif")
    for id, several in (("c.png", "x/c.png, y/c.png"), ("b", "b.gif, b.png")):
        with pytest.raises(ImageSetError, match=f"{id} may be {several}"):
            ImageSet.from_csv(table(tmp_path, f"id,label\n{id},a\n"), root)
    images = ImageSet.from_csv(table(tmp_path, "id,label\nb,a\n"), root, suffix=".png")
    assert labelled(images) == {"b": "a"}


def test_accents_match_in_whatever_form(tmp_path: Path) -> None:
    name = "caf\u00e9.png"
    root = fill(tmp_path / "f", unicodedata.normalize("NFD", name))
    path = table(tmp_path, f"id,label\n{unicodedata.normalize('NFC', name)},a\n")
    images = ImageSet.from_csv(path, root)
    assert images.classes == ["a"] and images.read(0) == png(0)


def test_classes_with_almost_one_name_are_told(tmp_path: Path, root: Path) -> None:
    path = table(tmp_path, "id,label\nA.JPG,Red rose\nb.png,red  rose\nx/c.png,daisy\n")
    notes = ImageSet.from_csv(path, root).notes
    assert notes == ["different classes with almost one name: 'Red rose', 'red  rose'"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("A.JPG,a\nb.png,b\n", r"the first line is no header but holds A.JPG, a"),
        ("id,label\nb.png,a\0b\n", "line 2: not a table: it holds a NUL"),
        ("id,label\nb.png,a\nb.png,b\n", "several labels per image are out of scope"),
        ('id,label\nA.JPG,a\nb.png,"b\nx/c.png,"c\n', "line 3: "),
        ('id,label,more\nA.JPG,a,z\nb.png,"b\nx/c.png",c\n', "line 3: the label goes on"),
        ('id,label\nA.JPG,a\nb.png,"b\nx/c.png,c\n', "line 3: "),
    ],
)
def test_tables_that_cannot_be_meant(tmp_path: Path, root: Path, text: str, message: str) -> None:
    with pytest.raises(ImageSetError, match=message):
        ImageSet.from_csv(table(tmp_path, text), root)


@pytest.mark.parametrize(
    "encoding, message", [("utf-16", "got UTF-16"), ("latin-1", "line 2: expected UTF-8")]
)
def test_other_encodings(tmp_path: Path, root: Path, encoding: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes("id,label\nb.png,caf\u00e9\n".encode(encoding))
    with pytest.raises(ImageSetError, match=rf"{message}.*Save As, type CSV UTF-8"):
        ImageSet.from_csv(path, root)


def test_regression_is_told(tmp_path: Path, root: Path) -> None:
    path = table(tmp_path, "id,label\nA.JPG,1.5\nb.png,2\nx/c.png,2.5\n")
    assert "Regression is out of scope" in ImageSet.from_csv(path, root).notes[0]
    path = table(tmp_path, "id,label\nA.JPG,1\nb.png,2\nx/c.png,3\n")
    assert ImageSet.from_csv(path, root).notes == []


def test_files_without_a_row_and_rows_without_a_label_are_counted(
    tmp_path: Path, root: Path
) -> None:
    images = ImageSet.from_csv(table(tmp_path, "id,label\nb.png,\nx/c.png,c\n"), root)
    assert images.notes == [
        "1 left out: without a row in labels.csv (first: A.JPG)",
        "1 without a label (first: b.png)",
    ]


def test_a_table_labels_whatever_there_is(tmp_path: Path, root: Path) -> None:
    tar = shard(tmp_path / "s.tar", {"a/1.png": png(1), "a/2.png": png(2), "2.cls": b"9"})
    for names in ("a/1.png", "1.png"), ("s.tar/a/1.png", "a/1.png"):
        for name in names:
            path = table(tmp_path, f"id,label\n{name},rose\n")
            images = ImageSet.open(tar, labels_csv=path)
            assert labelled(images) == {"s.tar/a/1.png": "rose"}
            assert images.read(0) == png(1)
            assert list(ImageSet.open(**images.opened_with).labels) == ["rose"]
    path = table(tmp_path, "id,label\nA.JPG,rose\n")
    assert labelled(ImageSet.open(f"{root}/*.*", labels_csv=path)) == {"A.JPG": "rose"}
    pixels = np.zeros((2, 3, 4), np.uint8)
    np.save(tmp_path / "p.npy", pixels)
    path = table(tmp_path, "id,label\n00000001,rose\n")
    assert labelled(ImageSet.open(tmp_path / "p.npy", labels_csv=path)) == {"00000001": "rose"}


def test_a_table_may_name_a_file_without_a_suffix(tmp_path: Path) -> None:
    root = fill(tmp_path / "f", "0001", ".hidden/2.png", "3.png")
    path = table(tmp_path, "id,label\n0001,a\n.hidden/2.png,b\n")
    images = ImageSet.from_csv(path, root)
    assert labelled(images) == {"0001": "a", ".hidden/2.png": "b"}
    assert images.read(1) == png(0)


def test_a_link_that_leads_nowhere_says_so(tmp_path: Path) -> None:
    root = fill(tmp_path / "f", "a.png")
    (root / "b.png").symlink_to(tmp_path / "annex/b.png")
    path = table(tmp_path, "id,label\na.png,x\nb.png,y\n")
    for images in ImageSet.from_csv(path, root), ImageSet.from_folder(root):
        with pytest.raises(DecodeError, match=r"a link to .*annex/b.png, which is missing"):
            images.read(1)


# -- patterns of names ---------------------------------------------------------------------------


def test_labels_from_names(tmp_path: Path) -> None:
    root = fill(tmp_path / "f", "cat.0.jpg", "dog.1.jpg", "other.jpg")
    pattern = r"^(?P<label>\w+)\.\d+\.jpg$"
    images = ImageSet.from_folder(root, label_pattern=pattern)
    assert labelled(images) == {"cat.0.jpg": "cat", "dog.1.jpg": "dog", "other.jpg": ""}
    assert list(ImageSet.open(**images.opened_with).labels) == list(images.labels)
    assert list(ImageSet.open(f"{root}/*", label_pattern=pattern).labels) == list(images.labels)
    for wrong, message in ((r"(\w+)", "no group named label"), ("(", "is not regular")):
        with pytest.raises(ImageSetError, match=message):
            ImageSet.open(root, label_pattern=wrong)
    done = featcache("extract", root, "-o", tmp_path / "s.h5", *NETWORK, "--label-pattern", pattern)
    assert "3 images in 2 classes (cat 1, dog 1)" in done.stdout


# -- labels that are kept ------------------------------------------------------------------------


def test_a_scan_without_labels_keeps_those_of_the_store(tmp_path: Path, root: Path) -> None:
    from featcache import FeatureStore

    path, store = table(tmp_path, "id,label\nA.JPG,a\nb.png,b\nx/c.png,c\n"), tmp_path / "s.h5"

    def extract(*arguments: object) -> dict[str, Any]:
        done = featcache("extract", *arguments, "-o", store, *NETWORK, "--json")
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout))

    extract(root, "--labels", path)
    told = extract(f"{root}/**/*.*")
    assert told["skipped"] and not told["relabelled"]
    assert list(FeatureStore.open(store).labels) == ["a", "b", "c"]
    (root / "b.png").rename(root / "renamed.png")
    (root / "new.png").write_bytes(png(77))
    told = extract(f"{root}/**/*.*")
    opened = FeatureStore.open(store)
    kept = dict(zip(opened.ids.tolist(), opened.labels.tolist(), strict=True))
    assert kept == {"A.JPG": "a", "new.png": "", "renamed.png": "b", "x/c.png": "c"}
    assert (told["unlabelled"], told["computed"], told["copied"]) == (1, 1, 3)
    extract(f"{root}/**/*.*", "--drop-labels")
    assert set(FeatureStore.open(store).labels) == {""}


# -- tars ----------------------------------------------------------------------------------------


def test_members_whose_keys_hold_dots(tmp_path: Path) -> None:
    members = {
        "1.0.jpg": png(1),
        "1.0.cls": b"a",
        "1.5.jpg": png(2),
        "1.5.json": b'{"label": "b"}',
        "1.jpg": png(3),
        "1.cls": b"c",
        "1.mask.png": png(4),
    }
    images = ImageSet.from_tar(shard(tmp_path / "s.tar", members))
    assert labelled(images) == {"s.tar/1.0.jpg": "a", "s.tar/1.5.jpg": "b", "s.tar/1.jpg": "c"}
    assert "1 left out: beside the image of its sample (first: s.tar/1.mask.png)" in images.notes[0]


def test_no_label_in_json_is_none(tmp_path: Path) -> None:
    members = {"1.jpg": png(1), "1.json": b'{"label": null}', "2.jpg": png(2), "2.cls": b"x"}
    assert list(ImageSet.from_tar(shard(tmp_path / "s.tar", members)).labels) == ["", "x"]
    members["1.json"] = b'{"label": [1, 2]}'
    with pytest.raises(ImageSetError, match=r"1.json is not a label: .*out of scope"):
        ImageSet.from_tar(shard(tmp_path / "s.tar", members))


def test_class_folders_in_a_tar(tmp_path: Path) -> None:
    names = ["f/cat/1.jpg", "f/dog/2.jpg", "f/dog/2.b.jpg"]
    images = ImageSet.from_tar(shard(tmp_path / "s.tar", {name: png() for name in names}))
    assert list(images.labels) == ["cat", "dog", "dog"]
    names = ["./train/cat/1.jpg", "./test/dog/2.jpg"]
    images = ImageSet.from_tar(shard(tmp_path / "s.tar", {name: png() for name in names}))
    assert (list(images.labels), list(images.splits)) == (["dog", "cat"], ["test", "train"])


def test_folders_of_systems_in_a_tar_are_no_classes(tmp_path: Path) -> None:
    names = ["cat/1.jpg", "dog/2.jpg", "@eaDir/3.jpg", "cat/@eaDir/4.jpg", ".git/5.jpg"]
    images = ImageSet.from_tar(shard(tmp_path / "s.tar", {name: png() for name in names}))
    assert images.classes == ["cat", "dog"] and len(images) == 2
    assert "3 left out: hidden, or a folder of the system" in images.notes[0]


def test_a_tar_that_ends_inside_or_at_a_damaged_header_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", {f"{k}.jpg": png(k) for k in range(4)})
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        header = tar.getmembers()[2].offset
    for damaged in (whole[: header + 200], whole[:header] + b"x" * 512 + whole[header + 512 :]):
        path.write_bytes(damaged)
        with pytest.raises(ImageSetError, match=r"whole tar file: it is damaged or cut off"):
            ImageSet.from_tar(path)


def test_what_a_tar_holds_besides_is_told(tmp_path: Path) -> None:
    members = {"1.jpg": png(), "1.txt": b"a cat", "1.json": b'{"caption": "a cat"}'}
    notes = ImageSet.from_tar(shard(tmp_path / "s.tar", members)).notes
    assert "seen beside the images and not used: 1 .txt, 1 JSON key caption" in notes


def test_hard_links_in_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    (tmp_path / "1.jpg").write_bytes(png(7))
    (tmp_path / "2.jpg").hardlink_to(tmp_path / "1.jpg")
    with tarfile.open(path, "w") as tar:
        for name in ("1.jpg", "2.jpg"):
            tar.add(tmp_path / name, name)
    images = ImageSet.from_tar(path)
    assert list(images.ids) == ["s.tar/1.jpg", "s.tar/2.jpg"]
    assert images.read(1) == png(7)


def test_several_tars_and_braces(tmp_path: Path) -> None:
    paths = [shard(tmp_path / f"t-{k:02d}.tar", {"1.jpg": png(k)}) for k in range(9, 12)]
    assert len(ImageSet.open(tmp_path / "t-{09..11}.tar")) == 3
    assert len(ImageSet.open(tmp_path / "t-{09,11}.tar")) == 2
    assert len(ImageSet.from_tar(tmp_path / "t-{09..10}.tar")) == 2
    done = featcache("extract", *paths[:2], "-o", tmp_path / "s.h5", *NETWORK, "--json")
    assert json.loads(done.stdout)["images"] == 2


# -- selections ----------------------------------------------------------------------------------


def test_select_takes_a_mask_and_refuses_what_is_no_image(root: Path) -> None:
    images = ImageSet.from_folder(root)
    assert list(images.select(images.labels == "x").ids) == ["x/c.png"]
    assert len(images.select(np.zeros(3, bool))) == len(images.select([])) == 0
    for wrong in ([-1], [3], [1, 1], [True, False], [0.5], [[0, 1]]):
        with pytest.raises(ImageSetError, match="number"):
            images.select(wrong)
