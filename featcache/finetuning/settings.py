"""`SuffixSettings`, apart from all that trains: the command line makes its options from them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from featcache.errors import TrainingError

__all__ = ["SCHEDULES", "Schedule", "SuffixSettings"]

Schedule = Literal["one-cycle", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def _option(default: Any, help: str, **least: int) -> Any:
    """Return a field that is also an option of the command line; a whole number has a least one."""
    return field(default=default, metadata={"help": help, **least})


@dataclass(frozen=True, kw_only=True)
class SuffixSettings:
    """How the rest of a network is trained on cached features.

    Parameters
    ----------
    first : str, optional
        The first layer to train, ``--from`` on the command line. The layers between the cut and it
        stay frozen. Left out, everything behind the cut is trained.
    epochs : int
        How often each image is seen, at most.
    batch_size : int
        Number of images in a step.
    lr : float
        Highest learning rate of the new last layer.
    factor : float
        Learning rate of pretrained layers, relative to `lr`.
    decay : float
        Ratio of learning rates from one block to the next below.
    weight_decay : float
        AdamW's weight decay. Biases and the parameters of normalisation have none.
    schedule : {"one-cycle", "cosine"}
        One cycle rises for a quarter of the steps and then falls to zero (Smith and Topin 2018,
        https://arxiv.org/abs/1708.07120); cosine only falls (Loshchilov and Hutter 2017,
        https://arxiv.org/abs/1608.03983).
    unfreeze_every : int
        Begin with the new layer and unfreeze one block more every so many epochs, back to `first`
        (Howard and Ruder 2018). 0 trains all of them at once.
    patience : int
        Stop after so many epochs without a better validation loss. 0 never stops early.
    validation : float
        Share of the training images that are set aside to decide when to stop. With 0 all images
        are trained on to the last epoch, whose weights are kept. That is better where images are
        few: those set aside cannot tell one epoch from another, and training lacks them.
    device : str
        ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
    """

    first: str | None = _option(None, "first layer to train. Default: the first behind the cut.")
    epochs: int = _option(10, "train for at most this many epochs.", least=1)
    batch_size: int = _option(32, "number of images per step.", least=2)
    lr: float = _option(3e-3, "highest learning rate of the new last layer.")
    factor: float = 0.1
    decay: float = 1.0
    weight_decay: float = 0.01
    schedule: Schedule = field(default="one-cycle", metadata={"help": "learning rate schedule."})
    unfreeze_every: int = _option(
        0, "unfreeze one block more every N epochs; 0 trains all of them at once.", least=0
    )
    patience: int = _option(
        5, "stop after N epochs without a better validation loss; 0 never stops early.", least=0
    )
    validation: float = _option(
        0.1,
        "share of the images set aside to decide when to stop; with 0, train on all of them, to "
        "the last epoch.",
    )
    device: str = _option("auto", "auto, cpu, cuda, cuda:1 or mps.")

    def __post_init__(self) -> None:
        values = {one.name: (getattr(self, one.name), one.metadata) for one in fields(self)}
        for right, what in (
            *(
                (value >= more["least"], f"{name} counts from {more['least']}, got {value}")
                for name, (value, more) in values.items()
                if "least" in more
            ),
            (self.lr > 0, f"lr must be over 0, got {self.lr}"),
            (self.factor > 0 and self.decay > 0, "factor and decay must be over 0"),
            (0 <= self.validation < 1, f"validation is a share of 1, got {self.validation}"),
            (
                self.schedule in SCHEDULES,
                f"schedule is {' or '.join(SCHEDULES)}, got {self.schedule!r}",
            ),
        ):
            if not right:
                raise TrainingError(f"Suffix training: {what}.")
