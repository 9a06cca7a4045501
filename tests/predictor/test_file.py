"""The file of a predictor: what it holds, and that nothing else is taken for one."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from featcache import train
from featcache.errors import PredictorError
from featcache.predictor.predictor import Predictor
from tests.labelled import clusters, make_store
from tests.predictor_files import Arrays, parts_of, rewritten, whole

LABELS = ["ant", "bee", "cod"] * 16
KINDS = {
    "linear": ["matrix"],
    "rbf-svm": ["gaussian", "pair-votes"],
    "forest": ["trees", "log"],
    "boosting": ["matrix", "trees"],
    "knn": ["neighbors", "log"],
    "mlp": ["matrix", "relu", "matrix"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    """Return a file of some kinds of heads, trained on few columns."""
    store = make_store(folder / "a.h5", clusters(LABELS, d=3), LABELS)
    paths = {head: folder / f"{head}.featcache" for head in KINDS}
    for head, path in paths.items():
        train(store, head=head, cv=2).save(path)
    return paths


@pytest.mark.parametrize("head", KINDS)
def test_a_file_is_plain_safetensors(files: dict[str, Path], head: str) -> None:
    text, arrays = parts_of(files[head])
    kinds = [step["kind"] for step in text["steps"]]
    assert kinds[-len(KINDS[head]) :] == KINDS[head]
    assert text["classes"] == ["ant", "bee", "cod"]
    assert arrays["train_sha256"].shape == (48, 32)
    assert len(text["sha256"]) == 64
    assert files[head].stat().st_size < sum(one.nbytes for one in arrays.values()) + 20_000


def test_every_damaged_byte_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    content = files["linear"].read_bytes()
    assert len(content) < 20_000
    target = tmp_path / "x"
    rng = np.random.default_rng(0)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        target.write_bytes(damaged)
        with pytest.raises(PredictorError, match=str(target)):
            Predictor.load(target)


def test_the_digest_is_compared_exactly(files: dict[str, Path], tmp_path: Path) -> None:
    content = files["linear"].read_bytes()
    digest = parts_of(files["linear"])[0]["sha256"].encode()
    assert digest.upper() != digest
    for other in (digest.upper(), b" " * 64, b"0" * 64):
        (tmp_path / "x").write_bytes(content.replace(digest, other))
        with pytest.raises(PredictorError, match="damaged"):
            Predictor.load(tmp_path / "x")


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 30, 60, 100, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(files: dict[str, Path], tmp_path: Path, cut: float) -> None:
    content = files["linear"].read_bytes()
    size = int(cut * len(content)) if isinstance(cut, float) else cut
    (tmp_path / "x").write_bytes(content[:size])
    with pytest.raises(PredictorError):
        Predictor.load(tmp_path / "x")
    (tmp_path / "x").write_bytes(content + b"more")
    with pytest.raises(PredictorError):
        Predictor.load(tmp_path / "x")


def test_a_file_of_an_earlier_featcache_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.featcache", "w") as archive:
        archive.writestr("manifest.json", '{"format": "featcache-predictor"}')
    with pytest.raises(PredictorError, match=r"earlier featcache.*Train again"):
        Predictor.load(tmp_path / "old.featcache")


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}, {"featcache": "{}"}):
        content = safetensors.numpy.save({"a": np.zeros(3)}, metadata=metadata)
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(PredictorError, match="not a featcache predictor"):
            Predictor.load(tmp_path / "x")


@pytest.mark.parametrize(
    "rest", ["", "}", "[" * 100_000, '"a": ' + "9" * 10_000 + "}", '"steps": NaN}', "null}"]
)
def test_texts_that_are_none(files: dict[str, Path], tmp_path: Path, rest: str) -> None:
    _, arrays = parts_of(files["linear"])
    zeros = "0" * 64
    content = whole(json.dumps({"sha256": zeros}), arrays)
    text = json.dumps({"sha256": zeros})[:-1] + ", " + rest
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header["__metadata__"]["featcache"] = text
    (tmp_path / "x").write_bytes(signed(header, content))
    with pytest.raises(PredictorError):
        Predictor.load(tmp_path / "x")


def signed(header: Any, content: bytes) -> bytes:
    """Return a file of this header and the arrays of another, with the right digest."""
    import hashlib

    size = int.from_bytes(content[:8], "little")
    head = json.dumps(header, separators=(",", ":")).encode()
    made = len(head).to_bytes(8, "little") + head + content[8 + size :]
    blank = made.replace(header_digest(header), b"0" * 64, 1)
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


def header_digest(header: Any) -> bytes:
    return str(header["__metadata__"]["featcache"])[12:76].encode()


@pytest.mark.parametrize("shape", [[10**12], [3, -1], [2], [10**30], ["x"], None, [3, 5, 0]])
def test_arrays_that_do_not_account_for_their_bytes(
    files: dict[str, Path], tmp_path: Path, shape: Any
) -> None:
    content = files["linear"].read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header["step0.weight" if "step0.weight" in header else "step1.weight"]["shape"] = shape
    (tmp_path / "x").write_bytes(signed(header, content))
    with pytest.raises(PredictorError):
        Predictor.load(tmp_path / "x")


def test_arrays_of_other_names_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    for path in files.values():
        _, arrays = parts_of(path)
        for name in arrays:
            with pytest.raises(
                PredictorError, match=r": (It lacks|Step \d of its (head|typicality) cannot)"
            ):
                Predictor.load(rewritten(path, tmp_path / "x", lambda _, a, n=name: a.pop(n)))
        for name in ("more", "step0.more", "step9.weight", "canary_image_0"):
            with pytest.raises(PredictorError, match=r"more|step9|canary"):
                Predictor.load(
                    rewritten(path, tmp_path / "x", lambda _, a, n=name: a.update({n: np.ones(3)}))
                )


@pytest.mark.parametrize("head", KINDS)
def test_arrays_of_other_types_and_shapes_are_refused(
    files: dict[str, Path], tmp_path: Path, head: str
) -> None:
    _, arrays = parts_of(files[head])
    for name, value in arrays.items():
        others: list[np.ndarray] = [value.astype(np.int8), value[None], value.astype(bool)]
        if value.ndim:
            others += [value[..., :-1], np.concatenate([value, value]), value[:0]]
        for other in others:
            hashes = name in ("train_sha256", "train_groups") and other.dtype == np.uint8
            if hashes and other.shape[1:] == (32,):
                continue  # on how many images and groups it was trained is nowhere else
            alike = other.dtype == value.dtype and other.shape[1:] == value.shape[1:]
            if name == "typical_sample" and alike and other.size:
                continue  # nor how many of them are kept
            changed = rewritten(
                files[head], tmp_path / "x", lambda _, a, n=name, o=other: a.update({n: o})
            )
            with pytest.raises(PredictorError):
                Predictor.load(changed)


EDITS: dict[str, tuple[str, str, Callable[[np.ndarray], Any]]] = {
    "a child that does not exist": ("forest", "children", lambda a: a.__setitem__((0, 1), len(a))),
    "a negative child": ("forest", "children", lambda a: a.__setitem__((0, 0), -1)),
    "a child before its parent": ("boosting", "children", lambda a: a.__setitem__((5, 0), 0)),
    "half a leaf": ("boosting", "children", lambda a: a.__setitem__((0, 0), 0)),
    "a column that does not exist": ("boosting", "feature", lambda a: a.__setitem__(0, 99)),
    "a negative column": ("forest", "feature", lambda a: a.__setitem__(0, -1)),
    "a root that does not exist": ("forest", "roots", lambda a: a.__iadd__(10**6)),
    "a negative root": ("boosting", "roots", lambda a: a.__setitem__((0, 0), -1)),
    "a row of no class": ("knn", "codes", lambda a: a.__setitem__(0, 3)),
    "a row of a negative class": ("knn", "codes", lambda a: a.__setitem__(0, -1)),
    "weights of zero": ("knn", "weights", lambda a: a.__imul__(0)),
    "negative weights": ("knn", "weights", lambda a: a.__imul__(-1)),
    "weights that are no numbers": ("knn", "weights", lambda a: a.__imul__(np.nan)),
    "a temperature of zero": ("knn", "temperature", lambda a: a.__imul__(0)),
    "no neighbours": ("knn", "n_neighbors", lambda a: a.__imul__(0)),
    "counts beyond the vectors": ("rbf-svm", "counts", lambda a: a.__imul__(1000)),
    "two trees of one root": ("forest", "roots", lambda a: a.__setitem__(1, a[0])),
    "a leaf that is no number": ("forest", "value", lambda a: a.__setitem__((-1, 0), np.nan)),
    "a weight that is no number": ("linear", "weight", lambda a: a.__setitem__((0, 0), np.nan)),
    "an infinite weight": ("mlp", "weight", lambda a: a.__setitem__((0, 0), np.inf)),
    "negative counts": ("rbf-svm", "counts", lambda a: a.__imul__(np.array([-1, 1, 1]))),
}


@pytest.mark.parametrize("what", EDITS)
def test_values_that_a_computation_could_not_stand_are_refused(
    files: dict[str, Path], tmp_path: Path, what: str
) -> None:
    head, name, edit = EDITS[what]

    def change(text: dict[str, Any], arrays: Arrays) -> None:
        found = next(key for key in sorted(arrays) if key.endswith(f".{name}"))
        arrays[found] = arrays[found].copy()
        edit(arrays[found])

    with pytest.raises(PredictorError, match="the step"):
        Predictor.load(rewritten(files[head], tmp_path / "x", change))


def test_a_width_that_no_byte_accounts_for_is_refused(
    files: dict[str, Path], tmp_path: Path
) -> None:
    shapes = {
        "step0.weight": (0, 3), "step0.bias": (0,), "step1.vectors": (10**6, 0), "step1.gamma": (),
        "step2.weight": (0, 10**6), "step2.bias": (0,), "step3.weight": (3, 0), "step3.bias": (3,),
    }  # fmt: skip

    def change(text: dict[str, Any], arrays: Arrays) -> None:
        for name in [name for name in arrays if name.startswith("step")]:
            del arrays[name]
        text["steps"] = [{"kind": kind} for kind in ("matrix", "gaussian", "matrix", "matrix")]
        arrays |= {name: np.zeros(shape) for name, shape in shapes.items()}
        arrays["canary_logits"] = np.zeros_like(arrays["canary_logits"])

    changed = rewritten(files["linear"], tmp_path / "x", change)
    assert changed.stat().st_size < 20_000
    with pytest.raises(PredictorError, match=r"weight of the step 'matrix' is float64 \(0, 3\)"):
        Predictor.load(changed)


CANARIES: dict[str, Callable[[dict[str, Any], Arrays], Any]] = {
    "canary rows": lambda _, a: a.update({n: a[n][:0] for n in ("canary_x", "canary_logits")}),
    "canary scores": lambda _, a: a.update(canary_logits=a["canary_logits"][0]),
    "canary images": lambda t, a: (
        t["canaries"].append("x"),
        a.update(canary_image_0=np.zeros(9, np.uint8)),
    ),
}


@pytest.mark.parametrize("what", CANARIES)
def test_canaries_that_check_nothing_are_refused(
    files: dict[str, Path], tmp_path: Path, what: str
) -> None:
    with pytest.raises(PredictorError, match=f"mistake in its {what}"):
        Predictor.load(rewritten(files["linear"], tmp_path / "x", CANARIES[what]))


def survive(path: Path, target: Path, rounds: int, seed: int) -> int:
    """Load mutants with right digests, predict with those that load; count the refused."""
    rng = np.random.default_rng(seed)
    X = clusters(LABELS, d=3)
    refused = 0
    for _ in range(rounds):

        def mutate(text: dict[str, Any], arrays: Arrays) -> None:
            full = sorted(name for name, value in arrays.items() if value.size)
            name = full[rng.integers(len(full))]
            changed = np.array(arrays[name])
            content = changed.reshape(-1).view(np.uint8)
            for _ in range(rng.integers(1, 9)):
                content[rng.integers(len(content))] = rng.choice([0, 1, 127, 128, 255])
            arrays[name] = changed

        try:
            loaded = Predictor.load(rewritten(path, target, mutate))
        except PredictorError:
            refused += 1
        else:
            loaded.predict_proba(X)
    return refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", KINDS)
def test_mutants_are_refused_or_predict_but_never_crash(
    files: dict[str, Path], tmp_path: Path, head: str
) -> None:
    assert survive(files[head], tmp_path / "x", 40, seed=1) > 0


@pytest.mark.campaign
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", KINDS)
def test_thousands_of_mutants(files: dict[str, Path], tmp_path: Path, head: str) -> None:
    assert survive(files[head], tmp_path / "x", 5000, seed=2) > 0
