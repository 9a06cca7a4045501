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
factor of about two, and is what `tol` is compared with: as a part of the objective, and of how far
that lies below the best constant scores. A strong penalty keeps solutions so near to those that
they would pass for the minimum.

Scores are (problems, classes, rows): the rows are innermost, so that the softmax runs along
contiguous memory and finished problems are dropped by a plain slice. Matrix products go through
numpy, whose OpenBLAS was measured at twice the speed of torch's MKL on AMD processors and at the
same on Intel's; everything else through torch. Threads work on blocks, not inside operations
(see `Workers`).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from threadpoolctl import ThreadpoolController, threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from featcache.heads.rows import FeatureBlocks, check_values, working_dtype
from featcache.heads.steps import Scale, Step, chained

Loss: TypeAlias = Literal["log", "squared_hinge"]

_CELLS = 1 << 20  # scores that a thread computes at a time: 4 MB
_FLOATS = 1 << 20  # features in a block that is read from disk: 4 MB
_RANK = 256  # directions in which the preconditioner knows the covariance
_SAMPLE = 4096  # rows that the preconditioner is computed from
_PAIRS = 6  # history of L-BFGS
_GROUPS = 8  # of problems, whose directions are computed side by side
# Steps without progress beyond rounding, after which there is none to come: a thousand more would
# bring less than 1e-4 in float32. The weights of a float64 fit gain digits when its value does not.
_IDLE = {torch.float32: 10, torch.float64: 50}
_ARMIJO = 1e-4
_NOISE = 3  # relative error of an objective, in units of the scores' precision
_STEEPEST = 10.0  # a fold's deviation is taken as no less than a tenth of that of all folds' rows
# At a thread's first operation of this size torch sets what it was told; of a larger one, it would
# start threads, which then wait by spinning.
_GRAIN = 1 << 15
_ALONE = threading.RLock()  # held by the caller whose threads work
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

    def __init__(self, pool: ThreadPoolExecutor, count: int) -> None:
        self._pool, self._count = pool, count

    @classmethod
    @contextlib.contextmanager
    def start(cls) -> Iterator[Workers]:
        """Start as many threads as torch would use; stop the libraries' own meanwhile.

        Of several callers one works at a time: each puts back what it found. Threads are counted
        by OpenMP for each thread; what torch sets itself holds for threads to come, too.
        """
        from featcache.system.memory import reuse_memory

        controller = ThreadpoolController()

        def alone() -> None:
            torch.ones(_GRAIN)
            controller.limit(limits=1, user_api="openmp")

        with _ALONE, reuse_memory():
            torch.ones(_GRAIN)
            count = torch.get_num_threads()
            with (
                controller.limit(limits=1),
                ThreadPoolExecutor(count, "featcache-solver", alone) as pool,
            ):
                yield cls(pool, count)

    def in_order(self, jobs: Iterable[Callable[[], Any]]) -> Iterator[Any]:
        """Run jobs, few at a time ahead of the one whose result is yielded."""
        running: deque[Future[Any]] = deque()
        for job in jobs:
            running.append(self._pool.submit(job))
            if len(running) > self._count:
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
        which go through `steps` as they are read.
    steps : list of Step
        The row-wise treatment, if there is one, and the scaling over all rows.
    order : ndarray of shape (n,)
        Which row of the input stands where in `source`.
    edges : list of int
        Where the sorted rows change their fold.
    weights : Tensor of shape (folds, n)
        Weight of each row in the loss of each fold's problems.
    codes : Tensor of shape (n,), int64
        Class of each row.
    means, ratios : Tensor of shape (folds, d)
        Mean, as the loss weights them, and inverse deviation of each fold's training rows, in these
        coordinates; 0 in place of the latter where a column is constant.
    sample : ndarray of shape (m, d)
        Some of the standardised rows.
    """

    source: Tensor | FeatureBlocks
    steps: list[Step]
    order: np.ndarray
    edges: list[int]
    weights: Tensor
    codes: Tensor
    means: Tensor
    ratios: Tensor
    sample: np.ndarray

    @classmethod
    def build(
        cls,
        X: np.ndarray | FeatureBlocks,
        codes: np.ndarray,
        row_weights: np.ndarray,
        loss_weights: np.ndarray,
        *,
        standardize: bool = True,
        treatment: Step | None = None,
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
        treatment : Step, optional
            What comes before the standardisation, row by row.
        """
        blocks = FeatureBlocks.of(X) if isinstance(X, np.ndarray) else X
        steps = [] if treatment is None else [treatment]
        with Workers.start() as workers:
            largest = row_weights.max(axis=0)  # (n,)
            # Around the loss's own mean the intercept is apart from the weights, where these are
            # small. Otherwise their first step is right but for the intercept, and looks converged.
            sets = [row_weights] if loss_weights is row_weights else [row_weights, loss_weights]
            weights = np.concatenate([*sets, largest[None]])
            mean, variance, sample = _moments(blocks, weights, largest > 0, steps, workers)
            variance = np.delete(variance, slice(len(row_weights), -1), axis=0)
            means = mean[-1 - len(row_weights) : -1]
            constant = variance <= _CONSTANT * np.maximum(variance[-1], mean[-1] ** 2)
            deviation = np.where(constant, 1.0, np.sqrt(variance)) if standardize else 1.0
            centre, scale = mean[-1], np.broadcast_to(deviation, variance.shape)[-1]
            # A column that is constant in a fold has no weight there, whatever other rows hold; the
            # one image in which it hardly fires does not say how far it may go.
            ratios = np.where(constant, 0.0, np.minimum(scale / deviation, _STEEPEST))[:-1]
            scaling = Scale(centre, scale)
            steps.append(scaling)
            source: Tensor | FeatureBlocks = blocks
            order, edges = np.arange(len(codes)), [0, len(codes)]
            if isinstance(X, np.ndarray):
                order = np.lexsort(row_weights > 0)
                source = _standardised(X, order, steps, workers)
                loss_weights, codes = loss_weights[:, order], codes[order]
                used = row_weights[:, order] > 0
                changes = np.flatnonzero((used[:, 1:] != used[:, :-1]).any(axis=0)) + 1
                edges = [0, *changes.tolist(), len(codes)]
        dtype = sample.dtype
        return cls(
            source=source,
            steps=steps,
            order=order,
            edges=edges,
            weights=torch.from_numpy(loss_weights.astype(dtype, copy=False)),
            codes=torch.from_numpy(codes),
            means=torch.from_numpy(((means - centre) / scale).astype(dtype)),
            ratios=torch.from_numpy(ratios.astype(dtype)),
            sample=scaling(sample),
        )

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.codes)

    @property
    def d(self) -> int:
        """Number of columns."""
        return int(self.sample.shape[1])

    @cached_property
    def principal(self) -> tuple[Tensor, Tensor, float]:
        """Largest eigenvectors and eigenvalues (r,) of the covariance, and the mean of the rest.

        The eigenvectors are (d + 1, r): zero for the intercept.
        """
        with threadpool_limits(1, user_api="blas"):
            basis, spectrum, rest = _principal(self.sample)
        padded = np.concatenate([basis, np.zeros((1, len(spectrum)), dtype=basis.dtype)])
        return torch.from_numpy(padded), torch.from_numpy(spectrum), rest

    def affine(self, V: Tensor, fold: Tensor) -> tuple[Tensor, Tensor]:
        """Return solutions as weights (..., k, d) and offsets (..., k, 1) for the design's rows.

        Parameters
        ----------
        V : Tensor of shape (..., folds, k, d + 1)
            Weights and intercepts in the coordinates of each fold.
        fold : Tensor of shape (folds,), int64
            Which these are.
        """
        weights = V[..., :-1] * self.ratios[fold][:, None]
        moved = (weights * self.means[fold][:, None]).sum(dim=-1, keepdim=True)
        return weights, V[..., -1:] - moved

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
        return torch.from_numpy(chained(self.steps, block))


def _cut(edges: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Cut the runs between `edges` into nearly equal pieces of about `size` rows."""
    for start, stop in itertools.pairwise(edges):
        bounds = np.linspace(start, stop, max(1, round((stop - start) / size)) + 1).astype(int)
        yield from itertools.pairwise(bounds.tolist())


def _standardised(
    X: np.ndarray, order: np.ndarray, steps: Sequence[Step], workers: Workers
) -> Tensor:
    """Send rows (n, d) through the steps, in another order."""
    out = np.empty(X.shape, dtype=working_dtype(X))

    def fill(start: int) -> None:
        some = slice(start, start + 1024)
        out[some] = chained(steps, X[order[some]].astype(out.dtype, copy=False))

    for _ in workers.in_order(partial(fill, start) for start in range(0, len(X), 1024)):
        pass
    return torch.from_numpy(out)


def _moments(
    blocks: FeatureBlocks,
    weights: np.ndarray,
    used: np.ndarray,
    steps: Sequence[Step],
    workers: Workers,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read all blocks once; return weighted moments of the columns, and some of the rows.

    Parameters
    ----------
    blocks : FeatureBlocks
        The rows (n, d).
    weights : ndarray of shape (sets, n)
        Weights of the rows.
    used : ndarray of shape (n,), bool
        Of which rows the sample is.
    steps : sequence of Step
        Treatment of the rows.

    Returns
    -------
    mean, variance : ndarray of shape (sets, d), float64
        For each set of weights.
    sample : ndarray of shape (at most 4096, d)
        Treated rows.
    """
    d = blocks.shape[-1]
    shuffled = np.random.default_rng(0).permutation(len(used))
    chosen = np.zeros(len(used), dtype=bool)
    chosen[shuffled[used[shuffled]][:_SAMPLE]] = True
    shifts: list[np.ndarray] = []  # the first block's mean, so that squares lose no digits

    def sums(images: slice, block: np.ndarray) -> tuple[np.ndarray, ...]:
        check_values(block, images, blocks.views)
        rows, treated = blocks.rows_of(images), chained(steps, block)
        if not shifts:
            shifts.append(treated.mean(axis=0, dtype=np.float64))
        # In float32 the variance of a column that is constant in a fold would be rounding noise.
        away = np.subtract(treated, shifts[0], dtype=np.float64)
        own = weights[:, rows].astype(np.float64)
        kept = treated[chosen[rows]]
        return own @ away, own @ np.square(away, out=away), kept

    stream = blocks.blocks(max(256, _FLOATS // d))
    total, squares, kept = sums(*next(stream))
    sample = [kept]
    for one, two, kept in workers.in_order(partial(sums, *pair) for pair in stream):
        total += one
        squares += two
        sample.append(kept)
    size = weights.sum(axis=1, keepdims=True, dtype=np.float64)
    total /= size
    variance = np.maximum(squares / size - total**2, 0.0)
    return shifts[0] + total, variance, np.concatenate(sample)


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
    loss : {"log", "squared_hinge"}
        The logarithmic loss of more than two classes couples them (softmax). Otherwise each class
        is a problem of its own, against the rest; of two classes there is one problem, whose
        positive class is the second.
    C : Tensor of shape (p, 1, 1)
        Weight of the loss.
    fold : Tensor of shape (p,), int64
        Row of `Design.weights`.
    positive : Tensor of shape (p, k, 1) or None
        One against the rest: factors on the weights of a class's own rows.
    """

    loss: Loss
    C: Tensor
    fold: Tensor
    positive: Tensor | None = None

    def select(self, keep: Tensor) -> Problems:
        """Return the problems numbered `keep`."""
        positive = None if self.positive is None else self.positive[keep]
        return replace(self, C=self.C[keep], fold=self.fold[keep], positive=positive)


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


def _targets(L: Tensor, codes: Tensor) -> Tensor:
    """Return -1 and 1 (k, r): of each class, or of the second one where there are two."""
    k = L.shape[1]
    own = torch.arange(k)[:, None] == codes if k > 1 else (codes == 1)[None]
    return own.to(L.dtype) * 2 - 1


def _logistic(L: Tensor, codes: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    target = _targets(L, codes)
    margin = L.mul_(target)
    loss = (torch.nn.functional.softplus(-margin) * s).sum(dim=2, dtype=torch.float64)
    P = margin.neg_().sigmoid_()
    R = P * s
    curvature = (R * (1 - P)).sum(dim=2)
    return loss, R.mul_(-target), curvature


def _squared_hinge(
    L: Tensor, codes: Tensor, s: Tensor, positive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    target = _targets(L, codes)
    if positive is not None:
        s = s * torch.where(target > 0, positive, 1.0)
    slack = L.mul_(target).neg_().add_(1).clamp_(min=0)
    R = slack * s
    loss = (R * slack).sum(dim=2, dtype=torch.float64)
    curvature = 2 * ((slack > 0) * s).sum(dim=2)
    return loss, R.mul_(-2 * target), curvature


_Value: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Of points of p problems: the objectives (p, k or 1, 1), in float64; their gradients
(p, k, d + 1), the intercept's last; and mean curvatures (p, k, 1)."""


def evaluate(design: Design, problems: Problems, V: Tensor, workers: Workers) -> _Value:
    """Return objectives, gradients and curvatures of all `problems` at V (p, k, d + 1).

    That is one pass over the rows. A problem that does not train on a block costs nothing there.
    """
    p, k, _ = V.shape
    weights, offset = design.affine(V, problems.fold)
    # The problems that train on the same rows: their numbers, and what belongs to them.
    parts: dict[tuple[bool, ...], tuple[Tensor, Problems, Tensor, Tensor]] = {}

    def jobs() -> Iterator[Callable[[], tuple[Tensor, ...]]]:
        for rows, block in design.blocks(p * k):
            own = design.weights[:, rows]
            folds = (own > 0).any(dim=1)
            key = tuple(folds.tolist())
            if key not in parts:
                used = folds[problems.fold].nonzero()[:, 0]
                parts[key] = (used, problems.select(used), weights[used], offset[used])
            if len(parts[key][0]):
                yield partial(_sums, design, parts[key], block, design.codes[rows], own)

    coupled = problems.loss == "log" and k > 1
    shapes = (p, 1 if coupled else k), (p, k), (p, k, 1), (p, k, V.shape[2] - 1)
    # Many small terms on a large sum would lose their digits in float32.
    totals = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for used, *sums in workers.in_order(jobs()):
        for total, part in zip(totals, sums, strict=True):
            total.index_add_(0, used, part.double())
    loss, curvature, Gs, Gx = totals
    ratios, means = design.ratios[problems.fold][:, None], design.means[problems.fold][:, None]
    Gb, C, W = Gs.to(V.dtype), problems.C, V[..., :-1]
    Gw = Gx.to(V.dtype).addcmul_(Gb, means, value=-1).mul_(ratios).mul_(C).add_(W)
    size = W.square().sum(dim=2, keepdim=True, dtype=torch.float64)
    if coupled:
        size = size.sum(dim=1, keepdim=True)
    G = torch.cat([Gw, Gb.mul_(C)], dim=2)
    return C * loss[:, :, None] + size / 2, G, C * curvature[:, :, None].to(V.dtype)


def _sums(
    design: Design,
    part: tuple[Tensor, Problems, Tensor, Tensor],
    block: Tensor | np.ndarray,
    codes: Tensor,
    weights: Tensor,
) -> tuple[Tensor, ...]:
    """Return what `evaluate` adds up, over a block of r rows with weights (folds, r)."""
    used, problems, W, offset = part
    p, k, d = W.shape
    X = design.standardised(block)
    L = product(W.view(-1, d), X.T).view(p, k, -1)  # (p * k, d) x (d, r) -> (p, k, r)
    L += offset
    s = weights[problems.fold][:, None]
    if problems.loss == "squared_hinge":
        loss, R, curvature = _squared_hinge(L, codes, s, problems.positive)
    elif k == 1:
        loss, R, curvature = _logistic(L, codes, s)
    else:
        loss, R, curvature = _softmax(L, codes, s)
    Gx = product(R.view(p * k, -1), X).view(p, k, d)
    return used, loss, curvature, R.sum(dim=2, keepdim=True), Gx


def _constant(design: Design, problems: Problems, k: int) -> Tensor:
    """Return the objectives (p, k or 1, 1), float64, of the best scores that are constant."""
    count = torch.zeros((len(design.weights), max(k, 2)), dtype=torch.float64)
    count = count.index_add_(1, design.codes, design.weights.double())[problems.fold, :, None]
    whole = count.sum(dim=1, keepdim=True)
    if problems.loss == "log":
        loss = torch.xlogy(whole, whole) - torch.xlogy(count, count).sum(dim=1, keepdim=True)
    else:
        own = count[:, -k:]
        rest = whole - own
        own = own if problems.positive is None else own * problems.positive
        loss = 4 * own * rest / (own + rest)
    return problems.C * loss


class _Preconditioner:
    """Inverse Hessian of the quadratic with the problems' mean curvatures."""

    def __init__(self, design: Design, curvature: Tensor) -> None:
        self._basis, spectrum, rest = design.principal
        # Curvature vanishes when all rows are far on the right side; the penalty then rules.
        self._rest = 1 / (curvature * rest + 1)
        self._leading = 1 / (curvature * spectrum + 1) - self._rest
        self._intercept = 1 / curvature.clamp(min=1e-6)

    def __call__(self, Q: Tensor) -> Tensor:
        inside = product(Q.view(-1, Q.shape[2]), self._basis).view(*Q.shape[:2], -1)
        inside *= self._leading
        back = product(inside.view(-1, inside.shape[2]), self._basis.T).view(Q.shape)
        back += Q * self._rest
        back[..., -1:] = Q[..., -1:] * self._intercept
        return back


@dataclass
class _State:
    """The running problems: point, value, direction, step, and history."""

    numbers: Tensor  # (p,) which of the original problems these are
    constant: Tensor  # (p, k or 1, 1) see _constant
    problems: Problems
    V: Tensor  # (p, k, d + 1) weights, and the intercept in the last column
    f: Tensor  # these three: see _Value
    G: Tensor
    curvature: Tensor
    D: Tensor  # (p, k, d + 1)
    slope: Tensor  # (p, k or 1, 1) along D
    step: Tensor  # the same shape
    lowest: Tensor  # (p,) objective when it last fell by more than rounding
    idle: Tensor  # (p,) steps since then
    pairs: list[tuple[Tensor, ...]]  # (S, Y, rho)

    @classmethod
    def start(cls, design: Design, problems: Problems, V: Tensor, workers: Workers) -> _State:
        value = evaluate(design, problems, V, workers)
        f = value[0]
        D, slope = _directions(design, [], value, workers)
        total, idle = f.sum(dim=(1, 2)), torch.zeros(len(V), dtype=torch.int64)
        numbers, constant = torch.arange(len(V)), _constant(design, problems, V.shape[1])
        step = torch.ones_like(f)
        return cls(numbers, constant, problems, V, *value, D, slope, step, total, idle, [])

    def take(self, keep: Tensor) -> _State:
        tensors = {name: one[keep] for name, one in vars(self).items() if isinstance(one, Tensor)}
        pairs = [tuple(part[keep] for part in pair) for pair in self.pairs]
        return replace(self, **tensors, problems=self.problems.select(keep), pairs=pairs)


def _dot(A: Tensor, B: Tensor, like: Tensor) -> Tensor:
    """Inner product of each problem: over columns and classes, or over columns; as `like`."""
    inner: Tensor = torch.linalg.vecdot(A, B)[:, :, None]
    return inner.sum(dim=1, keepdim=True) if like.shape[1] == 1 else inner


def _directions(
    design: Design, pairs: list[tuple[Tensor, ...]], value: _Value, workers: Workers
) -> list[Tensor]:
    """Return the L-BFGS directions and their slopes, of some problems in each thread.

    How many does not depend on the number of threads: products of other shapes round differently.
    """
    size = -(-len(value[0]) // _GROUPS)

    def jobs() -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
        for start in range(0, len(value[0]), size):
            some = slice(start, start + size)
            own = [tuple(part[some] for part in pair) for pair in pairs]
            yield partial(_direction, design, own, *(part[some] for part in value))

    return [torch.cat(parts) for parts in zip(*workers.in_order(jobs()), strict=True)]


def _direction(
    design: Design, pairs: list[tuple[Tensor, ...]], f: Tensor, G: Tensor, curvature: Tensor
) -> tuple[Tensor, Tensor]:
    precondition = _Preconditioner(design, curvature)
    Q, steps = G.clone(), []
    for S, Y, rho in reversed(pairs):
        steps.append(rho * _dot(S, Q, f))
        Q.addcmul_(steps[-1], Y, value=-1)
    Q = precondition(Q)
    if pairs:
        _, Y, rho = pairs[-1]
        curved = _dot(Y, precondition(Y), f)
        Q *= torch.where(rho > 0, 1 / (rho * curved).clamp(min=1e-30), 1.0)
    for (S, Y, rho), a in zip(pairs, reversed(steps), strict=True):
        Q.addcmul_(a - rho * _dot(Y, Q, f), S)
    if Q.shape[1] > f.shape[1]:
        # What all classes of a softmax share only the penalty sees; it is zero at the minimum.
        Q -= Q.mean(dim=1, keepdim=True)
    return -Q, -_dot(Q, G, f).double()


def _advance(design: Design, state: _State, workers: Workers) -> None:
    """Move the problems whose objective fell enough, shorten the steps of the others."""
    V = torch.addcmul(state.V, state.step.to(state.V.dtype), state.D)
    value = evaluate(design, state.problems, V, workers)
    noise = _NOISE * torch.finfo(V.dtype).eps * state.f.abs()
    accepted = value[0] <= state.f + _ARMIJO * state.step * state.slope + noise
    S, Y = (V - state.V).mul_(accepted), value[1] - state.G
    bent = _dot(S, Y, state.f)
    # A problem that did not move, or moved within rounding, leaves an empty pair.
    rho = torch.where(bent > 0, 1 / bent.clamp(min=1e-30), 0.0)
    state.pairs = [*state.pairs, (S, Y, rho)][-_PAIRS:]
    # Minimum of the parabola through the value and slope at 0 and the value tried.
    rise = (value[0] - state.f - state.step * state.slope).clamp(min=1e-300)
    shorter = (-state.slope * state.step**2 / (2 * rise)).clamp(0.1 * state.step, 0.5 * state.step)
    moved = [V, *value, *_directions(design, state.pairs, value, workers), torch.ones_like(shorter)]
    if not accepted.all():
        stayed = state.V, state.f, state.G, state.curvature, state.D, state.slope, shorter
        moved = [torch.where(accepted, a, b) for a, b in zip(moved, stayed, strict=True)]
    state.V, state.f, state.G, state.curvature, state.D, state.slope, state.step = moved


@dataclass(frozen=True)
class Solution:
    """Minimisers, in standardised coordinates.

    Attributes
    ----------
    V : Tensor of shape (p, k, d + 1)
        Weights, and the intercept in the last column.
    objective : ndarray of shape (p, k or 1), float64
        Value reached.
    passes : ndarray of shape (p,), int
        Passes over the rows until each problem was done.
    finished : bool
        Whether all were, before there was no pass left.
    """

    V: Tensor
    objective: np.ndarray
    passes: np.ndarray
    finished: bool


def minimise(
    design: Design,
    problems: Problems,
    V: Tensor,
    *,
    tol: float = 1e-6,
    max_iter: int = 1000,
) -> Solution:
    """Solve all `problems` from the starting points `V`.

    Parameters
    ----------
    design : Design
        The rows.
    problems : Problems
        What to solve.
    V : Tensor of shape (p, k, d + 1)
        Where to start: weights, and the intercept in the last column. Those of the classes of a
        softmax sum to zero, as those of the solution do.
    tol : float
        A problem is done when half its Newton decrement, an estimate of the distance to the
        minimum, is below `tol` times its objective, and times what that is less than the objective
        of the best constant scores.
    max_iter : int
        Passes over the rows at most.
    """
    with Workers.start() as workers:
        state = _State.start(design, problems, V, workers)
        passes = np.zeros(len(V), dtype=np.int64)
        solution = Solution(V.clone(), state.f[:, :, 0].numpy().copy(), passes, True)
        for iteration in range(1, max_iter + 1):
            done = _finished(state, tol)
            if iteration == max_iter and not done.all():
                solution, done = replace(solution, finished=False), torch.ones_like(done)
            if done.any():
                numbers = state.numbers[done]
                solution.V[numbers] = state.V[done]
                solution.objective[numbers] = state.f[done, :, 0].numpy()
                solution.passes[numbers] = iteration
                state = state.take((~done).nonzero()[:, 0])
            if not len(state.V):
                break
            _advance(design, state, workers)
    return solution


def _finished(state: _State, tol: float) -> Tensor:
    """Return which problems are close to their minimum, or get no closer."""
    close = -state.slope / 2 <= tol * torch.minimum(state.f, state.constant - state.f)
    total = state.f.sum(dim=(1, 2))
    noise = _NOISE * torch.finfo(state.V.dtype).eps
    fell = total < state.lowest - noise * state.lowest.abs()
    state.lowest = torch.where(fell, total, state.lowest)
    state.idle = torch.where(fell, 0, state.idle + 1)
    return close.all(dim=2).all(dim=1) | (state.idle > _IDLE[state.V.dtype])


def unstandardise(design: Design, fold: int, V: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (k, d) and intercepts (k,), float64, for raw (treated) features."""
    scaling = design.steps[-1]
    assert isinstance(scaling, Scale)
    inner = V[:, :-1].double().numpy() * design.ratios[fold].double().numpy()
    weights = inner / scaling.scale
    offset = V[:, -1].double().numpy() - inner @ design.means[fold].double().numpy()
    return weights, offset - weights @ scaling.mean
