"""Find the images that are still what an earlier run recorded; their features are copied.

An image is the same while the hash of its content is the same. Its file's size, times and inode
only decide whether it must be read again to find out. They are compared for equality, never for
order, so clocks that are wrong do no harm.

Nothing here imports torch, so that "nothing to do" is said at once (`up_to_date`).
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.errors import DecodeError, ExtractionError, StoreError
from featcache.extraction.summary import Summary
from featcache.fingerprint import Fingerprint, differences
from featcache.images.image_set import ImageSet, content_hash
from featcache.pixels.views import Augmentation
from featcache.store import disk
from featcache.store.file import StoreFile
from featcache.store.format import DONE, ENTRY, FAILED, PENDING
from featcache.store.splitting import hash_keys
from featcache.store.store import FeatureStore
from featcache.store.writer import FeatureWriter, relabel, remove_leftovers, restamp
from featcache.system.console import check_stopped

if TYPE_CHECKING:
    from featcache.extraction.stream import Options  # which imports torch


def wanted(
    precision: str, store_dtype: str, augmentation: Augmentation | None, varying: bool
) -> dict[str, Any]:
    """Return which features are asked of a network, as JSON values: a part of a request."""
    return {
        "precision": precision,
        "store_dtype": store_dtype,
        "augmentation": augmentation and augmentation.to_dict(),
        "varying": varying,
    }


def of_features(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a request that says which features are asked of a network."""
    return {name: request[name] for name in wanted("", "", None, False)}


def unchanged(
    images: ImageSet,
    rows: np.ndarray,
    entries: np.ndarray,
    *,
    stats: np.ndarray | None = None,
    rehash: bool = False,
) -> np.ndarray:
    """Return a mask of the images that are still what their entries say.

    Parameters
    ----------
    images : ImageSet
        The images.
    rows : ndarray of int64, shape (k,)
        Numbers of the images to look at.
    entries : structured ndarray, shape (k,)
        What was recorded, with the fields of `featcache.store.format.ENTRY`.
    stats : ndarray of int64, shape (k, 2), optional
        Size and stamp of each image, where they are known.
    rehash : bool
        Read and hash every file; left out, those of another stamp and the same size.

    Returns
    -------
    ndarray of bool, shape (k,)
        An image that failed counts as unchanged if size and stamp are those recorded.
    """
    size, stamp = (_stats(images, rows) if stats is None else stats).T
    same = (size == entries["size"]) & (stamp == entries["stamp"])
    # Of what is no file, such as an array, nothing but the content tells.
    unsure = (size == entries["size"]) & (entries["status"] == DONE)
    unsure &= (size < 0) | ~same | rehash
    for k in np.flatnonzero(unsure).tolist():
        same[k] = _hash(images, int(rows[k])) == entries["sha256"][k].tobytes()
    return np.asarray(same)


def _stats(images: ImageSet, rows: np.ndarray) -> np.ndarray:
    """Return size and stamp of images now: int64, shape (k, 2)."""
    return np.array([images.stat(row) for row in rows.tolist()], np.int64).reshape(-1, 2)


def _hash(images: ImageSet, row: int) -> bytes:
    """Return the hash of an image's content; b"" if the image cannot be read."""
    check_stopped()
    try:
        return content_hash(images.read(row))
    except DecodeError:
        return b""


# --- a store that is there ------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredLayout:
    """Fingerprint and shapes of features, as a file records them, and the request for them.

    The shapes are those of one image by tap, the axis of views included.
    """

    fingerprint: Fingerprint
    shapes: dict[str, tuple[int, ...]]
    request: dict[str, Any] | None


def differing(
    mine: Mapping[str, Any] | None,
    theirs: Mapping[str, Any] | None,
    names: tuple[str, str] = ("", ""),
) -> str:
    """Return what differs between requests, of what decides features; "" for nothing.

    Of a weights file that is the hash, not path and time.
    """

    def compared(request: Mapping[str, Any] | None) -> dict[str, Any]:
        request = dict(request or {})
        if isinstance(checkpoint := request.get("checkpoint"), dict):
            request |= {"weights": None, "checkpoint": checkpoint.get("sha256", checkpoint)}
        return request

    return differences(compared(mine), compared(theirs), names)


def recorded(path: str) -> Iterator[StoredLayout]:
    """Yield what the store at `path` records, unfinished and finished, where it can be opened."""
    for candidate in (f"{path}.partial", path):
        with contextlib.suppress(StoreError), contextlib.closing(StoreFile(candidate)) as file:
            file.recheck()
            shapes = {tap: dataset.shape[1:] for tap, dataset in file.features.items()}
            yield StoredLayout(file.fingerprint, shapes, file.meta("request"))


def up_to_date(
    store: FeatureStore, images: ImageSet, drop_labels: bool, *, rehash: bool = False, **wanted: Any
) -> FeatureStore | None:
    """Return a finished store if nothing is to be computed; labels are rewritten.

    Parameters
    ----------
    store : FeatureStore
        The store.
    images : ImageSet
        The images. Their labels may differ from the store's.
    drop_labels : bool
        Whether images without labels lose those of the store.
    rehash : bool
        Read all images, also those whose size and stamp are as recorded.
    **wanted
        JSON values that the store must hold as metadata: ``request`` or ``asked``.

    Returns
    -------
    FeatureStore or None
        With its `Summary`. None if something is to be done: it has other features, images were
        added, removed, changed or rewritten, or another run has begun.
    """
    path = os.path.realpath(*store.paths)
    if Path(f"{path}.partial").exists():
        return None
    if any(differing(store.meta.get(key), value) for key, value in wanted.items()):
        return None
    rows = np.arange(len(images))
    entries, theirs = _by_id(store, images, rows)
    if len(entries) != len(images) or (theirs < 0).any():
        return None
    entries = entries[theirs]
    stats = _stats(images, rows)  # before the contents, which may change meanwhile
    if not unchanged(images, rows, entries, stats=stats, rehash=rehash).all():
        return None
    touched = (stats[:, 1] != entries["stamp"]) & (entries["status"] == DONE)
    if touched.any():
        with contextlib.suppress(StoreError):  # a file that only others may write
            restamp(store, theirs[touched], stats[touched, 1])
    images = images if drop_labels else with_labels(images, store)
    summary = Summary(
        len(images), failed=len(store.failures), unlabelled=images.unlabelled, skipped=True
    )
    summary.notes = store.fingerprint.notes
    remove_leftovers(path)
    remove_parts(path)
    if not _same_tables(store, images):
        store = relabel(store, images.tables)
        summary.relabelled = True
    store.extraction = summary
    return store


def beside(path: str, what: str) -> list[str]:
    """Return the files that parts make beside a store, with `what` behind its name, in order."""
    where, own = Path(path), re.compile(r"\d{4,}(\.partial)?(\.old|\.lock)?~*")
    found = where.parent.glob(f"{glob.escape(where.name)}.{what}-*")
    start = len(f"{where.name}.{what}-")  # others are a user's
    return sorted(str(one) for one in found if own.fullmatch(one.name[start:]))


def plan_file(path: str) -> Path:
    """Return the file of the plan of the store at `path`."""
    return Path(f"{path}.partial.plan")


def plan_text(path: str) -> bytes:
    """Return what that file holds."""
    with os.fdopen(disk.open_file(str(plan_file(path))), "rb") as file:
        return file.read()


def remove_parts(path: str) -> None:
    """Remove what a job in parts left beside its store, if all parts are in it."""
    rest = beside(path, "part")
    with contextlib.suppress(OSError, StoreError, ValueError, KeyError, TypeError):
        if json.loads(plan_text(path))["merging"] and all(x.endswith(".lock") for x in rest):
            for file in [*rest, *beside(path, "old-part"), str(plan_file(path))]:
                disk.remove(file)


def finished_store(path: str) -> FeatureStore | None:
    """Return the store at `path` that an earlier run finished."""
    try:
        store = FeatureStore.open(path)
        store.checked_files()
        return store
    except StoreError:
        if Path(path).exists() and not Path(f"{path}.partial").exists():
            raise
        return None


def unfinished_store(path: str) -> FeatureStore | None:
    """Return the file of a run that did not finish, or of a store that is being mended."""
    with contextlib.suppress(StoreError):
        return FeatureStore.of_file(StoreFile(f"{path}.partial"))
    return None


def check_removal(before: FeatureStore, images: ImageSet) -> None:
    """Refuse images that most rows of an earlier store are not among, under no name.

    Raises
    ------
    ExtractionError
    """
    known, gone = set(before.ids.tolist()), _gone(before, images)
    if 2 * gone.sum() <= len(before):
        return
    # Those that were renamed are found by their content.
    new = np.array([row for row, name in enumerate(images.ids.tolist()) if name not in known], int)
    sizes = set(before.sizes[gone].tolist())
    found = {_hash(images, row) for row in new.tolist() if images.stat(row)[0] in sizes}
    left = sum(sha256.tobytes() not in found for sha256 in before.sha256[gone])
    if 2 * left > len(before):
        raise ExtractionError(
            f"{left:,} of {len(before):,} rows of {before.paths[0]} are of images that are not "
            f"among the {len(images):,} of {images.source}: this run would remove them. If these "
            "are other images, or not all, choose another file with -o; else type --allow-removal "
            "(allow_removal=True)."
        )


def _gone(before: FeatureStore, images: ImageSet) -> np.ndarray:
    """Return a mask (n,) of an earlier store's rows whose ids are not among the images'."""
    kept = set(images.ids.tolist())
    return np.array([name not in kept for name in before.ids.tolist()], bool)


def count_removed(before: FeatureStore, store: FeatureStore, images: ImageSet) -> int:
    """Count the rows of an earlier store whose image is among the images under no name."""
    gone = _gone(before, images)
    return int((~np.isin(hash_keys(before.sha256[gone]), hash_keys(store.sha256))).sum())


def with_labels(images: ImageSet, store: FeatureStore) -> ImageSet:
    """Give images without labels those of a store, and its groups, splits and kept columns.

    They are found by id, else by content; an image that the store does not hold has none.
    """
    if images.labels is not None or not (store.labels != "").any():
        return images
    place_of = {name: k for k, name in enumerate(store.ids.tolist())}
    theirs = np.array([place_of.get(name, -1) for name in images.ids.tolist()], np.int64)
    same = theirs >= 0
    _find_by_content(images, np.arange(len(images)), store, theirs, same)
    others = {name: x for name, x in store.tables.items() if name not in images.tables}
    return images.with_tables({name: np.where(same, x[theirs], "") for name, x in others.items()})


def _same_tables(store: FeatureStore, images: ImageSet) -> bool:
    """Return whether labels, groups, splits and kept columns of a store are the images'."""
    row_of = {name: row for row, name in enumerate(images.ids.tolist())}
    rows = np.array([row_of[name] for name in store.ids.tolist()], np.int64)
    none = np.full(len(store), "")
    tables = store.tables
    for name in (tables.keys() | images.tables.keys()) - {"ids"}:
        there, asked = tables.get(name, none), images.tables.get(name)
        if not np.array_equal(there, none if asked is None else asked[rows].astype(there.dtype)):
            return False
    return True


def _by_id(
    store: FeatureStore, images: ImageSet, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of a store's images, failed ones last, and where some images are in them.

    The places are int64, shape (k,); -1 if an id is not there.
    """
    n, failures = len(store), store.failures
    entries = np.zeros(n + len(failures), ENTRY)
    entries["status"][:n], entries["status"][n:] = DONE, FAILED
    entries["sha256"][:n] = store.sha256
    entries["size"] = [*store.sizes, *(failure.size for failure in failures)]
    passing = np.array([failure.stage == "system" for failure in failures], bool)
    entries["size"][n:][passing] = -2  # no file's size: it is tried again
    entries["stamp"] = [*store.stamps, *(failure.stamp for failure in failures)]
    ids = [*store.ids.tolist(), *(failure.id for failure in failures)]
    place_of = {name: k for k, name in enumerate(ids)}
    places = [place_of.get(name, -1) for name in images.ids[rows].tolist()]
    return entries, np.array(places, np.int64)


# --- a file that is being filled ------------------------------------------------------------------


def recheck_replaced_files(writer: FeatureWriter, images: ImageSet, rows: np.ndarray) -> None:
    """Mark as pending the files among `rows` that were replaced after they were read.

    Those that are gone keep their features: the next run finds them missing.
    """
    rows = rows[writer.status[rows] == DONE]
    rows = rows[_stats(images, rows)[:, 0] >= 0]
    writer.mark_pending(rows[~unchanged(images, rows, writer.entries(rows))])


def copy_unchanged(writer: FeatureWriter, images: ImageSet, options: Options) -> None:
    """Keep what is unchanged: rows of a resumed file, and features of earlier stores.

    Rows whose images have changed, or may be read now, become pending; into pending rows features
    are copied from the earlier stores, also of an image that has another id now. But views depend
    on the id.
    """
    failed = np.flatnonzero(writer.status == FAILED)
    passing = np.array([failure.stage == "system" for failure in writer.failures], bool)
    writer.mark_pending(failed[passing])
    known, rehash = np.flatnonzero(writer.status != PENDING), options.rehash
    writer.mark_pending(known[~unchanged(images, known, writer.entries(known), rehash=rehash)])
    for store in writer.earlier_stores:
        rows = writer.pending
        entries, theirs = _by_id(store, images, rows) if len(rows) else (rows, rows)
        if not len(entries):
            continue
        there = np.flatnonzero(theirs >= 0)
        same = np.zeros(len(rows), bool)
        same[there] = unchanged(images, rows[there], entries[theirs[there]], rehash=rehash)
        failed = same & (entries["status"][theirs] == FAILED)
        if not options.retry_failed:
            for row, k in zip(rows[failed].tolist(), theirs[failed] - len(store), strict=True):
                failure = store.failures[k]
                stat = {"size": failure.size, "stamp": failure.stamp}
                writer.fail(row, failure.stage, failure.reason, **stat)
        if options.augmentation is None:
            _find_by_content(images, rows, store, theirs, same)
        same &= ~failed
        size, stamp = _stats(images, rows[same]).T
        writer.copy_rows(store, theirs[same], rows[same], size=size, stamp=stamp)


def copy_record(writer: FeatureWriter) -> None:
    """Keep how the rows of earlier stores were computed, where a run only copies rows."""
    for store in writer.earlier_stores:
        ours, theirs = writer.canaries, store.canaries
        if ours and not ours.features and theirs and theirs.images == ours.images:
            writer.set_canaries(theirs.features)
        if writer.meta.get("settings") is None:
            writer.set_meta("settings", store.meta.get("settings"))


def _find_by_content(
    images: ImageSet, rows: np.ndarray, store: FeatureStore, theirs: np.ndarray, same: np.ndarray
) -> None:
    """Look the images that are not `same` up by their hash; fill in `theirs` and `same`."""
    if same.all():
        return
    sizes = set(store.sizes.tolist())
    places = {sha256.tobytes(): k for k, sha256 in enumerate(store.sha256)}
    for k in np.flatnonzero(~same).tolist():
        row = int(rows[k])
        if images.stat(row)[0] in sizes and (sha256 := _hash(images, row)) in places:
            theirs[k], same[k] = places[sha256], True
