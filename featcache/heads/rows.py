"""The rows that heads are trained on: features, classes, weights, folds and views.

Features are an array, or blocks that are read from disk where they do not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from featcache.errors import TrainingError
from featcache.system.tables import in_order

Folds: TypeAlias = Sequence[tuple[np.ndarray, np.ndarray]]

_ROWS = 8192  # read at a time
_LARGEST = 1e15  # of a feature: sums of squares must stay within float32


def coded(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes (k,) in their order, and the number of each label's class (n,)."""
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    names = classes.tolist()
    if all(isinstance(name, str) for name in names):
        place = {name: number for number, name in enumerate(in_order(names))}
        codes = np.array([place[name] for name in names], dtype=np.int64)[codes]
        classes = np.array([*place], classes.dtype)
    return classes, codes


def working_dtype(X: np.ndarray) -> np.dtype[Any]:
    """Return what to compute in: float64 for float64, else float32."""
    return np.result_type(X.dtype, np.float32)


def check_values(X: np.ndarray, images: slice, views: int = 1) -> None:
    """Refuse the features (images * views, d) of some images that no head can compute with.

    Raises
    ------
    TrainingError
        Values that are not finite or too large, with the first image that has one.
    """
    if X.size and not max(X.max(), -X.min()) <= _LARGEST:
        row, column = np.argwhere(~(np.abs(X) <= _LARGEST))[0]
        raise TrainingError(
            f"Expected features that are finite and at most {_LARGEST:g}; column {column} of image "
            f"{images.start + row // views} is {X[row, column]:g}. Leave out the image, or scale "
            "the features."
        )


@dataclass(frozen=True)
class FeatureBlocks:
    """Rows of features that only exist as a sequence of blocks.

    Parameters
    ----------
    shape : tuple of int
        (n, d) or (n, views, d).
    read : callable
        ``read(rows)`` gives ``(slice, block)`` pairs, in order and without gaps; a block is
        float16 or float32, of shape (at most `rows`, ...).

    Examples
    --------
    ``FeatureBlocks((len(store), d), lambda rows: store.blocks(layers, rows))``
    """

    shape: tuple[int, ...]
    read: Callable[[int], Iterator[tuple[slice, np.ndarray]]]

    @classmethod
    def of(cls, X: np.ndarray) -> FeatureBlocks:
        """Return the blocks of an array, mapped or not."""

        def read(rows: int) -> Iterator[tuple[slice, np.ndarray]]:
            for start in range(0, len(X), rows):
                stop = min(start + rows, len(X))
                yield slice(start, stop), X[start:stop]

        return cls(tuple(X.shape), read)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def views(self) -> int:
        """Rows of each image."""
        return self.shape[1] if len(self.shape) == 3 else 1

    def blocks(self, rows: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (images, block of shape (images * views, d)) with about `rows` rows."""
        for images, block in self.read(max(1, rows // self.views)):
            flat = np.asarray(block).reshape(-1, self.shape[-1])
            yield images, flat.astype(working_dtype(flat), copy=False)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Return some rows, by ascending number; reads all blocks once.

        Parameters
        ----------
        numbers : ndarray of shape (m,), int
            Row numbers; an image has `views` of them.

        Returns
        -------
        ndarray of shape (m, d)
        """
        found: np.ndarray | None = None
        for images, block in self.blocks(_ROWS):
            check_values(block, images, self.views)
            part = self.rows_of(images)
            a, b = np.searchsorted(numbers, [part.start, part.stop])
            some = block[numbers[a:b] - part.start]
            if found is None:
                found = np.empty((len(numbers), some.shape[1]), dtype=some.dtype)
            found[a:b] = some
        assert found is not None, "no blocks"
        return found

    def rows_of(self, images: slice) -> slice:
        """Return the numbers of all rows of a slice of images."""
        return slice(images.start * self.views, images.stop * self.views)


@dataclass(frozen=True)
class TrainingRows:
    """Training rows, checked, views flattened into rows of their own.

    Attributes
    ----------
    X : ndarray of shape (n * views, d), or FeatureBlocks
        Features.
    codes : ndarray of shape (n,), int64
        Class of each image.
    classes : ndarray of shape (k,)
        Labels.
    weight : ndarray of shape (n,) or None
        Weight of each image.
    folds : list of (train, valid)
        Image numbers.
    views : int
        Rows of `X` for each image, next to each other.
    images : ndarray of shape (n,), int64, or None
        Where this is a part: the numbers of its images in the whole, ascending.
    total : int
        Images of the whole, where this is a part.
    """

    X: np.ndarray | FeatureBlocks
    codes: np.ndarray
    classes: np.ndarray
    weight: np.ndarray | None
    folds: Folds
    views: int
    images: np.ndarray | None = None
    total: int = 0

    @classmethod
    def check(
        cls,
        X: np.ndarray | FeatureBlocks,
        y: np.ndarray,
        folds: Folds,
        sample_weight: np.ndarray | None = None,
    ) -> TrainingRows:
        """Validate what a search was given.

        Raises
        ------
        TrainingError
            Other lengths, not one class, values that are not finite (of blocks: once they are
            read), weights that are negative, no folds.
        """
        if len(X.shape) not in (2, 3):
            raise TrainingError(f"Expected features (n, d) or (n, views, d), got shape {X.shape}.")
        if len(X) != len(y):
            raise TrainingError(f"Expected one label per row: {len(X)} rows, {len(y)} labels.")
        classes, codes = coded(y)
        if len(classes) < 2:
            raise TrainingError(f"Expected at least two classes, got {classes.tolist()}.")
        if not len(folds):
            raise TrainingError("Expected at least one (train, valid) pair of row numbers, got 0.")
        weight = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        if weight is not None and weight.shape != codes.shape:
            raise TrainingError(
                f"Expected one sample weight per row: {len(X)} rows, weights of shape "
                f"{weight.shape}."
            )
        if weight is not None and not ((weight >= 0) & (weight < np.inf)).all():
            first = np.flatnonzero(~((weight >= 0) & (weight < np.inf)))[0]
            raise TrainingError(
                f"Expected sample weights that are finite and not negative; that of row {first} "
                f"is {weight[first]:g}."
            )
        counted = np.ones(len(codes), dtype=bool) if weight is None else weight > 0
        for number, (train, _) in enumerate(folds):
            seen = codes[train][counted[train]]
            missing = np.flatnonzero(np.bincount(seen, minlength=len(classes)) == 0)
            if len(missing):
                raise TrainingError(
                    f"Fold {number} has no training row of class {str(classes[missing[0]])!r}. "
                    "Use fewer folds, or more images of that class."
                )
        views = X.shape[1] if len(X.shape) == 3 else 1
        if isinstance(X, FeatureBlocks):
            flat: np.ndarray | FeatureBlocks = X
        else:
            flat = np.asarray(X, dtype=np.float32).reshape(-1, X.shape[-1])
            check_values(flat, slice(0, len(X)), views)
        return cls(flat, codes.astype(np.int64), classes, weight, folds, views)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def labels(self) -> np.ndarray:
        """Label of each image."""
        labels: np.ndarray = self.classes[self.codes]
        return labels

    def rows(self, images: np.ndarray) -> np.ndarray:
        """Row numbers of all views of `images`."""
        numbers: np.ndarray = (
            np.asarray(images)[:, None] * self.views + np.arange(self.views)
        ).ravel()
        return numbers

    def features(self, images: np.ndarray | None = None) -> np.ndarray:
        """Features of all views of `images`, of shape (images * views, d)."""
        if isinstance(self.X, FeatureBlocks):
            raise TrainingError(
                "This head cannot read its features in blocks: they must fit in memory."
            )
        return self.X if images is None else self.X[self.rows(images)]

    def weights(self, images: np.ndarray | None = None) -> np.ndarray:
        """Weights of the same rows: an image's weight, or 1, is shared out among its views."""
        weight = np.ones(len(self)) if self.weight is None else self.weight
        chosen = weight if images is None else weight[images]
        return np.repeat(chosen / self.views, self.views)

    def row_codes(self, images: np.ndarray | None = None) -> np.ndarray:
        """Classes of the same rows, as numbers."""
        return np.repeat(self.codes if images is None else self.codes[images], self.views)

    def numbered(self, class_weight: Any) -> Any:
        """Return class weights by the numbers of the classes, which estimators are fitted to."""
        if not isinstance(class_weight, Mapping):
            return class_weight
        number = {name: k for k, name in enumerate(self.classes.tolist())}
        return {number[name]: weight for name, weight in class_weight.items()}

    def images_in(self, room: int) -> int:
        """Return how many images' features (float32) so many bytes hold."""
        return room // (4 * self.views * self.X.shape[-1])

    def sample(self, images: int, random_state: int) -> TrainingRows:
        """Return about so many images in memory, the same part of each class in each fold.

        At least one image is kept of each class in each fold. Where there are no more images, the
        rows are returned as they are, in memory or not.
        """
        if images >= len(self):
            return self
        strata = self.codes if self.weight is None else 2 * self.codes + (self.weight > 0)
        for fold in self.folds:
            side = np.zeros(len(self), dtype=np.int64)
            for bit, part in enumerate(fold):
                side[part] += 1 << bit
            _, strata = np.unique(4 * strata + side, return_inverse=True)
        return self.only(stratified(strata, images, random_state))

    def loaded(self) -> TrainingRows:
        """Return the same rows in memory."""
        return self if isinstance(self.X, np.ndarray) else self.only(np.arange(len(self)))

    def only(self, images: np.ndarray) -> TrainingRows:
        """Return some images in memory, in the order of their numbers, and their folds."""
        chosen = np.sort(images)
        place = np.full(len(self), -1)
        place[chosen] = np.arange(len(chosen))
        numbers = self.rows(chosen)
        return replace(
            self,
            X=self.X.take(numbers) if isinstance(self.X, FeatureBlocks) else self.X[numbers],
            codes=self.codes[chosen],
            weight=None if self.weight is None else self.weight[chosen],
            folds=[
                (place[train][place[train] >= 0], place[valid][place[valid] >= 0])
                for train, valid in self.folds
            ],
            images=chosen if self.images is None else self.images[chosen],
            total=self.total or len(self),
        )

    def judging(self, part: TrainingRows) -> TrainingRows:
        """Return the same rows, of which each fold validates only those of a part of them."""
        own = np.arange(len(self)) if self.images is None else self.images
        judged = np.arange(len(part)) if part.images is None else part.images
        folds = [(train, valid[np.isin(own[valid], judged)]) for train, valid in self.folds]
        return replace(self, folds=folds)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return values (n, ...) of these images among those of the whole, NaN for the others."""
        if self.images is None:
            return values
        whole = np.full((self.total, *values.shape[1:]), np.nan, dtype=values.dtype)
        whole[self.images] = values
        return whole


def stratified(codes: np.ndarray, size: int, random_state: int) -> np.ndarray:
    """Return about `size` row numbers in order, the same part of each class, none left out."""
    if size >= len(codes):
        return np.arange(len(codes))
    shuffled = np.random.default_rng(random_state).permutation(len(codes))
    by_class = shuffled[np.argsort(codes[shuffled], kind="stable")]
    spread = by_class[np.linspace(0, len(codes) - 1, max(size, 1)).astype(np.int64)]
    _, first = np.unique(codes[by_class], return_index=True)
    return np.union1d(spread, by_class[first])
