"""Which images are trained on and which judge: hold-outs, folds, and groups that are in both."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from featcache.errors import TrainingError
from featcache.store import splitting
from featcache.store.splitting import Fold
from featcache.store.store import FeatureStore
from featcache.study.evaluate import look_alikes
from featcache.study.options import TrainingOptions
from featcache.system.tables import counted, first_names, in_order

__all__ = [
    "folds_of",
    "hold_out",
    "rare_classes",
    "remarks",
    "untested",
    "without_crossing",
    "without_small",
]


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


def folds_of(store: FeatureStore, options: TrainingOptions) -> list[Fold]:
    """Return the folds of a store, fewer than asked for where all classes are small."""
    tied = _tied(store, options)
    return splitting.folds(store.labels, **tied, cv=options.cv, random_state=options.random_state)


def without_small(
    store: FeatureStore, test: FeatureStore | None, options: TrainingOptions
) -> tuple[FeatureStore, FeatureStore | None, list[str]]:
    """Leave out the classes of fewer than `TrainingOptions.min_images`, and list them."""
    if options.min_images < 2:
        return store, test, []
    known = splitting.class_units(store.labels, **_tied(store, options))
    small = {name: count for name, count in known.items() if count < options.min_images}
    units = "groups" if options.group else "images"
    if len(known) - len(small) < 2:
        raise TrainingError(
            f"min_images={options.min_images} (--min-images) leaves {len(known) - len(small)} of "
            f"{len(known)} classes, and a classifier needs two. The largest: "
            f"{counted(max(known.values()), units[:-1])}."
        )

    def kept(one: FeatureStore) -> FeatureStore:
        return one.select(~np.isin(one.labels, [*small]))

    names = first_names([f"{name!r} ({small[name]})" for name in in_order(small)])
    which = f"of fewer than {options.min_images} {units}"
    left = counted(len(small), f"class {which} is", f"classes {which} are")
    notes = [f"{left} left out: {names}"] * bool(small)
    return kept(store), None if test is None else kept(test), notes


def rare_classes(store: FeatureStore, folds: list[Fold], options: TrainingOptions) -> list[str]:
    """Return how folds were made to fit small classes."""
    units = "groups" if options.group else "images"
    notes = []
    if len(folds) < options.cv:
        notes.append(f"{len(folds)} folds and not {options.cv}: no class has more {units}")
    tested = Counter(name for _, valid in folds for name in {*store.labels[valid].tolist()})
    few = [f"{name!r} ({tested[name]})" for name in store.classes if 0 < tested[name] < len(folds)]
    if few:
        which = f"in fewer than {len(folds)} folds, having fewer {units}"
        classes = counted(len(few), "class is", "classes are")
        notes.append(f"{classes} {which}: {first_names(few, 5)}")
    return notes


def untested(store: FeatureStore, test: FeatureStore | None, what: str) -> list[str]:
    """Return the note on classes that are trained on and not among the images that judge."""
    lacking = [] if test is None else in_order({*store.classes} - {*test.classes})
    of = first_names([*map(repr, lacking)], 5)
    return [f"no {what} is of {of}: the accuracies tell nothing of such"] * bool(lacking)


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
