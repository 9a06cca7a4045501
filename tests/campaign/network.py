"""The network of the campaign: it pauses, so that rows are written one batch after the other."""

from __future__ import annotations

import time

from torch import Tensor, nn

from featcache.pixels.preprocessing import Preprocessing
from tests.small import SIDE, Network, network


class Pausing(Network):
    """It takes three milliseconds a batch."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.003)
        return super().forward(x)


def own() -> tuple[nn.Module, Preprocessing]:
    """Return the network for ``--backbone tests.campaign.network:own``."""
    return network(Pausing), Preprocessing(resize=SIDE, crop=SIDE)
