"""What an extraction did, and where the time went."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from featcache.system.tables import counted


def new_clock() -> dict[str, float]:
    """Return seconds to count, each 0: see `Summary.seconds`."""
    names = ("decode", "waiting_for_images", "forward", "write", "waiting_for_writer")
    return dict.fromkeys(names, 0.0)


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

    def measure(self, clock: dict[str, float], seconds: float, settings: dict[str, Any]) -> None:
        """Record the times of a loop that took so many seconds, and its settings."""
        self.seconds |= {"loop": seconds, **clock}
        spent = {
            "decode": "waiting_for_images",
            "forward": "forward",
            "write": "waiting_for_writer",
        }
        self.bottleneck = max(spent, key=lambda part: clock[spent[part]])
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**asdict(self), "images_per_second": self.images_per_second}

    def __str__(self) -> str:
        return "\n".join([self._counts(), *self._speed(), *self.notes])

    def _counts(self) -> str:
        labels = "; labels rewritten" if self.relabelled else ""
        labels += f"; {self.unlabelled:,} without a label" if self.unlabelled else ""
        if self.skipped:
            failed = f", {self.failed:,} of them failed" if self.failed else ""
            return f"nothing to do: all {self.images:,} images are there{failed}{labels}"
        text = (
            f"{counted(self.images, 'image')}: {self.computed:,} computed, {self.copied:,} reused, "
            f"{self.failed:,} failed, in {self.seconds['total']:.1f} s"
        )
        if self.cut_off:
            text += f"; {counted(self.cut_off, 'image is', 'images are')} cut off"
        if self.removed:
            gone = counted(
                self.removed,
                "image is no longer there: its features",
                "images are no longer there: their features",
            )
            text += f"; {gone} were removed"
        return text + labels

    def _speed(self) -> Iterator[str]:
        if self.bottleneck is None:
            return
        seconds = self.seconds
        # The same words however busy the machine is; the figures say what is slow.
        yield (
            f"from the first image to the last {seconds['loop']:.1f} s "
            f"({self.images_per_second:.1f} images/s): forward pass {seconds['forward']:.1f} s, "
            f"waiting for images {seconds['waiting_for_images']:.1f} s, waiting for the disk "
            f"{seconds['waiting_for_writer']:.1f} s; the longest of them limits the speed"
        )
        if self.rounding is not None:
            yield (
                f"{self.settings['precision']} features of the test images are "
                f"{self.rounding:.1%} from their float32 ones"
            )
