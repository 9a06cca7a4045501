"""Views are random to the eye and the same in every run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as F

from featcache.pixels.views import Augmentation, View

SIZE = (375, 500)


def test_a_view_depends_on_seed_id_and_number_alone() -> None:
    augmentation = Augmentation(random_state=7)
    view = augmentation.view("rose/1.jpg", 3, SIZE)
    for index in range(3):
        augmentation.view("other", index, SIZE)
    assert augmentation.view("rose/1.jpg", 3, SIZE) == view
    others = [
        augmentation.view("rose/1.jpg", 2, SIZE),
        augmentation.view("rose/2.jpg", 3, SIZE),
        Augmentation(random_state=8).view("rose/1.jpg", 3, SIZE),
    ]
    assert view not in others and len(set(others)) == 3


def test_views_are_the_same_in_every_process_and_release() -> None:
    code = (
        "from featcache.pixels.views import Augmentation\n"
        "print(Augmentation().view('caf\\u00e9.jpg', 0, (100, 80)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(Augmentation().view("café.jpg", 0, (100, 80)))
    # Stored features were computed from these very views: other numbers would be another format.
    assert Augmentation().view("a.jpg", 0, (100, 80)) == EXPECTED


EXPECTED = View(angle=-5.2991867597947016, box=(7, 15, 77, 92), flip=True)


def test_draws_cover_their_ranges() -> None:
    augmentation = Augmentation(flip=0.25, scale=(0.2, 0.6), ratio=(0.8, 1.25), rotation=10)
    views = [augmentation.view(str(k), 0, SIZE) for k in range(2000)]
    flips = np.mean([view.flip for view in views])
    assert 0.2 < flips < 0.3
    angles = np.array([view.angle for view in views])
    assert -10 <= angles.min() < -9.8 and 9.8 < angles.max() <= 10
    boxes = np.array([view.box for view in views])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = width * height / (SIZE[0] * SIZE[1])
    assert 0.199 < share.min() < 0.21 and 0.55 < share.max() < 0.605
    assert 0.79 < (width / height).min() < 0.82 and 1.22 < (width / height).max() < 1.27
    assert boxes[:, 0].min() == 0 and boxes[:, 2].max() == 500
    assert boxes[:, 1].min() == 0 and boxes[:, 3].max() == 375


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 9))
def test_crops_lie_in_the_image(height: int, width: int, index: int) -> None:
    left, upper, right, lower = Augmentation().view("id", index, (height, width)).box
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


def test_an_image_too_long_for_any_draw_is_cropped_in_its_middle() -> None:
    augmentation = Augmentation(scale=(0.9, 1.0))
    assert augmentation.view("id", 0, (30, 3000)).box == (1480, 0, 1520, 30)
    assert augmentation.view("id", 0, (3000, 30)).box == (0, 1480, 30, 1520)


def test_views_are_what_torchvision_makes_of_the_same_draw() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    view = View(angle=12.5, box=(10, 5, 50, 45), flip=True)
    bilinear = F.InterpolationMode.BILINEAR
    expected = F.rotate(image, 12.5, bilinear)
    expected = F.hflip(F.resized_crop(expected, 5, 10, 40, 40, [24, 32], bilinear))
    assert np.array_equal(view(image, (24, 32), Image.Resampling.BILINEAR), expected)


def test_without_any_change_a_view_is_the_image() -> None:
    augmentation = Augmentation(flip=0, scale=(1, 1), ratio=(4 / 3, 4 / 3), rotation=0)
    view = augmentation.view("id", 0, (60, 80))
    assert view == View(angle=0.0, box=(0, 0, 80, 60), flip=False)


def test_survives_json() -> None:
    augmentation = Augmentation(flip=0.1, scale=(0.3, 0.9), rotation=180, random_state=5, views=3)
    again = Augmentation.from_dict(json.loads(json.dumps(augmentation.to_dict())))
    assert again == augmentation and again.views == 3 and hash(again) == hash(augmentation)
    with pytest.raises(ValueError, match="unknown fields of an augmentation: blur"):
        Augmentation.from_dict({"blur": 1})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"flip": 1.1}, "probability"),
        ({"scale": (0.0, 1.0)}, "scale"),
        ({"scale": (0.5, 0.4)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (2, 1)}, "ratio"),
        ({"rotation": -1}, "180 degrees"),
        ({"views": 0}, "views is at least 1"),
    ],
)
def test_impossible_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**values)


def test_the_crop_is_drawn_evenly() -> None:
    boxes = [
        Augmentation(scale=(0.25, 0.25), ratio=(1, 1)).view(str(k), 0, (4, 4)).box
        for k in range(900)
    ]
    counts = Counter(boxes)
    assert len(counts) == 9
    assert min(counts.values()) > 60
