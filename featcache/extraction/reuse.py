"""What an extraction need not compute: features that an earlier run left behind.

An image is the same image while the hash of its content is the same. Size and time of the last
change only decide whether it must be read again to find out. Times are compared for equality,
never for order, so clocks that are wrong do no harm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.errors import DecodeError, StoreError
from featcache.fingerprint import Fingerprint, RequestKey, canonical_json
from featcache.images.image_set import ImageSet, content_hash
from featcache.store.format import DONE, FAILED, PENDING, StoreFile
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter

__all__ = [
    "Known",
    "complete_store",
    "forget_changed",
    "forget_overtaken",
    "known",
    "same_labels",
    "take_over",
]


@dataclass(frozen=True)
class Known:
    """What a file on the disk says of the features asked for.

    Attributes
    ----------
    fingerprint : Fingerprint
        Of the network, found without loading it.
    shapes : dict of str to tuple of int
        Of one image's features by tap, the axis of views included.
    """

    fingerprint: Fingerprint
    shapes: dict[str, tuple[int, ...]]


def known(path: str, key: RequestKey) -> Known | None:
    """Return what the store at `path`, finished or not, knows; None if it was asked for otherwise.

    Parameters
    ----------
    path : str
        Of the store.
    key : RequestKey
        What is asked for now.
    """
    for candidate in (f"{path}.partial", path):
        try:
            file = StoreFile(candidate)
        except StoreError:
            continue
        try:
            if _requested(file) == key:
                shapes = {tap: dataset.shape[1:] for tap, dataset in file.features.items()}
                return Known(file.fingerprint, shapes)
        finally:
            file.close()
    return None


def _requested(file: StoreFile) -> RequestKey | None:
    values = file.meta("request")
    return None if values is None else RequestKey.from_json(canonical_json(values))


def complete_store(path: str, images: ImageSet, key: RequestKey) -> FeatureStore | None:
    """Return the finished store at `path` if it holds what is asked for, of exactly these images.

    Parameters
    ----------
    path : str
        Of the store.
    images : ImageSet
        The images. Their labels may differ from the store's.
    key : RequestKey
        What is asked for.

    Returns
    -------
    FeatureStore or None
        None where something is to be done: no store, other features, or images that were added,
        removed, changed or rewritten.
    """
    if not Path(path).exists() or Path(f"{path}.partial").exists():
        return None
    store = FeatureStore.open(path)
    if store.request_key != key:
        return None
    failures = store.failures
    if len(store) + len(failures) != len(images):
        return None
    row_of = {name: row for row, name in enumerate(images.ids)}
    for failure in failures:
        row = row_of.get(failure.id)
        if row is None or images.stat(row) != (failure.size, failure.mtime_ns):
            return None
    content = zip(
        store.ids, store.sizes.tolist(), store.mtimes_ns.tolist(), store.sha256, strict=True
    )
    for name, size, mtime_ns, sha256 in content:
        row = row_of.get(name)
        if row is None or images.stat(row) != (size, mtime_ns):
            return None
        if size < 0 and _hash(images, row) != sha256.tobytes():
            return None
    return store


def same_labels(store: FeatureStore, images: ImageSet) -> bool:
    """Say whether labels, groups and splits of the store are those of the images."""
    if len(store) == len(images):
        rows = None
    else:
        row_of = {name: row for row, name in enumerate(images.ids)}
        rows = np.array([row_of[name] for name in store.ids])
    for name in ("labels", "groups", "splits"):
        there, asked = getattr(store, name), getattr(images, name)
        if asked is None:
            if there is not None and any(there):
                return False
            continue
        asked = np.asarray(asked)
        if there is None or not np.array_equal(there, asked if rows is None else asked[rows]):
            return False
    return True


def forget_changed(writer: FeatureWriter, images: ImageSet) -> None:
    """Count as pending again what changed since the partial file's rows were written.

    Parameters
    ----------
    writer : FeatureWriter
        On a partial file that is resumed.
    images : ImageSet
        Its images.
    """
    settled = np.flatnonzero(writer.status != PENDING)
    changed = []
    for row, entry in _entries(writer, settled):
        size, mtime_ns = int(entry["size"]), int(entry["mtime_ns"])
        if entry["status"] == FAILED:
            same = images.stat(row) == (size, mtime_ns)
        else:
            same = _is_same(images, row, entry["sha256"].tobytes(), size, mtime_ns)
        if not same:
            changed.append(row)
    writer.mark_pending(changed)


def forget_overtaken(writer: FeatureWriter, images: ImageSet, rows: np.ndarray) -> None:
    """Count as pending again the files among `rows` that were replaced after they were read.

    Those that are gone keep their features: the next run finds them missing.
    """
    overtaken = []
    for row, entry in _entries(writer, rows[writer.status[rows] == DONE]):
        now = images.stat(row)
        if now[0] >= 0 and now != (int(entry["size"]), int(entry["mtime_ns"])):
            overtaken.append(row)
    writer.mark_pending(overtaken)


def _entries(writer: FeatureWriter, rows: np.ndarray) -> Iterator[tuple[int, np.void]]:
    """Yield rows with what the partial file holds of them."""
    yield from zip(rows.tolist(), writer.entries(rows), strict=True)


def take_over(
    writer: FeatureWriter, images: ImageSet, *, retry_failed: bool, by_content: bool
) -> int:
    """Copy features of unchanged images from an earlier store into the pending rows.

    Parameters
    ----------
    writer : FeatureWriter
        Of the new file.
    images : ImageSet
        Its images.
    retry_failed : bool
        Try images again that are recorded as failed, unchanged or not.
    by_content : bool
        Take the features of an image that has another id now. Not so for views, which depend on
        the id.

    Returns
    -------
    int
        Rows copied.
    """
    copied = 0
    for source in writer.earlier_stores:
        pending = writer.pending
        if not len(pending):
            break
        if not retry_failed:
            _repeat_failures(writer, images, source, pending)
        pairs = list(_matches(images, source, writer.pending.tolist(), by_content))
        if pairs:
            ours, theirs = (np.array(column, np.int64) for column in zip(*pairs, strict=True))
            stats = np.array([images.stat(row) for row in ours.tolist()], np.int64)
            copied += len(
                writer.copy_rows(source, theirs, ours, size=stats[:, 0], mtime_ns=stats[:, 1])
            )
    return copied


def _repeat_failures(
    writer: FeatureWriter, images: ImageSet, source: FeatureStore, pending: np.ndarray
) -> None:
    failures = {failure.id: failure for failure in source.failures}
    if not failures:
        return
    for row in pending.tolist():
        failure = failures.get(images.ids[row])
        if failure and images.stat(row) == (failure.size, failure.mtime_ns):
            writer.fail(
                row,
                failure.stage,
                failure.reason,
                size=failure.size,
                mtime_ns=failure.mtime_ns,
            )


def _matches(
    images: ImageSet, source: FeatureStore, rows: list[int], by_content: bool
) -> Iterator[tuple[int, int]]:
    """Yield (row, row of the source) for images whose content is in the source."""
    row_of = {name: k for k, name in enumerate(source.ids)}
    hashes, sizes, times = source.sha256, source.sizes, source.mtimes_ns
    known_sizes = set(sizes.tolist())
    by_hash = {sha256.tobytes(): k for k, sha256 in enumerate(hashes)} if by_content else {}
    for row in rows:
        k = row_of.get(images.ids[row])
        if k is not None and _is_same(images, row, hashes[k].tobytes(), sizes[k], times[k]):
            yield row, k
        elif by_content and images.stat(row)[0] in known_sizes:
            k = by_hash.get(_hash(images, row))
            if k is not None:
                yield row, k


def _is_same(images: ImageSet, row: int, sha256: bytes, size: int, mtime_ns: int) -> bool:
    now = images.stat(row)
    if now == (size, mtime_ns) and size >= 0:
        return True
    return now[0] == size and _hash(images, row) == sha256


def _hash(images: ImageSet, row: int) -> bytes:
    """Return the hash of an image's content; of one that cannot be read, none that exists."""
    try:
        return content_hash(images.read(row))
    except DecodeError:
        return b""
