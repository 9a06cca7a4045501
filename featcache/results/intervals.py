"""Scores with 95 % intervals.

The standard error of accuracy, balanced accuracy and macro F1 is the jackknife's (Efron and
Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 11): what each figure becomes without
one image, or without one group where the store has groups. Photographs of one patient or one module
are not independent, and left out one by one they would give intervals that are too narrow. The
figures depend on the images only through the confusion matrix, so that all images of one cell are
left out at once.

An interval of "so many standard errors either side" leaves [0, 1] and covers too seldom near its
ends. So the interval is Wilson's (*Journal of the American Statistical Association* 22, 1927), for
the number of independent images that would have the same standard error, and with Student's t for
the normal distribution, because the standard error is estimated from n images or groups (Korn and
Graubard, *Survey Methodology* 24, 1998, for Clopper and Pearson's interval). Simulated by
``tests/benchmarks/honesty.py``: it covers the true accuracy, balanced accuracy and macro F1 with a
probability of 0.91 to 0.99, for 30 images and for 1,000, for 50 classes of 4 images, and for 5
groups that differ as much as groups can. With fewer groups nothing can be said, and no interval is
given.

The jackknife knows nothing of a class that has all its images right: left out, they change nothing.
So where there is such a class (or one that is all wrong), balanced accuracy and macro F1 take the
further of its ends and those that the classes' own intervals combine to by the sum of their squares
(Zou and Donner, *Statistics in Medicine* 27, 2008): a class of two images is known no better than
two images tell. Of a class, the interval is Wilson's of its recall, or, for F1, of the images that
it and its predictions share, TP / (TP + FP + FN), as F1 is a function of that. Where every image is
right (or every one wrong) these are the intervals, and that of accuracy is Wilson's for all images
or groups. Of groups, the jackknife is taken further in the same way where a class has fewer than 5,
by the intervals of such classes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Interval = tuple[float | None, float | None]

FEWEST_GROUPS = 5  # that an interval is given for
_CELLS_AT_ONCE = 1 << 21  # bounds the memory of the jackknife: 16 MB
_Z = 1.959963984540054  # 97.5 % point of the normal distribution


class Score(float):
    """A number with its 95 % interval, which ``print`` and ``format`` without a width show.

    Parameters
    ----------
    value : float
        The estimate.
    low, high : float or None
        The ends of its interval; None where there is too little to tell.

    Examples
    --------
    >>> score = Score(0.87, 0.855, 0.885)
    >>> print(score, score.interval, round(score + 0.01, 2))
    0.870 [0.855, 0.885] (0.855, 0.885) 0.88
    """

    low: float | None
    high: float | None

    def __new__(cls, value: float, low: float | None, high: float | None) -> Score:  # noqa: D102
        score = super().__new__(cls, value)
        score.low, score.high = low, high
        return score

    def __reduce__(self) -> tuple[type[Score], tuple[float, float | None, float | None]]:
        return Score, (float(self), self.low, self.high)

    @property
    def interval(self) -> Interval:
        """The ends of the interval."""
        return self.low, self.high

    def to_dict(self, name: str) -> dict[str, Any]:
        """Return the number and its interval as JSON values, by its name."""
        return {name: float(self), f"{name}_interval": list(self.interval)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], name: str) -> Score:
        """Return what `to_dict` wrote."""
        return cls(values[name], *values[f"{name}_interval"])

    @classmethod
    def types(cls, name: str) -> dict[str, Any]:
        """Return the types of what `to_dict` writes."""
        return {name: float, f"{name}_interval": Interval}

    def __repr__(self) -> str:
        return f"Score({float(self)}, {self.low}, {self.high})"

    def __str__(self) -> str:
        return f"{float(self):.3f}" + (
            "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        )


def rate_scores(
    y_true: npt.NDArray[np.int64],
    y_pred: npt.NDArray[np.int64],
    k: int,
    groups: npt.NDArray[Any] | None,
) -> tuple[Score, Score, Score]:
    """Return accuracy, balanced accuracy and macro F1 of predictions, with their intervals.

    Parameters
    ----------
    y_true, y_pred : ndarray of int64, shape (n,)
        True and predicted column of each image.
    k : int
        Number of classes.
    groups : ndarray of shape (n,), optional
        Groups that are left out as a whole; below 5 of them there are no intervals.
    """
    right = y_true == y_pred
    hits, true, predicted = (np.bincount(of, minlength=k) for of in (y_true[right], y_true, y_pred))
    counts = np.concatenate([hits, true, predicted])
    values = _rates(counts[None].astype(np.float64))[0].tolist()
    either = true + predicted - hits
    group, units, trials = None, len(y_true), (true, either)
    if groups is not None:
        names, group = np.unique(groups, return_inverse=True)
        units = len(names)
        cells = np.unique(y_true * units + group)
        trials = (np.bincount(cells // units, minlength=k),) * 2  # groups of each class
    few = group is not None and units < FEWEST_GROUPS
    alike = right.all() or not right.any()
    if few:
        ends: list[Any] = [(None, None)] * 3
    elif alike:
        ends = [wilson(values[0], units), *[(values[0], values[0])] * 2]
    else:
        variances = _jackknife(y_true, y_pred, k, group, counts)
        ends = [
            _interval(value, variance, units, len(y_true))
            for value, variance in zip(values, variances, strict=True)
        ]
    recall, jaccard = hits / np.maximum(true, 1), hits / np.maximum(either, 1)
    certain = ((hits == true) | (hits == 0))[true > 0].any()
    vague = np.asarray(alike or (certain if group is None else trials[0] < FEWEST_GROUPS))
    if not few and (vague & (true > 0)).any():
        ends[1] = _widened(ends[1], recall, trials[0], vague, lambda share: share)
        ends[2] = _widened(
            ends[2], jaccard, trials[1], vague, lambda share: 2 * share / (1 + share)
        )
    accuracy, balanced, f1 = (Score(value, *both) for value, both in zip(values, ends, strict=True))
    return accuracy, balanced, f1


def _widened(
    ends: tuple[float, float],
    share: Floats,
    trials: npt.NDArray[np.int64],
    vague: npt.NDArray[np.bool_],
    figure: Callable[[Floats], Floats],
) -> tuple[float, float]:
    """Widen an interval to what the shares of vague classes say of the mean of all figures."""
    seen = trials > 0
    vague, middle = vague & seen, figure(share[seen]).mean()
    pairs = zip(share[vague].tolist(), trials[vague].tolist(), strict=True)
    own = np.array([wilson(*one) for one in pairs])  # (vague classes, 2)
    off = figure(own) - figure(share[vague])[:, None]
    below, above = np.linalg.norm(off, axis=0) / seen.sum()
    low, high = float(middle - below), float(middle + above)
    return min(ends[0], max(0.0, low)), max(ends[1], min(1.0, high))


def _interval(value: float, variance: float, units: int, images: int) -> tuple[float, float]:
    """Return the interval of a figure with a variance, which was estimated from so many units."""
    from scipy.stats import t

    independent = images if variance <= 0 else min(value * (1 - value) / variance, images)
    return wilson(value, independent, float(t.ppf(0.975, units - 1)))


def wilson(share: float, n: float, z: float = _Z) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share seen in `n` independent trials."""
    z2 = z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    low = 0.0 if share == 0 else middle - half
    return low, 1.0 if share == 1 else middle + half


def _rates(counts: Floats) -> Floats:
    """Turn counts into rates.

    Parameters
    ----------
    counts : ndarray of shape (m, 3 k)
        Right images, images, and predictions of each class.

    Returns
    -------
    ndarray of shape (m, 3)
        Accuracy, balanced accuracy, macro F1.
    """
    right, true, predicted = np.split(counts, 3, axis=1)
    recall = right / np.maximum(true, 1)
    f1 = 2 * right / np.maximum(true + predicted, 1)
    return np.stack(
        [
            right.sum(axis=1) / true.sum(axis=1),
            recall.sum(axis=1) / (true > 0).sum(axis=1),
            f1.sum(axis=1) / (true + predicted > 0).sum(axis=1),
        ],
        axis=1,
    )


def _jackknife(
    y_true: npt.NDArray[np.int64],
    y_pred: npt.NDArray[np.int64],
    k: int,
    group: npt.NDArray[np.int64] | None,
    counts: npt.NDArray[np.int64],
) -> list[float]:
    """Return the variances of accuracy, balanced accuracy and macro F1; groups are numbers."""
    from scipy.sparse import coo_array

    cells = y_true * k + y_pred
    if group is None:  # images of one cell are alike, and each is left out
        cell, alike = np.unique(cells, return_counts=True)
        unit, images = np.arange(len(cell)), np.ones(len(cell), dtype=np.int64)
    else:
        alike = np.ones(int(group.max()) + 1)
        pairs, images = np.unique(cells * len(alike) + group, return_counts=True)
        cell, unit = np.divmod(pairs, len(alike))
    true, predicted = np.divmod(cell, k)
    hit = true == predicted
    # table[u, c]: what unit u adds to each count.
    rows = np.concatenate([unit[hit], unit, unit])
    columns = np.concatenate([true[hit], k + true, 2 * k + predicted])
    values = np.concatenate([images[hit], images, images])
    table = coo_array((values, (rows, columns)), shape=(len(alike), 3 * k)).tocsr()
    at_once = max(1, _CELLS_AT_ONCE // (3 * k))
    without = np.concatenate(
        [
            _rates(counts - table[start : start + at_once].toarray())
            for start in range(0, len(alike), at_once)
        ]
    )  # (units, 3)
    n = alike.sum()
    off = without - (alike @ without) / n
    variances: list[float] = ((n - 1) / n * (alike @ off**2)).tolist()
    return variances
