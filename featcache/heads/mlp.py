"""The network head: one hidden layer on standardised features.

Trained by torch, kept as steps of numpy arrays, which can be grafted onto the backbone as layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from featcache.heads.base import ClassWeight, FittedHead, Head, class_factors
from featcache.heads.preparation import Preparation, component_counts
from featcache.heads.rows import TrainingRows
from featcache.heads.search import HeadKind, Params, Search, gather
from featcache.heads.solver import Workers
from featcache.heads.steps import Matrix, Relu, Scale, Step

_CHECKPOINTS = (1, 2, 3, 5, 7, 10, 14, 20, 28)  # epochs at which a search looks, or ...
_STEPS = 16  # ... a multiple of them, so that there are as many steps between two looks
_PATIENCE = 2  # checkpoints without a better score before a search stops
_TREATMENTS = ("standard", "l2", "power")
_COUNTS = (256,)  # of principal components
_DROPOUTS = (0.5, 0.75)
_WEIGHT_DECAY = 1.0  # larger than the default of `MLP`, whose epochs are not chosen
_AVERAGED = 0.99  # part of the average of the weights that is kept at each step
_BLOCK = 8192  # rows scored at a time


class MLP(Head):
    """One hidden layer of rectified units with dropout, trained by AdamW on minibatches.

    What predicts is a running average of the weights, which is steadier than the last ones
    (Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992).

    Parameters
    ----------
    hidden : int
        Hidden units.
    dropout : float
        Part of the hidden units that is left out at each step of training.
    learning_rate, weight_decay : float
        Of AdamW (Loshchilov and Hutter, Decoupled weight decay regularization, 2019).
    batch_size : int
        Rows of a step.
    epochs : int
        Passes over the training rows.
    class_weight : "balanced", dict or None
        Weights of the classes.
    random_state : int, RandomState or None
        Seed of the first weights, the order of the rows and dropout.

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
        Labels.
    steps_ : list of Step
        Standardisation, and the two layers with the rectifier between them.
    n_features_in_ : int
        Number of columns.
    """

    def __init__(
        self,
        hidden: int = 256,
        *,
        dropout: float = 0.5,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        batch_size: int = 128,
        epochs: int = 100,
        class_weight: ClassWeight = None,
        random_state: Any = 0,
    ) -> None:
        self.hidden = hidden
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.epochs = epochs
        self.class_weight = class_weight
        self.random_state = random_state

    _positive = "hidden", "learning_rate", "batch_size", "epochs"

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}.")

    def _fit(self, X: np.ndarray, codes: np.ndarray, weight: np.ndarray) -> list[Step]:
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        X, rows = X.astype(np.float32, copy=False), np.arange(len(X))
        # Steps this small gain nothing from threads, and lose much to other programs' beside them.
        with Workers.start():
            training = _Training(self, X, codes, weight, self.classes_, rows, seed)
            training.advance(self.epochs)
        return training.head_steps()


class _Training:
    """A network being trained on some rows, an epoch at a time."""

    def __init__(
        self,
        settings: MLP,
        X: np.ndarray,
        codes: np.ndarray,
        weight: np.ndarray,
        classes: np.ndarray,
        rows: np.ndarray,
        seed: int,
    ) -> None:
        self.settings, self.X, self.codes = settings, X, codes
        factors = class_factors(settings.class_weight, classes, codes[rows], weight[rows])
        self._weight = weight * factors[codes]
        self.rows = rows[weight[rows] > 0]
        if not len(self.rows):
            raise ValueError("Expected at least one row of positive weight, all weights are 0.")
        self.centre, self.scale = _moments(X, self.rows, weight)
        self.generator = torch.Generator().manual_seed(seed)
        d, k = X.shape[1], len(classes)
        self.parameters = [
            self._normal(settings.hidden, d) * (2.0 / d) ** 0.5,
            self._normal(k, settings.hidden) * (1.0 / settings.hidden) ** 0.5,
            torch.zeros(settings.hidden),
            torch.zeros(k),
        ]
        self.average = [one.clone() for one in self.parameters]
        for one in self.parameters:
            one.requires_grad_()
        self.optimiser = torch.optim.AdamW(
            [
                {"params": self.parameters[:2], "weight_decay": settings.weight_decay},
                {"params": self.parameters[2:], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
        )
        self.done = 0

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def advance(self, epochs: int) -> None:
        """Train for some epochs."""
        for _ in range(epochs):
            self.epoch()

    def epoch(self) -> None:
        """Train once on each row."""
        order = self.rows[torch.randperm(len(self.rows), generator=self.generator).numpy()]
        mean = self._weight[self.rows].mean() or 1.0
        for rows in _batches(order, self.settings.batch_size):
            x = torch.from_numpy((self.X[rows] - self.centre) / self.scale)
            target = torch.from_numpy(self.codes[rows])
            weight = torch.from_numpy((self._weight[rows] / mean).astype(np.float32))
            self._step(x, target, weight)

    def _step(self, x: Tensor, target: Tensor, weight: Tensor) -> None:
        first, second, bias, offset = self.parameters
        active = torch.addmm(bias, x, first.T).relu()
        if self.settings.dropout:
            kept = 1.0 - self.settings.dropout
            active = active * (torch.rand(active.shape, generator=self.generator) < kept) / kept
        logits = torch.addmm(offset, active, second.T)
        losses = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        self.optimiser.zero_grad()
        (losses * weight).mean().backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.done += 1
        # A short memory at first, so that the average does not hold on to the random start.
        kept = min(_AVERAGED, self.done / (self.done + 10.0))
        with torch.no_grad():
            for mean, one in zip(self.average, self.parameters, strict=True):
                mean.lerp_(one, 1.0 - kept)

    def head_steps(self) -> list[Step]:
        """Return the averaged network behind the standardisation."""
        first, second, bias, offset = (one.numpy().copy() for one in self.average)
        if len(offset) == 2:  # as -f/2 and f/2
            second, offset = second - second.mean(axis=0), offset - offset.mean()
        scale = Scale(self.centre, self.scale)
        return [scale, Matrix(first, bias), Relu(), Matrix(second, offset)]


def _batches(order: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cut rows into parts of nearly the same size, none above `size`."""
    count = -(-len(order) // size)
    yield from np.array_split(order, count)


def _moments(X: np.ndarray, rows: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weighted mean and deviation of the columns, float32; 1 for constant columns."""
    total, mean, square = 0.0, np.zeros(X.shape[1]), np.zeros(X.shape[1])
    shift = X[rows[0]].astype(np.float64)
    for start in range(0, len(rows), _BLOCK):
        part = rows[start : start + _BLOCK]
        block, w = X[part] - shift, weight[part]
        total += w.sum()
        mean += w @ block
        square += w @ np.square(block)
    mean /= total
    variance = np.maximum(square / total - mean**2, 0.0)
    size = np.abs(shift + mean)
    constant = variance <= (1e-6 * size) ** 2
    deviation = np.where(constant, 1.0, np.sqrt(variance))
    return (shift + mean).astype(np.float32), deviation.astype(np.float32)


@dataclass(frozen=True)
class MLPHead(HeadKind):
    """Network of one hidden layer: treatment, components, dropout and the number of epochs.

    All folds are trained side by side and scored on their validation rows as they go; training
    stops where the score does. The network that is kept is trained on all rows for as many
    epochs as did best, so that early stopping costs no training rows.
    """

    name: ClassVar[str] = "mlp"

    def explore(self, rows: TrainingRows, search: Search) -> None:
        """Try treatments, then components, then other dropouts."""
        seed = self.options.random_state
        for treatment in _TREATMENTS:
            self._try(rows, search, Preparation(treatment, scaled=False), _DROPOUTS[0])
        treatment = search.best.params["treatment"]
        for count in component_counts(rows, _COUNTS):
            self._try(rows, search, Preparation(treatment, count, random_state=seed), _DROPOUTS[0])
        for dropout in _DROPOUTS[1:]:
            best = Preparation.of(search.best.params, seed, scaled=False)
            self._try(rows, search, best, dropout)

    def _network(self, dropout: float) -> MLP:
        return MLP(
            dropout=dropout,
            weight_decay=_WEIGHT_DECAY,
            class_weight=self.options.class_weight,
            random_state=self.options.random_state,
        )

    def _try(
        self, rows: TrainingRows, search: Search, preparation: Preparation, dropout: float
    ) -> None:
        """Train one network a fold, and score them together at the checkpoints."""
        estimator = self._network(dropout)
        features = preparation.on_folds(rows)
        codes, weight = rows.row_codes(), rows.weights()
        seeds = np.random.SeedSequence(self.options.random_state).generate_state(len(rows.folds))
        trainings = [
            _Training(estimator, X, codes, weight, rows.classes, rows.rows(train), seed)
            for X, (train, _), seed in zip(features, rows.folds, seeds.tolist(), strict=True)
        ]
        done = 0
        scored: list[float] = []
        size = min(len(training.rows) for training in trainings)
        unit = -(-_STEPS * estimator.batch_size // size)
        for checkpoint in _CHECKPOINTS:
            epochs = checkpoint * unit
            with Workers.start() as workers:
                for _ in workers.in_order(
                    partial(training.advance, epochs - done) for training in trainings
                ):
                    search.fitted()
            done = epochs
            per_fold = [
                _fold_scores(rows, training, valid)
                for training, (_, valid) in zip(trainings, rows.folds, strict=True)
            ]
            params = {**preparation.params, "dropout": dropout, "epochs": epochs}
            scored.append(search.tried(params, gather(rows, per_fold)).score)
            if len(scored) - 1 - int(np.argmax(scored)) >= _PATIENCE:
                break

    def fit(self, rows: TrainingRows, params: Params) -> list[Step]:
        """Train on all rows for the chosen number of epochs."""
        network = self._network(params["dropout"]).set_params(epochs=params["epochs"])
        # The network scales columns by itself.
        preparation = Preparation.of(params, self.options.random_state, scaled=False)
        return preparation.fit_head(rows, network)


def _fold_scores(rows: TrainingRows, training: _Training, valid: np.ndarray) -> np.ndarray:
    """Return scores (images, k) of validation images, means over their views."""
    X = training.X[rows.rows(valid)]
    head = FittedHead(training.head_steps(), rows.classes)
    return head.logits(X.reshape(len(valid), rows.views, -1))
