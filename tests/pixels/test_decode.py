"""Pixels equal those of the weights' own transforms; odd images are decoded right or refused."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tarfile
import threading
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence
from sklearn.datasets import load_sample_images
from torchvision.transforms import functional as F

from featcache.errors import DecodeError
from featcache.pixels.decode import RawImage, decode
from featcache.pixels.preprocessing import Preprocessing
from featcache.pixels.views import Augmentation
from tests.cli.test_cli import featcache, succeed


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def photographs(elpv_root: Path) -> dict[str, bytes]:
    """Real photographs, grey and coloured, and pieces of them in odd shapes."""
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    cells = sorted((elpv_root / "images").glob("*.png"))
    return {
        "cell": cells[0].read_bytes(),
        "another cell": cells[1700].read_bytes(),
        "china": encoded(china.resize((500, 375)), "JPEG", quality=90),
        "flower, upright": encoded(flower.crop((100, 0, 331, 427)), "JPEG", quality=75),
        "one row": encoded(china.crop((0, 40, 60, 41))),
        "one column": encoded(china.crop((40, 0, 41, 60))),
        "one pixel": encoded(china.crop((40, 40, 41, 41))),
        "as resized": encoded(china.crop((0, 0, 256, 256))),
        "as cropped": encoded(china.crop((0, 0, 224, 224))),
        "larger": encoded(flower.resize((1023, 761))),
    }


def reference(raw: bytes) -> Image.Image:
    return Image.open(io.BytesIO(raw)).convert("RGB")


def classification_presets() -> dict[str, Any]:
    """Every distinct transform of torchvision's classification weights."""
    presets = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            presets.setdefault(repr(weights.transforms()), weights)
    return {str(weights): weights for weights in presets.values()}


# -- the same pixels as the weights' own transforms ----------------------------------------------


@pytest.mark.parametrize("weights", classification_presets().values(), ids=str)
def test_equals_torchvision_preset(weights: Any, photographs: dict[str, bytes]) -> None:
    transform = weights.transforms()
    preprocessing = Preprocessing.from_torchvision(transform)
    for name in ("cell", "china", "flower, upright"):
        raw = photographs[name]
        pixels = preprocessing(raw)
        normalized = preprocessing.normalize(torch.from_numpy(pixels)[None])[0]
        assert torch.equal(normalized, transform(reference(raw))), name
    assert Preprocessing.from_torchvision(weights) == preprocessing


@pytest.mark.parametrize("resize", [256, 232, 342])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_equals_torchvision_on_odd_shapes(
    resize: int, interpolation: Any, photographs: dict[str, bytes]
) -> None:
    preprocessing = Preprocessing(resize=resize, crop=224, interpolation=interpolation)
    mode = torchvision.transforms.InterpolationMode(interpolation)
    for name, raw in photographs.items():
        expected = F.center_crop(F.resize(reference(raw), [resize], mode), [224])
        assert np.array_equal(preprocessing(raw), F.pil_to_tensor(expected)), name


@settings(max_examples=60)
@given(
    width=st.integers(1, 700),
    height=st.integers(1, 700),
    resize=st.one_of(
        st.sampled_from([None, 256, 232, 8]), st.tuples(st.integers(1, 300), st.integers(1, 300))
    ),
    crop=st.one_of(st.integers(1, 300), st.tuples(st.integers(1, 300), st.integers(1, 300))),
    interpolation=st.sampled_from(["bilinear", "bicubic", "nearest"]),
    grey=st.booleans(),
)
def test_equals_torchvision_for_any_size(
    width: int, height: int, resize: Any, crop: Any, interpolation: Any, grey: bool
) -> None:
    if isinstance(resize, int) and max(width, height) > 20 * min(width, height):
        resize = 8  # the reference computes the whole strip
    pixels = noise(height, width) if grey else noise(height, width, 3)
    preprocessing = Preprocessing(resize=resize, crop=crop, interpolation=interpolation)
    image = Image.fromarray(pixels).convert("RGB")
    if resize is not None:
        mode = torchvision.transforms.InterpolationMode(interpolation)
        image = F.resize(image, [resize] if isinstance(resize, int) else list(resize), mode)
    expected = F.pil_to_tensor(F.center_crop(image, [crop] if isinstance(crop, int) else crop))
    assert np.array_equal(preprocessing(pixels), expected)
    assert preprocessing.output_shape == tuple(expected.shape)


def timm_configs() -> dict[str, dict[str, Any]]:
    """Every distinct way in which timm's pretrained models prepare an image, by one model each."""
    timm = pytest.importorskip("timm", reason="pip install 'featcache[timm]'")
    configs = {}
    for name in timm.list_pretrained():
        config = timm.data.resolve_data_config(
            pretrained_cfg=timm.get_pretrained_cfg(name).to_dict()
        )
        if config["input_size"][1] <= 256:
            key = {k: v for k, v in config.items() if k not in ("mean", "std")}
            configs.setdefault(repr(key), (name, config))
    return dict(configs.values())


def test_equals_timm(photographs: dict[str, bytes]) -> None:
    timm = pytest.importorskip("timm", reason="pip install 'featcache[timm]'")
    configs = timm_configs()
    wide = {"crop_mode": "center", "input_size": (3, 160, 224), "crop_pct": 0.9}
    example = next(iter(configs.values()))
    configs["not square"] = {**example, **wide}
    configs["border, not square"] = {**example, **wide, "crop_mode": "border"}
    configs["squash, not square"] = {**example, **wide, "crop_mode": "squash"}
    modes = Counter(config["crop_mode"] for config in configs.values())
    assert modes["center"] > 5 and modes["border"] > 0 and modes["squash"] > 1
    for name, config in configs.items():
        if config["crop_mode"] == "border":
            with pytest.raises(ValueError, match=r"'border' pads images .* Hand over another one"):
                Preprocessing.from_timm(config)
            continue
        transform = timm.data.create_transform(**config)
        preprocessing = Preprocessing.from_timm(config)
        assert preprocessing.output_shape == config["input_size"]
        for photograph in ("cell", "china", "flower, upright"):
            raw = photographs[photograph]
            normalized = preprocessing.normalize(torch.from_numpy(preprocessing(raw))[None])[0]
            assert torch.equal(normalized, transform(reference(raw))), (name, photograph)


def test_long_strip_is_cropped_before_it_fills_the_memory() -> None:
    # Resized in whole this strip would have 256 x 15,360,000 pixels.
    strip = np.repeat(noise(60_000, 1), 1, axis=1)
    pixels = Preprocessing(resize=256, crop=224)(encoded(Image.fromarray(strip)))
    assert pixels.shape == (3, 224, 224)
    assert np.all(pixels[:, :, :1] == pixels)
    middle = strip[29_999:30_001, 0].astype(int)
    assert middle.min() - 1 <= pixels.min() <= pixels.max() <= middle.max() + 1
    inexact = Preprocessing(resize=231, crop=224)(strip)
    assert np.abs(inexact[0, 111:113, 0].astype(int) - pixels[0, 111:113, 0]).max() <= 3


def test_pixels_lie_side_by_side_and_can_be_written(photographs: dict[str, bytes]) -> None:
    for name in ("cell", "china"):
        pixels = Preprocessing()(photographs[name])
        assert pixels.shape == (3, 224, 224)
        assert pixels.transpose(1, 2, 0).flags.c_contiguous
        assert pixels.flags.writeable


def test_normalize_equals_torchvision_in_any_layout() -> None:
    preprocessing = Preprocessing(resize=None, crop=7, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3))
    batch = torch.from_numpy(np.arange(3 * 256 * 7, dtype=np.int64).astype(np.uint8))
    batch = batch.reshape(1, 3, 256, 7)
    expected = F.normalize(
        F.convert_image_dtype(batch, torch.float32), [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    )
    assert torch.equal(preprocessing.normalize(batch), expected)
    last = batch.contiguous(memory_format=torch.channels_last)
    normalized = preprocessing.normalize(last)
    assert torch.equal(normalized, expected)
    assert normalized.is_contiguous(memory_format=torch.channels_last)
    half = preprocessing.normalize(batch, torch.bfloat16)
    assert torch.equal(half, expected.to(torch.bfloat16))
    assert batch.dtype == torch.uint8 and torch.equal(batch, last)


@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 4), (1, 3, 5, 4), (3, 3, 1, 1), (2, 4, 1, 7), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize_shapes_that_fit_two_layouts(
    shape: tuple[int, int, int, int], memory_format: torch.memory_format
) -> None:
    b, c, h, w = shape
    mean, std = (0.1, 0.2, 0.3, 0.4)[:c], (0.5, 0.6, 0.7, 0.8)[:c]
    preprocessing = Preprocessing(resize=None, crop=(h, w), channels=c, mean=mean, std=std)
    batch = torch.from_numpy(noise(b, h, w, c)).permute(0, 3, 1, 2)
    batch = batch.contiguous(memory_format=memory_format)
    expected = F.normalize(F.convert_image_dtype(batch, torch.float32), mean, std)
    assert torch.equal(preprocessing.normalize(batch), expected)


# -- preprocessing is data -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(),
        Preprocessing(resize=(240, 320), crop=(224, 300), fit="cover", interpolation="bicubic"),
        Preprocessing(resize=None, crop=32, channels=1, mean=(0.1,), std=(0.2,)),
        Preprocessing(resize=(8, 8), crop=None),
    ],
)
def test_survives_json(preprocessing: Preprocessing) -> None:
    import json

    text = json.dumps(preprocessing.to_dict(), sort_keys=True)
    again = Preprocessing.from_dict(json.loads(text))
    assert again == preprocessing
    assert hash(again) == hash(preprocessing)
    assert json.dumps(again.to_dict(), sort_keys=True) == text


@pytest.mark.parametrize(
    "values, message",
    [
        ({"resize": 0}, "resize is a positive int"),
        ({"resize": (1, 2, 3)}, "resize is a positive int"),
        ({"crop": -1}, "crop is a positive int"),
        ({"crop": 2.5}, "crop is a positive int"),
        ({"crop": None}, "one size"),
        ({"crop": None, "resize": (8, 8), "fit": "cover"}, "one size"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"fit": "squash"}, "stretch, cover"),
        ({"channels": 4}, "each of 4 channels"),
        ({"channels": 0, "mean": (), "std": ()}, "at least 1"),
        ({"std": (1.0, 0.0, 1.0)}, "positive"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**values)


def test_unknown_fields_and_foreign_transforms_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown fields of a preprocessing: gamma"):
        Preprocessing.from_dict({**Preprocessing().to_dict(), "gamma": 2})
    with pytest.raises(ValueError, match="transform of a classification model"):
        Preprocessing.from_torchvision(torchvision.transforms.Resize(3))


@pytest.mark.parametrize(
    "before, size, resize, crop",
    [
        (Preprocessing(), 448, 512, 448),
        (Preprocessing(resize=232), 64, 66, 64),
        (Preprocessing(resize=(240, 240), crop=(200, 160)), 100, (120, 150), 100),
        (Preprocessing(resize=(224, 224), crop=None), 96, (96, 96), None),
        (Preprocessing(resize=None), 96, None, 96),
    ],
)
def test_image_size_keeps_the_ratio(
    before: Preprocessing, size: int, resize: Any, crop: Any
) -> None:
    after = before.with_image_size(size)
    assert (after.resize, after.crop) == (resize, crop)
    assert after.output_shape == (3, size, size)
    assert after.mean == before.mean
    with pytest.raises(ValueError, match="at least 1"):
        before.with_image_size(0)


# -- every kind of image is decoded right --------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    upright = np.zeros((40, 24, 3), np.uint8)
    upright[:20, :12], upright[:20, 12:], upright[20:, :12] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.get(orientation)
    methods = Image.Transpose
    turned = Image.fromarray(upright)
    if undo is not None:
        exif_method = {
            2: methods.FLIP_LEFT_RIGHT,
            3: methods.ROTATE_180,
            4: methods.FLIP_TOP_BOTTOM,
            5: methods.TRANSPOSE,
            6: methods.ROTATE_270,
            7: methods.TRANSVERSE,
            8: methods.ROTATE_90,
        }[undo]
        turned = turned.transpose(exif_method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    raw = encoded(turned, format, exif=exif, **options.get(format, {}))
    pixels = decode(raw)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 4
    assert np.array_equal(pixels, ImageOps.exif_transpose(Image.open(io.BytesIO(raw))))
    assert np.array_equal(pixels, decode(Image.open(io.BytesIO(raw))))


def test_damaged_exif_leaves_the_picture() -> None:
    picture = Image.fromarray(noise(16, 24, 3))
    for exif in (
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
    ):
        assert decode(encoded(picture, "JPEG", exif=exif)).shape == (16, 24, 3)


def test_transparency_is_laid_on_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0] = [(200, 100, 50, 255), (200, 100, 50, 0), (200, 100, 50, 128)]
    pixels = decode(encoded(Image.fromarray(rgba)))
    assert pixels[0, 0].tolist() == [200, 100, 50]
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert np.abs(pixels[0, 2].astype(int) - [227, 177, 152]).max() <= 1
    assert np.array_equal(decode(rgba), pixels)
    la = decode(encoded(Image.fromarray(rgba).convert("LA")))
    assert la[0, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_transparent_colour_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGB", (4, 4), "black")
    image.paste("white", (0, 0, 2, 4))
    image = image.convert(mode)
    transparency = (0, 0, 0) if mode == "RGB" else image.getpixel((3, 3))
    pixels = decode(encoded(image, transparency=transparency))
    assert pixels.min() == 255
    assert decode(encoded(image)).min() == 0


def test_transparent_16_bit_grey_is_laid_on_white() -> None:
    grey = Image.fromarray(np.array([[0, 513]], np.uint16))
    raw = encoded(grey)
    # Pillow does not write tRNS for 16 bits: put the chunk behind the header, by hand.
    chunk = b"tRNS" + struct.pack(">H", 513)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert decode(raw)[..., 0].tolist() == [[0, 2]]
    assert decode(raw[:33] + chunk + raw[33:])[..., 0].tolist() == [[0, 255]]


def test_opaque_alpha_and_palette_change_no_colour() -> None:
    picture = Image.fromarray(noise(9, 9, 3))
    assert np.array_equal(decode(encoded(picture.convert("RGBA"))), picture)
    palette = picture.quantize(16)
    assert np.array_equal(decode(encoded(palette)), palette.convert("RGB"))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format: str) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(decode(encoded(Image.fromarray(ramp), format)), expected)
    assert np.array_equal(decode(ramp), expected)


def test_16_bit_pgm_and_colour_are_scaled_alike() -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16)
    pgm = b"P5 16 16 65535\n" + ramp.astype(">u2").tobytes()
    expected = np.arange(256).reshape(16, 16)
    assert np.array_equal(decode(pgm)[..., 1], expected)
    # A 16-bit RGB PNG, which Pillow cannot write.
    colour = np.repeat(ramp.reshape(16, 16, 1), 3, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in colour)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(decode(png)[..., 2], expected)


def test_12_bit_tiff_is_scaled() -> None:
    samples = np.array([[0, 0x123, 0xFFF, 0x800]])
    a, b, c, d = samples[0]
    packed = bytes(
        [a >> 4, (a & 15) << 4 | b >> 8, b & 255, c >> 4, (c & 15) << 4 | d >> 8, d & 255]
    )
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 200), (277, 1), (278, 1)]
    tags += [(279, len(packed))]
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags))
    tiff += b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags
    )
    tiff = tiff.ljust(200, b"\0") + packed
    assert decode(tiff, 1)[..., 0].tolist() == [[0, 0x12, 0xFF, 0x80]]


def test_cmyk_ycbcr_lab_and_bilevel_become_rgb() -> None:
    colours = Image.new("RGB", (8, 8), (200, 30, 60))
    cmyk = decode(encoded(colours.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(cmyk.astype(int) - [200, 30, 60]).max() <= 3
    ycbcr = decode(encoded(colours.convert("YCbCr"), "TIFF"))
    assert np.abs(ycbcr.astype(int) - [200, 30, 60]).max() <= 3
    bilevel = decode(encoded(Image.fromarray(np.eye(4, dtype=bool))))
    assert np.array_equal(bilevel[..., 0], 255 * np.eye(4))
    assert decode(np.eye(4, dtype=bool)).tolist() == bilevel.tolist()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    raw = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert len(list(ImageSequence.Iterator(Image.open(io.BytesIO(raw))))) == 3
    assert np.unique(decode(raw).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_grey_weights_of_colour() -> None:
    picture = Image.fromarray(noise(9, 9, 3))
    grey = decode(encoded(picture), channels=1)
    assert grey.shape == (9, 9, 1)
    assert np.array_equal(grey[..., 0], picture.convert("L"))
    one = Preprocessing(resize=32, crop=24, channels=1, mean=(0.5,), std=(0.5,))
    expected = picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR).crop((4, 4, 28, 28))
    assert np.array_equal(one(encoded(picture))[0], expected)


# -- any number of channels ----------------------------------------------------------------------


def test_rgba_as_four_channels() -> None:
    rgba = noise(12, 10, 4)
    assert np.array_equal(decode(encoded(Image.fromarray(rgba)), channels=4), rgba)
    same = decode(rgba, channels=4)
    assert np.array_equal(same, rgba) and not np.shares_memory(same, rgba)
    opaque = decode(encoded(Image.fromarray(rgba[..., :3])), channels=4)
    assert np.array_equal(opaque[..., :3], rgba[..., :3]) and opaque[..., 3].min() == 255


def test_grey_with_alpha_as_two_channels() -> None:
    bands = noise(5, 6, 2)
    image = Image.merge("LA", [Image.fromarray(bands[..., k]) for k in (0, 1)])
    assert np.array_equal(decode(encoded(image), channels=2), bands)


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_tiff_pages_are_channels(channels: int) -> None:
    bands = noise(12, 10, channels)
    pages = [Image.fromarray(bands[..., k]) for k in range(channels)]
    raw = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(decode(raw, channels), bands)
    assert np.array_equal(decode(raw)[..., 0], bands[..., 0])


def test_16_bit_tiff_pages_are_scaled() -> None:
    bands = np.random.default_rng(0).integers(0, 65536, (6, 7, 5), dtype=np.uint16)
    pages = [Image.fromarray(bands[..., k]) for k in range(5)]
    raw = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(decode(raw, 5), bands >> 8)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_npy_files() -> None:
    bands = noise(12, 10, 6)
    assert np.array_equal(decode(npy(bands), 6), bands)
    assert np.array_equal(decode(npy(bands[..., :3])), bands[..., :3])
    assert np.array_equal(decode(npy(bands[..., 0]))[..., 2], bands[..., 0])
    assert np.array_equal(decode(npy(np.asfortranarray(bands)), 6), bands)


def test_channels_are_resized_by_themselves() -> None:
    bands = noise(30, 40, 5)
    bands[..., 3] = 0  # an "alpha" of nothing must not blank the others
    wide = Preprocessing(resize=16, crop=12, channels=5, mean=(0.0,) * 5, std=(1.0,) * 5)
    single = Preprocessing(resize=16, crop=12, channels=1, mean=(0.0,), std=(1.0,))
    pixels = wide(npy(bands))
    assert pixels.shape == (5, 12, 12) and pixels.transpose(1, 2, 0).flags.c_contiguous
    for k in range(5):
        assert np.array_equal(pixels[k], single(bands[..., k])[0])


def test_an_image_smaller_than_the_crop_is_padded_with_black() -> None:
    four = Preprocessing(resize=None, crop=4, channels=4, mean=(0.0,) * 4, std=(1.0,) * 4)
    pixels = four(np.full((2, 2, 4), 9, np.uint8))
    assert (pixels[:, 1:3, 1:3] == 9).all() and pixels.sum() == 4 * 4 * 9


# -- what cannot be decoded is refused, with its reason ------------------------------------------


PHOTO = encoded(Image.fromarray(noise(64, 64, 3)), "JPEG")


@pytest.mark.parametrize(
    "raw, channels, reason",
    [
        (b"", 3, "an empty file"),
        (b"hello world, I am not an image", 3, "not an image that Pillow can read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", 3, "git lfs pull"),
        (b"\n<!DOCTYPE HTML><html><body>404</body></html>", 3, "an HTML page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 3, "an SVG drawing"),
        (b"%PDF-1.7 ...", 3, "a PDF document"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", 3, "or cut short"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", 3, "PostScript"),
        (PHOTO[:20], 3, "cut short"),
        (PHOTO[: len(PHOTO) // 2], 3, "truncated"),
        (encoded(Image.fromarray(noise(64, 64, 3)))[:3000], 3, "truncated"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), 3, "floating-point"),
        (encoded(Image.new("I", (4, 4), -1), "TIFF"), 3, "32-bit pixels from -1 to -1"),
        (encoded(Image.new("I", (4, 4), 65536), "TIFF"), 1, "no known range"),
        (encoded(Image.new("RGB", (4, 4))), 5, "expected 5 channels, got 3"),
        (npy(np.zeros((4, 4), np.float32)), 3, "got float32"),
        (npy(np.array([{}], object)), 3, "allow_pickle"),
        (npy(np.zeros((4, 4, 3), np.uint8))[:90], 3, "ValueError"),
        (np.zeros((4, 4, 5), np.uint8), 3, "expected 3 channels, got 5"),
        (np.zeros((0, 4, 3), np.uint8), 3, r"\(0, 4, 3\)"),
        (np.zeros(4, np.uint8), 3, r"\(4,"),
        ("a path", 3, "got str"),
    ],
)
def test_bad_input_is_refused(raw: RawImage, channels: int, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason) as caught:
        decode(raw, channels)
    assert caught.value.stage == "decode"
    assert "\n" not in caught.value.reason
    with pytest.raises(DecodeError):
        Preprocessing(channels=channels, mean=(0.5,) * channels, std=(0.5,) * channels)(raw)


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow as it is before a HEIC image comes."""
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)


def heic(picture: Image.Image, **options: Any) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(picture).save(file, quality=-1, chroma=444, **options)
    return file.getvalue()


@pytest.mark.usefixtures("without_heif")
def test_heic_is_read_where_its_package_is_installed() -> None:
    picture = Image.fromarray(noise(4, 6, 3)).resize((90, 60))
    found = decode(heic(picture))
    assert found.shape == (60, 90, 3)
    np.testing.assert_allclose(found, np.asarray(picture), atol=3)
    with pytest.raises(DecodeError):
        decode(heic(picture)[:200])
    assert decode(encoded(picture, "AVIF")).shape == (60, 90, 3)


@pytest.mark.usefixtures("without_heif")
def test_a_folder_of_a_phone_names_the_extra_that_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "phone").mkdir()
    for k in range(2):
        photograph = heic(Image.fromarray(noise(4, 6, 3, seed=k)).resize((90, 60)))
        (tmp_path / f"phone/{k}.HEIC").write_bytes(photograph)
    own = ("--backbone", "tests.small:own", "--layer", "pool", "--workers", 0)
    asked = ("extract", tmp_path / "phone", "-o", tmp_path / "a.h5", *own)
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "pillow_heif", None)
        done = featcache(*asked)
    assert done.exit_code == 1
    assert "Type: pip install 'featcache[heif]'" in done.stderr and "--retry-failed" in done.stderr
    assert "2 computed" in succeed(*asked, "--retry-failed")


def test_pages_of_colour_or_of_other_sizes_are_no_channels() -> None:
    pages = [Image.fromarray(noise(4, 4, 3)) for _ in range(5)]
    raw = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(DecodeError, match="page 0 is RGB, not grey"):
        decode(raw, 5)
    mixed = [Image.fromarray(noise(4, 4 + k)) for k in range(2)]
    with pytest.raises(DecodeError, match="shape"):
        decode(encoded(mixed[0], "TIFF", save_all=True, append_images=mixed[1:]), 2)


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(encoded(Image.new("L", (40, 40)))).shape == (40, 40, 3)  # Pillow warns only
    with pytest.raises(DecodeError, match="DecompressionBombError"):
        decode(encoded(Image.new("L", (60, 60))))


PLUGIN_ERRORS = (
    (ValueError, OSError, SyntaxError, NotImplementedError, struct.error, EOFError, MemoryError),
    (KeyError, IndexError, RecursionError, AttributeError, OverflowError, ZeroDivisionError),
)


@pytest.mark.parametrize("error", [error for row in PLUGIN_ERRORS for error in row])
def test_whatever_a_plugin_raises_is_a_decode_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Any) -> None:
        raise error("in <object at 0x7f0123456789>,\nsecond line")

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", load)
    with pytest.raises(DecodeError, match=error.__name__) as caught:
        decode(PHOTO)
    assert "0x7f" not in caught.value.reason  # the same reason in every run
    assert isinstance(caught.value.__cause__, error)


def test_an_interrupt_is_no_decode_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", load)
    with pytest.raises(KeyboardInterrupt):
        decode(PHOTO)


@settings(max_examples=150)
@given(data=st.data())
def test_damaged_files_give_pixels_or_a_decode_error(data: st.DataObject) -> None:
    start = data.draw(st.sampled_from(DAMAGEABLE))
    raw = bytearray(start)
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    try:
        pixels = decode(bytes(raw[:cut]))
    except DecodeError as error:
        assert error.reason
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


_SMALL = Image.fromarray(noise(9, 11, 3))
DAMAGEABLE = [
    encoded(_SMALL, "JPEG"),
    encoded(_SMALL),
    encoded(_SMALL.quantize(8), "GIF"),
    encoded(_SMALL, "TIFF", compression="tiff_lzw"),
    encoded(_SMALL, "BMP"),
    encoded(_SMALL, "WEBP"),
    encoded(_SMALL, "TGA"),
    npy(np.asarray(_SMALL)),
]


# -- Pillow's warnings ---------------------------------------------------------------------------


BOMB_WARNING = encoded(Image.new("L", (40, 40)))


def test_pillow_warnings_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode(BOMB_WARNING)
        Image.open(io.BytesIO(BOMB_WARNING))
    assert [w.category for w in caught] == [Image.DecompressionBombWarning]  # the user's own
    assert list(warnings.filters) == before


def test_warnings_of_other_threads_are_restored_in_any_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    before = list(warnings.filters)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(100):
                decode(BOMB_WARNING)  # under pytest a warning that leaks is an error
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(warnings.filters) == before
    with pytest.warns(UserWarning, match="still heard"):
        warnings.warn("still heard", stacklevel=1)


def test_pillow_logs_nothing_to_a_user_without_handlers(tmp_path: Path) -> None:
    code = (
        "import logging, featcache.pixels.decode\n"
        "logging.getLogger('PIL.TiffImagePlugin').error('More samples per pixel')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout == ""


# -- views ---------------------------------------------------------------------------------------


def test_views_are_cropped_from_the_whole_image(photographs: dict[str, bytes]) -> None:
    preprocessing = Preprocessing(resize=256, crop=64)
    augmentation = Augmentation(rotation=0, random_state=3, views=4)
    views = preprocessing.views(photographs["china"], augmentation, "china.jpg")
    assert views.shape == (4, 3, 64, 64)
    assert views.transpose(0, 2, 3, 1).flags.c_contiguous
    image = reference(photographs["china"])
    for index, pixels in enumerate(views):
        view = augmentation.view("china.jpg", index, (375, 500))
        left, upper, right, lower = view.box
        mode = torchvision.transforms.InterpolationMode.BILINEAR
        box = (upper, left, lower - upper, right - left)
        expected = F.resized_crop(image, *box, [64, 64], mode)
        expected = F.hflip(expected) if view.flip else expected
        assert np.array_equal(pixels, F.pil_to_tensor(expected))


def test_views_of_grey_and_of_many_channels() -> None:
    augmentation = Augmentation(random_state=1, views=2)
    grey = noise(40, 50)
    three = Preprocessing(resize=32, crop=24).views(grey, augmentation, "a")
    five = Preprocessing(resize=32, crop=24, channels=5, mean=(0.0,) * 5, std=(1.0,) * 5)
    stacked = five.views(np.repeat(grey[..., None], 5, axis=2), augmentation, "a")
    assert stacked.shape == (2, 5, 24, 24)
    for k in range(5):
        assert np.array_equal(stacked[:, k], three[:, 0])
    with pytest.raises(DecodeError, match="an empty file"):
        Preprocessing().views(b"", augmentation, "a")


# -- Pillow's own collection ---------------------------------------------------------------------


@pytest.mark.campaign
def test_pillow_collection(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that Pillow tests itself with gives pixels or one clear reason, and no noise."""
    version = f"pillow=={PIL.__version__}"
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "pillow"]
    subprocess.run([*download, version, "-d", str(tmp_path)], check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    capfd.readouterr()
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    preprocessing = Preprocessing()
    for path in sorted(tmp_path.rglob("Tests/images/**/*")):
        if not path.is_file():
            continue
        raw = path.read_bytes()
        try:
            pixels, small = decode(raw), preprocessing(raw)
        except DecodeError as error:
            outcomes["refused"] += 1
            reasons[error.reason.partition(";")[0][:60]] += 1
        else:
            outcomes["decoded"] += 1
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3, path
            assert small.shape == (3, 224, 224), path
    noise = [line for line in "".join(capfd.readouterr()).splitlines() if _IS_LIBTIFF not in line]
    assert noise == []
    with capfd.disabled():
        print(f"\n{version}: {dict(outcomes)}")
        for reason, count in reasons.most_common():
            print(f"  {count:4d}  {reason}")
    assert outcomes.total() > 1000
    assert outcomes["decoded"] > 800


# libtiff writes this one to standard error by itself, for a compression it was built without.
_IS_LIBTIFF = "WEBP compression support is not configured"
