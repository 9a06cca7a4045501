"""What folds measured on training images, kept in a predictor to judge new images by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import PredictorError
from featcache.system.tables import counted

Floats = npt.NDArray[np.float64]

_KEPT = 1000  # quantiles


@dataclass(frozen=True, eq=False)
class Quantiles:
    """Quantiles of the scores that training images had out of fold.

    Attributes
    ----------
    n : int
        Number of images.
    values : ndarray of float64, shape (m,)
        The scores, rising; of more than 1,000, those of that many evenly spread ranks, the last
        among them.

    Examples
    --------
    >>> scores = Quantiles.of(np.arange(5000.0))
    >>> scores.n, len(scores.values), scores.smallest(4750)
    (5000, 1000, 4749.0)
    """

    n: int
    values: Floats

    @classmethod
    def of(cls, scores: npt.NDArray[Any]) -> Quantiles:
        """Return the quantiles of the scores (n,) of single images."""
        n, kept = len(scores), min(len(scores), _KEPT)
        ranks = -(-np.arange(1, kept + 1) * n // max(kept, 1))  # from 1 to n
        return cls(n, np.sort(scores.astype(np.float64))[ranks - 1])

    def smallest(self, rank: int) -> float:
        """Return the score of a rank, counted from 1, or the next larger one that is kept."""
        return float(self.values[(rank - 1) * len(self.values) // self.n])

    @property
    def sound(self) -> bool:
        """Whether they can be what `of` returned."""
        values, kept = self.values, min(self.n, _KEPT)
        return (
            values.dtype == np.float64
            and values.shape == (kept,)
            and bool(np.isfinite(values).all() and (np.diff(values) >= 0).all())
        )


def in_set(scores: Quantiles, proba: Floats, coverage: float) -> npt.NDArray[np.bool_]:
    """Return which classes belong to an image's set of labels: a mask (n, k).

    They are those whose probability the true class had too, out of fold, among the share `coverage`
    of the training images on which it was highest: the least ambiguous sets of Sadinle, Lei and
    Wasserman, *Journal of the American Statistical Association* 114, 2019.

    Parameters
    ----------
    scores : Quantiles
        1 less the probability of the true class.
    proba : ndarray of float64, shape (n, k)
        Calibrated probabilities.
    coverage : float
        Share of the images whose set should hold the true label.

    Raises
    ------
    PredictorError
        No share between 0 and 1, or one that so few images cannot show.
    """
    if not 0 < coverage < 1:
        raise PredictorError(f"coverage is a share between 0 and 1, such as 0.95, not {coverage}.")
    rank = math.ceil((scores.n + 1) * coverage - 1e-9)
    if rank > scores.n:
        needed = math.ceil(1 / (1 - coverage) - 1 - 1e-9)
        most = math.floor(scores.n / (scores.n + 1) * 1e3) / 1e3
        raise PredictorError(
            f"A coverage of {coverage:g} can be told from {needed:,} images on that folds judged, "
            f"and this predictor has {scores.n:,}: ask for {most:g} or less, or train on more "
            "images."
        )
    found: npt.NDArray[np.bool_] = 1 - proba <= scores.smallest(rank)
    return found


def coverage_text(n: int, coverage: float, *, grouped: bool) -> str:
    """Return what sets of labels promise, for people."""
    these = " of these groups" if grouped else ""
    return (
        f"labels: the sets held the true label of at least {coverage:.1%} of "
        f"{counted(n, 'image')}{these} when folds judged them; for images"
        f"{these or ' like these'}, that is measured, not guaranteed"
    )
