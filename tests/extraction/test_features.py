"""Features in memory: of whatever a notebook has for images, and the bits that a store holds."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featcache as fc
from featcache.errors import BackboneError, ExtractionError, ImageSetError
from tests.small import backbone, folder, network


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("photographs"), 12, classes=("ant",))


def test_the_features_of_any_form_are_the_bits_of_a_store(root: Path, tmp_path: Path) -> None:
    images = fc.ImageSet.open(root)
    X, _ = fc.extract(images, backbone(), tmp_path / "s.h5").load()
    one = backbone()
    files = [str(root / name) for name in images.ids]
    pictures = [Image.open(file) for file in files]
    arrays = [np.asarray(Image.open(file)) for file in files]
    batch = torch.from_numpy(np.stack(arrays))
    forms = (
        images, root, f"{root}/ant/*.jpg", files, np.array(files), map(Path, files), pictures,
        arrays, np.stack(arrays), batch, batch.permute(0, 3, 1, 2), list(batch.permute(0, 3, 1, 2)),
    )  # fmt: skip
    for form in forms:
        found = fc.features(form, one)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, X)
    np.testing.assert_array_equal(one(files[::-1])[::-1], fc.features(files[::-1], one)[::-1])
    assert one([files[3], files[0], files[3]]).shape == (3, 16)  # as often as it is given


def test_one_image_in_any_form_is_one_row(root: Path) -> None:
    file, one = root / "ant" / "0003.jpg", backbone()
    pixels = np.array(Image.open(file))
    expected = one(file)
    assert expected.shape == (1, 16)
    for form in (str(file), [file], pixels, Image.open(file), torch.from_numpy(pixels)):
        np.testing.assert_array_equal(one(form), expected)
    np.testing.assert_array_equal(one(torch.from_numpy(pixels).permute(2, 0, 1)), expected)
    grey = pixels[..., 0]
    for form in (grey, [grey], torch.from_numpy(grey)[None], Image.fromarray(grey)):
        np.testing.assert_array_equal(one(form), one([np.repeat(grey[..., None], 3, axis=2)]))


def test_several_taps_come_by_name(root: Path) -> None:
    one = backbone(layers=("pool", "stem:map"))
    found = one(root)
    assert list(found) == one.taps
    assert [x.shape for x in found.values()] == [(12, *shape) for shape in one.shapes.values()]


def test_images_that_cannot_be_read_are_named(root: Path, tmp_path: Path) -> None:
    bad = tmp_path / "torn.jpg"
    whole = (root / "ant" / "0000.jpg").read_bytes()
    bad.write_bytes(whole[: 2 * len(whole) // 3])
    with pytest.raises(ExtractionError, match=r"torn\.jpg.*has no features \(decode: "):
        fc.features([root / "ant" / "0001.jpg", bad], backbone())
    with (
        Image.open(bad) as torn,
        pytest.raises(ExtractionError, match="00000001 of a list has no features"),
    ):
        fc.features([Image.open(root / "ant" / "0001.jpg"), torn], backbone())


def test_what_are_no_images_is_refused_with_what_to_do(root: Path) -> None:
    floats = np.zeros((2, 8, 8, 3), np.float32)
    for form in (floats, floats[0], list(floats), torch.zeros(2, 3, 8, 8), [torch.zeros(3, 8, 8)]):
        with pytest.raises(ImageSetError, match=r"uint8.*float32.*\(images \* 255\)"):
            fc.features(form, backbone())
    for form in ([], None, [None], [root, np.zeros((8, 8), np.uint8)]):
        with pytest.raises(ImageSetError, match=r"There are no images|Expected paths"):
            fc.features(form, backbone())
    with pytest.raises(BackboneError, match=r"Backbone\('resnet50'\): 'resnet18'"):
        fc.features(root, "resnet18")  # type: ignore[arg-type]


def test_the_network_is_made_ready_once_and_stays_quiet(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = backbone()
    loaded = pickle.loads(pickle.dumps(one))  # without what the first call keeps
    one(root)
    kept = one.runtime
    one(fc.ImageSet.open(root))
    assert one.runtime is kept
    one(root, precision="bfloat16")
    assert one.runtime is not kept
    assert pickle.loads(pickle.dumps(one)).runtime is None
    np.testing.assert_array_equal(loaded(root), one(root))
    assert capfd.readouterr() == ("", "")


def test_a_network_that_overflows_says_so(root: Path) -> None:
    module = network()
    module.get_submodule("body").get_parameter("bias").data[0] = torch.inf
    one = fc.Backbone(module, preprocessing=backbone().preprocessing, layers=["pool"])
    with pytest.raises(ExtractionError, match=r"0000\.jpg.*forward: features are not finite"):
        fc.features(root, one)
