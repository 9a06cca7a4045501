"""Cut the rows of a store into parts that share nothing that would flatter a test.

Every split of featcache is made here: the hold-out, the folds of a search, and the folds of an
audit. Four rules hold in all of them.

1. *Rows that belong together stay together.* Two rows are tied when they have the same group or
   the same content hash (the same bytes under two names, whatever their labels); ties chain. The
   rows of one chain are a **unit**, and a unit is never cut.
2. *Every part looks like the whole.* Units are dealt so that each part has its share of each
   class, within one row where all units are single rows.
3. *A row without a label takes part in nothing.* It is in no part; `n_unlabelled` counts them.
4. *What is tested is trained on.* A class of one unit is trained on everywhere, and tested nowhere.
A class of fewer units than folds is in fewer of them, and where all classes are so, there are
fewer folds.

The dealing is one greedy pass: units of several rows first, the largest first, each to the part
that lacks its classes most; then the single rows of each class fill what is missing. Where that
leaves a class in one part alone, units are moved (`_spread`). The dealing is the rule of
scikit-learn's ``StratifiedGroupKFold``, but linear in the rows (its inner loop takes a standard
deviation per unit and part: minutes for a million images) and with parts of any size, so that the
hold-out follows the same rule as the folds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import TrainingError
from featcache.system.tables import counted

IntArray = npt.NDArray[np.int64]
Labels = Sequence[str] | npt.NDArray[Any]
Fold = tuple[IntArray, IntArray]

# Of the walk that brings each class to two parts: its steps at most, the units that a step tries,
# and how often it takes any of them.
_MOVES, _TRIED, _NOISE = 1000, 32, 0.2

# What the words of a split column, in lower case, say of a row.
_ROLES = {
    **dict.fromkeys(("train", "training", "fit"), "fit"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "holdout", "eval"), "test"),
    "": "",
}


def n_unlabelled(y: Labels) -> int:
    """Count the rows without a label (the empty string)."""
    return int((np.asarray(y) == "").sum())


def units(
    n: int, *, groups: Labels | None = None, sha256: npt.NDArray[np.uint8] | None = None
) -> IntArray:
    """Give each row the number of its unit: rows tied by group or by content hash share it.

    Parameters
    ----------
    n : int
        Number of rows.
    groups : sequence of str, optional
        Group of each row; the empty string means "a group of its own".
    sha256 : ndarray of shape (n, 32), dtype uint8, optional
        Content hash of each row.

    Returns
    -------
    ndarray of shape (n,), dtype int64
        Unit of each row, numbered from 0 in the order of first appearance.
    """
    unit = np.arange(n, dtype=np.int64)
    keys: list[IntArray] = []
    if groups is not None:
        names = np.asarray(groups)
        _, key = np.unique(names, return_inverse=True)
        keys.append(np.where(names == "", key.max(initial=0) + 1 + unit, key.astype(np.int64)))
    if sha256 is not None and n:
        _, key = np.unique(hash_keys(sha256), return_inverse=True)
        keys.append(key.astype(np.int64))
    if not keys:
        return unit
    joined = keys[0] if len(keys) == 1 else _connect(keys[0], keys[1])
    _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
    rank: IntArray = np.argsort(np.argsort(first))
    return rank[inverse]


def hash_keys(sha256: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """View hashes (n, 32) as n opaque values, which numpy sorts and compares as one key."""
    rows = np.ascontiguousarray(sha256, dtype=np.uint8)
    return rows.view(np.dtype((np.void, rows.shape[1]))).ravel()


def _connect(a: IntArray, b: IntArray) -> IntArray:
    """Join two partitions: rows tied by `a` or by `b`, directly or through others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n_a, n_b = int(a.max()) + 1, int(b.max()) + 1
    edges = coo_array((np.ones(len(a), np.int8), (a, b + n_a)), shape=(n_a + n_b,) * 2)
    _, label = connected_components(edges, directed=False)
    return np.asarray(label, dtype=np.int64)[a]


def holdout(
    y: Labels,
    *,
    groups: Labels | None = None,
    sha256: npt.NDArray[np.uint8] | None = None,
    test_size: float = 0.25,
    stratify: bool = True,
    random_state: int = 0,
) -> tuple[IntArray, IntArray]:
    """Split the labelled rows into a part to fit on and a part to test on.

    Parameters
    ----------
    y : sequence of str
        Label of each row; rows with an empty label are in neither part.
    groups : sequence of str, optional
        Rows of one group are on one side.
    sha256 : ndarray of shape (n, 32), dtype uint8, optional
        Rows of one content hash are on one side.
    test_size : float
        Share of the rows to test on, between 0 and 1.
    stratify : bool
        Give both sides the same mix of classes, and at least one unit of each; a class that has
        but one is not in `test`.
    random_state : int
        Seed: the same seed and rows give the same split.

    Returns
    -------
    fit, test : ndarray, dtype int64
        Row numbers, sorted.

    Raises
    ------
    TrainingError
        `test_size` outside (0, 1), fewer than two classes, a class whose units cannot be on both
        sides, or nothing left for one side.

    Examples
    --------
    >>> fit, test = holdout(["ant"] * 5 + ["bee"] * 5 + ["cod"])
    >>> len(fit), len(test)
    (9, 2)
    """
    if not 0 < test_size < 1:
        raise TrainingError(
            f"test_size must lie between 0 and 1 (0.25 = one quarter), got {test_size}."
        )
    rows, codes, names, unit = _prepare(y, groups, sha256, stratify=stratify)
    lone = _lone(codes, names, unit, grouped=groups is not None) if stratify else codes < 0
    shares = np.array([1 - test_size, test_size])
    part = _divide(codes, names, unit, lone, shares, random_state)
    fit, test = rows[part < 1], rows[part == 1]
    if not len(fit) or not len(test):
        raise TrainingError(
            f"A hold-out of {test_size:g} leaves no row to {'fit' if not len(fit) else 'test'} on: "
            f"{len(rows)} labelled rows in {int(unit.max()) + 1} inseparable units. Add images, "
            "or choose another test size."
        )
    return fit, test


def folds(
    y: Labels,
    *,
    groups: Labels | None = None,
    sha256: npt.NDArray[np.uint8] | None = None,
    cv: int = 5,
    random_state: int = 0,
) -> list[Fold]:
    """Make the stratified folds of a cross-validation.

    Parameters
    ----------
    y, groups, sha256, random_state
        As in `holdout`.
    cv : int
        Number of folds, at least 2; as many as the commonest class has units, where these are
        fewer.

    Returns
    -------
    list of (train, valid)
        Row numbers, sorted, dtype int64. Each labelled row is in `valid` exactly once, or, if its
        class has but one unit (with groups: one group), never.

    Raises
    ------
    TrainingError
        Fewer than two classes, no class of two units, or a class whose units groups keep in one
        fold.

    Examples
    --------
    >>> made = folds(["ant"] * 4 + ["bee"] * 3 + ["cod"], cv=5)
    >>> [len(valid) for _, valid in made]
    [2, 2, 2, 1]
    """
    if cv < 2:
        raise TrainingError(f"Cross-validation needs at least 2 folds, got cv={cv}.")
    rows, codes, names, unit = _prepare(y, groups, sha256, stratify=True)
    lone = _lone(codes, names, unit, grouped=groups is not None)
    cv = min(cv, int(_units_per_class(codes[~lone], unit[~lone], len(names)).max()))
    part = _divide(codes, names, unit, lone, np.full(cv, 1 / cv), random_state)
    return [(rows[part != k], rows[part == k]) for k in range(cv)]


def crossing(groups: npt.NDArray[Any], judging: npt.NDArray[Any] | None) -> npt.NDArray[np.bool_]:
    """Return which rows are of a group that rows which judge are of too: (n,)."""
    if judging is None:
        return np.zeros(len(groups), dtype=bool)
    shared: npt.NDArray[np.bool_] = (groups != "") & np.isin(groups, judging)
    return shared


def crossing_text(groups: npt.NDArray[Any], judges: str) -> str:
    """Return which groups some rows share with those that judge, for people."""
    names = np.unique(groups)
    return f"of {counted(len(names), 'group')} that {judges} have too (first: {str(names[0])!r})"


def crossing_error(groups: npt.NDArray[Any], judges: str, cure: str) -> TrainingError:
    """Return the error for rows to train on of groups that the rows which judge are of too."""
    return TrainingError(
        f"{counted(len(groups), 'image to train on is', 'images to train on are')} "
        f"{crossing_text(groups, judges)}, which flatters. Correct the split column, or leave such "
        f"images out of training with {cure}."
    )


def predefined(
    splits: Labels, y: Labels, *, sha256: npt.NDArray[np.uint8] | None = None
) -> tuple[IntArray, IntArray]:
    """Read the split column: rows to fit on and rows to test on.

    ``train`` (also ``training``, ``fit``) and ``val`` (``valid``, ``validation``, ``dev``) are
    fitted on, ``test`` (``testing``, ``holdout``, ``eval``) is tested on; case does not matter.
    The column is published and therefore obeyed, but a row to fit on whose bytes are also in the
    test part is left out with a warning: the test part stays as published, and stays unseen.

    Raises
    ------
    TrainingError
        Another word in the column, or no row for one of the two sides.
    """
    role, labelled = _roles(splits), np.asarray(y) != ""
    test = np.flatnonzero((role == "test") & labelled)
    fit = np.flatnonzero(((role == "fit") | (role == "valid")) & labelled)
    for side, found in (("train", fit), ("test", test)):
        if not len(found):
            raise TrainingError(
                f"The split column names no labelled row {side!r}. Name rows of both sides, or "
                "give --test-size to split at random."
            )
    return _without_leaks(fit, test, sha256, "test"), test


def has_test(splits: Labels | None) -> bool:
    """Return whether a split column names rows to test on and rows to fit on."""
    if splits is None:
        return False
    roles = set(_roles(splits).tolist())
    return "test" in roles and bool(roles & {"fit", "valid"})


def class_units(
    y: Labels,
    *,
    groups: Labels | None = None,
    sha256: npt.NDArray[np.uint8] | None = None,
) -> dict[str, int]:
    """Return how many inseparable units each class has: images, or groups where there are any."""
    _, codes, names, unit = _prepare(y, groups, sha256, stratify=True)
    return dict(zip(names, _units_per_class(codes, unit, len(names)).tolist(), strict=True))


def _without_leaks(
    fit: IntArray, test: IntArray, sha256: npt.NDArray[np.uint8] | None, other: str
) -> IntArray:
    """Drop the rows of `fit` whose bytes are also in the `other` part, and say so."""
    if sha256 is None:
        return fit
    keys = hash_keys(sha256)
    leak = np.isin(keys[fit], keys[test])
    if leak.any():
        warnings.warn(
            f"{int(leak.sum())} training images are byte for byte in the {other} split too; they "
            "are left out of the training part.",
            stacklevel=3,
        )
    return fit[~leak]


def validation_fold(
    splits: Labels | None, y: Labels, *, sha256: npt.NDArray[np.uint8] | None = None
) -> list[Fold] | None:
    """Return the one fold (train, val) that a split column defines, or None if it has no val.

    A data set that comes with its own validation part is searched on that part, not on folds.
    As in `predefined`, a training row whose bytes are also in the validation part is left out.
    """
    train, valid = (np.flatnonzero(part_of(splits, name, y)) for name in ("fit", "valid"))
    if not len(train) or not len(valid):
        return None
    return [(_without_leaks(train, valid, sha256, "validation"), valid)]


def part_of(splits: Labels | None, part: str, y: Labels) -> npt.NDArray[np.bool_]:
    """Return which labelled rows are of a part (``fit``, ``valid``, ``test``): (n,).

    None are where there is no split column, or one of other words.
    """
    labelled = np.asarray(y) != ""
    try:
        roles = _roles(np.full(len(labelled), "") if splits is None else splits)
    except TrainingError:
        return np.zeros_like(labelled)
    found: npt.NDArray[np.bool_] = labelled & (roles == part)
    return found


def _roles(splits: Labels) -> npt.NDArray[Any]:
    """Translate the words of a split column to ``fit``, ``valid``, ``test`` or ``''``."""
    words, inverse = np.unique(np.asarray(splits), return_inverse=True)
    roles = []
    for word in words:
        name = str(word).strip().lower()
        if name not in _ROLES:
            raise TrainingError(
                f"The split column holds {str(word)!r}; the words it may hold are train, val "
                "and test (and the empty cell: in no part)."
            )
        roles.append(_ROLES[name])
    return np.asarray(roles)[inverse]


def _prepare(
    y: Labels, groups: Labels | None, sha256: npt.NDArray[np.uint8] | None, *, stratify: bool
) -> tuple[IntArray, IntArray, list[str], IntArray]:
    """Return the labelled rows, their class codes, the class names and their units."""
    labels = np.asarray(y)
    rows = np.flatnonzero(labels != "")
    if not len(rows):
        raise TrainingError(
            f"None of the {len(labels)} rows has a label. Put the images into one folder per "
            "class, or give --labels FILE.csv, and extract again (relabelling costs no forward "
            "pass)."
        )
    names, codes = np.unique(labels[rows], return_inverse=True)
    if len(names) < 2:
        raise TrainingError(
            f"All {len(rows)} labelled rows have the one class {str(names[0])!r}; a classifier "
            "needs at least two."
        )
    if not stratify:
        codes = np.zeros_like(codes)
    unit = units(
        len(rows),
        groups=None if groups is None else np.asarray(groups)[rows],
        sha256=None if sha256 is None else sha256[rows],
    )
    return rows, codes.astype(np.int64), [str(name) for name in names], unit


def _units_per_class(codes: IntArray, unit: IntArray, n_classes: int) -> IntArray:
    pairs = np.unique(np.stack([codes, unit], axis=1), axis=0)
    return np.bincount(pairs[:, 0], minlength=n_classes).astype(np.int64)


def _lone(
    codes: IntArray, names: list[str], unit: IntArray, *, grouped: bool
) -> npt.NDArray[np.bool_]:
    """Return which rows are tied to a class of one unit, and so always trained on: (n,)."""
    lone = np.zeros(len(codes), dtype=bool)
    while True:
        free = ~lone
        alone = _units_per_class(codes[free], unit[free], len(names)) == 1
        tied = np.isin(unit, unit[free & alone[codes]])
        if not tied.any():
            return lone
        lone |= tied
        if lone.all():
            kind = "groups" if grouped else "images of different content"
            raise TrainingError(
                f"No class has two {kind}, one to train on and one to test on: class {names[0]!r} "
                f"has {counted(int((codes == 0).sum()), 'image')}. Add images, or merge classes."
            )


def _divide(
    codes: IntArray,
    names: list[str],
    unit: IntArray,
    lone: npt.NDArray[np.bool_],
    shares: npt.NDArray[Any],
    seed: int,
) -> IntArray:
    """Return the part of each row, -1 for lone ones, or raise where a part lacks training rows.

    Each class is then in two parts, so that whatever one part lacks, the rest has.
    """
    part = np.full(len(codes), -1, dtype=np.int64)
    present, mine = np.unique(codes[~lone], return_inverse=True)
    part[~lone] = dealt = _deal(mine, unit[~lone], shares, seed)
    alone = present[_alone(_table(mine, dealt, len(shares)))]
    if len(alone):
        raise TrainingError(
            f"However they are divided, all rows of class {names[alone[0]]!r} would be in one part "
            "alone, because groups tie them to those of other classes. Use coarser labels, or "
            "smaller groups."
        )
    return part


def _deal(codes: IntArray, unit: IntArray, shares: npt.NDArray[Any], seed: int) -> IntArray:
    """Deal the units to parts of the given shares; return the part of each row."""
    rng = np.random.default_rng(seed)
    n_classes, n_parts = int(codes.max()) + 1, len(shares)
    want = _quotas(np.bincount(codes, minlength=n_classes), shares)  # (classes, parts)
    part = np.full(len(codes), -1, dtype=np.int64)
    size = np.bincount(unit)
    for members in _large_units(unit, size, rng):
        mix = np.bincount(codes[members], minlength=n_classes)[:, None]
        # The cost that the unit adds in each part: squared excess over what the part wants.
        cost = ((mix - want) ** 2 - want**2).sum(axis=0)
        chosen = int(cost.argmin())
        part[members] = chosen
        want[:, chosen] -= mix[:, 0]
    singles = rng.permutation(np.flatnonzero(size[unit] == 1))
    singles = singles[np.argsort(codes[singles], kind="stable")]
    ends = np.searchsorted(codes[singles], np.arange(n_classes + 1))
    for k in range(n_classes):
        mine = singles[ends[k] : ends[k + 1]]
        part[mine] = np.repeat(np.arange(n_parts), _fill(want[k], len(mine)))
    return _spread(part, codes, unit, shares, rng)


def _table(codes: IntArray, part: IntArray, n_parts: int) -> IntArray:
    """Count the rows of each class in each part: (classes, parts)."""
    n_classes = int(codes.max()) + 1
    counts = np.bincount(codes * n_parts + part, minlength=n_classes * n_parts)
    return counts.reshape(n_classes, n_parts).astype(np.int64)


def _alone(table: IntArray) -> npt.NDArray[np.bool_]:
    """Return which classes are in no two parts."""
    found: npt.NDArray[np.bool_] = (table > 0).sum(axis=1) < 2
    return found


def _spread(
    part: IntArray,
    codes: IntArray,
    unit: IntArray,
    shares: npt.NDArray[Any],
    rng: np.random.Generator,
) -> IntArray:
    """Move units until no class is in one part alone; where that fails, return what there is.

    To find such a division is as hard as satisfiability, and this is its random walk (Selman,
    Kautz and Cohen, Noise strategies for improving local search, AAAI 1994): of a class that is
    alone, a unit is moved, mostly the one that leaves the fewest classes alone and then the parts
    nearest to their shares, sometimes any one, to get out of dead ends.
    """
    n_parts = len(shares)
    table = _table(codes, part, n_parts)
    want = table.sum(axis=1, keepdims=True) * shares
    for _ in range(_MOVES):
        alone = np.flatnonzero(_alone(table))
        if not len(alone):
            break
        mine = rng.permutation(np.unique(unit[codes == rng.choice(alone)]))[:_TRIED]
        moves: list[tuple[Any, ...]] = []
        for one in mine:
            rows = np.flatnonzero(unit == one)
            mix = np.bincount(codes[rows], minlength=len(table))
            for other in np.flatnonzero(np.arange(n_parts) != part[rows[0]]):
                after = table.copy()
                after[:, part[rows[0]]] -= mix
                after[:, other] += mix
                faults = _alone(after).sum() + (after.sum(axis=0) == 0).sum()
                moves.append((faults, ((after - want) ** 2).sum(), len(moves), rows, other, after))
        chosen = moves[rng.integers(len(moves))] if rng.random() < _NOISE else min(moves)
        *_, rows, other, table = chosen
        part[rows] = other
    return part


def _quotas(counts: IntArray, shares: npt.NDArray[Any]) -> IntArray:
    """Round counts x shares to whole rows that add up in every class and are even over parts."""
    want = np.floor(np.outer(counts, shares) + 1e-9).astype(np.int64)
    total = want.sum(axis=0).astype(float)
    for k, count in enumerate(counts):
        exact = count * shares
        for _ in range(int(count - want[k].sum())):
            # Rest rows go where the class lacks most; ties, where the whole part lacks most.
            lack = exact - want[k]
            ties = np.flatnonzero(lack >= lack.max() - 1e-9)
            chosen = ties[np.argmin((total / shares)[ties])]
            want[k, chosen] += 1
            total[chosen] += 1
        if count >= len(shares):  # a class with enough members is in every part
            while want[k].min() == 0:
                want[k, want[k].argmax()] -= 1
                want[k, want[k].argmin()] += 1
    return want


def _large_units(unit: IntArray, size: IntArray, rng: np.random.Generator) -> list[IntArray]:
    """List the row numbers of each unit of several rows, the largest first, ties at random."""
    rows = np.flatnonzero(size[unit] > 1)
    if not len(rows):
        return []
    rows = rows[np.argsort(unit[rows], kind="stable")]
    pieces = np.split(rows, np.flatnonzero(np.diff(unit[rows])) + 1)
    order = rng.permutation(len(pieces))
    return sorted((pieces[i] for i in order), key=len, reverse=True)


def _fill(want: IntArray, n: int) -> IntArray:
    """Cut `n` single rows into parts as close to `want` as can be; the cuts add up to `n`."""
    cut = np.maximum(want, 0)
    while cut.sum() > n:  # units gave other parts too much: take where most is wanted
        cut[cut.argmax()] -= 1
    while cut.sum() < n:
        cut[(want - cut).argmax()] += 1
    return cut
