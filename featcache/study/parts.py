"""Which images are trained on and which judge: hold-outs, folds, and groups that are in both."""

from __future__ import annotations

from typing import Any

import numpy as np

from featcache.errors import TrainingError
from featcache.store import splitting
from featcache.store.splitting import Fold
from featcache.store.store import FeatureStore
from featcache.study.evaluate import look_alikes
from featcache.study.options import TrainingOptions
from featcache.system.tables import counted

__all__ = ["folds_of", "hold_out", "possible_folds", "remarks", "without_crossing"]


def hold_out(
    store: FeatureStore, test_size: float | None, options: TrainingOptions
) -> tuple[FeatureStore, FeatureStore]:
    """Return what is trained on and what is held out.

    Without a size that is the split column's test part, where there is one, else a quarter.
    """
    if test_size is None and not splitting.has_test(store.splits):
        test_size = 0.25
    # Whether groups cross the split column is for `without_crossing`, which may leave them out.
    grouped = options.group and test_size is not None
    return store.split(test_size, group=grouped, random_state=options.random_state)


def without_crossing(
    fit: FeatureStore, test: FeatureStore | None, options: TrainingOptions
) -> tuple[FeatureStore, list[str]]:
    """Leave out images to train on of groups that judge, refuse them, or say that they are there.

    Without `TrainingOptions.group` they stay, with a note.
    """
    if fit.groups is None:
        return fit, []
    valid = splitting.part_of(fit.splits, "valid", fit.labels)
    held_out = None if test is None or test.groups is None else test.groups[test.labels != ""]
    by = {
        "the validation images": ~valid & splitting.crossing(fit.groups, fit.groups[valid]),
        "the held-out images": splitting.crossing(fit.groups, held_out),
    }
    shared = np.logical_or(*by.values())
    judges = " and ".join(name for name, rows in by.items() if rows.any())
    if not judges:
        return fit, []
    groups = fit.groups[shared]
    if options.group and not options.drop_crossing_groups:
        cure = "--drop-crossing-groups (library: drop_crossing_groups=True)"
        raise splitting.crossing_error(groups, judges, cure)
    count = counted(len(groups), "image to train on is", "images to train on are")
    of = splitting.crossing_text(groups, judges)
    if not options.group:
        return fit, [f"{count} {of}, which flatters: give --group (library: group=True)"]
    if (shared | valid).all():
        raise TrainingError(f"No image is left to train on: all are {of}.")
    return fit.select(~shared), [f"{count} left out: {of}"]


def possible_folds(store: FeatureStore, options: TrainingOptions) -> int:
    """Return how many folds of a store can be made: fewer than asked for where a class is small."""
    return splitting.possible_folds(options.cv, store.labels, **_tied(store, options))


def folds_of(store: FeatureStore, options: TrainingOptions, *, fewer: bool = False) -> list[Fold]:
    """Return the folds of a store, `fewer` than asked for where a class is small."""
    cv = possible_folds(store, options) if fewer else options.cv
    seed = options.random_state
    return splitting.folds(store.labels, **_tied(store, options), cv=cv, random_state=seed)


def _tied(store: FeatureStore, options: TrainingOptions) -> dict[str, Any]:
    """Return what says which images are kept together."""
    return {"groups": store.groups if options.group else None, "sha256": store.sha256}


def remarks(fit: FeatureStore, layers: list[str]) -> list[str]:
    """Return what is odd about the images that are trained on."""
    notes = look_alikes(fit.classes)
    tested = int(splitting.part_of(fit.splits, "test", fit.labels).sum())
    if tested:
        of = "of the split column's test part"
        trained = counted(tested, f"image {of} is", f"images {of} are")
        notes.append(f"{trained} trained on: what is held out is not that part")
    _, first = next(fit.blocks(layers, 1))
    if all((block == first).all() for _, block in fit.blocks(layers, 1024)):
        notes.append("all images have the same features: nothing can be learnt from them")
    if failures := fit.failures:
        none = counted(len(failures), "image has", "images have")
        notes.append(f"{none} no features, such as {failures[0].id}")
    return notes
