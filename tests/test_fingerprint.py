"""The fingerprint: what decides the value of a feature, compared field by field."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from featcache.errors import CorruptStore, FormatVersionError
from featcache.fingerprint import (
    FORMAT_VERSION,
    Fingerprint,
    canonical_json,
    state_sha256,
)


def make(**changes: Any) -> Fingerprint:
    values: dict[str, Any] = {
        "source": "torchvision",
        "backbone": "resnet50",
        "weights": "IMAGENET1K_V2",
        "state_sha256": "ab" * 32,
        "taps": ("avgpool:output:flatten",),
        "preprocessing": {"resize": 232, "mean": (0.485, 0.456, 0.406)},
    }
    return Fingerprint(**(values | changes))


OTHER_VALUES = {
    "source": "timm",
    "backbone": "resnet18",
    "state_sha256": "cd" * 32,
    "taps": ("layer4:output:mean",),
    "preprocessing": {"resize": 256, "mean": (0.485, 0.456, 0.406)},
    "precision": "bfloat16",
    "store_dtype": "float16",
    "augmentation": {"flip": True, "views": 4},
    "varying": True,
}
OTHER_VALUES_THAT_ARE_SHOWN = {
    "weights": "IMAGENET1K_V1",
    "checkpoint": {"parameters": 3, "loaded": 2, "missing": ["fc.weight"]},
    "untrained": "It is untrained",
}


def test_equal_fingerprints_have_equal_text_digest_and_hash() -> None:
    a = make(preprocessing={"a": 1, "b": [1, 2]}, taps=["x", "y"])
    b = make(preprocessing={"b": (1, 2), "a": 1}, taps=("x", "y"))
    assert a == b
    assert a.to_json() == b.to_json()
    assert a.digest == b.digest
    assert len({a, b}) == 1


@pytest.mark.parametrize("field", OTHER_VALUES)
def test_every_field_counts_and_is_named_in_the_difference(field: str) -> None:
    a, b = make(), make(**{field: OTHER_VALUES[field]})
    assert a != b
    assert a.digest != b.digest
    assert field in a.diff(b)
    assert len(a.diff(b).splitlines()) == 1


def test_other_values_cover_every_field() -> None:
    fields = {field.name for field in dataclasses.fields(Fingerprint)}
    assert fields == {*OTHER_VALUES, *OTHER_VALUES_THAT_ARE_SHOWN, "format_version"}


@pytest.mark.parametrize("field", OTHER_VALUES_THAT_ARE_SHOWN)
def test_where_weights_come_from_is_shown_but_the_weights_are_compared(field: str) -> None:
    changes = {field: OTHER_VALUES_THAT_ARE_SHOWN[field]}
    a, b = make(), make(**changes)
    assert (a, a.digest, hash(a), a.diff(b)) == (b, b.digest, hash(b), "")
    assert field in a.diff(make(**changes, state_sha256="cd" * 32))
    assert Fingerprint.from_json(b.to_json()).to_dict() == b.to_dict()


def test_difference_goes_into_dictionaries_and_names_both_sides() -> None:
    a, b = make(), make(preprocessing={"resize": 256, "mean": (0.485, 0.456, 0.406)})
    assert (
        a.diff(b, ("stored", "asked for")) == "preprocessing.resize: 232 (stored), 256 (asked for)"
    )
    assert a.diff(make()) == ""


def test_json_round_trip() -> None:
    full = make(**OTHER_VALUES)
    assert Fingerprint.from_json(full.to_json()) == full
    assert json.loads(full.to_json())["taps"] == ["layer4:output:mean"]
    assert Fingerprint.from_dict(full.to_dict()) == full


def test_another_format_version_is_refused_not_guessed() -> None:
    text = make().to_json().replace(f'"format_version":{FORMAT_VERSION}', '"format_version":99')
    with pytest.raises(FormatVersionError, match="99"):
        Fingerprint.from_json(text)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"source": "x"}', "{", '{"surprise": 1}'])
def test_damaged_text_is_reported(text: str) -> None:
    with pytest.raises(CorruptStore):
        Fingerprint.from_json(text)


def test_what_json_cannot_hold_is_refused_at_once() -> None:
    with pytest.raises(ValueError):
        make(preprocessing={"mean": float("nan")})
    with pytest.raises(TypeError):
        make(preprocessing={"fn": print})
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}'


def test_state_hash_is_over_name_type_shape_and_bytes() -> None:
    state = {"b": torch.tensor([[1, 2]], dtype=torch.int32), "a": torch.tensor(1.5)}
    expected = hashlib.sha256(
        b"a\0torch.float32\0()\0"
        + torch.tensor(1.5).numpy().tobytes()
        + b"b\0torch.int32\0(1, 2)\0"
        + b"\1\0\0\0\2\0\0\0"
    ).hexdigest()
    assert state_sha256(state) == expected
    assert state_sha256(dict(reversed(state.items()))) == expected


@pytest.mark.parametrize(
    "changed",
    [
        {"w": torch.zeros(6)},
        {"w": torch.zeros(2, 3, dtype=torch.float16)},
        {"v": torch.zeros(2, 3)},
        {"w": torch.zeros(2, 3).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(-0.0))},
        {"w": torch.zeros(2, 3), "extra": torch.zeros(0)},
        {"w": torch.zeros(2, 3), "_extra_state": {"k": 1}},
    ],
    ids=["shape", "dtype", "name", "one bit", "empty", "extra state"],
)
def test_state_hash_changes_with(changed: dict[str, Any]) -> None:
    assert state_sha256(changed) != state_sha256({"w": torch.zeros(2, 3)})


def test_state_hash_takes_every_type_and_layout() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert state_sha256({"w": x.t().contiguous().t()}) == state_sha256({"w": x})
    assert state_sha256({"w": x.clone().requires_grad_()}) == state_sha256({"w": x})
    assert state_sha256({"w": x.bfloat16()}) != state_sha256({"w": x.half()})


def test_importing_it_is_cheap() -> None:
    code = "import sys, featcache.fingerprint; print({'torch', 'h5py', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
