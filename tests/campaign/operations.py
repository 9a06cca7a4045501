"""What is attacked: commands that write something, each from a known state, and what they make.

A state is a folder; `Ground` makes all states once. The oracle of a command is what an
uninterrupted run of it leaves behind, read back into plain arrays by `contents`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests import small
from tests.campaign.process import KILL_BEFORE, WRITES, Arm, arm, command, disarm, run, status_of

# What a folder holds: for each file name, its facts.
Contents = dict[str, Mapping[str, Any]]
_OWN = b"what a user keeps here"
NETWORK = "tests.campaign.network:own"
# Each head once, with few folds: a predictor of each kind is attacked.
HEADS = ("linear", "svm", "ridge", "knn", "forest", "boosting", "rbf-svm", "mlp")


@dataclass(frozen=True)
class Operation:
    """A command that writes into a folder: its start, its arguments, and the folder's new names.

    ``{here}`` in the arguments is the folder of the trial, ``{ground}`` that of the images.
    """

    name: str
    start: str
    argv: tuple[str, ...]
    output: str

    def arguments(self, ground: Path, here: Path) -> list[str]:
        """Return the arguments for a folder."""
        return [part.format(ground=ground, here=here) for part in self.argv]


def _extract(name: str, start: str, images: str, *more: str) -> Operation:
    options = ("--backbone", NETWORK, "--batch-size", "4", *more)
    workers = () if "--workers" in more else ("--workers", "0")
    argv = ("extract", f"{{ground}}/{images}", "-o", "{here}/s.h5", *options, *workers)
    return Operation(name, start, argv, "s.h5")


def _train(name: str, store: str, *more: str) -> Operation:
    argv = ("train", f"{{ground}}/{store}", "-o", "{here}/p.featcache", "--cv", "2", *more)
    return Operation(name, "empty", argv, "p.featcache")


_TAPS = ("--layer", "body:input:map", "--layer", "pool")
_SUFFIX = ("--head", "suffix", "--backbone", NETWORK, "--layer", "body:input:map", "--epochs", "2")
OPERATIONS = (
    _extract("fresh", "empty", "images"),
    _extract("failures", "empty", "bad", "--max-failures", "0.5"),
    _extract("growing", "stored", "more"),
    _extract("relabelling", "stored", "images", "--labels", "{ground}/labels.csv"),
    _extract("resuming", "begun", "images"),
    _extract("set aside", "begun", "more"),
    _extract("two workers", "empty", "images", "--workers", "2"),
    _train("train", "store/s.h5", "--head", "ridge", "--head", "knn"),
    _train("suffix", "maps/s.h5", *_SUFFIX),
    Operation("export npz", "empty", ("export", "{ground}/store/s.h5", "-o", "{here}/x.npz"),
              "x.npz"),
    Operation("export csv", "empty", ("export", "{ground}/store/s.h5", "-o", "{here}/x.csv"),
              "x.csv"),
    Operation("audit", "empty", ("audit", "{ground}/store/s.h5", "-o", "{here}/a.csv"), "a.csv"),
    Operation("predict", "empty", ("predict", "{ground}/trained/p.featcache", "{ground}/images",
              "-o", "{here}/predictions.csv", "--backbone", NETWORK, "--workers", "0"),
              "predictions.csv"),
)  # fmt: skip
BY_NAME = {operation.name: operation for operation in OPERATIONS}


@dataclass(frozen=True)
class Undisturbed:
    """What an undisturbed run finds, what it leaves, and how many calls of each kind it makes."""

    before: Contents
    after: Contents
    by_kind: dict[int, int]

    def calls(self, kinds: int = WRITES) -> int:
        """Return how many calls of some kinds it makes."""
        return sum(n for kind, n in self.by_kind.items() if kind & kinds)


class Ground:
    """The folder that trials start from: images, tables, and one folder for each state.

    Parameters
    ----------
    root : Path
        An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, Undisturbed] = {}
        for name, number in (("images", 24), ("more", 28), ("bad", 24)):
            small.folder(root / name, number)
        for name in ("ant/0100.jpg", "bee/0101.jpg"):
            (root / "bad" / name).write_bytes(b"\xff\xd8 not an image")
        rows = [f"{p.parent.name}/{p.name},{'cd'[k % 2]}" for k, p in enumerate(self._files)]
        (root / "labels.csv").write_text("\n".join(["id,label", *rows, ""]))
        for state in ("empty", "store", "maps", "stored", "begun", "trained"):
            (root / state).mkdir()
        self.must(BY_NAME["fresh"], root / "store")
        shutil.copy(root / "store" / "s.h5", root / "stored" / "s.h5")
        self.must(_extract("maps", "empty", "images", *_TAPS), root / "maps")
        self.must(BY_NAME["train"], root / "trained")
        self.kill_until(BY_NAME["fresh"], root / "begun", _is_halfway)

    @property
    def _files(self) -> list[Path]:
        return sorted((self.root / "images").rglob("*.jpg"))

    def command(self, operation: Operation, here: Path) -> Callable[[], None]:
        """Return the function that runs an operation in a folder."""
        return command(*operation.arguments(self.root, here), "--quiet")

    def must(self, operation: Operation, here: Path) -> None:
        """Run an operation that nothing disturbs."""
        ended = run(self.command(operation, here))
        assert ended.status == 0, f"{operation.name}: {ended}"

    def kill_until(
        self, operation: Operation, here: Path, reached: Callable[[Path], bool], share: float = 1
    ) -> None:
        """Kill an operation at one call before the other, from the last, until a state is reached.

        The folder `here` is left in that state. It begins with a share of all calls.
        """
        for at in range(int(self.undisturbed(operation).calls() * share), 0, -1):
            self.begin(operation, here)
            run(self.command(operation, here), Arm(here, WRITES, KILL_BEFORE, at))
            if reached(here):
                return
        raise AssertionError(f"no kill of {operation.name} left what was wanted")

    def begin(self, operation: Operation, here: Path, *, beside: bool = False) -> None:
        """Make the folder of a trial, with files of a user's beside the output or without."""
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(self.root / operation.start, here)
        if beside:
            for name in _beside(operation):
                (here / name).write_bytes(_OWN)
            (self.root / "victim").write_bytes(_OWN)
            (here / f"{operation.output}.new").symlink_to(self.root / "victim")

    def touched(self, operation: Operation, here: Path) -> str:
        """Return what is wrong with the files that `begin` put beside the output."""
        for path in (self.root / "victim", *(here / name for name in _beside(operation))):
            if not path.exists() or path.read_bytes() != _OWN:
                return f"touched: {path.name}, a user's own file, is not what it was"
        return ""

    def undisturbed(self, operation: Operation) -> Undisturbed:
        """Return what an undisturbed run of an operation is like."""
        here = self.root / "undisturbed"

        def look_run_look() -> Undisturbed:
            before = contents_here(here)
            arm(Arm(here, 0, KILL_BEFORE))
            status = status_of(self.command(operation, here))
            calls = disarm()
            assert status == 0, operation
            return Undisturbed(before, contents_here(here), calls)

        if operation.name not in self._known:
            self.begin(operation, here)
            ended = run(look_run_look)
            assert ended.result, ended
            self._known[operation.name] = ended.result
        return self._known[operation.name]


def _beside(operation: Operation) -> list[str]:
    """Return the names of a user's own files beside an output.

    One that is named like a partial file set aside stops whoever sets one aside, as those do that
    write to a store with others or after others: there it is left out.
    """
    alone = operation.start == "empty" and operation.name not in {"failures", "two workers"}
    ends = [".partial.new", ".tmp", *([".partial.old"] if alone else [])]
    return ["notes.txt", *(operation.output + end for end in ends)]


def _is_halfway(folder: Path) -> bool:
    """Return whether a folder has a partial file in which about half of the rows are done."""
    partial = folder / "s.h5.partial"
    if not partial.exists():
        return False
    with h5py.File(partial) as file:
        return bool(0 < np.count_nonzero(file["rows"]["status"]) <= 12)


def contents(folder: Path) -> Contents:
    """Read every file of a folder, in a process of its own: a damaged file may end that."""
    ended = run(lambda: contents_here(folder))
    if ended.fault or ended.result is None:
        return {"": {"error": ended.fault or ended.err}}
    return dict(ended.result)


def contents_here(folder: Path) -> Contents:
    """Read every file of a folder in this process."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): facts(p) for p in files if p.read_bytes() != _OWN}


def facts(path: Path) -> Mapping[str, Any]:
    """Return what a reader gets from a file, or ``{"error": message}`` where it is refused."""
    from featcache.errors import FeatcacheError

    readers: dict[str, Callable[[Path], Mapping[str, Any]]] = {
        ".h5": of_store, ".featcache": of_predictor, ".npz": of_arrays,
    }  # fmt: skip
    try:
        if path.suffix in readers:
            return readers[path.suffix](path)
    except FeatcacheError as error:
        return {"error": str(error)}
    if path.suffix == ".csv":
        return {"bytes": path.read_bytes()}
    return {"there": True}  # a partial file, a lock


def of_store(path: Path) -> Mapping[str, Any]:
    """Return what training reads of a store."""
    from featcache.store.store import FeatureStore

    store = FeatureStore.open(path)
    try:
        found: dict[str, Any] = {
            "ids": store.ids.tolist(),
            "labels": store.labels.tolist(),
            "classes": store.classes,
            "sha256": store.sha256.tobytes(),
            "failures": [(f.id, f.stage, f.reason) for f in store.failures],
            "fingerprint": str(store.fingerprint),
        }
        for name in ("groups", "splits"):
            column = getattr(store, name)
            found[name] = None if column is None else column.tolist()
        canaries = store.canaries
        if canaries is not None:
            found["canaries"] = (canaries.names, [hash_of(x) for x in canaries.images])
            found |= {f"canary {tap}": hash_of(x) for tap, x in canaries.features.items()}
        for tap in store.taps:
            found[tap] = store.load(tap)[0].tobytes()
        return found
    finally:
        store.close()


def hash_of(value: Any) -> str:
    """Return the SHA-256 of bytes or of an array's bytes and shape."""
    if isinstance(value, np.ndarray):
        value = str((value.shape, value.dtype)).encode() + np.ascontiguousarray(value).tobytes()
    return hashlib.sha256(value).hexdigest()


def of_predictor(path: Path) -> Mapping[str, Any]:
    """Return what a predictor says of rows that are drawn here."""
    from featcache.predictor.predictor import Predictor

    predictor = Predictor.load(path)
    rows = np.random.default_rng(0).standard_normal((8, predictor.n_features), np.float32)
    return {
        "head": (predictor.head, str(predictor.params)),
        "classes": predictor.classes,
        "columns": (predictor.columns, predictor.fingerprints),
        "calibration": predictor.calibration,
        "metrics": str({k: v for k, v in predictor.metrics.items() if "seconds" not in k}),
        "trained on": (hash_of(predictor.train_sha256), hash_of(predictor.train_groups)),
        "logits": hash_of(predictor.logits(rows)),
    }


def of_arrays(path: Path) -> Mapping[str, Any]:
    """Return the arrays of an ``.npz`` file."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: hash_of(arrays[name]) for name in arrays.files}


def difference(found: Contents, expected: Sequence[Contents], output: str) -> str:
    """Return "" if the output is one of those expected, else "silent: ..." or "lost: ..."."""
    here = found.get(output)
    if any(here == one.get(output) for one in expected):
        return ""
    if here is None:
        return f"lost: {output} is gone; there are {', '.join(found) or 'no files'}"
    if "error" in here:
        return f"lost: {here['error']}"
    wrong = [k for k in here if all(here[k] != (one.get(output) or {}).get(k) for one in expected)]
    return f"silent: {output} differs in {', '.join(wrong) or 'what is missing'}"


def rerun(
    ground: Ground,
    operation: Operation,
    here: Path,
    possible: Sequence[Contents],
    *,
    beside: bool = True,
) -> str:
    """Look at the output, run the same command again in peace, look again; return the fault.

    A user's own files were put beside the output, or not.
    """
    oracle = ground.undisturbed(operation).after

    def look_run_look() -> tuple[Contents, Contents]:
        before = contents_here(here)
        status = status_of(ground.command(operation, here))
        if status:
            raise SystemExit(status)
        return before, contents_here(here)

    ended = run(look_run_look)
    if ended.fault:
        return ended.fault
    if ended.result is None:
        return f"lost: the same command ended with {ended.status}: {ended.said}"
    before, after = ended.result
    wrong = difference(before, possible, operation.output)
    wrong = wrong or difference(after, [oracle], operation.output)
    wrong = wrong or (ground.touched(operation, here) if beside else "")
    litter = sorted(after.keys() - oracle.keys())
    return wrong or (f"litter: {', '.join(litter)}" if litter else "")
