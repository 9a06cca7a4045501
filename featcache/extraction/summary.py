"""What an extraction did, how long each part took, and what would make it faster."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from featcache.extraction.stream import Clock
from featcache.networks.forward import Settings

__all__ = ["Summary"]

_PARTS = {"decode": "decoding", "forward": "the forward pass", "write": "writing"}


@dataclass
class Summary:
    """What an extraction did.

    Attributes
    ----------
    images : int
        Size of the image set.
    computed, copied, failed : int
        Images whose features were computed in this run, were there from an earlier one, and that
        are recorded as failed.
    relabelled : bool
        Labels were rewritten.
    skipped : bool
        There was nothing to do, and no weights were loaded.
    seconds : dict of str to float
        ``total``; of it ``loop``, from the first image to the last. Within the loop ``decode``
        (summed over all workers), ``forward`` and ``write``, which overlap, and
        ``waited_for_decode`` and ``waited_for_write``, for which the forward pass stood still.
    bottleneck : str or None
        "decode", "forward" or "write": what the loop spent most of its time on.
    hint : str
        What would make it faster.
    settings : dict
        `featcache.networks.forward.Settings` of the forward pass.
    rounding : float or None
        Of a run in less than float32: how far the features of the test images in the store are
        from their float32 ones, as a part of their length; the median over images, and the worst
        tap. It depends on the network: ResNet-50 loses less than MobileNetV2.
    """

    images: int
    computed: int = 0
    copied: int = 0
    failed: int = 0
    relabelled: bool = False
    skipped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    bottleneck: str | None = None
    hint: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    rounding: float | None = None

    @property
    def images_per_second(self) -> float:
        """Images computed a second, from the first to the last."""
        seconds = self.seconds.get("loop", 0.0)
        return self.computed / seconds if seconds else 0.0

    def measure(self, clock: Clock, seconds: float, settings: Settings, workers: int) -> None:
        """Take in the times of the loop, and draw the conclusion.

        Parameters
        ----------
        clock : Clock
            Times of the parts.
        seconds : float
            Time of the whole loop.
        settings : Settings
            Of the forward pass.
        workers : int
            Processes that decoded.
        """
        self.seconds |= {
            "loop": seconds,
            "decode": clock.decode,
            "forward": clock.forward,
            "write": clock.write,
            "waited_for_decode": clock.waiting_for_images,
            "waited_for_write": clock.waiting_for_writer,
        }
        spent = {
            "decode": clock.waiting_for_images,
            "forward": clock.forward,
            "write": clock.waiting_for_writer,
        }
        self.bottleneck = max(spent, key=lambda part: spent[part])
        self.settings = settings.to_dict()
        self.hint = _hint(self.bottleneck, settings, workers)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "images_per_second": self.images_per_second}

    def __str__(self) -> str:
        labels = "; labels rewritten" if self.relabelled else ""
        if self.skipped:
            failed = f", {self.failed:,} of them failed" if self.failed else ""
            return f"nothing to do: all {self.images:,} images are there{failed}{labels}"
        text = (
            f"{self.images:,} images: {self.computed:,} computed, {self.copied:,} reused, "
            f"{self.failed:,} failed, in {self.seconds['total']:.1f} s"
        )
        if self.bottleneck is None:
            return text
        parts = ", ".join(f"{part} {self.seconds[part]:.1f} s" for part in _PARTS)
        hint = f" Faster: {self.hint}." if self.hint else ""
        rounding = (
            ""
            if self.rounding is None
            else f"\n{self.settings['precision']} features of the test images are "
            f"{self.rounding:.1%} from their float32 ones"
        )
        return (
            f"{text} ({self.images_per_second:.1f} images/s)\n"
            f"{parts}; {_PARTS[self.bottleneck]} limits the speed.{hint}{rounding}"
        )


def _hint(bottleneck: str, settings: Settings, workers: int) -> str:
    """Return the flag that would help most."""
    if bottleneck == "write":
        return "--store-dtype float16, or a faster disk"
    cores = os.cpu_count() or 1
    if bottleneck == "decode":
        if workers < cores:
            return f"--workers {cores}"
        return "images made smaller beforehand, or a faster disk"
    if settings.device == "cpu" and settings.precision == "float16":
        return "--precision bfloat16, which CPUs compute faster"
    if settings.device == "cpu" and torch.cuda.is_available():
        return "--device cuda"
    if settings.precision == "float32" and (settings.device != "cpu" or _has_bfloat16()):
        return "--precision bfloat16 (the run then says what rounding costs)"
    return "" if settings.device != "cpu" else "--image-size, or a smaller backbone"


def _has_bfloat16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported())
