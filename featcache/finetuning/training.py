"""Train what lies behind a cut by minibatches of cached features.

One training: AdamW with a learning rate a layer group
(`featcache.networks.surgery.parameter_groups`), a schedule, gradual unfreezing where asked for,
early stopping on an inner validation part, and the best weights kept. Features are read from the
store a minibatch at a time, so memory does not grow with the store. Of stored views each epoch
takes one at random, predictions average over all.
Everything that is drawn (new layer, order, views, dropout) follows from `random_state` and the
epoch's number alone. So a training resumed from its checkpoint (`featcache.finetuning.checkpoint`),
which is written after every epoch, gives the same weights as one that was never interrupted.

Examples
--------
The ninth recipe, from the cache: images of breeds that a CSV names, the new last layer trained for
nine epochs on four augmented views of the pooling layer's input, then SVM and trees beside it.

>>> import featcache as fc
>>> images = fc.ImageSet.from_csv(
...     "labels.csv", "train", label_column="breed", suffix=".jpg"
... )  # doctest: +SKIP
>>> backbone = fc.Backbone(
...     "resnet50", layers=["avgpool:input:map", "avgpool"]
... )  # doctest: +SKIP
>>> four = fc.Augmentation(views=4)
>>> store = fc.extract(images, backbone, "breeds.h5", augmentation=four)  # doctest: +SKIP
>>> fit, validation = store.split(0.1, stratify=True)  # doctest: +SKIP
>>> nine = fc.SuffixSettings(first="fc", epochs=9)
>>> print(
...     fc.train(fit, validation, head=["suffix", "svm", "forest"], suffix=nine)
... )  # doctest: +SKIP

To train the last stage as well, keep its input (``layers=["layer4:input:map"]``) and name it:
``SuffixSettings(first="layer4")``. Its learning rates are a tenth of the new layer's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

from featcache.errors import TrainingError
from featcache.finetuning.checkpoint import Checkpoint
from featcache.finetuning.cutting import Suffix
from featcache.finetuning.head import SCORED_AT_ONCE, block_scores, to_device
from featcache.finetuning.settings import SuffixSettings
from featcache.heads.calibration import fit_temperature
from featcache.networks.forward import select_device
from featcache.networks.surgery import (
    blocks,
    freeze,
    parameter_groups,
    train_mode,
    unfreeze,
    unfreeze_gradually,
)
from featcache.store.store import FeatureStore
from featcache.system.console import check_stopped
from featcache.system.memory import reuse_memory

__all__ = [
    "Epoch",
    "Finetuned",
    "Maps",
    "finetune",
    "minibatches",
    "rate",
    "scores_of",
    "seeded",
]

_WARM_UP = 0.25  # of a one-cycle training
_START = 1 / 25  # of the highest rate, where one cycle begins


@dataclass(frozen=True)
class Epoch:
    """How one epoch went.

    Attributes
    ----------
    number : int
        From 1.
    loss : float
        Mean training loss over its steps.
    validation_loss, validation_accuracy : float
        On the inner validation images; the loss after calibration by temperature. NaN where there
        are none.
    """

    number: int
    loss: float
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class Finetuned:
    """What a training ended with.

    Attributes
    ----------
    suffix : Suffix
        With the best weights, frozen, in evaluation mode.
    history : tuple of Epoch
        All epochs.
    best : int
        Number of the epoch whose weights these are, from 1.
    """

    suffix: Suffix
    history: tuple[Epoch, ...]
    best: int


@dataclass(frozen=True)
class Maps:
    """Features at the cut, read from a store a few rows at a time.

    Parameters
    ----------
    store : FeatureStore
        Of one network.
    tap : str
        Full name of the tap.
    """

    store: FeatureStore
    tap: str

    @property
    def views(self) -> int:
        """Views of each image."""
        return self.store.taps[self.tap].views

    def read(self, rows: np.ndarray, view: np.ndarray | None = None) -> Tensor:
        """Return features of some images as stored.

        Parameters
        ----------
        rows : ndarray of int, shape (m,)
            In ascending order they are read fastest.
        view : ndarray of int, shape (m,), optional
            Which view of each; left out, all of them.

        Returns
        -------
        torch.Tensor
            (m, ...), or (m, views, ...) where views are stored and none is chosen.
        """
        found, _ = self.store.select(rows).load(self.tap, dtype=None)
        if self.views > 1 and view is not None:
            found = found[np.arange(len(rows)), view]
        return torch.from_numpy(found)


def scores_of(suffix: Suffix, maps: Maps, rows: np.ndarray, device: torch.device) -> np.ndarray:
    """Return scores (m, k) of some images, averaged over their views.

    Parameters
    ----------
    suffix : Suffix
        On `device`; it is left in evaluation mode.
    maps : Maps
        Features at the cut.
    rows : ndarray of int, shape (m,)
        Images.
    device : torch.device
        Where to compute.
    """
    suffix.eval()
    blocks = np.split(rows, range(SCORED_AT_ONCE, len(rows), SCORED_AT_ONCE))
    return np.concatenate([block_scores(suffix, maps.read(block), device) for block in blocks])


def minibatches(rows: np.ndarray, size: int, seed: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield all rows in random order, in batches of nearly one size, each sorted for the disk.

    Parameters
    ----------
    rows : ndarray of int, shape (n,)
        What to deal.
    size : int
        The largest batch.
    seed : sequence of int
        What decides the order.
    """
    order = np.random.default_rng(list(seed)).permutation(rows)
    for batch in np.array_split(order, max(1, -(-len(order) // size))):
        yield np.sort(batch)


def rate(schedule: str, step: int, steps: int) -> float:
    """Return the learning rate of a step (from 0), relative to the highest."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * step / steps))
    top = max(1, round(_WARM_UP * steps))
    if step < top:
        return _START + (1 - _START) * 0.5 * (1 - math.cos(math.pi * step / top))
    return 0.5 * (1 + math.cos(math.pi * (step - top) / max(1, steps - top)))


@dataclass
class _Training:
    """One training while it runs."""

    suffix: Suffix
    maps: Maps
    codes: np.ndarray
    fit: np.ndarray
    settings: SuffixSettings
    weight: np.ndarray
    random_state: int
    device: torch.device
    history: list[Epoch] = field(default_factory=list)
    best: int = 0
    best_state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        network, settings = self.suffix.network, self.settings
        self.suffix.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.trained = self.suffix.trained(settings.first)
        self.order = _top_down(self.suffix, self.trained)
        freeze(network)
        unfreeze(network, *self.trained)
        groups = parameter_groups(
            network,
            settings.lr,
            new=[self.suffix.head],
            factor=settings.factor,
            decay=settings.decay,
            weight_decay=settings.weight_decay,
        )
        for group in groups:
            group["highest"] = group["lr"]
        self.optimizer = torch.optim.AdamW(groups)

    def epoch(self, number: int) -> float:
        """Train for one epoch, numbered from 0, and return the mean loss."""
        settings = self.settings
        self._set_trainable(number)
        train_mode(self.suffix)
        rng = np.random.default_rng([self.random_state, number, 1])
        total = 0.0
        batches = list(minibatches(self.fit, settings.batch_size, (self.random_state, number)))
        for step, rows in enumerate(batches, number * len(batches)):
            check_stopped()
            relative = rate(settings.schedule, step, settings.epochs * len(batches))
            for group in self.optimizer.param_groups:
                group["lr"] = relative * group["highest"]
            view = rng.integers(self.maps.views, size=len(rows)) if self.maps.views > 1 else None
            scores = self.suffix(to_device(self.maps.read(rows, view), self.device))
            loss = self._loss(scores, rows)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += float(loss.detach()) * len(rows)
        return total / len(self.fit)

    def _set_trainable(self, number: int) -> None:
        """Let the parameters be trained that are unfrozen in an epoch."""
        if self.settings.unfreeze_every:
            network, every = self.suffix.network, self.settings.unfreeze_every
            unfreeze_gradually(network, number, every=every, order=self.order)
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name in self.trained)

    def _loss(self, scores: Tensor, rows: np.ndarray) -> Tensor:
        target = torch.from_numpy(self.codes[rows]).to(self.device)
        losses = nn.functional.cross_entropy(scores.float(), target, reduction="none")
        weight = torch.from_numpy(self.weight[rows]).to(self.device)
        return (losses * weight).sum() / weight.sum()

    def judge(self, rows: np.ndarray) -> tuple[float, float]:
        """Return loss and accuracy on some images.

        The loss is that of calibrated probabilities, as a predictor gives them: training makes
        scores too large in the end, and that alone does not count against an epoch.
        """
        if not len(rows):
            return math.nan, math.nan
        scores = scores_of(self.suffix, self.maps, rows, self.device).astype(np.float64)
        truth, weight = self.codes[rows], self.weight[rows].astype(np.float64)
        if not np.isfinite(scores).all():
            return math.inf, 0.0
        temperature = fit_temperature(scores, truth, weight)
        losses = -log_softmax(scores / temperature, axis=1)[np.arange(len(rows)), truth]
        right = scores.argmax(axis=1) == truth
        return float(np.average(losses, weights=weight)), float(right.mean())

    def note(self, epoch: Epoch) -> None:
        """Keep an epoch's figures, and its weights if they are the best yet."""
        self.history.append(epoch)
        best = self.history[self.best - 1].validation_loss if self.best else math.inf
        # Without validation images (NaN) each epoch takes the place of the one before it.
        if not epoch.validation_loss >= best or not self.best:
            self.best = epoch.number
            self.best_state = _copied(self.suffix)

    @property
    def is_over(self) -> bool:
        """Whether the last epoch is done, or patience is."""
        done, patience = len(self.history), self.settings.patience
        unfreezing = self.settings.unfreeze_every * len(self.order)
        waited = done - max(self.best, min(unfreezing, self.settings.epochs))
        return done >= self.settings.epochs or bool(patience and waited >= patience)

    # --- checkpoints ---------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """Return all that resuming needs."""
        return {
            "tensors": _copied(self.suffix),
            "optimizer": self.optimizer.state_dict(),
            "history": [astuple(epoch) for epoch in self.history],
            "best": self.best,
            "best_tensors": self.best_state,
        }

    def take_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        _restore(self.suffix, state["tensors"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = [Epoch(*values) for values in state["history"]]
        self.best, self.best_state = state["best"], state["best_tensors"]

    def finished(self) -> Finetuned:
        """Return the suffix with its best weights."""
        _restore(self.suffix, self.best_state)
        self.suffix.requires_grad_(False).cpu().eval()
        # As a head that is loaded again lies in memory: torch.export wants no other.
        self.suffix.to(memory_format=torch.contiguous_format)
        return Finetuned(self.suffix, tuple(self.history), self.best)


def _copied(suffix: Suffix) -> dict[str, Tensor]:
    return {name: one.detach().cpu().clone() for name, one in suffix.tensors().items()}


def _restore(suffix: Suffix, tensors: Mapping[str, Tensor]) -> None:
    own = suffix.tensors()
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)


def _top_down(suffix: Suffix, trained: Sequence[str]) -> list[str]:
    """Return the blocks to train in the order of unfreezing: the head is the first."""
    names = [suffix.head]
    for name in blocks(suffix.network):
        inside = any(one == name or one.startswith(f"{name}.") for one in trained)
        if inside and name != suffix.head:
            names.append(name)
    return names


def finetune(
    suffix: Suffix,
    classes: int,
    maps: Maps,
    codes: np.ndarray,
    fit: np.ndarray,
    valid: np.ndarray,
    settings: SuffixSettings,
    *,
    weight: np.ndarray | None = None,
    random_state: int = 0,
    checkpoint: Checkpoint | None = None,
) -> Finetuned:
    """Give a suffix a new last layer and train it.

    Parameters
    ----------
    suffix : Suffix
        From `featcache.finetuning.cutting.cut`; it is changed.
    classes : int
        Number of classes.
    maps : Maps
        Features at the cut.
    codes : ndarray of int64, shape (n,)
        Class of each row of the store.
    fit, valid : ndarray of int
        Rows to train on, and rows that decide when to stop (none: train to the end).
    settings : SuffixSettings
        How to train.
    weight : ndarray of shape (n,), optional
        Weights of the rows.
    random_state : int
        Seed.
    checkpoint : Checkpoint, optional
        Where to resume from and to write to after every epoch.

    Returns
    -------
    Finetuned

    Raises
    ------
    TrainingError
        The loss is no longer finite.
    """
    device = select_device(settings.device)
    with seeded(random_state, device):
        suffix.new_classifier(classes)
    weight = (np.ones(len(codes)) if weight is None else weight).astype(np.float32)
    training = _Training(suffix, maps, codes, fit, settings, weight, random_state, device)
    state = None if checkpoint is None else checkpoint.read()
    if state is not None:
        training.take_state(state)
    with reuse_memory():
        while not training.is_over:
            number = len(training.history)
            with seeded(random_state, device, number):
                loss = training.epoch(number)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"The loss is no longer finite in epoch {number + 1}. Train with a smaller "
                    f"learning rate than {settings.lr:g} (--lr)."
                )
            training.note(Epoch(number + 1, loss, *training.judge(valid)))
            if checkpoint is not None:
                checkpoint.write(training.to_state())
    return training.finished()


@contextlib.contextmanager
def seeded(random_state: int, device: torch.device, epoch: int = -1) -> Iterator[None]:
    """Draw from a seed of its own, and leave the caller's generators as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        seed = np.random.SeedSequence([random_state, epoch + 1]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        yield
