"""What a choice tells: the accuracy of the best, freed of the choice, and whether it is the best.

Of settings that are all as good as chance, the best has more than chance on the images that it was
chosen on. Bootstrap bias-corrected cross-validation (Tsamardinos, Greasidou and Borboudakis,
*Machine Learning* 107, 2018) makes the choice anew on resampled images and judges what was chosen
on the images that the resample left out. It needs the out-of-fold predictions of all settings, and
no further fit.

Whether the best is really better than another is a matter of the images that only one of the two
has right, so each difference is taken image by image. As the best was not named before the images
were seen, and several others are looked at, their intervals hold at once for the differences of all
pairs: Tukey's range, of the largest studentised difference, by the multiplier bootstrap
(Chernozhukov, Chetverikov and Kato, *Annals of Statistics* 41, 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.results.intervals import FEWEST_GROUPS, Score, rate_scores

_MOST, _FEWEST = 1000, 200  # resamples
_DRAWN = 10_000  # of differences, where one is cheap
_WORK = 1 << 28  # cells that the resamples read, between these numbers of them


def corrected_accuracy(
    y_true: npt.NDArray[np.int64],
    predicted: Sequence[npt.NDArray[np.int32]],
    groups: npt.NDArray[Any] | None = None,
    *,
    balanced: bool = False,
    by_fold: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None = None,
) -> Score:
    """Return the accuracy of the best of several settings, with its 95 % interval.

    Parameters
    ----------
    y_true : ndarray of shape (n,)
        True class of each image.
    predicted : sequence of ndarray of shape (n,)
        For each setting, the classes that were predicted out of fold.
    groups : ndarray of shape (n,), optional
        Groups that are drawn as a whole; below 5 of them there is no interval.
    balanced : bool
        Choose by balanced accuracy.
    by_fold : tuple of ndarray of shape (n,) and ndarray of shape (folds, m), optional
        Choose by another score: the fold that judged each image, and the score of each setting
        there. Folds are then drawn as a whole, since such a score is of a fold and not of an image.

    In the bag the highest score chooses, for every head. `rbf-svm` then prefers a wider kernel
    within one standard error, which needs the fold scores of the resample: so chosen, its figure
    on labels of chance (40 seeds of ``honesty.py choice``) was 0.510 in place of 0.513.

    Folds know less of each other than images do, but not nothing: each has trained the models that
    the others judge. On labels of chance, of which half are right, the best of four heads by
    `roc_auc` had 0.522 (60 seeds, standard error 0.007), by `neg_log_loss` 0.528; drawing images,
    and choosing by accuracy, gave 0.515 on the same predictions.

    Returns
    -------
    Score
        Mean of the accuracies on the images that a resample left out, and the percentiles between
        which 95 % of them lie. An interval so made is wide: a resample leaves out a third of the
        images. It is never narrower than that of the best setting as it is.
    """
    right = np.stack([one == y_true for one in predicted], axis=1).astype(np.float32)  # (n, m)
    n = len(right)
    if by_fold is None:
        unit = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
        worth, of = (right / np.bincount(y_true)[y_true, None] if balanced else right), unit
    else:
        unit, worth = by_fold
        of = np.arange(len(worth))
    worth, units = worth.astype(np.float32, copy=False), int(unit.max()) + 1
    rng = np.random.default_rng(0)  # the same predictions give the same figure
    scores = []
    for _ in range(int(np.clip(_WORK // right.size, _FEWEST, _MOST))):
        drawn = np.bincount(rng.integers(0, units, units), minlength=units)  # (units,)
        left = (drawn == 0)[unit]
        if left.any():
            best = (drawn[of].astype(np.float32) @ worth).argmax()
            scores.append(right[left, best].mean())
    mine = right[:, worth.sum(axis=0).argmax()]
    value = float(np.mean(scores or mine))  # a single image or group is always drawn
    # Never narrower than that of the best as it is: of few errors or groups resamples know less.
    plain = rate_scores(np.ones(n, np.int64), mine.astype(np.int64), 2, groups)[0]
    if plain.low is None or plain.high is None or not scores:
        return Score(value, None, None)
    low, high = np.percentile(scores, [2.5, 97.5]).tolist()
    low, high = min(low, value - plain + plain.low), max(high, value + plain.high - plain)
    return Score(value, max(low, 0.0), min(high, 1.0))


def paired_differences(
    y_true: npt.NDArray[np.int64],
    predicted: Sequence[npt.NDArray[np.int64]],
    groups: npt.NDArray[Any] | None = None,
    *,
    balanced: bool = False,
) -> list[Score]:
    """Return how far each of several predictions is from the first, with 95 % intervals.

    Parameters
    ----------
    y_true : ndarray of shape (n,)
        True class of each image.
    predicted : sequence of ndarray of shape (n,)
        Of each head, the best first: the classes that were predicted out of fold, -1 where none
        was. A difference is over the images that both heads scored.
    groups : ndarray of shape (n,), optional
        Groups that are drawn as a whole; below 5 of them there are no intervals.
    balanced : bool
        Of balanced accuracy, in place of accuracy.

    Returns
    -------
    list of Score
        Differences to the first, below 0 where it is better. With a probability of 0.95 all
        intervals hold the true difference at once, whichever head is the first
        (``tests/benchmarks/honesty.py pairs``).

    Examples
    --------
    >>> y = np.arange(100) % 2
    >>> print(paired_differences(y, [y, np.where(np.arange(100) < 30, 0, y)])[1])
    -0.150 [-0.221, -0.079]
    """
    from scipy.sparse import coo_array
    from scipy.stats import norm, t

    said, cell = np.stack(predicted, axis=1), y_true if balanced else np.zeros_like(y_true)
    both = (said >= 0) & (said[:, :1] >= 0)  # (n, m)
    cells = coo_array((np.ones(len(cell)), (cell, np.arange(len(cell))))).tocsr()  # (cells, n)
    of = cells @ both.astype(np.float64)
    worth = both / np.maximum(of, 1)[cell] / (of > 0).sum(axis=0)
    right = (said == y_true[:, None]).astype(np.float64)
    table = worth * (right - right[:, :1])
    values = table.sum(axis=0)
    # What an image adds beyond the others of its cell: resampled, these add up to the deviations.
    table -= worth * (cells @ table)[cell] * (of > 0).sum(axis=0)
    if groups is not None:
        unit = np.unique(groups, return_inverse=True)[1]
        table = coo_array((np.ones(len(unit)), (unit, np.arange(len(unit))))).tocsr() @ table
    n = len(table)
    if groups is not None and n < FEWEST_GROUPS:
        return [Score(value, None, None) for value in values.tolist()]
    cov = table.T @ table * n / max(n - 1, 1)  # (m, m)
    # Multiplying what each unit adds by a normal number, resample for resample, gives these.
    rng = np.random.default_rng(0)
    off = rng.multivariate_normal(values * 0, cov, _DRAWN, "ignore", method="svd")  # (drawn, m)
    error = np.sqrt(np.maximum(cov.diagonal()[:, None] + cov.diagonal() - 2 * cov, 0))  # (m, m)
    # Predictions that agree on all images would not on the next one.
    error = np.maximum(error, worth.max())
    most = np.max([np.abs(off - mine[:, None]) / error[k] for k, mine in enumerate(off.T)], axis=0)
    wide = max(float(np.quantile(most.max(axis=1), 0.95)), 1.96)
    half = t.ppf(norm.cdf(wide), n - 1) * error[0] * (np.arange(len(values)) > 0)
    ends = zip(values, np.maximum(values - half, -1), np.minimum(values + half, 1), strict=True)
    return [Score(*map(float, one)) for one in ends]
