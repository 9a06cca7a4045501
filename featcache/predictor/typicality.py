"""How typical an image is of those that a predictor was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featcache.heads.base import transformed
from featcache.heads.steps import Matrix, Scale, Step
from featcache.predictor.measured import Quantiles

if TYPE_CHECKING:
    from featcache.heads.rows import TrainingRows

_NEIGHBOR = 5  # whose distance tells: one or two copies of an image say nothing
_COMPONENTS = 64
_FEWEST = 16  # components, of wide features
_BYTES = 4_400_000  # of the steps; with the sample, 5 MB
_SAMPLE = 2000  # images that are kept
_IMAGES = 5000  # images that folds measure
_EXACT = 256  # columns up to which the whole covariance is decomposed
_ROWS = 1024  # compared at a time


@dataclass(frozen=True, eq=False)
class Typicality:
    """Share of the training images that lie farther out than an image, from 0 to 1.

    How far out an image lies is its distance to the fifth nearest of a sample of training images,
    in whitened principal components. Of training images it was measured out of fold, so that of
    new images of their kind a share p has a typicality below about p.

    On the demo's photographs (MobileNetV2, 20 random halves) 5 % of the other half and 90 % of
    pencil drawings of such cells were below .05. On one half, in 32 and in 128 components, the
    fifth neighbour flagged 89 % and 92 % of the drawings, the Mahalanobis distance to the nearest
    class (Lee et al. 2018) 66 % and 92 %, and its relative variant (Ren et al. 2021) 8 % and 22 %.

    Attributes
    ----------
    steps : sequence of Step
        From features (n, d) to components (n, q).
    sample : ndarray of float32, shape (m, q)
        Training images.
    distances : Quantiles
        Out of fold.
    """

    steps: Sequence[Step]
    sample: npt.NDArray[np.float32]
    distances: Quantiles

    def __call__(self, X: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return it for features (n, d) or (n, views, d), of which the views are averaged."""
        if not len(X):
            return np.empty(0)
        rows = X.mean(axis=1) if X.ndim == 3 else X
        with np.errstate(all="ignore"):
            far = _distances(transformed(self.steps, rows.astype(np.float32)), self.sample)
        values = self.distances.values
        nearer = np.searchsorted(values, far)  # a distance that is not a number is the farthest
        share: npt.NDArray[np.float64] = 1 - nearer / len(values)
        return share

    @property
    def sound(self) -> bool:
        """Whether it can be what `of` returned."""
        plain = all(isinstance(step, Scale | Matrix) for step in self.steps)
        rows = self.sample
        return bool(
            plain
            and rows.dtype == np.float32
            and rows.ndim == 2
            and rows.size
            and np.isfinite(rows).all()
            and self.distances.n > 0
            and self.distances.sound
        )

    @classmethod
    def of(cls, rows: TrainingRows, random_state: int = 0) -> Typicality | None:
        """Measure the rows that heads are trained on, on their folds, or a random part of them.

        None for features so wide (above 55,000 columns) that too few components can be kept.
        """
        from featcache.heads.preparation import Preparation

        width = rows.X.shape[-1]
        fewest = min(len(train) for train, _ in rows.folds)
        wanted = min(_COMPONENTS, (_BYTES // width - 16) // 4)
        if wanted < min(_FEWEST, width):
            return None
        some = rows.sample(_IMAGES, random_state).loaded()
        X = some.features().reshape(len(some), some.views, width).mean(axis=1)
        some = replace(some, X=X, views=1, weight=None)
        count = max(1, min(wanted, width, fewest // 2))
        preparation = Preparation("standard", count, random_state=random_state, exact=_EXACT)
        rng = np.random.default_rng(random_state)
        # As many for all images as in a fold: neighbours of a larger sample are nearer.
        most = min(_SAMPLE, *(len(train) for train, _ in some.folds))

        def drawn(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.sort(rng.permutation(images)[:most])

        far = []
        for number, (train, valid) in enumerate(some.folds):
            inside = preparation.on_fold(some, number)
            far.append(_distances(inside[valid], inside[drawn(train)]))
        steps = preparation.fit(some)
        kept = transformed(steps, X[drawn(np.arange(len(X)))]).astype(np.float32)
        return cls(steps, kept, Quantiles.of(np.concatenate(far)))


def _distances(X: npt.NDArray[Any], sample: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the distance (n,) of rows (n, q) to the fifth nearest of a sample (m, q)."""
    sample = sample.astype(np.float64)
    far, nth = np.empty(len(X)), min(_NEIGHBOR, len(sample)) - 1
    for start in range(0, len(X), _ROWS):
        some = X[start : start + _ROWS].astype(np.float64)
        squares = (some**2).sum(axis=1)[:, None] + (sample**2).sum(axis=1) - 2 * some @ sample.T
        far[start : start + _ROWS] = np.partition(squares, nth, axis=1)[:, nth]
    return np.sqrt(np.maximum(far, 0))
