"""The file of a predictor: one safetensors file, arrays by name and one JSON text.

The text is the entry ``featcache`` of the file's metadata: the SHA-256 of the whole file with its
own 64 digits blanked, format and versions, head and parameters, classes, calibration, columns
(which taps of which networks, side by side), the networks' fingerprints, figures, and the kinds of
the head's steps. The arrays are:

========================  ========================================================================
``step0.weight`` ...      the arrays of each step (see `featcache.heads.steps`)
``train_sha256``          (n, 32): hash of each training image
``train_groups``          (g, 32): hash of the name of each group of training images
``canary_x``              (m, d): rows, ``canary_logits`` (m, k) what the head makes of them, and
``canary_image_0`` ...    the image files that they come from
``label_scores``          (q,): quantiles of 1 less the probability of the true class, out of fold;
                          ``judged`` in the text is how many images they are of
``typical0.weight`` ...   the arrays of each step of its typicality, ``typical_sample`` (s, q), and
                          ``typical_distances``, quantiles too; the text's ``typicality`` has the
                          kinds of the steps and the number of images
========================  ========================================================================

Whoever wrote a file decides what is in it, so nothing is taken for granted: names, types and
shapes are checked before anything is made of them, and a file that is not a predictor's ends in
`PredictorError`. Reading takes no more memory than the file has, and runs no code of it.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from featcache.errors import PredictorError
from featcache.finetuning.head import SuffixStep
from featcache.fingerprint import Fingerprint
from featcache.heads import steps
from featcache.heads.base import FittedHead
from featcache.heads.calibration import Calibration
from featcache.pixels.preprocessing import Preprocessing
from featcache.pixels.views import Augmentation
from featcache.predictor.inputs import InputTap
from featcache.predictor.measured import Quantiles
from featcache.predictor.typicality import Typicality
from featcache.results.json_types import check_types
from featcache.results.leaderboard import Leaderboard
from featcache.system.files import open_file
from featcache.system.tables import first_names, in_order
from featcache.version import __version__

FORMAT_VERSION = 4

_KEY = "featcache"
_START = b'{"__metadata__":{"featcache":"{\\"sha256\\": \\"'  # of the header, before the digits
_DIGITS = slice(8 + len(_START), 8 + len(_START) + 64)
_KINDS: dict[str, type[steps.Step]] = {
    one.kind: one
    for one in (
        steps.Unit, steps.Power, steps.Scale, steps.Matrix, steps.Relu, steps.Log, steps.Gaussian,
        steps.PairVotes, steps.Neighbors, steps.Trees, SuffixStep,
    )
}  # fmt: skip
_AS_THEY_ARE = ("versions", "head", "params", "classes", "metrics", "request")
_TEXT = {
    "sha256": str,
    "format_version": int,
    "created": str,
    "versions": dict,
    "head": str,
    "params": dict,
    "classes": tuple[str, ...],
    "calibration": Calibration,
    "metrics": dict,
    "leaderboard": dict | None,
    "request": dict | None,
    "columns": tuple[InputTap, ...],
    "fingerprints": tuple[Fingerprint, ...],
    "canaries": tuple[str, ...],
    "judged": int,
    "typicality": dict | None,
    "steps": tuple[Mapping[str, Any], ...],
}
_CHECKPOINT = {"parameters": int, "loaded": int, "random": tuple[str, ...], "key": str}


@dataclass(frozen=True, eq=False)
class CanaryRows:
    """Rows on which a head, and the network before it, can be checked.

    Attributes
    ----------
    x : ndarray of float32, shape (m, d)
        Features.
    logits : ndarray of float32, shape (m, k)
        What the head made of them when it was trained.
    names, images : tuple of str, tuple of bytes
        The image files that `x` are the features of; empty where `x` are training rows.
    """

    x: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]
    names: tuple[str, ...] = ()
    images: tuple[bytes, ...] = ()


def group_hashes(groups: npt.NDArray[Any] | None) -> npt.NDArray[np.uint8]:
    """Return the hashes (g, 32) of the names of groups, each once; those stay with their owner."""
    names = sorted({*([] if groups is None else groups.tolist())} - {""})
    digests = (hashlib.sha256(name.encode("utf-8", "replace")).digest() for name in names)
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def is_predictor(path: Path) -> bool:
    """Return whether a file is a predictor, of whatever version, intact or not."""
    with open_file(path) as file:
        return file.read(_DIGITS.start)[8:] == _START


def write(parts: Mapping[str, Any]) -> bytes:
    """Return the file of a predictor's parts, by name as `read` gives them."""
    head, canaries, board = parts["estimator"], parts["canaries"], parts["leaderboard"]
    typical = parts["typicality"]
    chains = {"step": head.steps, "typical": () if typical is None else typical.steps}
    kinds = {
        name: [{"kind": step.kind, **step.values()} for step in chain]
        for name, chain in chains.items()
    }
    _check_parts(**parts)
    text = {
        "sha256": "0" * 64,
        "format_version": FORMAT_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **{name: parts[name] for name in _AS_THEY_ARE},
        "calibration": dataclasses.asdict(parts["calibration"]),
        "leaderboard": None if board is None else board.to_dict(),
        "columns": [dataclasses.asdict(column) for column in parts["columns"]],
        "fingerprints": [one.to_dict() for one in parts["fingerprints"]],
        "canaries": canaries.names,
        "judged": parts["label_scores"].n,
        "steps": kinds["step"],
        "typicality": typical and {"images": typical.distances.n, "steps": kinds["typical"]},
    }
    arrays = {
        f"{kind}{number}.{name}": one
        for kind, chain in chains.items()
        for number, step in enumerate(chain)
        for name, one in step.arrays().items()
    }
    arrays |= {
        f"canary_image_{number}": np.frombuffer(image, dtype=np.uint8)
        for number, image in enumerate(canaries.images)
    }
    arrays |= {
        "train_sha256": parts["train_sha256"],
        "train_groups": parts["train_groups"],
        "canary_x": canaries.x,
        "canary_logits": canaries.logits,
        "label_scores": parts["label_scores"].values,
    }
    if typical is not None:
        arrays["typical_sample"] = typical.sample
        arrays["typical_distances"] = typical.distances.values
    content = bytearray(
        safetensors.numpy.save(
            {name: np.asarray(one, order="C") for name, one in arrays.items()},
            metadata={_KEY: json.dumps(text, ensure_ascii=False)},
        )
    )
    content[_DIGITS] = hashlib.sha256(content).hexdigest().encode()
    return bytes(content)


def read(source: IO[bytes]) -> dict[str, Any]:
    """Return the parts of a predictor by name: its fields. Of another file, only the start is read.

    Raises
    ------
    PredictorError
        It is not a predictor's, damaged, of another format version, or its parts do not fit.
    ValueError and others
        What hostile bytes can make of parsing JSON and arrays.
    """
    start = source.read(_DIGITS.start)
    if start[8:] != _START:
        if start.startswith(b"PK"):
            raise PredictorError(
                "It is a predictor of an earlier featcache, or another zip, which this featcache "
                f"{__version__} does not read. Train again."
            )
        if start.startswith(b"\x89HDF"):
            raise PredictorError("It is an HDF5 file, as feature files are, and not a predictor.")
        raise PredictorError("It is not a featcache predictor.")
    content = start + source.read()
    whole = memoryview(content)
    digest = hashlib.sha256(whole[: _DIGITS.start])
    digest.update(b"0" * 64)
    digest.update(whole[_DIGITS.stop :])
    if content[_DIGITS] != digest.hexdigest().encode():
        raise PredictorError("It is damaged: its SHA-256 is not that of its content.")
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    text = json.loads(header["__metadata__"][_KEY])
    if (version := text.get("format_version")) != FORMAT_VERSION:
        raise PredictorError(
            f"It has format version {version!r} (made by {text.get('versions')!r}), this featcache "
            f"{__version__} reads version {FORMAT_VERSION}. Use that featcache, or train again."
        )
    check_types("", text, _TEXT)
    arrays = safetensors.numpy.load(content)
    names, board = tuple(text["canaries"]), text.get("leaderboard")
    typical = text.get("typicality")
    pictures = [f"canary_image_{number}" for number in range(len(names))]
    needed = {"train_sha256", "train_groups", "canary_x", "canary_logits", "label_scores"}
    needed.update(pictures)
    if typical is not None:
        check_types("typicality", typical, {"images": int, "steps": tuple[Mapping[str, Any], ...]})
        needed |= {"typical_sample", "typical_distances"}
    if missing := needed - arrays.keys():
        raise PredictorError(f"It lacks arrays: {first_names(sorted(missing))}.")
    parts = {
        **{name: text.get(name) for name in _AS_THEY_ARE},
        "leaderboard": None if board is None else Leaderboard.from_dict(board),
        "classes": tuple(text["classes"]),
        "calibration": Calibration(
            text["calibration"]["temperature"], tuple(text["calibration"]["bias"])
        ),
        "columns": tuple(InputTap(**column) for column in text["columns"]),
        "fingerprints": tuple(map(_fingerprint, text["fingerprints"])),
        "estimator": FittedHead(
            _steps("step", "head", text["steps"], arrays), np.array(text["classes"])
        ),
        "typicality": typical
        and Typicality(
            _steps("typical", "typicality", typical["steps"], arrays),
            arrays.pop("typical_sample"),
            Quantiles(typical["images"], arrays.pop("typical_distances")),
        ),
        "train_sha256": arrays.pop("train_sha256"),
        "train_groups": arrays.pop("train_groups"),
        "canaries": CanaryRows(
            arrays.pop("canary_x"),
            arrays.pop("canary_logits"),
            names,
            tuple(arrays.pop(name).tobytes() for name in pictures),
        ),
        "label_scores": Quantiles(text["judged"], arrays.pop("label_scores")),
    }
    if arrays:
        raise PredictorError(f"It holds arrays of no part: {first_names(sorted(arrays))}.")
    _check_parts(**parts)
    return parts


def _steps(
    prefix: str, of: str, chain: Sequence[dict[str, Any]], arrays: dict[str, npt.NDArray[Any]]
) -> list[steps.Step]:
    """Return steps of their values in the text and their arrays, taken out of `arrays`."""
    return [
        _step(f"{prefix}{number}.", f"Step {number} of its {of}", values, arrays)
        for number, values in enumerate(chain)
    ]


def _step(
    prefix: str, what: str, values: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]
) -> steps.Step:
    mine = {name: arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}
    kind = _KINDS.get(str(values.pop("kind", "")))
    if kind is None:
        raise PredictorError(f"{what} is of no kind that this featcache knows.")
    try:
        return kind.of({name.removeprefix(prefix): one for name, one in mine.items()}, **values)
    except (TypeError, ValueError) as error:
        raise PredictorError(f"{what} cannot be made: {error}.") from error


def _fingerprint(values: Any) -> Fingerprint:
    """Return a fingerprint of the text, whose types are right, after checking its values."""
    made = Fingerprint.from_dict(values)
    right = (
        made.source in ("torchvision", "timm", "callable", "module")
        and made.taps
        and made.preprocessing
        and made.precision in ("float32", "bfloat16", "float16")
        and made.store_dtype in ("float32", "float16")
    )
    try:
        Preprocessing.from_dict(made.preprocessing)
        Augmentation.from_dict(made.augmentation or {})
    except (TypeError, ValueError):
        right = False
    if not right:
        raise PredictorError(f"One of its fingerprints is damaged: {values!r:.200}.")
    if made.checkpoint is not None:
        shown = {name: made.checkpoint.get(name) for name in _CHECKPOINT}
        check_types("checkpoint", shown, _CHECKPOINT)
    return made


def _check_parts(
    *,
    estimator: FittedHead,
    classes: tuple[str, ...],
    calibration: Calibration,
    columns: tuple[InputTap, ...],
    fingerprints: tuple[Fingerprint, ...],
    train_sha256: npt.NDArray[Any],
    train_groups: npt.NDArray[Any],
    canaries: CanaryRows,
    label_scores: Quantiles,
    typicality: Typicality | None,
    **_: Any,
) -> None:
    """Refuse parts that do not fit each other."""
    d, k, rows = sum(column.width for column in columns), len(classes), canaries
    for right, what in (
        (k >= 2 and list(classes) == in_order(set(classes)), "classes"),
        # Scores are float32, and stay finite when they are divided by it.
        (1e-200 < calibration.temperature < 1e200, "temperature"),
        (len(calibration.bias) == k and np.abs(calibration.bias).max() < 1e200, "bias"),
        (
            all(
                one.width > 0
                and 0 <= one.source < len(fingerprints)
                and one.tap in fingerprints[one.source].taps
                for one in columns
            ),
            "columns",
        ),
        (len({one.views for one in fingerprints}) == 1, "views"),
        (train_sha256.dtype == np.uint8 and train_sha256.shape[1:] == (32,), "training images"),
        (train_groups.dtype == np.uint8 and train_groups.shape[1:] == (32,), "training groups"),
        # One at least: its numbers account for the columns.
        (rows.x.dtype == np.float32 and rows.x.shape[1:] == (d,) and rows.x.size, "canary rows"),
        (
            rows.logits.dtype == np.float32 and rows.logits.shape == (*rows.x.shape[:1], k),
            "canary scores",
        ),
        (typicality is None or typicality.sound, "typicality"),
        (label_scores.sound and label_scores.n > 0, "out-of-fold scores"),
        (len(rows.images) in (0, *rows.x.shape[:1]), "canary images"),
    ):
        if not right:
            raise PredictorError(f"There is a mistake in its {what}.")
    if (width := _width(estimator.steps, d)) != k:
        raise PredictorError(f"The head gives {width} scores for {k} classes.")
    if typicality is not None and _width(typicality.steps, d) != typicality.sample.shape[1]:
        raise PredictorError("There is a mistake in its typicality.")


def _width(chain: Sequence[steps.Step], width: int) -> int:
    """Return how many columns come out of sound steps that so many go into."""
    for step in chain:
        width = step.check(width)
    return width


def versions() -> dict[str, str]:
    """Return the versions of what decides what a predictor computes."""
    from importlib.metadata import version

    packages = ("torch", "torchvision", "pillow", "scikit-learn", "numpy")
    return {"featcache": __version__, **{name: version(name) for name in packages}}


def then_and_now(trained: Mapping[str, str]) -> str:
    """Return which versions a predictor was trained with, and which are here."""
    then, now = (
        ", ".join(f"{name} {version}" for name, version in one.items())
        for one in (trained, versions())
    )
    return f"trained with {then}; here are {now}"
