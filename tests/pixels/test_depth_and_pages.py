"""Samples of more than eight bits, pages of a TIFF, very large and incomplete images."""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.errors import DecodeError
from featcache.extraction.extract import extract
from featcache.images.image_set import ImageSet
from featcache.networks.backbone import Backbone
from featcache.networks.identity import rebuild
from featcache.pixels.decode import decode
from featcache.pixels.preprocessing import Preprocessing
from featcache.store.store import FeatureStore
from tests.cli.test_cli import FAST, NETWORK, fail, featcache, succeed
from tests.small import SIDE, backbone, folder

tifffile = pytest.importorskip("tifffile")


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def tiff(*pages: np.ndarray, kinds: tuple[int, ...] = (), **options: object) -> bytes:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for k, page in enumerate(pages):
            kind = kinds[k] if kinds else 0
            writer.write(page, subfiletype=kind, metadata=None, **options)
    return file.getvalue()


def noise(bits: int, dtype: str, seed: int = 0, shape: tuple[int, ...] = (40, 36)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**bits, shape).astype(dtype)


# --- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint32", "int32"])
def test_32_bit_integers_below_256_are_8_bit(dtype: str) -> None:
    samples = noise(8, dtype)
    np.testing.assert_array_equal(decode(tiff(samples), 1)[..., 0], samples)


def test_a_set_of_32_bit_images_is_of_one_depth(tmp_path: Path) -> None:
    for name, bits in (("a", 8), ("b", 8), ("c", 12)):
        (tmp_path / f"{name}.tif").write_bytes(tiff(noise(bits, "int32")))
    asked = ("extract", tmp_path, *NETWORK, *FAST, "-o")
    message = fail(*asked, tmp_path / "x.h5")
    assert "c.tif: 32-bit pixels" in message and "type --bit-depth N" in message
    succeed(*asked, tmp_path / "y.h5", "--bit-depth", "12")


@pytest.mark.parametrize("bits", [9, 12, 16, 20])
def test_other_32_bit_integers_need_their_depth(bits: int) -> None:
    samples = noise(bits, "int32")
    with pytest.raises(DecodeError, match=r"32-bit pixels .* no known range: type --bit-depth N"):
        decode(tiff(samples), 1)
    found = decode(tiff(samples), 1, bit_depth=bits)[..., 0]
    np.testing.assert_array_equal(found, samples >> (bits - 8))
    with pytest.raises(DecodeError, match=rf"do not fit into {bits - 1} bits"):
        decode(tiff(samples), 1, bit_depth=bits - 1)


def test_the_depth_is_that_of_all_images_and_not_of_the_brightest_pixel() -> None:
    bright, dark = noise(12, "uint16"), noise(6, "uint16")
    for samples in (bright, dark):
        for raw in (tiff(samples), encoded(Image.fromarray(samples), "PNG"), samples):
            found = decode(raw, 1, bit_depth=12)[..., 0]
            np.testing.assert_array_equal(found, samples >> 4)
            np.testing.assert_array_equal(decode(raw, 1)[..., 0], samples >> 8)
    np.testing.assert_array_equal(
        decode(noise(5, "uint16"), 1, bit_depth=5)[..., 0] >> 3, noise(5, "uint8")
    )


def test_a_pgm_has_the_depth_of_its_largest_value() -> None:
    samples = noise(12, "uint16")
    data = samples.astype(">u2").tobytes()
    for bit_depth in (None, 12):
        found = decode(b"P5 36 40 4095\n" + data, 1, bit_depth=bit_depth)[..., 0]
        np.testing.assert_allclose(found, samples / 4095 * 255, atol=1)
    wide = decode(b"P5 36 40 65535\n" + data, 1, bit_depth=12)[..., 0]
    np.testing.assert_array_equal(wide, samples >> 4)


def scans(root: Path, bits: int, n: int = 6) -> Path:
    root.mkdir()
    for k in range(n):
        Image.fromarray(noise(bits, "uint16", k)).save(root / f"{k}.png")
    return root


def test_12_bits_in_16_are_warned_of_once_and_the_flag_is_part_of_the_fingerprint(
    tmp_path: Path,
) -> None:
    own = ("--backbone", "tests.small:own", "--layer", "pool")
    asked = ("extract", scans(tmp_path / "scans", 12), "-o", tmp_path / "a.h5", *own)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        result = featcache(*asked)
    assert result.exit_code == 0
    assert result.stderr.count("--bit-depth N") == 1
    assert "use no more than 12 of them" in result.stderr
    assert "bit-depth" not in featcache(*asked).stderr  # nothing to do
    result = featcache(*asked[:2], "-o", tmp_path / "b.h5", *own, "--bit-depth", 12)
    assert (result.exit_code, "Warning" in result.stderr) == (0, False)
    plain, deep = (FeatureStore.open(tmp_path / name) for name in ("a.h5", "b.h5"))
    assert plain.fingerprint != deep.fingerprint
    assert deep.fingerprint.preprocessing["bit_depth"] == 12
    assert not np.allclose(plain.load()[0], deep.load()[0])
    # a predictor prepares images alike, also for a network that comes as code
    again = rebuild(deep.fingerprint, backbone="tests.small:own")
    assert again.fingerprint() == deep.fingerprint


@pytest.mark.parametrize("bits", [14, 16])
def test_images_that_fill_their_files_are_not_warned_of(bits: int, tmp_path: Path) -> None:
    images = ImageSet.open(scans(tmp_path / "scans", bits))
    extract(images, backbone(), tmp_path / "a.h5", device="cpu")  # warnings are errors here


# --- pages, size, end -----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_the_first_page_that_is_no_preview_is_read(channels: int) -> None:
    small, large, mask = noise(8, "uint8", 1, (9, 8)), noise(8, "uint8", 2), noise(8, "uint8", 3)
    for kinds, expected in (
        ((1, 1, 0), mask),
        ((1, 0, 0), large),
        ((0, 0, 0), small),
        ((0, 1, 1), small),
        ((1, 1, 1), small),
    ):
        found = decode(tiff(small, large, mask, kinds=kinds), channels)
        np.testing.assert_array_equal(found[..., 0], expected)


def test_larger_images_are_read_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    large = encoded(Image.new("RGB", (60, 50), "red"), "PNG")
    with pytest.raises(DecodeError, match=r"3,000 pixels.*--max-pixels 3000 --retry-failed"):
        decode(large)
    assert decode(large, max_pixels=3000).shape == (50, 60, 3)
    with pytest.raises(DecodeError, match="more than 2,999"):
        decode(large, max_pixels=2999)
    assert Image.MAX_IMAGE_PIXELS == 1000
    assert Preprocessing(resize=8, crop=8)(large, max_pixels=3000).shape == (3, 8, 8)


def test_a_failed_image_is_read_with_the_flags_of_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    root = folder(tmp_path / "images", 12)
    Image.new("RGB", (60, 50), "red").save(root / "ant" / "large.png")
    own = ("--backbone", "tests.small:own", "--layer", "pool", "--workers", "0")
    asked = ("extract", root, "-o", tmp_path / "a.h5", *own, "--max-failures", "50%")
    assert "1 failed" in succeed(*asked)
    assert "--max-pixels 3000 --retry-failed" in succeed("info", tmp_path / "a.h5")
    assert "0 failed" in succeed(*asked, "--max-pixels", 3000, "--retry-failed")


def test_tasks_of_an_executor_and_predictors_read_larger_images_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "images", 12)
    large = root / "ant" / "large.png"
    Image.new("RGB", (60, 50), "red").save(large)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    images, network = ImageSet.open(root), Backbone("squeezenet1_1", weights=None, image_size=32)
    asked: dict[str, Any] = {"device": "cpu", "max_pixels": 3000}
    with ThreadPoolExecutor(2) as threads:
        told = extract(images, network, tmp_path / "a.h5", parts=2, executor=threads, **asked)
    assert told.extraction.failed == 0
    succeed("train", tmp_path / "a.h5", "-o", tmp_path / "p", "--head", "ridge", "--cv", 2)
    assert "more than 2,000" in succeed("predict", tmp_path / "p", large)
    assert "more than" not in succeed("predict", tmp_path / "p", large, "--max-pixels", 3000)


def photograph(progressive: bool = False) -> bytes:
    pixels = Image.fromarray(noise(8, "uint8", 4, (30, 40, 3))).resize((200, 150))
    return encoded(pixels, "JPEG", quality=90, progressive=progressive)


def test_a_jpeg_that_lacks_only_its_end_marker_is_read() -> None:
    data = photograph()
    assert data.endswith(b"\xff\xd9")
    np.testing.assert_array_equal(decode(data[:-2]), decode(data))
    np.testing.assert_array_equal(decode(data[:-1]), decode(data))


@pytest.mark.parametrize("missing", [12, 40, 1000, 5000])
def test_a_jpeg_that_lacks_pixels_is_refused(missing: int) -> None:
    with pytest.raises(DecodeError, match="truncated"):
        decode(photograph()[:-missing])
    with pytest.raises(DecodeError, match="truncated"):
        decode(photograph(progressive=True)[:-missing])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_of_an_image_that_is_cut_off_what_there_is_is_read(format: str, channels: int) -> None:
    options = {"interlace": 0} if format == "GIF" else {}
    data = encoded(Image.open(io.BytesIO(photograph())), format, **options)
    cut = data[: len(data) // 2]
    with pytest.raises(DecodeError, match=r"truncated.* with --truncated accept, and another file"):
        decode(cut, channels)
    found, whole = decode(cut, channels, truncated="accept"), decode(data, channels)
    assert found.shape == whole.shape
    same = (found == whole).reshape(len(whole), -1).all(axis=1)  # rows
    assert (same[110:] if format == "BMP" else same[:50]).all() and not same.all()
    np.testing.assert_array_equal(decode(data, channels, truncated="accept"), whole)


def test_a_progressive_jpeg_that_is_cut_off_is_coarser() -> None:
    data = photograph(progressive=True)
    found = decode(data[: len(data) // 2], truncated="accept").astype(int)
    assert 0 < np.abs(found - decode(data)).mean() < 40


def test_an_image_of_which_no_row_is_there_is_refused() -> None:
    data = encoded(Image.open(io.BytesIO(photograph())), "BMP")[:60]
    with pytest.raises(DecodeError, match="truncated"):
        decode(data, truncated="accept")


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_cut_off_are_counted(tmp_path: Path, workers: int) -> None:
    root = folder(tmp_path / "images", 12)
    for k in range(2):
        (root / "ant" / f"cut-{k}.jpg").write_bytes(photograph()[: 2000 + k])
    own = ("--backbone", "tests.small:own", "--layer", "pool", "--workers", workers)
    assert "2 failed" in succeed("extract", root, "-o", tmp_path / "a.h5", *own)
    asked = ("extract", root, "-o", tmp_path / "b.h5", *own, "--truncated", "accept")
    assert "14 computed, 0 reused, 0 failed" in (told := succeed(*asked))
    assert "; 2 images are cut off" in told
    assert '"cut_off": 0' in succeed(*asked, "--json")  # nothing is computed
    plain, cut = (FeatureStore.open(tmp_path / name) for name in ("a.h5", "b.h5"))
    assert plain.fingerprint != cut.fingerprint
    assert cut.fingerprint.preprocessing["truncated"] == "accept"
    shared = cut.select(np.isin(cut.ids, plain.ids))
    np.testing.assert_allclose(shared.load()[0], plain.load()[0], rtol=1e-5)
    again = rebuild(cut.fingerprint, backbone="tests.small:own")
    assert again.fingerprint() == cut.fingerprint
    images = ImageSet.open(root)
    told = extract(images, again, tmp_path / "parts.h5", parts=2, device="cpu").extraction
    assert (told.cut_off, told.failed) == (2, 0)


def test_what_is_to_be_done_with_a_cut_image_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="truncated is one of refuse, accept"):
        Preprocessing(truncated="perhaps")


def test_a_depth_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="bit_depth is from 1 to 31"):
        Preprocessing(resize=SIDE, crop=SIDE, bit_depth=0)
    assert Backbone("squeezenet1_1", weights=None).preprocessing.bit_depth is None
