"""What a fitted head is made of: a list of steps, from features to scores of the classes.

A step holds arrays, computes in numpy, and gives a torch layer where it is one. Prediction, the
file of a predictor, `Predictor.to_torch` and exported models are four readings of that list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Self, get_type_hints

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featcache.system.nearest import BLOCK, SHORTEST, nearest, unit

Array = npt.NDArray[Any]
Number = Annotated[float, ("float64",)]

_FLOAT = ("float32", "float64")
_INTEGER = ("int32", "int64")
_SMALLEST_PROBABILITY = 1e-4  # before a logarithm: votes are often exactly zero
_STEEPNESS = 4.0  # of the votes between two classes
_MOST = 4096  # neighbours that are looked at


class Step:
    """One computation on rows: (n, in) to (n, out).

    Its fields are arrays and numbers. Each is annotated with the types that it may have and the
    names of its dimensions: ``in`` are the columns that the step takes, ``out`` those that it
    gives (as many, where no field says so), and a name means the same number in all fields.
    """

    kind: ClassVar[str]

    def __call__(self, X: Array) -> Array:
        """Return the rows behind this step."""
        raise NotImplementedError

    def module(self) -> nn.Module | None:
        """Return the same as a torch layer, None where it is not made of layers."""
        return None

    @property
    def cells(self) -> int:
        """Numbers that one row needs on its way through, so that blocks stay small."""
        return 1

    @classmethod
    @cache
    def declared(cls) -> dict[str, tuple[tuple[str, ...], *tuple[str, ...]]]:
        """Return the types and the dimensions of each field, by name."""
        hints = get_type_hints(cls, include_extras=True)
        return {name: one.__metadata__ for name, one in hints.items() if name != "kind"}

    def arrays(self) -> dict[str, Array]:
        """Return the fields as arrays, by name: what is written to a file."""
        return {name: np.asarray(getattr(self, name)) for name in self.declared()}

    def values(self) -> dict[str, Any]:
        """Return what else the step is made of, as JSON values."""
        return {}

    @classmethod
    def of(cls, arrays: Mapping[str, Array], **values: Any) -> Self:
        """Return the step that gave these `arrays` and `values`; `check` it before it is used.

        Raises
        ------
        ValueError
            Other names than the step has.
        """
        if values or arrays.keys() != cls.declared().keys():
            given, own = ", ".join((*arrays, *values)), ", ".join(cls.declared())
            raise ValueError(f"the step {cls.kind!r} is made of: {own}; given are: {given}")
        return cls(**{name: one if one.ndim else one.item() for name, one in arrays.items()})

    def check(self, width: int) -> int:
        """Refuse arrays that do not fit each other or rows of `width` columns.

        Returns
        -------
        int
            The columns that the step gives.

        Raises
        ------
        ValueError
            With the name of the array.
        """
        sizes = {"in": width}
        for name, value in self.arrays().items():
            dtypes, *names = self.declared()[name]
            if (
                value.dtype.name not in dtypes
                or value.ndim != len(names)
                or not value.size  # whose other dimensions no byte would account for
                or any(
                    sizes.setdefault(*one) != one[1] for one in zip(names, value.shape, strict=True)
                )
            ):
                raise ValueError(
                    f"{name} of the step {self.kind!r} is {value.dtype} {value.shape}, expected "
                    f"{' or '.join(dtypes)} ({', '.join(names)}), where {sizes}"
                )
            self._require(np.isfinite(value).all(), f"numbers in {name!r} that are not finite")
        self._check_values()
        return sizes.get("out", width)

    def _check_values(self) -> None:
        """Refuse values that the computation could not stand."""

    def _require(self, condition: Any, what: str) -> None:
        if not condition:
            raise ValueError(f"the step {self.kind!r} has {what}")


def chained(steps: Sequence[Step], X: Array) -> Array:
    """Send rows through steps, one after the other."""
    for step in steps:
        X = step(X)
    return X


@dataclass(frozen=True, eq=False)
class Unit(Step):
    """Scale rows to Euclidean length 1; rows that are shorter than 1e-15 stay."""

    kind = "unit"

    def __call__(self, X: Array) -> Array:
        """Return the scaled rows in a new array."""
        return unit(X)

    def module(self) -> nn.Module:
        """Return the layer."""
        return UnitLayer()


class UnitLayer(nn.Module):
    """`Unit` in torch."""

    def forward(self, x: Tensor) -> Tensor:
        """Return rows of length 1, of shape (b, d)."""
        length = x.norm(dim=1, keepdim=True)
        return x / torch.where(length < SHORTEST, 1.0, length)


@dataclass(frozen=True, eq=False)
class Power(Step):
    """Raise absolute values to a power and keep the signs.

    The square root tames the long tail of pooled ReLU features (Perronnin, Sanchez and Mensink,
    Improving the Fisher kernel, 2010).
    """

    kind = "power"
    exponent: Number = 0.5

    def __call__(self, X: Array) -> Array:
        """Return the powers in a new array."""
        size = np.abs(X)
        half = self.exponent == 0.5
        treated = np.sqrt(size, out=size) if half else np.power(size, self.exponent, out=size)
        signed: Array = np.copysign(treated, X, out=treated)
        return signed

    def module(self) -> nn.Module:
        """Return the layer."""
        return PowerLayer(self.exponent)


class PowerLayer(nn.Module):
    """`Power` in torch."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(self, x: Tensor) -> Tensor:
        """Return ``sign(x) * abs(x) ** exponent``."""
        return x.sign() * x.abs().pow(self.exponent)


@dataclass(frozen=True, eq=False)
class Scale(Step):
    """Take a mean off each column and divide by a scale."""

    kind = "scale"
    mean: Annotated[Array, _FLOAT, "in"]
    scale: Annotated[Array, _FLOAT, "in"]

    def __call__(self, X: Array) -> Array:
        """Return the scaled columns in a new array."""
        scaled: Array = X - self.mean.astype(X.dtype, copy=False)
        scaled /= self.scale.astype(X.dtype, copy=False)
        return scaled

    def module(self) -> nn.Module:
        """Return the layer."""
        return ScaleLayer(self.mean, self.scale)


class ScaleLayer(nn.Module):
    """`Scale` in torch; what it takes off and divides by is not trained."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Array, scale: Array) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / scale``."""
        return (x - self.mean) / self.scale


@dataclass(frozen=True, eq=False)
class Matrix(Step):
    """Multiply rows by a matrix and add a bias."""

    kind = "matrix"
    weight: Annotated[Array, _FLOAT, "out", "in"]
    bias: Annotated[Array, _FLOAT, "out"]

    def __call__(self, X: Array) -> Array:
        """Return the products."""
        product: Array = X @ self.weight.astype(X.dtype, copy=False).T
        product += self.bias.astype(X.dtype, copy=False)
        return product

    def module(self) -> nn.Module:
        """Return the layer."""
        layer = nn.Linear(*self.weight.shape[::-1])
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(self.weight)))
            layer.bias.copy_(torch.from_numpy(self.bias))
        return layer

    @classmethod
    def of_scores(cls, weight: Array, bias: Array) -> Self:
        """Return the step that gives a score a class: one row of weights becomes -f/2 and f/2."""
        if len(weight) == 1:
            weight, bias = (np.concatenate([-one, one]) / 2 for one in (weight, bias))
        return cls(weight, bias)


@dataclass(frozen=True, eq=False)
class Relu(Step):
    """Set negative values to zero."""

    kind = "relu"

    def __call__(self, X: Array) -> Array:
        """Return the values in a new array."""
        positive: Array = np.maximum(X, 0)
        return positive

    def module(self) -> nn.Module:
        """Return the layer."""
        return nn.ReLU()


@dataclass(frozen=True, eq=False)
class Log(Step):
    """Take the logarithm of probabilities, those of almost zero raised to 0.0001."""

    kind = "log"

    def __call__(self, X: Array) -> Array:
        """Return the logarithms."""
        logarithms: Array = np.log(np.maximum(X, _SMALLEST_PROBABILITY))
        return logarithms


@dataclass(frozen=True, eq=False)
class Gaussian(Step):
    """Compare rows with some vectors: ``exp(-gamma * |x - v|^2)``, in double precision."""

    kind = "gaussian"
    vectors: Annotated[Array, _FLOAT, "out", "in"]
    gamma: Number

    def __call__(self, X: Array) -> Array:
        """Return the kernel (n, vectors)."""
        return kernel(squared_distances(X, self.vectors.astype(X.dtype, copy=False)), self.gamma)

    @property
    def cells(self) -> int:
        """A row's part of the kernel."""
        return 2 * len(self.vectors)


def squared_distances(A: Array, B: Array) -> Array:
    """Return squared Euclidean distances of all rows: (n, d) and (m, d) to (n, m)."""
    centre, b = B.mean(axis=0), np.einsum("ij,ij->i", B, B)
    if 2 * centre @ centre > b.mean():  # lengths that are mostly an offset leave no digits
        A, B = A - centre, B - centre
        b = np.einsum("ij,ij->i", B, B)
    a = np.einsum("ij,ij->i", A, A)
    D: Array = A @ B.T
    D *= -2
    D += a[:, None]
    D += b
    np.maximum(D, 0, out=D)
    return D


def kernel(D: Array, gamma: float) -> Array:
    """Return ``exp(-gamma * D)`` in double precision, which libsvm wants."""
    K: Array = np.multiply(D, -gamma, dtype=np.float64)
    np.exp(K, out=K)
    return K


@dataclass(frozen=True, eq=False)
class PairVotes(Step):
    """Decide between each two classes on a kernel, as libsvm, and count smooth votes.

    With f the decision value between two classes, the one gets a vote of ``tanh(4 f)`` and the
    other as much less: nearly a whole vote outside the margin, and no jump between the classes.
    Two classes have f itself, as -f/2 and f/2; it is positive for the second, as in scikit-learn.

    Attributes
    ----------
    counts : ndarray of shape (k,), int32
        Support vectors of each class, which come class by class.
    dual : ndarray of shape (k - 1, vectors)
        Coefficients of the vectors against each of the other classes.
    intercept : ndarray of shape (k * (k - 1) / 2,)
        Of each pair of classes.
    """

    kind = "pair-votes"
    counts: Annotated[Array, _INTEGER, "out"]
    dual: Annotated[Array, _FLOAT, "others", "in"]
    intercept: Annotated[Array, _FLOAT, "pairs"]

    def __call__(self, X: Array) -> Array:
        """Return scores (n, k) of kernel rows (n, vectors)."""
        k = len(self.counts)
        ends = np.cumsum(self.counts)
        # Each class's vectors against the other classes: (n, k, k), nothing on the diagonal.
        parts = np.zeros((len(X), k, k))
        for own, (end, count) in enumerate(zip(ends, self.counts, strict=True)):
            some = slice(end - count, end)
            parts[:, own, np.arange(k) != own] = X[:, some] @ self.dual[:, some].T
        first, second = np.triu_indices(k, 1)
        value = parts[:, first, second] + parts[:, second, first] + self.intercept  # (n, pairs)
        if k == 2:
            return np.concatenate([-value, value], axis=1) / 2
        votes = np.zeros((len(X), k, k))
        votes[:, first, second] = np.tanh(_STEEPNESS * value)
        scores: Array = votes.sum(axis=2) - votes.sum(axis=1)
        return scores

    @property
    def cells(self) -> int:
        """A row's part of the votes."""
        return 3 * len(self.counts) ** 2

    def _check_values(self) -> None:
        k = len(self.counts)
        self._require(k > 1 and len(self.dual) == k - 1, "coefficients for other classes")
        self._require(len(self.intercept) == k * (k - 1) // 2, "intercepts of other pairs")
        right = (self.counts >= 0).all() and int(self.counts.sum()) == self.dual.shape[1]
        self._require(right, "counts of other support vectors")


@dataclass(frozen=True, eq=False)
class Neighbors(Step):
    """Count the votes of the most similar of some rows, for rows of length 1.

    Attributes
    ----------
    rows : ndarray of shape (m, d)
        Rows of length 1.
    codes, weights : ndarray of shape (m,), int32 and float64
        Their classes and sample weights.
    factors : ndarray of shape (k,), float64
        Class weights.
    n_neighbors : float
        Total sample weight of the neighbours that vote.
    temperature : float
        A neighbour of similarity s votes with the weight ``exp(s / temperature)``.
    """

    kind = "neighbors"
    rows: Annotated[Array, _FLOAT, "rows", "in"]
    codes: Annotated[Array, _INTEGER, "rows"]
    weights: Annotated[Array, ("float64",), "rows"]
    factors: Annotated[Array, ("float64",), "out"]
    n_neighbors: Number
    temperature: Number

    def __call__(self, X: Array) -> Array:
        """Return each class's part of the votes, (n, k)."""
        return self.votes(*nearest(X, self.rows, needed_neighbors(self.weights, self.n_neighbors)))

    def votes(self, similarities: Array, indices: Array) -> Array:
        """Count the votes of the nearest rows, which `nearest` found: (q, m) to (q, k)."""
        q, k = len(similarities), len(self.factors)
        weight, own = self.weights[indices], self.codes[indices]
        share = np.clip(self.n_neighbors - (np.cumsum(weight, axis=1) - weight), 0.0, weight)
        above = similarities.astype(np.float64) - similarities[:, :1]
        vote = share * np.exp(above / self.temperature) * self.factors[own]
        cell = np.arange(q)[:, None] * k + own
        total = np.bincount(cell.ravel(), weights=vote.ravel(), minlength=q * k).reshape(q, k)
        whole = total.sum(axis=1, keepdims=True)
        # Classes whose weight is 0 can be all that votes.
        parts: Array = np.divide(total, whole, out=np.full((q, k), 1.0 / k), where=whole > 0)
        return parts

    @property
    def cells(self) -> int:
        """A row's similarities to some of the rows."""
        return min(len(self.rows), BLOCK)

    def _check_values(self) -> None:
        k = len(self.factors)
        self._require(((self.codes >= 0) & (self.codes < k)).all(), "a row of no class")
        # How many neighbours to look at follows from the smallest weight.
        self._require((self.weights > 0).all(), "a weight that is not positive")
        self._require(self.n_neighbors >= 1 and self.temperature > 0, "impossible parameters")


def needed_neighbors(weights: Array, n_neighbors: float) -> int:
    """Return how many neighbours may be needed to reach a total weight of `n_neighbors`.

    Never more than 4,096: only weights far below 1 could ask for more.
    """
    return int(min(len(weights), _MOST, np.ceil(n_neighbors / weights.min())))


@dataclass(frozen=True, eq=False)
class Trees(Step):
    """Walk rows down decision trees and add up what their leaves say.

    Attributes
    ----------
    roots : ndarray of shape (rounds, trees), int32
        First node of each tree; the trees of a round give columns of their own.
    feature : ndarray of shape (nodes,), int32
        Column that a node looks at.
    threshold : ndarray of shape (nodes,), float32
        Values up to it go left.
    children : ndarray of shape (nodes, 2), int32
        The nodes to the left and to the right. A leaf is followed by itself.
    value : ndarray of shape (nodes, values), float32
        What a leaf adds to its tree's columns.
    baseline : ndarray of shape (trees * values,)
        Scores before the first round.
    """

    kind = "trees"
    roots: Annotated[Array, ("int32",), "rounds", "trees"]
    feature: Annotated[Array, ("int32",), "nodes"]
    threshold: Annotated[Array, ("float32",), "nodes"]
    children: Annotated[Array, ("int32",), "nodes", "sides"]
    value: Annotated[Array, ("float32",), "nodes", "values"]
    baseline: Annotated[Array, _FLOAT, "out"]

    @classmethod
    def joined(cls, trees: Sequence[Mapping[str, Array]], per_round: int, baseline: Array) -> Self:
        """Put trees together, each with its own nodes from 0 and -1 for the children of leaves.

        Parameters
        ----------
        trees : list of dict
            ``feature``, ``threshold``, ``left``, ``right`` (nodes,) and ``value`` (nodes, values).
        per_round : int
            Trees of a round.
        baseline : ndarray of shape (per_round * values,)
        """
        counts = [len(one["feature"]) for one in trees]
        start = np.concatenate([[0], np.cumsum(counts)[:-1]])
        feature, threshold, left, right, value = (
            np.concatenate([one[name] for one in trees])
            for name in ("feature", "threshold", "left", "right", "value")
        )
        leaf, itself = left < 0, np.arange(len(left))
        children = np.stack([left, right], axis=1) + np.repeat(start, counts)[:, None]
        near = threshold.astype(np.float32)
        # Rounded downwards: float32 values compare with it as with the float64.
        down = np.where(near > threshold, np.nextafter(near, np.float32(-np.inf)), near)
        return cls(
            start.astype(np.int32).reshape(-1, per_round),
            np.where(leaf, 0, feature).astype(np.int32),
            np.where(leaf, np.float32(0), down),
            np.where(leaf[:, None], itself[:, None], children).astype(np.int32),
            value.astype(np.float32),
            baseline,
        )

    @classmethod
    def of_forest(cls, forest: Any) -> Self:
        """Return the trees of a fitted forest of scikit-learn: the mean of their probabilities."""
        count = len(forest.estimators_)
        trees = [
            {
                "feature": one.feature,
                "threshold": one.threshold,
                "left": one.children_left,
                "right": one.children_right,
                "value": one.value[:, 0] / count,  # (nodes, 1, classes)
            }
            for one in (tree.tree_ for tree in forest.estimators_)
        ]
        return cls.joined(trees, 1, np.zeros(len(forest.classes_)))

    def __call__(self, X: Array) -> Array:
        """Return scores (n, trees * values)."""
        scores: Array = self.baseline + self.rounds(X).sum(axis=0, dtype=np.float64)
        return scores

    def rounds(self, X: Array) -> Array:
        """Return what each round adds to the scores, of shape (rounds, n, trees * values)."""
        # (rounds, trees, n) leaves, so that the rows of a tree are walked side by side
        leaves = self._leaves(np.ascontiguousarray(X, dtype=np.float32))
        found = self.value[leaves.reshape(*self.roots.shape, len(X)).swapaxes(1, 2)]
        return found.reshape(len(self.roots), len(X), -1)

    def _leaves(self, X: Array) -> Array:
        """Return the leaf of each row in each tree, of shape (rounds * trees * n,)."""
        now = node = np.repeat(self.roots.ravel(), len(X))
        first = np.tile(np.arange(len(X)) * X.shape[1], self.roots.size)  # of the row, in values
        values, children, walking = X.ravel(), self.children.ravel(), np.arange(len(node))
        while len(walking):
            right = values.take(first + self.feature.take(now)) > self.threshold.take(now)
            after = children.take(2 * now + right)
            on = np.flatnonzero(after != now)
            node[walking] = after
            walking, first, now = walking.take(on), first.take(on), after.take(on)
        return node

    @property
    def cells(self) -> int:
        """A row's leaves and their values."""
        return int(self.roots.size * (4 + self.value.shape[1]))

    def _check_values(self) -> None:
        n, itself = len(self.feature), np.arange(len(self.feature))[:, None]
        self._require(self.children.shape[1] == 2, "nodes without two children")
        self._require(((self.children >= 0) & (self.children < n)).all(), "a child that is none")
        # Children stand behind their parent, so that every walk ends.
        leaf = (self.children == itself).all(axis=1)
        right = (self.children > itself).all(axis=1) | leaf
        self._require(right.all(), "a child before its parent")
        self._require(((self.roots >= 0) & (self.roots < n)).all(), "a root that is none")
        # Each tree has leaves of its own, whose values account for what a row takes on its way.
        self._require(len(np.unique(self.roots)) == self.roots.size, "two trees of one root")
        columns = self.roots.shape[1] * self.value.shape[1]
        self._require(len(self.baseline) == columns, "a baseline of other columns")

    def check(self, width: int) -> int:
        """Refuse arrays that do not fit, and nodes that look at no column."""
        out = super().check(width)
        looked = (self.feature >= 0) & (self.feature < width)
        self._require(looked.all(), "a node that looks at no column")
        return out
