"""`SuffixSettings`, apart from all that trains: the command line's help shows its defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from featcache.errors import TrainingError

__all__ = ["SCHEDULES", "Schedule", "SuffixSettings"]

Schedule = Literal["one-cycle", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


@dataclass(frozen=True, kw_only=True)
class SuffixSettings:
    """How the rest of a network is trained on cached features.

    Parameters
    ----------
    first : str, optional
        The first layer to train, ``--from`` on the command line. What lies between the cut and it
        stays frozen. Left out: everything behind the cut is trained.
    epochs : int
        Times that each image is seen, at most.
    batch_size : int
        Images a step.
    lr : float
        Highest learning rate of the new last layer.
    factor : float
        Learning rate of pretrained layers, relative to `lr`.
    decay : float
        Ratio of learning rates from one block to the next below.
    weight_decay : float
        AdamW's, of weights; biases and normalisation have none.
    schedule : {"one-cycle", "cosine"}
        One cycle rises for a quarter of the steps and then falls to zero (Smith and Topin 2018,
        https://arxiv.org/abs/1708.07120); cosine only falls (Loshchilov and Hutter 2017,
        https://arxiv.org/abs/1608.03983).
    unfreeze_every : int
        Begin with the new layer and unfreeze one block more every so many epochs, back to `first`
        (Howard and Ruder 2018). 0: all at once.
    patience : int
        Stop after so many epochs without a better validation loss. 0: never.
    validation : float
        Share of the training images that early stopping looks at and nothing is trained on. 0:
        train on all images to the last epoch, whose weights are kept. Where images are few, those
        set aside are too few to tell one epoch from another, and are missed in training.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
    """

    first: str | None = None
    epochs: int = 10
    batch_size: int = 32
    lr: float = 3e-3
    factor: float = 0.1
    decay: float = 1.0
    weight_decay: float = 0.01
    schedule: Schedule = "one-cycle"
    unfreeze_every: int = 0
    patience: int = 5
    validation: float = 0.1
    device: str = "auto"

    def __post_init__(self) -> None:
        for right, what in (
            (self.epochs >= 1, f"epochs counts from 1, got {self.epochs}"),
            (self.batch_size >= 2, f"batch_size counts from 2, got {self.batch_size}"),
            (self.lr > 0, f"lr must be over 0, got {self.lr}"),
            (self.factor > 0 and self.decay > 0, "factor and decay must be over 0"),
            (0 <= self.validation < 1, f"validation is a share of 1, got {self.validation}"),
            (
                self.schedule in SCHEDULES,
                f"schedule is {' or '.join(SCHEDULES)}, got {self.schedule!r}",
            ),
            (
                self.unfreeze_every >= 0 and self.patience >= 0,
                "unfreeze_every and patience count from 0",
            ),
        ):
            if not right:
                raise TrainingError(f"Suffix training: {what}.")
