"""The network head: one hidden layer on standardised features.

Trained by torch, kept as numpy arrays: the standardisation is folded into the first layer, so
that a fitted head is two matrix products, and can be grafted onto its backbone as two layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from featcache.errors import TrainingError
from featcache.heads.base import FittedHead
from featcache.heads.calibration import fit_temperature
from featcache.heads.preparation import Preparation, component_counts
from featcache.heads.rows import FeatureBlocks, TrainingRows
from featcache.heads.search import Scoring, SearchResult, Trial, gather, score_folds
from featcache.heads.solver import Workers

_CHECKPOINTS = (1, 2, 3, 5, 7, 10, 14, 20, 28)  # epochs at which a search looks, or ...
_STEPS = 16  # ... a multiple of them, so that there are as many steps between two looks
_PATIENCE = 2  # checkpoints without a better score before a search stops
_TREATMENTS = ("standard", "l2", "power")
_COUNTS = (256,)  # of principal components
_DROPOUTS = (0.5, 0.75)
_WEIGHT_DECAY = 1.0  # larger than the default of `MLP`, whose epochs are not chosen
_AVERAGED = 0.99  # part of the average of the weights that is kept at each step
_BLOCK = 8192  # rows scored at a time


class MLP(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
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
        TrainingRows of a step.
    max_epochs : int
        Passes over the training rows at most.
    validation_fraction : float
        Part of the training rows that is held out to stop early; 0 trains for `max_epochs`.
        Nothing is held out where a class would have no row left.
    patience : int
        Epochs without a smaller loss on the held-out rows before training stops.
    class_weight : "balanced", dict or None
        Weights of the classes.
    random_state : int, RandomState or None
        Seed of the first weights, the order of the rows, dropout and what is held out.

    Attributes
    ----------
    classes_ : ndarray of shape (k,)
        Labels.
    coefs_ : list of ndarray, float32 (hidden, d) and (k, hidden)
        Weights of the two layers, for raw features.
    intercepts_ : list of ndarray, float32 (hidden,) and (k,)
        Intercepts.
    n_features_in_, n_iter_ : int
        Columns; epochs that the weights have seen.
    """

    def __init__(
        self,
        hidden: int = 256,
        *,
        dropout: float = 0.5,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        batch_size: int = 128,
        max_epochs: int = 100,
        validation_fraction: float = 0.1,
        patience: int = 8,
        class_weight: str | dict[Any, float] | None = None,
        random_state: Any = 0,
    ) -> None:
        self.hidden = hidden
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.class_weight = class_weight
        self.random_state = random_state

    def fit(
        self,
        X: np.ndarray,
        y: np.ndarray,
        sample_weight: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> MLP:
        """Fit to features (n, d) and labels (n,).

        Parameters
        ----------
        X : array of shape (n, d)
            Features; trained on as float32.
        y : array of shape (n,)
            Labels.
        sample_weight : array of shape (n,), optional
            Weights of the rows in the loss and in the standardisation.
        groups : array of shape (n,), optional
            TrainingRows of one group are held out together.

        Raises
        ------
        ValueError
            A parameter out of range, or data that scikit-learn refuses.
        """
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(y)
        weight = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        classes, codes = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"Expected at least two classes, got one class: {classes[0]!r}.")
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        kept, held = self._hold_out(codes, groups, seed)
        # Steps this small gain nothing from threads, and lose much to other programs' beside them.
        with Workers.start():
            training = _Training(self, X, codes, weight, classes, kept, seed)
            return self._take(self._trained(training, held), classes)

    def _trained(self, training: _Training, held: np.ndarray) -> _Layers:
        """Train to the end, or until the loss on the rows `held` out falls no more."""
        if not len(held):
            training.advance(self.max_epochs)
            self.n_iter_ = self.max_epochs
            return training.layers()
        best, since, found = np.inf, 0, training.layers()
        for epoch in range(1, self.max_epochs + 1):
            training.epoch()
            layers = training.layers()
            scores = layers.scores(training.X[held])
            loss = _log_loss(scores, training.codes[held], training.loss_weights(held))
            since = 0 if loss < best else since + 1
            if loss < best:
                best, found, self.n_iter_ = loss, layers, epoch
            if since >= self.patience:
                break
        return found

    def _check_parameters(self) -> None:
        positive = (
            self.hidden,
            self.learning_rate,
            self.batch_size,
            self.max_epochs,
            self.patience,
        )
        if not all(value > 0 for value in positive):
            raise ValueError(
                "hidden, learning_rate, batch_size, max_epochs and patience must be positive, "
                f"got {positive}."
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.validation_fraction < 1:
            raise ValueError(
                "dropout and validation_fraction must be in [0, 1), got "
                f"{self.dropout}, {self.validation_fraction}."
            )

    def _hold_out(
        self, codes: np.ndarray, groups: np.ndarray | None, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Split row numbers into those to train on and those to stop by."""
        everything, nothing = np.arange(len(codes)), np.arange(0)
        counts = np.bincount(codes)
        size = int(self.validation_fraction * len(codes))
        if size < len(counts):
            return everything, nothing
        from sklearn.model_selection import GroupShuffleSplit, StratifiedShuffleSplit

        if groups is not None:
            if len(np.unique(groups)) < 2:
                return everything, nothing
            split = GroupShuffleSplit(1, test_size=self.validation_fraction, random_state=seed)
        elif counts.min() < 2:
            return everything, nothing
        else:
            split = StratifiedShuffleSplit(1, test_size=size, random_state=seed)
        kept, held = next(split.split(everything, codes, groups))
        if len(np.unique(codes[kept])) < len(counts):
            return everything, nothing
        return kept, held

    def _take(self, layers: _Layers, classes: np.ndarray) -> MLP:
        self.classes_ = classes
        self.coefs_ = [layers.first, layers.second]
        self.intercepts_ = [layers.bias, layers.offset]
        self.n_features_in_ = layers.first.shape[1]
        return self

    def layers(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (weights (out, in), bias (out,)) of the layers, float64, for raw features.

        Between them stands a ReLU; the last gives the logits of all classes.
        """
        check_is_fitted(self)
        return [
            (weight.astype(np.float64), bias.astype(np.float64))
            for weight, bias in zip(self.coefs_, self.intercepts_, strict=True)
        ]

    def decision_function(self, X: np.ndarray) -> np.ndarray:
        """Return logits: (n, k), or for two classes their difference (n,)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        scores = _Layers(*self.coefs_, *self.intercepts_).scores(X)
        result: np.ndarray = scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores
        return result

    def predict_proba(self, X: np.ndarray) -> np.ndarray:
        """Return probabilities of shape (n, k)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.stack([expit(-scores), expit(scores)], axis=1)
        proba: np.ndarray = softmax(scores, axis=1)
        return proba

    def predict(self, X: np.ndarray) -> np.ndarray:
        """Return the most probable labels, of shape (n,)."""
        scores = self.decision_function(X)
        chosen = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        labels: np.ndarray = self.classes_[chosen]
        return labels


@dataclass(frozen=True)
class _Layers:
    """The two layers for raw features, as numpy arrays."""

    first: np.ndarray  # (hidden, d)
    second: np.ndarray  # (k, hidden)
    bias: np.ndarray  # (hidden,)
    offset: np.ndarray  # (k,)

    def scores(self, X: np.ndarray) -> np.ndarray:
        """Return logits of shape (n, k), in the precision of `X`."""
        first, second, bias, offset = (
            a.astype(X.dtype, copy=False) for a in (self.first, self.second, self.bias, self.offset)
        )
        parts = []
        for start in range(0, len(X), _BLOCK):
            active = np.maximum(X[start : start + _BLOCK] @ first.T + bias, 0)
            parts.append(active @ second.T + offset)
        return np.concatenate(parts)


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
        factors = compute_class_weight(
            settings.class_weight,
            classes=classes,
            y=classes[codes[rows]],
            sample_weight=weight[rows],
        )
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
        self.steps = 0

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def loss_weights(self, rows: np.ndarray) -> np.ndarray:
        """Return sample weight times class weight."""
        weights: np.ndarray = self._weight[rows]
        return weights

    def advance(self, epochs: int) -> None:
        """Train for some epochs."""
        for _ in range(epochs):
            self.epoch()

    def epoch(self) -> None:
        """Train once on each row."""
        order = self.rows[torch.randperm(len(self.rows), generator=self.generator).numpy()]
        mean = self.loss_weights(self.rows).mean() or 1.0
        for rows in _batches(order, self.settings.batch_size):
            x = torch.from_numpy((self.X[rows] - self.centre) / self.scale)
            target = torch.from_numpy(self.codes[rows])
            weight = torch.from_numpy((self.loss_weights(rows) / mean).astype(np.float32))
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
        self.steps += 1
        # A short memory at first, so that the average does not hold on to the random start.
        kept = min(_AVERAGED, self.steps / (self.steps + 10.0))
        with torch.no_grad():
            for mean, one in zip(self.average, self.parameters, strict=True):
                mean.lerp_(one, 1.0 - kept)

    def layers(self) -> _Layers:
        """Return the averaged network with the standardisation folded in."""
        first, second, bias, offset = (one.numpy().astype(np.float64) for one in self.average)
        folded = first / self.scale
        return _Layers(
            folded.astype(np.float32),
            second.astype(np.float32),
            (bias - folded @ self.centre).astype(np.float32),
            offset.astype(np.float32),
        )


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


def _log_loss(scores: np.ndarray, codes: np.ndarray, weight: np.ndarray) -> float:
    values = torch.from_numpy(scores).double()
    losses = torch.nn.functional.cross_entropy(values, torch.from_numpy(codes), reduction="none")
    return float(weight @ losses.numpy() / max(weight.sum(), 1e-300))


def search_mlp(
    rows: TrainingRows,
    *,
    class_weight: str | dict[Any, float] | None = None,
    scoring: Scoring = "accuracy",
    random_state: int = 0,
    **_: Any,
) -> SearchResult:
    """Choose treatment, components, dropout and the number of epochs by cross-validation.

    All folds are trained side by side and scored on their validation rows as they go; training
    stops where the score does. The network that is kept is trained on all rows for as many
    epochs as did best, so that early stopping costs no training rows.

    Parameters
    ----------
    rows : TrainingRows
        Training rows with their folds, in memory.
    class_weight : "balanced", dict or None
        Weights of the classes.
    scoring : str or callable
        See `featcache.heads.search.score_folds`.
    random_state : int
        Seed.
    """
    if isinstance(rows.X, FeatureBlocks):
        raise TrainingError("The mlp head needs its features in memory: give --memory, or linear.")
    start = time.perf_counter()
    search = _Search(rows, class_weight, scoring, random_state)
    for treatment in _TREATMENTS:
        search.attempt(Preparation(treatment, scaled=False), _DROPOUTS[0])
    treatment = search.best.preparation.treatment
    for count in component_counts(rows, _COUNTS):
        search.attempt(Preparation(treatment, count, random_state=random_state), _DROPOUTS[0])
    for dropout in _DROPOUTS[1:]:
        search.attempt(search.best.preparation, dropout)
    best = search.best
    middle = time.perf_counter()
    network = search.network(best.candidate.params["dropout"])
    network.set_params(max_epochs=best.candidate.params["epochs"], validation_fraction=0.0)
    fitted = FittedHead(best.preparation.fit_head(rows, network), rows.classes)
    return SearchResult(
        head="mlp",
        estimator=fitted,
        best=best.candidate,
        trials=tuple(one.candidate for one in search.tried),
        classes=rows.classes,
        logits=best.logits,
        temperature=fit_temperature(best.logits, rows.codes, rows.weight),
        search_seconds=middle - start,
        fit_seconds=time.perf_counter() - middle,
    )


@dataclass(frozen=True)
class _Tried:
    """A network after some epochs, on all folds."""

    candidate: Trial
    logits: np.ndarray
    preparation: Preparation


class _Search:
    """What was tried, and on what."""

    def __init__(
        self, rows: TrainingRows, class_weight: Any, scoring: Scoring, random_state: int
    ) -> None:
        self.rows, self.class_weight = rows, class_weight
        self.scoring, self.random_state = scoring, random_state
        self.tried: list[_Tried] = []

    @property
    def best(self) -> _Tried:
        """The best so far; the earlier one where scores tie."""
        return max(self.tried, key=lambda one: one.candidate.score)

    def network(self, dropout: float) -> MLP:
        """Return a network to train."""
        return MLP(
            dropout=dropout,
            weight_decay=_WEIGHT_DECAY,
            class_weight=self.class_weight,
            random_state=self.random_state,
        )

    def attempt(self, preparation: Preparation, dropout: float) -> None:
        """Train one network a fold, and score them together at the checkpoints."""
        rows, estimator = self.rows, self.network(dropout)
        features = preparation.on_folds(rows)
        codes = np.repeat(rows.codes, rows.views)
        given = rows.weights()
        weight = np.ones(len(codes)) if given is None else given
        trainings = [
            _Training(estimator, X, codes, weight, rows.classes, rows.rows(train), fold)
            for fold, (X, (train, _)) in enumerate(zip(features, rows.folds, strict=True))
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
                    pass
            done = epochs
            values = gather(
                rows,
                [
                    self._scores(training, valid)
                    for training, (_, valid) in zip(trainings, rows.folds, strict=True)
                ],
            )
            found = score_folds(values, rows.codes, rows.classes, rows.folds, self.scoring)
            params = {**preparation.params, "dropout": dropout, "epochs": epochs}
            self.tried.append(_Tried(Trial(params, found), values, preparation))
            scored.append(self.tried[-1].candidate.score)
            if len(scored) - 1 - int(np.argmax(scored)) >= _PATIENCE:
                break

    def _scores(self, training: _Training, valid: np.ndarray) -> np.ndarray:
        """Return scores (images, k) of validation images, means over their views."""
        scores = training.layers().scores(training.X[self.rows.rows(valid)])
        if scores.shape[1] == 2:  # as `featcache.heads.search.logits` gives them
            scores -= scores.mean(axis=1, keepdims=True)
        mean: np.ndarray = scores.reshape(len(valid), self.rows.views, -1).mean(axis=1)
        return mean
