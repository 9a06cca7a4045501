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
same on Intel's; everything else through torch, whose element-wise kernels use all cores.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from featcache.heads.blocks import RowBlocks

Loss: TypeAlias = Literal["softmax", "logistic", "squared_hinge"]
Transform: TypeAlias = Callable[[np.ndarray], np.ndarray]

_CELLS = 1 << 21  # scores computed at a time: 8 MB, which stays in the last-level cache
_RANK = 256  # directions in which the preconditioner knows the covariance
_SAMPLE = 4096  # rows that the preconditioner is computed from
_PAIRS = 8  # history of L-BFGS
_ARMIJO = 1e-4
_NOISE = 3e-7  # relative error of an objective that is computed from float32 scores
_CONSTANT = 1e-12  # a column with less variance than this, in units of its overall one, is constant


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product of float32 CPU tensors (the module says why through numpy)."""
    return torch.from_numpy(a.numpy() @ b.numpy())


@dataclass(frozen=True)
class Design:
    """The rows of all problems, in one standardised coordinate system.

    Attributes
    ----------
    source : Tensor of shape (n, d) or RowBlocks
        Standardised rows in memory, sorted so that rows of one fold are together; or raw blocks,
        which are treated and standardised as they are read.
    order : ndarray of shape (n,)
        Which row of the input stands where in `source`.
    edges : list of int
        Where the sorted rows change their fold.
    weights : Tensor of shape (folds, n), float32
        Weight of each row in the loss of each fold's problems.
    codes : Tensor of shape (n,), int64
        Class of each row.
    centre, scale : ndarray of shape (d,), float64
        The coordinate system: mean and deviation over all rows.
    means, ratios : Tensor of shape (folds, d), float32
        Mean and inverse deviation of each fold's training rows, in these coordinates.
    sample : ndarray of shape (m, d), float32
        Some of the rows.
    transform : callable or None
        Row-wise treatment of raw blocks.
    """

    source: Tensor | RowBlocks
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
        X: np.ndarray | RowBlocks,
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
        X : ndarray of shape (n, d), or RowBlocks
            Features. An array is copied, blocks are read anew for each pass.
        codes : ndarray of shape (n,), int64
            Class of each row.
        row_weights, loss_weights : ndarray of shape (folds, n), float32
            Weights that count for mean and deviation, and for the loss.
        standardize : bool
            Whether the problems' columns have unit deviation.
        transform : callable, optional
            Row-wise treatment, float32 (k, d) to float32 (k, d).
        """
        blocks = RowBlocks.of(X) if isinstance(X, np.ndarray) else X
        moments = _Moments.measure(blocks, row_weights, transform)
        scale = moments.deviation(-1) if standardize else np.ones(len(moments.centre))
        means = (moments.mean[:-1] - moments.centre) / scale
        ratios = np.ones_like(means)
        if standardize:
            ratios = np.stack([scale / moments.deviation(f) for f in range(len(means))])
        sample = ((moments.sample - moments.centre) / scale).astype(np.float32)
        order = np.arange(len(codes))
        source: Tensor | RowBlocks = blocks
        if isinstance(X, np.ndarray):
            order = np.lexsort(row_weights > 0)
            source = _standardised(X, order, moments.centre, scale, transform)
        used = row_weights[:, order] > 0
        changes = np.flatnonzero((used[:, 1:] != used[:, :-1]).any(axis=0)) + 1
        return cls(
            source=source,
            order=order,
            edges=[0, *changes.tolist(), len(codes)],
            weights=torch.from_numpy(loss_weights[:, order].astype(np.float32)),
            codes=torch.from_numpy(codes[order]),
            centre=moments.centre,
            scale=scale,
            means=torch.from_numpy(means.astype(np.float32)),
            ratios=torch.from_numpy(ratios.astype(np.float32)),
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
        basis, spectrum, rest = _principal(self.sample)
        return torch.from_numpy(basis), torch.from_numpy(spectrum), rest

    def blocks(self, columns: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, standardised block), sized for scores of `columns` columns."""
        size = int(np.clip(_CELLS // columns, 256, 4096))
        if isinstance(self.source, Tensor):
            for start, stop in _cut(self.edges, size):
                yield slice(start, stop), self.source[start:stop]
            return
        centre, scale = self.centre.astype(np.float32), self.scale.astype(np.float32)
        for images, block in self.source.blocks(size):
            treated = block if self.transform is None else self.transform(block)
            standard = treated - centre
            standard /= scale
            yield self.source.rows_of(images), torch.from_numpy(standard)


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
) -> Tensor:
    out = np.empty(X.shape, dtype=np.float32)
    for start in range(0, len(X), 4096):
        block = np.asarray(X[order[start : start + 4096]], dtype=np.float32)
        treated = block if transform is None else transform(block)
        np.subtract(treated, centre.astype(np.float32), out=out[start : start + 4096])
        out[start : start + 4096] /= scale.astype(np.float32)
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
        cls, blocks: RowBlocks, weights: np.ndarray, transform: Transform | None
    ) -> _Moments:
        """Read all blocks once; deviations are from a row near the mean, to lose no digits."""
        n, d = len(blocks) * blocks.views, blocks.shape[-1]
        chosen = np.zeros(n, dtype=bool)
        chosen[np.random.default_rng(0).permutation(n)[:_SAMPLE]] = True
        total, squares = np.zeros((2, len(weights) + 1, d))
        shift: np.ndarray | None = None
        sample = []
        for images, block in blocks.blocks(4096):
            rows = blocks.rows_of(images)
            block = block if transform is None else transform(block)
            sample.append(block[chosen[rows]])
            shift = block.mean(axis=0) if shift is None else shift
            away = block - shift
            both = np.vstack([weights[:, rows], np.ones((1, len(away)))]).astype(np.float32)
            total += both @ away
            squares += both @ np.square(away, out=away)
        sums = np.append(weights.sum(axis=1, dtype=np.float64), n)[:, None]
        total /= sums
        variance = np.maximum(squares / sums - total**2, 0.0)
        return cls(np.asarray(shift, dtype=np.float64) + total, variance, np.concatenate(sample))


def _principal(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the leading eigenvectors and eigenvalues of ``sample.T @ sample / n``, and the rest.

    Randomised subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) with one
    round: a preconditioner needs no digits.
    """
    n, d = sample.shape
    rank = min(_RANK, n, d)
    start = np.random.default_rng(0).standard_normal((d, min(rank + 16, d)), dtype=np.float32)
    basis = np.linalg.qr(sample.T @ (sample @ start))[0]
    basis = np.linalg.qr(sample.T @ (sample @ basis))[0]
    projected = sample @ basis
    values, vectors = np.linalg.eigh((projected.T @ projected).astype(np.float64) / n)
    leading = np.argsort(values)[::-1][:rank]
    spectrum = np.maximum(values[leading], 0.0)
    energy = float(np.square(sample, dtype=np.float64).sum() / n)
    rest = max(0.0, energy - float(spectrum.sum())) / max(1, d - rank)
    found = (basis @ vectors[:, leading].astype(np.float32)).astype(np.float32)
    return np.ascontiguousarray(found), spectrum.astype(np.float32), rest


@dataclass(frozen=True)
class Problems:
    """Which problems are solved.

    Attributes
    ----------
    loss : {"softmax", "logistic", "squared_hinge"}
        Softmax couples the classes of a problem; the two others are one problem a class.
    C : Tensor of shape (p, 1, 1), float32
        Weight of the loss.
    fold : Tensor of shape (p,), int64
        Row of `Design.weights`.
    positive : Tensor of shape (p, k) or None
        One-vs-rest: factors on the weights of a class's own rows.
    penalise_intercept : bool
        Whether ``b**2 / 2`` is added, as liblinear does.
    """

    loss: Loss
    C: Tensor
    fold: Tensor
    positive: Tensor | None = None
    penalise_intercept: bool = False

    def select(self, keep: Tensor) -> Problems:
        """Return the problems numbered `keep`."""
        positive = None if self.positive is None else self.positive[keep]
        return Problems(self.loss, self.C[keep], self.fold[keep], positive, self.penalise_intercept)


@dataclass
class _Value:
    """Objectives, gradients and mean curvatures at one point of each problem."""

    f: Tensor  # (p, k or 1, 1) float64
    G: Tensor  # (p, k, d)
    Gb: Tensor  # (p, k, 1)
    curvature: Tensor  # (p, k, 1)

    def take(self, keep: Tensor) -> _Value:
        return _Value(self.f[keep], self.G[keep], self.Gb[keep], self.curvature[keep])

    def merge(self, accepted: Tensor, other: _Value) -> _Value:
        return _Value(
            torch.where(accepted, other.f, self.f),
            torch.where(accepted, other.G, self.G),
            torch.where(accepted, other.Gb, self.Gb),
            torch.where(accepted, other.curvature, self.curvature),
        )


def _softmax(L: Tensor, codes: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (p, 1), residual (p, k, r) and curvature (p, k) of scores (p, k, r)."""
    L = torch.log_softmax(L, dim=1)
    truth = codes.expand(len(L), 1, -1)
    loss = -(L.gather(1, truth) * s).sum(dim=2, dtype=torch.float64)
    P = L.exp_()
    R = P * s
    curvature = R.sum(dim=2) - (R * P).sum(dim=2)
    return loss, R.scatter_add_(1, truth, -s), curvature


def _signed(L: Tensor, codes: Tensor, s: Tensor, positive: Tensor | None) -> tuple[Tensor, Tensor]:
    """Targets of -1 and 1 (k, r), and weights (p, k or 1, r), for one problem a class.

    With two classes there is one problem, and its positive class is the second.
    """
    k = L.shape[1]
    own = torch.arange(k)[:, None] == codes if k > 1 else (codes == 1)[None]
    target = own.to(L.dtype) * 2 - 1
    if positive is not None:
        s = s * torch.where(own, positive[:, :, None], torch.ones(()))
    return target, s


def _logistic(
    L: Tensor, codes: Tensor, s: Tensor, positive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    target, s = _signed(L, codes, s, positive)
    margin = L * target
    loss = (torch.nn.functional.softplus(-margin) * s).sum(dim=2, dtype=torch.float64)
    P = torch.sigmoid(-margin)
    R = P * s
    curvature = R.sum(dim=2) - (R * P).sum(dim=2)
    return loss, R.mul_(-target), curvature


def _squared_hinge(
    L: Tensor, codes: Tensor, s: Tensor, positive: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    target, s = _signed(L, codes, s, positive)
    slack = (1 - L * target).clamp_(min=0)
    R = slack * s
    loss = (R * slack).sum(dim=2, dtype=torch.float64)
    curvature = 2 * ((slack > 0) * s).sum(dim=2)
    return loss, R.mul_(-2 * target), curvature


def evaluate(design: Design, problems: Problems, W: Tensor, b: Tensor) -> _Value:
    """Return objectives and gradients of all `problems`, in one pass over the rows."""
    p, k, d = W.shape
    ratios, means = design.ratios[problems.fold][:, None], design.means[problems.fold][:, None]
    Wg = W * ratios
    offset = b - (Wg * means).sum(dim=2, keepdim=True)
    loss = torch.zeros((p, 1 if problems.loss == "softmax" else k), dtype=torch.float64)
    curvature = torch.zeros((p, k), dtype=torch.float64)
    Gx = torch.zeros((p, k, d), dtype=torch.float64)
    Gs = torch.zeros((p, k, 1), dtype=torch.float64)
    for rows, X in design.blocks(p * k):
        s_all = design.weights[:, rows]
        used = (s_all > 0).any(dim=1)[problems.fold].nonzero()[:, 0]
        if not len(used):
            continue
        every = len(used) == p
        part = Wg if every else Wg[used]
        L = product(part.reshape(-1, d), X.T).reshape(len(used), k, -1)
        L += offset if every else offset[used]
        codes, s = design.codes[rows], s_all[problems.fold[used]][:, None]
        if problems.loss == "softmax":
            one, R, bend = _softmax(L, codes, s)
        else:
            positive = None if problems.positive is None else problems.positive[used]
            rule = _logistic if problems.loss == "logistic" else _squared_hinge
            one, R, bend = rule(L, codes, s, positive)
        loss[used] += one
        curvature[used] += bend
        Gs[used] += R.sum(dim=2, keepdim=True)
        Gx[used] += product(R.reshape(-1, R.shape[2]), X).reshape(len(used), k, d)
    C = problems.C
    G = (C * ratios * (Gx - Gs * means)).float() + W
    Gb = C * Gs.float()
    size = W.square().sum(dim=2, keepdim=True, dtype=torch.float64)
    if problems.penalise_intercept:
        Gb += b
        size += b.double().square()
    if problems.loss == "softmax":
        size = size.sum(dim=1, keepdim=True)
    return _Value(C * loss[:, :, None] + size / 2, G, Gb, C * curvature[:, :, None].float())


class _Preconditioner:
    """Inverse Hessian of the quadratic with the problems' mean curvatures."""

    def __init__(self, design: Design, curvature: Tensor, penalise_intercept: bool) -> None:
        self._basis, spectrum, rest = design.principal
        # Curvature vanishes when all rows are far on the right side; the penalty then rules.
        self._rest = 1 / (curvature * rest + 1)
        self._leading = 1 / (curvature * spectrum + 1) - self._rest
        self._intercept = 1 / (curvature.clamp(min=1e-6) + float(penalise_intercept))

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
        )


def _dot(problems: Problems, A: Tensor, Ab: Tensor, B: Tensor, Bb: Tensor) -> Tensor:
    """Inner product of each problem: over classes and columns, or over columns alone."""
    inner = (A * B).sum(dim=2, keepdim=True) + Ab * Bb
    return inner.sum(dim=1, keepdim=True) if problems.loss == "softmax" else inner


def _direction(design: Design, state: _State) -> tuple[Tensor, Tensor, Tensor]:
    """Return the L-BFGS direction and its slope."""
    problems, value = state.problems, state.value
    precondition = _Preconditioner(design, value.curvature, problems.penalise_intercept)
    Q, Qb = value.G.clone(), value.Gb.clone()
    steps = []
    for S, Sb, Y, Yb, rho in reversed(state.pairs):
        a = rho * _dot(problems, S, Sb, Q, Qb)
        Q -= a * Y
        Qb -= a * Yb
        steps.append(a)
    Q, Qb = precondition(Q, Qb)
    if state.pairs:
        S, Sb, Y, Yb, rho = state.pairs[-1]
        curved = _dot(problems, Y, Yb, *precondition(Y, Yb))
        scaled = torch.where(rho > 0, 1 / (rho * curved).clamp(min=1e-30), torch.ones(()))
        Q *= scaled
        Qb *= scaled
    for (S, Sb, Y, Yb, rho), a in zip(state.pairs, reversed(steps), strict=True):
        change = a - rho * _dot(problems, Y, Yb, Q, Qb)
        Q += change * S
        Qb += change * Sb
    return -Q, -Qb, -_dot(problems, Q, Qb, value.G, value.Gb).double()


def _advance(design: Design, state: _State) -> None:
    """Try the current step of every problem; move where the objective falls enough."""
    problems, value = state.problems, state.value
    step = state.step.float()
    W, b = state.W + step * state.D, state.b + step * state.Db
    tried = evaluate(design, problems, W, b)
    wanted = value.f + _ARMIJO * state.step * state.slope + _NOISE * value.f.abs()
    accepted = tried.f <= wanted
    S, Sb = torch.where(accepted, W - state.W, 0.0), torch.where(accepted, b - state.b, 0.0)
    Y, Yb = tried.G - value.G, tried.Gb - value.Gb
    bent = _dot(problems, S, Sb, Y, Yb)
    # A problem that did not move, or moved within rounding, leaves an empty pair.
    rho = torch.where(bent > 0, 1 / bent.clamp(min=1e-30), torch.zeros(()))
    state.pairs = [*state.pairs, (S, Sb, Y, Yb, rho)][-_PAIRS:]
    state.W, state.b = torch.where(accepted, W, state.W), torch.where(accepted, b, state.b)
    # Minimum of the parabola through the value and slope at 0 and the value tried.
    rise = (tried.f - value.f - state.step * state.slope).clamp(min=1e-300)
    shorter = (-state.slope * state.step**2 / (2 * rise)).clamp(0.1 * state.step, 0.5 * state.step)
    state.value = value.merge(accepted, tried)
    D, Db, slope = _direction(design, state)
    state.D = torch.where(accepted, D, state.D)
    state.Db = torch.where(accepted, Db, state.Db)
    state.slope = torch.where(accepted, slope, state.slope)
    state.step = torch.where(accepted, torch.ones_like(shorter), shorter)


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


def minimise(
    design: Design,
    problems: Problems,
    W: Tensor,
    b: Tensor,
    *,
    tol: float = 1e-5,
    max_iter: int = 1000,
) -> Solution:
    """Solve all `problems` from the starting points `W`, `b`.

    Parameters
    ----------
    design : Design
        The rows.
    problems : Problems
        What to solve.
    W, b : Tensor of shape (p, k, d) and (p, k, 1), float32
        Where to start.
    tol : float
        A problem is done when half its Newton decrement, an estimate of the distance to the
        minimum, is below `tol` times its objective.
    max_iter : int
        Passes over the rows at most.
    """
    value = evaluate(design, problems, W, b)
    ones = torch.ones_like(value.f)
    numbers = torch.arange(len(W))
    state = _State(numbers, problems, W, b, value, W, b, -ones, ones, [])
    state.D, state.Db, state.slope = _direction(design, state)
    out_W, out_b, objective = W.clone(), b.clone(), value.f.clone()
    passes = np.full(len(W), max_iter)
    converged = np.zeros(len(W), dtype=bool)
    for iteration in range(1, max_iter + 1):
        close = -state.slope / 2 <= tol * state.value.f.abs()
        stuck = state.step < 1e-6  # rounding hides any further progress
        done = (close | stuck).all(dim=2).all(dim=1)
        if done.any() or iteration == max_iter:
            over = state.numbers if iteration == max_iter else state.numbers[done]
            leaving = slice(None) if iteration == max_iter else done
            out_W[over], out_b[over] = state.W[leaving], state.b[leaving]
            objective[over] = state.value.f[leaving]
            passes[state.numbers[done]] = iteration
            converged[state.numbers[done]] = True
            keep = (~done).nonzero()[:, 0]
            if not len(keep) or iteration == max_iter:
                break
            state = state.take(keep)
        _advance(design, state)
    return Solution(out_W, out_b, objective[:, :, 0].numpy(), passes, converged)


def unstandardise(design: Design, fold: int, W: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (k, d) and intercepts (k,), float64, for raw (treated) features."""
    inner = W.double().numpy() * design.ratios[fold].double().numpy()
    weights = inner / design.scale
    offset = b[:, 0].double().numpy() - inner @ design.means[fold].double().numpy()
    return weights, offset - weights @ design.centre


def standardise(
    design: Design, fold: int, weights: np.ndarray, intercept: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Invert `unstandardise`, for a warm start: float32 (k, d) and (k, 1)."""
    inner = weights * design.scale
    b = intercept + weights @ design.centre + inner @ design.means[fold].double().numpy()
    W = inner / design.ratios[fold].double().numpy()
    return torch.from_numpy(W).float(), torch.from_numpy(b).float()[:, None]
