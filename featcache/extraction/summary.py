"""What an extraction did, and where the time went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Clock", "Summary"]


@dataclass
class Clock:
    """Where the time went, in seconds.

    Attributes
    ----------
    decode : float
        Reading and decoding, summed over all workers.
    waiting_for_images : float
        The forward pass stood still for decoded images.
    forward : float
        Forward passes.
    write : float
        Writing, beside the forward pass.
    waiting_for_writer : float
        The forward pass stood still for the writer.
    """

    decode: float = 0.0
    waiting_for_images: float = 0.0
    forward: float = 0.0
    write: float = 0.0
    waiting_for_writer: float = 0.0


@dataclass
class Summary:
    """What an extraction did.

    Attributes
    ----------
    images : int
        Size of the image set.
    computed, copied, failed : int
        Images that were computed by this run, that an earlier run had computed, and that are
        recorded as failed.
    cut_off : int
        Images computed by this run that are cut off before their end.
    removed : int
        Images of an earlier file that are not in the image set, under no name: their features are
        no longer in the file.
    unlabelled : int
        Images without a label where others have one.
    relabelled : bool
        Whether labels were rewritten.
    skipped : bool
        Whether there was nothing to do; no weights were loaded then.
    seconds : dict of str to float
        ``total``; of it ``loop``, from the first image to the last. Within the loop ``decode``
        (summed over all workers), ``forward`` and ``write``, which overlap, and
        ``waiting_for_images`` and ``waiting_for_writer``, during which the forward pass stood
        still.
    bottleneck : str or None
        "decode", "forward" or "write": what the loop spent most of its time on. Decoding is faster
        with more workers or images made smaller beforehand, the forward pass in bfloat16 or on a
        GPU, writing with ``store_dtype="float16"`` or on a faster disk.
    settings : dict
        `featcache.networks.forward.Settings` of the forward pass.
    rounding : float or None
        Of a run in less than float32: median distance of the test images' features from their
        float32 ones, relative to their length, of the worst tap. It depends on the network:
        ResNet-50 loses less than MobileNetV2.
    notes : list of str
        What of a weights file was loaded, and what is wrong with the weights.
    """

    images: int
    computed: int = 0
    copied: int = 0
    failed: int = 0
    cut_off: int = 0
    removed: int = 0
    unlabelled: int = 0
    relabelled: bool = False
    skipped: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    bottleneck: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    rounding: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """`computed` divided by ``seconds["loop"]``: the start and the end of the run left out."""
        seconds = self.seconds.get("loop", 0.0)
        return self.computed / seconds if seconds else 0.0

    def measure(self, clock: Clock, seconds: float, settings: dict[str, Any]) -> None:
        """Record the times of a loop that took so many seconds, and its settings."""
        self.seconds |= {"loop": seconds, **asdict(clock)}
        spent = {
            "decode": clock.waiting_for_images,
            "forward": clock.forward,
            "write": clock.waiting_for_writer,
        }
        self.bottleneck = max(spent, key=lambda part: spent[part])
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "images_per_second": self.images_per_second}

    def __str__(self) -> str:
        return "\n".join([self._counts(), *self.notes])

    def _counts(self) -> str:
        labels = "; labels rewritten" if self.relabelled else ""
        labels += f"; {self.unlabelled:,} without a label" if self.unlabelled else ""
        if self.skipped:
            failed = f", {self.failed:,} of them failed" if self.failed else ""
            return f"nothing to do: all {self.images:,} images are there{failed}{labels}"
        text = (
            f"{self.images:,} images: {self.computed:,} computed, {self.copied:,} reused, "
            f"{self.failed:,} failed, in {self.seconds['total']:.1f} s"
        )
        if self.cut_off:
            text += f"; {self.cut_off:,} image{' is' if self.cut_off == 1 else 's are'} cut off"
        if self.removed:
            one = self.removed == 1
            gone = "1 image is" if one else f"{self.removed:,} images are"
            text += f"; {gone} no longer there: {'its' if one else 'their'} features were removed"
        text += labels
        if self.bottleneck is None:
            return text
        rounding = (
            ""
            if self.rounding is None
            else f"\n{self.settings['precision']} features of the test images are "
            f"{self.rounding:.1%} from their float32 ones"
        )
        # The same words however busy the machine is; the figures say what is slow.
        return (
            f"{text}\nfrom the first image to the last {self.seconds['loop']:.1f} s "
            f"({self.images_per_second:.1f} images/s): forward pass "
            f"{self.seconds['forward']:.1f} s, waiting for images "
            f"{self.seconds['waiting_for_images']:.1f} s, waiting for the disk "
            f"{self.seconds['waiting_for_writer']:.1f} s; the longest of them limits the speed"
            f"{rounding}"
        )
