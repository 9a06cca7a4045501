"""Many regularised linear problems on the same rows, solved together.

A cross-validated linear head is dozens of problems (values of C x folds) that differ only in C
and in the weights of the rows: a fold is a weight of 0 or 1. They share every pass over the
features: one wide matrix product gives the scores of all of them, another one their gradients.

Problem p minimises, over standardised weights w and intercepts b,

    C_p * sum_i s_pi * loss(x_i . w + b, y_i) + ||w||^2 / 2

where x_i is standardised with the mean and deviation of the problem's own rows. That is an affine
map of the columns, folded into w and b, so no fold needs a copy of the features.

L-BFGS (Nocedal and Wright, Numerical Optimization, algorithm 7.4) with two additions that matter
more than anything else here: the ten to hundred iterations of the plain method become two to
thirty.

- The initial inverse Hessian is that of a quadratic whose curvature is the mean over the rows:
  ``(c_k * Cov(x) + I)^-1`` with ``c_k = C * sum_i s_i * loss''_ik``, refreshed at each iteration;
  the largest 256 directions of Cov(x) come from a randomised decomposition of a sample of rows,
  the rest are taken as equal. (Boehning's bound, 1/2 for every c_k, is far off for many classes.)
- It is scaled by the newest pair, ``s.y / y.Hy``, after which the step 1 is nearly always
  accepted: one pass over the rows an iteration.

Half the Newton decrement, ``g.Hg / 2``, then estimates the distance to the minimum within a
factor of about two, and is what `tol` is compared with.

Scores are (problems, classes, rows): the rows are innermost, so that the softmax runs along
contiguous memory and finished problems are dropped by a plain slice. Matrix products go through
numpy, whose OpenBLAS was measured at twice the speed of torch's MKL on AMD processors and at the
same on Intel's; everything else through torch. Threads work on blocks, not inside operations
(see `Workers`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from featcache.heads.rows import FeatureBlocks, Transform, working_dtype

Loss: TypeAlias = Literal["softmax", "logistic", "squared_hinge"]

_CELLS = 1 << 20  # scores that a thread computes at a time: 4 MB
_FLOATS = 1 << 20  # features in a block that is read from disk: 4 MB
_RANK = 256  # directions in which the preconditioner knows the covariance
_SAMPLE = 4096  # rows that the preconditioner is computed from
_PAIRS = 6  # history of L-BFGS
_STATES = 8  # groups of problems whose directions are computed side by side
# Steps without progress beyond rounding, after which there is none to come: a thousand more would
# bring less than 1e-4 in float32. The weights of a float64 fit gain digits when its value does not.
_IDLE = {torch.float32: 10, torch.float64: 50}
_FLUSH = 16  # blocks that are summed in float32 before they go to a float64 sum
_ARMIJO = 1e-4
_NOISE = 3  # relative error of an objective, in units of the scores' precision
_CONSTANT = 1e-12  # a column with less variance than this, in units of its overall one, is constant


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product of CPU tensors (the module says why through numpy)."""
    return torch.from_numpy(a.numpy() @ b.numpy())


class Workers:
    """Threads that each work on a block of their own, without threads inside.

    The products come from one library and the element-wise operations from another. Left alone,
    each keeps a pool of threads that wait by spinning, on the cores that the other one's need:
    that took up to six times the processor time on a busy machine of two cores. Freed memory is
    kept for the next block: clearing new pages took longer than reading a block. Results come in
    the order of the blocks, so that sums have the same bits whatever the number of threads.
    """

    def __init__(self, pool: ThreadPoolExecutor | None, count: int) -> None:
        self._pool = pool
        self.count = count

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Workers]:
        """Start as many threads as torch would use; stop the libraries' own meanwhile."""
        from featcache.system.memory import reuse_memory

        count = torch.get_num_threads()
        with reuse_memory(), threadpool_limits(1, user_api="blas"):
            torch.set_num_threads(1)
            try:
                if count == 1:
                    yield cls(None, 1)
                else:
                    one = partial(torch.set_num_threads, 1)
                    with ThreadPoolExecutor(count, "featcache-solver", one) as pool:
                        yield cls(pool, count)
            finally:
                torch.set_num_threads(count)

    def in_order(self, jobs: Iterable[Callable[[], Any]]) -> Iterator[Any]:
        """Run jobs, few at a time ahead of the one whose result is yielded."""
        if self._pool is None:
            for job in jobs:
                yield job()
            return
        running: deque[Future[Any]] = deque()
        for job in jobs:
            running.append(self._pool.submit(job))
            if len(running) > self.count:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


@dataclass(frozen=True)
class Design:
    """The rows of all problems, in one standardised coordinate system.

    Attributes
    ----------
    source : Tensor of shape (n, d) or FeatureBlocks
        Standardised rows in memory, sorted so that rows of one fold are together; or raw blocks,
        which are treated and standardised as they are read.
    order : ndarray of shape (n,)
        Which row of the input stands where in `source`.
    edges : list of int
        Where the sorted rows change their fold.
    weights : Tensor of shape (folds, n)
        Weight of each row in the loss of each fold's problems.
    codes : Tensor of shape (n,), int64
        Class of each row.
    centre, scale : ndarray of shape (d,), float64
        The coordinate system: mean and deviation over all rows.
    means, ratios : Tensor of shape (folds, d)
        Mean and inverse deviation of each fold's training rows, in these coordinates.
    sample : ndarray of shape (m, d)
        Some of the rows.
    transform : callable or None
        Row-wise treatment of raw blocks.
    """

    source: Tensor | FeatureBlocks
    order: np.ndarray
    edges: list[int]
    weights: Tensor
    codes: Tensor
    centre: np.ndarray
    scale: np.ndarray
    means: Tensor
    ratios: Tensor
    sample: np.ndarray
    transform: Transform | None

    @classmethod
    def build(
        cls,
        X: np.ndarray | FeatureBlocks,
        codes: np.ndarray,
        row_weights: np.ndarray,
        loss_weights: np.ndarray,
        *,
        standardize: bool = True,
        transform: Transform | None = None,
    ) -> Design:
        """Measure the rows once, and keep a standardised copy of them if they are in memory.

        Parameters
        ----------
        X : ndarray of shape (n, d), or FeatureBlocks
            Features. An array is copied, blocks are read anew for each pass.
        codes : ndarray of shape (n,), int64
            Class of each row.
        row_weights, loss_weights : ndarray of shape (folds, n)
            Weights that count for mean and deviation, and for the loss.
        standardize : bool
            Whether the problems' columns have unit deviation.
        transform : callable, optional
            Row-wise treatment, (r, d) to (r, d), in a new array.
        """
        with Workers.start() as workers:
            return cls._build(X, codes, row_weights, loss_weights, standardize, transform, workers)

    @classmethod
    def _build(
        cls,
        X: np.ndarray | FeatureBlocks,
        codes: np.ndarray,
        row_weights: np.ndarray,
        loss_weights: np.ndarray,
        standardize: bool,
        transform: Transform | None,
        workers: Workers,
    ) -> Design:
        blocks = FeatureBlocks.of(X) if isinstance(X, np.ndarray) else X
        moments = _Moments.measure(blocks, row_weights, transform, workers)
        scale = moments.deviation(-1) if standardize else np.ones(len(moments.centre))
        means = (moments.mean[:-1] - moments.centre) / scale
        ratios = np.ones_like(means)
        if standardize:
            ratios = np.stack([scale / moments.deviation(f) for f in range(len(means))])
        dtype = moments.sample.dtype
        sample = (moments.sample - moments.centre.astype(dtype)) / scale.astype(dtype)
        order, edges = np.arange(len(codes)), [0, len(codes)]
        source: Tensor | FeatureBlocks = blocks
        if isinstance(X, np.ndarray):
            order = np.lexsort(row_weights > 0)
            source = _standardised(X, order, moments.centre, scale, transform, workers)
            loss_weights, codes = loss_weights[:, order], codes[order]
            used = row_weights[:, order] > 0
            changes = np.flatnonzero((used[:, 1:] != used[:, :-1]).any(axis=0)) + 1
            edges = [0, *changes.tolist(), len(codes)]
        return cls(
            source=source,
            order=order,
            edges=edges,
            weights=torch.from_numpy(loss_weights.astype(dtype, copy=False)),
            codes=torch.from_numpy(codes),
            centre=moments.centre,
            scale=scale,
            means=torch.from_numpy(means.astype(dtype)),
            ratios=torch.from_numpy(ratios.astype(dtype)),
            sample=sample,
            transform=transform,
        )

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.codes)

    @property
    def d(self) -> int:
        """Number of columns."""
        return len(self.centre)

    @cached_property
    def principal(self) -> tuple[Tensor, Tensor, float]:
        """Largest eigenvectors (d, r) and eigenvalues (r,) of the covariance, mean of the rest."""
        with threadpool_limits(1, user_api="blas"):
            basis, spectrum, rest = _principal(self.sample)
        return torch.from_numpy(basis), torch.from_numpy(spectrum), rest

    def blocks(self, columns: int) -> Iterator[tuple[slice, Tensor | np.ndarray]]:
        """Yield (rows, block for `standardised`), sized for scores of `columns` columns."""
        size = int(np.clip(_CELLS // columns, 256, 4096))
        if isinstance(self.source, Tensor):
            for start, stop in _cut(self.edges, size):
                yield slice(start, stop), self.source[start:stop]
            return
        for images, block in self.source.blocks(min(size, max(256, _FLOATS // self.d))):
            yield self.source.rows_of(images), block

    def standardised(self, block: Tensor | np.ndarray) -> Tensor:
        """Return a block of `blocks` in the design's coordinates."""
        if isinstance(block, Tensor):
            return block
        treated = block if self.transform is None else self.transform(block)
        standard = treated - self.centre.astype(treated.dtype)
        standard /= self.scale.astype(treated.dtype)
        return torch.from_numpy(standard)


def _cut(edges: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Cut the runs between `edges` into nearly equal pieces of about `size` rows."""
    for start, stop in itertools.pairwise(edges):
        bounds = np.linspace(start, stop, max(1, round((stop - start) / size)) + 1).astype(int)
        yield from itertools.pairwise(bounds.tolist())


def _standardised(
    X: np.ndarray,
    order: np.ndarray,
    centre: np.ndarray,
    scale: np.ndarray,
    transform: Transform | None,
    workers: Workers,
) -> Tensor:
    dtype = working_dtype(X)
    out = np.empty(X.shape, dtype=dtype)

    def fill(start: int) -> None:
        some = slice(start, start + 1024)
        block = np.asarray(X[order[some]], dtype=dtype)
        treated = block if transform is None else transform(block)
        np.subtract(treated, centre.astype(dtype), out=out[some])
        out[some] /= scale.astype(dtype)

    for _ in workers.in_order(partial(fill, start) for start in range(0, len(X), 1024)):
        pass
    return torch.from_numpy(out)


@dataclass(frozen=True)
class _Moments:
    """Weighted moments of the columns; the last set of weights is one for every row."""

    mean: np.ndarray  # (folds + 1, d)
    variance: np.ndarray  # (folds + 1, d)
    sample: np.ndarray  # (at most _SAMPLE, d)

    @property
    def centre(self) -> np.ndarray:
        centre: np.ndarray = self.mean[-1]
        return centre

    def deviation(self, weights: int) -> np.ndarray:
        """Deviation, or 1 where a column is constant (as in scikit-learn's scaler)."""
        variance = self.variance[weights]
        constant = variance <= _CONSTANT * np.maximum(self.variance[-1], self.mean[-1] ** 2)
        deviation: np.ndarray = np.where(constant, 1.0, np.sqrt(variance))
        return deviation

    @classmethod
    def measure(
        cls,
        blocks: FeatureBlocks,
        weights: np.ndarray,
        transform: Transform | None,
        workers: Workers,
    ) -> _Moments:
        """Read all blocks once; deviations are from the first block's mean, to lose no digits."""
        n, d = len(blocks) * blocks.views, blocks.shape[-1]
        chosen = np.zeros(n, dtype=bool)
        chosen[np.random.default_rng(0).permutation(n)[:_SAMPLE]] = True
        shifts: list[np.ndarray] = []

        def sums(images: slice, block: np.ndarray) -> tuple[np.ndarray, ...]:
            rows = blocks.rows_of(images)
            treated = block if transform is None else transform(block)
            if not shifts:
                shifts.append(treated.mean(axis=0))
            away = treated - shifts[0]
            ones = np.ones((1, len(away)), dtype=away.dtype)
            both = np.concatenate([weights[:, rows].astype(away.dtype), ones])
            kept = treated[chosen[rows]]
            return both @ away, both @ np.square(away, out=away), kept

        stream = blocks.blocks(max(256, _FLOATS // d))
        total, squares, kept = sums(*next(stream))
        total, squares, sample = total.astype(np.float64), squares.astype(np.float64), [kept]
        for one, two, kept in workers.in_order(partial(sums, *pair) for pair in stream):
            total += one
            squares += two
            sample.append(kept)
        size = np.append(weights.sum(axis=1, dtype=np.float64), n)[:, None]
        total /= size
        variance = np.maximum(squares / size - total**2, 0.0)
        return cls(shifts[0].astype(np.float64) + total, variance, np.concatenate(sample))


def _principal(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the leading eigenvectors and eigenvalues of ``sample.T @ sample / n``, and the rest.

    Randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) with one
    round: a preconditioner needs no digits.
    """
    n, d = sample.shape
    rank = min(_RANK, n, d)
    start = np.random.default_rng(0).standard_normal((d, min(rank + 16, d)), dtype=np.float32)
    start = start.astype(sample.dtype)
    basis = np.linalg.qr(sample.T @ (sample @ start))[0]
    basis = np.linalg.qr(sample.T @ (sample @ basis))[0]
    projected = sample @ basis
    values, vectors = np.linalg.eigh((projected.T @ projected).astype(np.float64) / n)
    leading = np.argsort(values)[::-1][:rank]
    spectrum = np.maximum(values[leading], 0.0)
    energy = float(np.square(sample, dtype=np.float64).sum() / n)
    rest = max(0.0, energy - float(spectrum.sum())) / max(1, d - rank)
    found = basis @ vectors[:, leading].astype(sample.dtype)
    return np.ascontiguousarray(found), spectrum.astype(sample.dtype), rest


@dataclass(frozen=True)
class Problems:
    """Which problems are solved.

    Attributes
    ----------
    loss : {"softmax", "logistic", "squared_hinge"}
        Softmax couples the classes of a problem; the two others are one problem a class.
    C : Tensor of shape (p, 1, 1)
        Weight of the loss.
    fold : Tensor of shape (p,), int64
        Row of `Design.weights`.
    positive : Tensor of shape (p, k) or None
        One-vs-rest: factors on the weights of a class's own rows.
    """

    loss: Loss
    C: Tensor
    fold: Tensor
    positive: Tensor | None = None

    @classmethod
    def join(cls, some: Sequence[Problems]) -> Problems:
        """Put problems with the same loss behind each other."""
        first = some[0]
        positive = [one.positive for one in some if one.positive is not None]
        return cls(
            first.loss,
            torch.cat([one.C for one in some]),
            torch.cat([one.fold for one in some]),
            torch.cat(positive) if positive else None,
        )

    def select(self, keep: Tensor | slice) -> Problems:
        """Return the problems numbered `keep`."""
        positive = None if self.positive is None else self.positive[keep]
        return Problems(self.loss, self.C[keep], self.fold[keep], positive)


@dataclass
class _Value:
    """Objectives, gradients and mean curvatures at one point of each problem."""

    f: Tensor  # (p, k or 1, 1) float64
    G: Tensor  # (p, k, d)
    Gb: Tensor  # (p, k, 1)
    curvature: Tensor  # (p, k, 1)

    def take(self, keep: Tensor | slice) -> _Value:
        return _Value(self.f[keep], self.G[keep], self.Gb[keep], self.curvature[keep])

    def merge(self, accepted: Tensor, other: _Value) -> _Value:
        return _Value(
            torch.where(accepted, other.f, self.f),
            torch.where(accepted, other.G, self.G),
            torch.where(accepted, other.Gb, self.Gb),
            torch.where(accepted, other.curvature, self.curvature),
        )


def _thin(L: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return every few columns, about 256: curvature only has to be known roughly."""
    step = max(1, L.shape[-1] // 256)
    return tuple(one[..., ::step] for one in (L, *others))


def _softmax(L: Tensor, codes: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (p, 1), residual (p, k, r) and curvature (p, k) of scores (p, k, r)."""
    L = torch.log_softmax(L, dim=1)
    truth = codes.expand(len(L), 1, -1)
    loss = -(L.gather(1, truth) * s).sum(dim=2, dtype=torch.float64)
    P = L.exp_()
    few, weight = _thin(P, s)
    share = s.sum(dim=2) / weight.sum(dim=2).clamp(min=1e-30)
    curvature = (few * (1 - few) * weight).sum(dim=2) * share
    P *= s
    return loss, P.scatter_add_(1, truth, -s), curvature


def _signed(L: Tensor, codes: Tensor, s: Tensor, positive: Tensor | None) -> tuple[Tensor, Tensor]:
    """Targets of -1 and 1 (k, r), and weights (p, k or 1, r), for one problem a class.

    With two classes there is one problem, and its positive class is the second.
    """
    k = L.shape[1]
    own = torch.arange(k)[:, None] == codes if k > 1 else (codes == 1)[None]
    target = own.to(L.dtype) * 2 - 1
    if positive is not None:
        s = s * torch.where(own, positive[:, :, None], 1.0)
    return target, s


def _logistic(
    L: Tensor, codes: Tensor, s: Tensor, positive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    target, s = _signed(L, codes, s, positive)
    margin = L.mul_(target)
    loss = (torch.nn.functional.softplus(-margin) * s).sum(dim=2, dtype=torch.float64)
    P = margin.neg_().sigmoid_()
    R = P * s
    curvature = (R * (1 - P)).sum(dim=2)
    return loss, R.mul_(-target), curvature


def _squared_hinge(
    L: Tensor, codes: Tensor, s: Tensor, positive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    target, s = _signed(L, codes, s, positive)
    slack = L.mul_(target).neg_().add_(1).clamp_(min=0)
    R = slack * s
    loss = (R * slack).sum(dim=2, dtype=torch.float64)
    curvature = 2 * ((slack > 0) * s).sum(dim=2)
    return loss, R.mul_(-2 * target), curvature


class _Part:
    """The problems that train on the same rows, and the sums over those rows."""

    def __init__(
        self, design: Design, problems: Problems, used: Tensor, Wg: Tensor, offset: Tensor
    ) -> None:
        self.used = used.nonzero()[:, 0]
        every = len(self.used) == len(Wg)
        own = problems if every else problems.select(self.used)
        self.problems = own
        self._Wg = (Wg if every else Wg[self.used]).reshape(-1, design.d)
        self._offset = offset if every else offset[self.used]
        p, k = self._offset.shape[:2]
        self.loss = torch.zeros((p, 1 if own.loss == "softmax" else k), dtype=torch.float64)
        self.curvature = torch.zeros((p, k), dtype=torch.float64)
        self.Gs = torch.zeros((p, k, 1), dtype=torch.float64)
        self.Gx = torch.zeros_like(self._Wg)
        self._exact: Tensor | None = None
        self._added = 0

    def sums(self, X: Tensor, codes: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        """Return the sums over a block of rows (r, d), given its weights (folds, r)."""
        p, k = self.curvature.shape
        L = product(self._Wg, X.T).reshape(p, k, -1)
        L += self._offset
        s = weights[self.problems.fold][:, None]
        if self.problems.loss == "softmax":
            loss, R, curvature = _softmax(L, codes, s)
        else:
            rule = _logistic if self.problems.loss == "logistic" else _squared_hinge
            loss, R, curvature = rule(L, codes, s, self.problems.positive)
        flat = R.reshape(p * k, -1)
        return loss, curvature, R.sum(dim=2, keepdim=True), product(flat, X)

    def add(self, loss: Tensor, curvature: Tensor, Gs: Tensor, Gx: Tensor) -> None:
        """Add the sums over a block."""
        self.loss += loss
        self.curvature += curvature
        self.Gs += Gs
        self.Gx += Gx
        self._added += 1
        if self._added == _FLUSH:
            # Many small terms on a large sum would lose their digits in float32.
            self._exact = self.Gx.double() if self._exact is None else self._exact + self.Gx
            self.Gx.zero_()
            self._added = 0

    def gradient(self) -> Tensor:
        """Return the sums of residual times row, (p, k, d)."""
        total = self.Gx if self._exact is None else (self._exact + self.Gx).to(self.Gx.dtype)
        return total.view(*self.curvature.shape, -1)


def evaluate(design: Design, problems: Problems, W: Tensor, b: Tensor, workers: Workers) -> _Value:
    """Return objectives and gradients of all `problems`, in one pass over the rows."""
    p, k, _ = W.shape
    ratios, means = design.ratios[problems.fold][:, None], design.means[problems.fold][:, None]
    Wg = W * ratios
    offset = b - (Wg * means).sum(dim=2, keepdim=True)
    parts: dict[tuple[bool, ...], _Part] = {}

    def jobs() -> Iterator[Callable[[], tuple[_Part, tuple[Tensor, ...]]]]:
        for rows, block in design.blocks(p * k):
            weights = design.weights[:, rows]
            used = (weights > 0).any(dim=1)[problems.fold]
            if not used.any():
                continue
            key = tuple(used.tolist())
            if key not in parts:
                parts[key] = _Part(design, problems, used, Wg, offset)
            yield partial(_job, design, parts[key], block, design.codes[rows], weights)

    for part, sums in workers.in_order(jobs()):
        part.add(*sums)
    loss = torch.zeros((p, 1 if problems.loss == "softmax" else k), dtype=torch.float64)
    curvature = torch.zeros((p, k), dtype=torch.float64)
    Gx, Gs = torch.zeros_like(W), torch.zeros((p, k, 1), dtype=torch.float64)
    for part in parts.values():
        loss[part.used] += part.loss
        curvature[part.used] += part.curvature
        Gs[part.used] += part.Gs
        Gx[part.used] += part.gradient()
    C = problems.C
    Gb = Gs.to(W.dtype)
    G = Gx.addcmul_(Gb, means, value=-1).mul_(ratios).mul_(C).add_(W)
    Gb *= C
    size = W.square().sum(dim=2, keepdim=True, dtype=torch.float64)
    if problems.loss == "softmax":
        size = size.sum(dim=1, keepdim=True)
    return _Value(C * loss[:, :, None] + size / 2, G, Gb, C * curvature[:, :, None].to(W.dtype))


def _job(
    design: Design, part: _Part, block: Tensor | np.ndarray, codes: Tensor, weights: Tensor
) -> tuple[_Part, tuple[Tensor, ...]]:
    return part, part.sums(design.standardised(block), codes, weights)


class _Preconditioner:
    """Inverse Hessian of the quadratic with the problems' mean curvatures."""

    def __init__(self, design: Design, curvature: Tensor) -> None:
        self._basis, spectrum, rest = design.principal
        # Curvature vanishes when all rows are far on the right side; the penalty then rules.
        self._rest = 1 / (curvature * rest + 1)
        self._leading = 1 / (curvature * spectrum + 1) - self._rest
        self._intercept = 1 / curvature.clamp(min=1e-6)

    def __call__(self, Q: Tensor, Qb: Tensor) -> tuple[Tensor, Tensor]:
        p, k, d = Q.shape
        inside = product(Q.reshape(-1, d), self._basis).reshape(p, k, -1) * self._leading
        back = product(inside.reshape(p * k, -1), self._basis.T).reshape(p, k, d)
        return back + Q * self._rest, Qb * self._intercept


@dataclass
class _State:
    """The running problems: point, value, direction, step, and history."""

    numbers: Tensor  # (p,) which of the original problems these are
    problems: Problems
    W: Tensor
    b: Tensor
    value: _Value
    D: Tensor
    Db: Tensor
    slope: Tensor  # (p, k or 1, 1) along D
    step: Tensor  # the same shape
    pairs: list[tuple[Tensor, ...]]  # (S, Sb, Y, Yb, rho)
    lowest: Tensor  # (p,) objective when it last fell by more than rounding
    idle: Tensor  # (p,) steps since then

    def take(self, keep: Tensor) -> _State:
        return _State(
            self.numbers[keep],
            self.problems.select(keep),
            self.W[keep],
            self.b[keep],
            self.value.take(keep),
            self.D[keep],
            self.Db[keep],
            self.slope[keep],
            self.step[keep],
            [tuple(part[keep] for part in pair) for pair in self.pairs],
            self.lowest[keep],
            self.idle[keep],
        )


def _dot(problems: Problems, A: Tensor, Ab: Tensor, B: Tensor, Bb: Tensor) -> Tensor:
    """Inner product of each problem: over classes and columns, or over columns alone."""
    inner: Tensor = torch.linalg.vecdot(A, B)[:, :, None] + Ab * Bb
    return inner.sum(dim=1, keepdim=True) if problems.loss == "softmax" else inner


def _direction(design: Design, state: _State) -> tuple[Tensor, Tensor, Tensor]:
    """Return the L-BFGS direction and its slope."""
    problems, value = state.problems, state.value
    precondition = _Preconditioner(design, value.curvature)
    Q, Qb = value.G.clone(), value.Gb.clone()
    steps = []
    for S, Sb, Y, Yb, rho in reversed(state.pairs):
        a = rho * _dot(problems, S, Sb, Q, Qb)
        Q.addcmul_(a, Y, value=-1)
        Qb.addcmul_(a, Yb, value=-1)
        steps.append(a)
    Q, Qb = precondition(Q, Qb)
    if state.pairs:
        S, Sb, Y, Yb, rho = state.pairs[-1]
        curved = _dot(problems, Y, Yb, *precondition(Y, Yb))
        scaled = torch.where(rho > 0, 1 / (rho * curved).clamp(min=1e-30), 1.0)
        Q *= scaled
        Qb *= scaled
    for (S, Sb, Y, Yb, rho), a in zip(state.pairs, reversed(steps), strict=True):
        change = a - rho * _dot(problems, Y, Yb, Q, Qb)
        Q.addcmul_(change, S)
        Qb.addcmul_(change, Sb)
    return -Q, -Qb, -_dot(problems, Q, Qb, value.G, value.Gb).double()


def _trial(state: _State) -> tuple[Tensor, Tensor]:
    """Return the points that the current steps lead to."""
    step = state.step.to(state.W.dtype)
    return torch.addcmul(state.W, step, state.D), torch.addcmul(state.b, step, state.Db)


def _advance(design: Design, state: _State, W: Tensor, b: Tensor, tried: _Value) -> _State:
    """Move the problems whose objective fell enough, shorten the steps of the others."""
    problems, value = state.problems, state.value
    noise = _NOISE * torch.finfo(W.dtype).eps * value.f.abs()
    wanted = value.f + _ARMIJO * state.step * state.slope + noise
    accepted = tried.f <= wanted
    S, Sb = (W - state.W).mul_(accepted), (b - state.b).mul_(accepted)
    Y, Yb = tried.G - value.G, tried.Gb - value.Gb
    bent = _dot(problems, S, Sb, Y, Yb)
    # A problem that did not move, or moved within rounding, leaves an empty pair.
    rho = torch.where(bent > 0, 1 / bent.clamp(min=1e-30), 0.0)
    state.pairs = [*state.pairs, (S, Sb, Y, Yb, rho)][-_PAIRS:]
    # Minimum of the parabola through the value and slope at 0 and the value tried.
    rise = (tried.f - value.f - state.step * state.slope).clamp(min=1e-300)
    shorter = (-state.slope * state.step**2 / (2 * rise)).clamp(0.1 * state.step, 0.5 * state.step)
    if accepted.all():
        state.W, state.b, state.value = W, b, tried
        state.D, state.Db, state.slope = _direction(design, state)
        state.step = torch.ones_like(shorter)
        return state
    state.W, state.b = torch.where(accepted, W, state.W), torch.where(accepted, b, state.b)
    state.value = value.merge(accepted, tried)
    D, Db, slope = _direction(design, state)
    state.D = torch.where(accepted, D, state.D)
    state.Db = torch.where(accepted, Db, state.Db)
    state.slope = torch.where(accepted, slope, state.slope)
    state.step = torch.where(accepted, torch.ones_like(shorter), shorter)
    return state


@dataclass(frozen=True)
class Solution:
    """Minimisers, in standardised coordinates.

    Attributes
    ----------
    W : Tensor of shape (p, k, d); b : Tensor of shape (p, k, 1)
        Weights and intercepts.
    objective : ndarray of shape (p, k or 1), float64
        Value reached.
    passes : ndarray of shape (p,), int
        Passes over the rows until each problem was done.
    converged : ndarray of shape (p,), bool
        Whether `tol` was reached.
    """

    W: Tensor
    b: Tensor
    objective: np.ndarray
    passes: np.ndarray
    converged: np.ndarray

    def keep(self, state: _State, done: Tensor) -> None:
        """Take over where the problems marked in `done` are."""
        numbers = state.numbers[done]
        self.W[numbers], self.b[numbers] = state.W[done], state.b[done]
        self.objective[numbers] = state.value.f[done, :, 0].numpy()


def minimise(
    design: Design,
    problems: Problems,
    W: Tensor,
    b: Tensor,
    *,
    tol: float = 1e-6,
    max_iter: int = 1000,
) -> Solution:
    """Solve all `problems` from the starting points `W`, `b`.

    Parameters
    ----------
    design : Design
        The rows.
    problems : Problems
        What to solve.
    W, b : Tensor of shape (p, k, d) and (p, k, 1)
        Where to start.
    tol : float
        A problem is done when half its Newton decrement, an estimate of the distance to the
        minimum, is below `tol` times its objective.
    max_iter : int
        Passes over the rows at most.
    """
    with Workers.start() as workers:
        return _minimise(design, problems, W, b, tol, max_iter, workers)


def _minimise(
    design: Design,
    problems: Problems,
    W: Tensor,
    b: Tensor,
    tol: float,
    max_iter: int,
    workers: Workers,
) -> Solution:
    value = evaluate(design, problems, W, b, workers)
    states = _split(problems, W, b, value)
    for state in states:
        state.D, state.Db, state.slope = _direction(design, state)
    solution = Solution(
        W.clone(),
        b.clone(),
        value.f[:, :, 0].numpy().copy(),
        np.full(len(W), max_iter),
        np.zeros(len(W), dtype=bool),
    )
    for iteration in range(1, max_iter + 1):
        states = [rest for state in states if (rest := _retire(state, solution, tol, iteration))]
        if not states or iteration == max_iter:
            break
        trials = [_trial(state) for state in states]
        W = torch.cat([trial for trial, _ in trials])
        b = torch.cat([trial for _, trial in trials])
        everything = Problems.join([state.problems for state in states])
        tried = evaluate(design, everything, W, b, workers)
        ends = np.cumsum([len(state.numbers) for state in states]).tolist()
        own = [
            slice(end - len(state.numbers), end) for end, state in zip(ends, states, strict=True)
        ]
        states = list(
            workers.in_order(
                partial(_advance, design, state, W[rows], b[rows], tried.take(rows))
                for rows, state in zip(own, states, strict=True)
            )
        )
    for state in states:
        solution.keep(state, torch.ones(len(state.numbers), dtype=torch.bool))
    if problems.loss == "softmax":
        # The same constant on all classes changes nothing: settle on a sum of zero.
        solution.b.sub_(solution.b.mean(dim=1, keepdim=True))
    return solution


def _split(problems: Problems, W: Tensor, b: Tensor, value: _Value) -> list[_State]:
    """Deal the problems out to a few states, which advance side by side.

    Their number does not depend on the number of threads: products of other shapes round
    differently.
    """
    states = []
    for numbers in torch.arange(len(W)).chunk(_STATES):
        some = slice(int(numbers[0]), int(numbers[-1]) + 1)
        mine, own = problems.select(some), value.take(some)
        unset = torch.ones_like(own.f)
        total = own.f.sum(dim=(1, 2))
        idle = torch.zeros(len(numbers), dtype=torch.int64)
        states.append(
            _State(numbers, mine, W[some], b[some], own, W, b, unset, unset, [], total, idle)
        )
    return states


def _retire(state: _State, solution: Solution, tol: float, iteration: int) -> _State | None:
    """Write finished problems to `solution` and return the others."""
    close = -state.slope / 2 <= tol * state.value.f.abs()
    total = state.value.f.sum(dim=(1, 2))
    noise = _NOISE * torch.finfo(state.W.dtype).eps
    fell = total < state.lowest - noise * state.lowest.abs()
    state.lowest = torch.where(fell, total, state.lowest)
    state.idle = torch.where(fell, 0, state.idle + 1)
    done = close.all(dim=2).all(dim=1) | (state.idle > _IDLE[state.W.dtype])
    if not done.any():
        return state
    solution.keep(state, done)
    solution.passes[state.numbers[done]] = iteration
    solution.converged[state.numbers[done]] = True
    left = (~done).nonzero()[:, 0]
    return state.take(left) if len(left) else None


def unstandardise(design: Design, fold: int, W: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (k, d) and intercepts (k,), float64, for raw (treated) features."""
    inner = W.double().numpy() * design.ratios[fold].double().numpy()
    weights = inner / design.scale
    offset = b[:, 0].double().numpy() - inner @ design.means[fold].double().numpy()
    return weights, offset - weights @ design.centre


def standardise(
    design: Design, fold: int, weights: np.ndarray, intercept: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Invert `unstandardise`, for a warm start: (k, d) and (k, 1)."""
    inner = weights * design.scale
    b = intercept + weights @ design.centre + inner @ design.means[fold].double().numpy()
    W = inner / design.ratios[fold].double().numpy()
    dtype = design.ratios.dtype
    return torch.from_numpy(W).to(dtype), torch.from_numpy(b).to(dtype)[:, None]
