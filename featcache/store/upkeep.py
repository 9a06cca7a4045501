"""Care of finished files: verifying, relabelling, and making one file from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.errors import MissingFeatures
from featcache.store import checksums, disk, layout
from featcache.store.layout import StoreFile
from featcache.store.locking import WriteLock

if TYPE_CHECKING:
    from featcache.images.image_set import ImageSet


@dataclass(frozen=True)
class Canaries:
    """Test images kept in the file, and what the network made of them.

    Parameters
    ----------
    names : list of str
    images : list of bytes
        Encoded.
    features : dict of str to ndarray, shape (k, ...), float32
        By tap, without views; empty where they were not computed.
    """

    names: list[str]
    images: list[bytes]
    features: dict[str, np.ndarray]


@dataclass(frozen=True)
class VerifyReport:
    """What `FeatureStore.verify` found.

    Parameters
    ----------
    rows : int
        Rows read.
    bad_rows : list of str
        Ids of the rows whose features, hash, or entry are not what was written.
    problems : list of str
        Sentences for people; empty when all is well.
    """

    rows: int
    bad_rows: list[str]
    problems: list[str]

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "ok": self.ok,
            "rows": self.rows,
            "bad_rows": self.bad_rows,
            "problems": self.problems,
        }

    def __str__(self) -> str:
        return "\n".join(self.problems) if self.problems else f"{self.rows:,} rows, all intact"


def read_canaries(file: StoreFile) -> Canaries | None:
    """Return the canaries of a file."""
    if "canaries/names" not in file.datasets:
        return None
    names = layout.decode_table(file.read("canaries/names")).tolist()
    images = [file.read(f"canaries/images/{i}").tobytes() for i in range(len(names))]
    features = {tap: file.read(f"canaries/{layout.feature_name(tap)}") for tap in file.features}
    if any(np.isnan(values).any() for values in features.values()):
        features = {}
    return Canaries(names, images, features)


def contents_of(file: StoreFile) -> layout.Contents:
    """Return everything but the features of a file, to make another from."""
    own = {"fingerprint", "classes"}
    canaries = read_canaries(file)

    def table(name: str) -> np.ndarray | None:
        return file.read(name) if name in file.datasets else None

    failures = [
        (name.decode(), stage.decode(), reason.decode(), size, mtime_ns)
        for name, stage, reason, size, mtime_ns in file.read("failures").tolist()
    ]
    return layout.Contents(
        fingerprint=file.fingerprint,
        shapes={tap: dataset.shape[1:] for tap, dataset in file.features.items()},
        ids=file.read("ids"),
        labels=table("labels"),
        groups=table("groups"),
        splits=table("splits"),
        meta={key: file.meta(key) for key in file.meta_keys if key not in own},
        failures=failures,
        canary_names=canaries.names if canaries else (),
        canary_images=canaries.images if canaries else (),
    )


def verify_file(file: StoreFile) -> tuple[list[str], list[str]]:
    """Return the ids of damaged rows of one file, and what to say about it."""
    problems = []
    if file.digest() != file.read("digest").tobytes():
        problems.append(
            f"{file.path}: the tables (ids, labels, rows, metadata) do not match their digest."
        )
    names: list[str] = []
    taps = dict.fromkeys(file.features, 0)
    for first, entries, ids in checksums.chunks(file):
        wrong = checksums.entry_checks(entries, ids) != entries["check"]
        for tap, bad in checksums.bad_features(file, first, entries).items():
            taps[tap] += int(np.count_nonzero(bad))
            wrong |= bad
        names += [name.decode(errors="backslashreplace") for name in ids[wrong].tolist()]
    if names:
        counts = ", ".join(f"{tap}: {count}" for tap, count in taps.items() if count)
        problems.append(
            f"{file.path}: {len(names)} of {file.n} rows are damaged (first: {names[0]}; "
            f"{counts or 'their entries'}). To compute only these again: mv {file.path} "
            f"{file.path}.partial, then run the same `featcache extract` command."
        )
    return names, problems


def relabel_file(file: StoreFile, images: ImageSet, row_of: Mapping[str, int]) -> None:
    """Replace one file by one with the tables of `images`."""
    ids = layout.decode_table(file.read("ids")).tolist()
    missing = [name for name in ids if name not in row_of]
    if missing:
        raise MissingFeatures(
            f"{len(missing)} of {len(ids)} images of {file.path} are not in {images.source} "
            f"(first: {missing[0]}). Run `featcache extract` to drop them."
        )
    rows = [row_of[name] for name in ids]

    def table(values: np.ndarray | None, what: str) -> np.ndarray | None:
        return None if values is None else layout.encode_table([values[i] for i in rows], what)

    contents = contents_of(file)
    contents.labels = table(images.labels, "labels")
    contents.groups = table(images.groups, "groups")
    contents.splits = table(images.splits, "splits")
    path = str(Path(file.path).resolve())
    try:
        with WriteLock(f"{path}.partial.lock", path):
            temporary = f"{path}.partial.relabelled"
            layout.rewrite(file, temporary, contents, np.arange(file.n))
            disk.rename(temporary, path)
    except OSError as error:
        disk.raise_for(error, path, needed=contents.feature_bytes, so_far=f"{path} is as it was.")
