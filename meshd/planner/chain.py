"""Chains of stages, as the searches represent them.

A peer is an index. Cut c is the boundary before layer c, so layers `[a, b)` lie between the cuts a and b.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshd.planner.profile import PeerProfile
from meshd.types import LayerRange, StagePlan

Array = NDArray[np.float64]


class LayerRun(NamedTuple):
    """Layers `[start, end)` on the peer with index `peer`."""

    peer: int
    start: int
    end: int


class Chain(NamedTuple):
    """Consecutive runs of layers, and their cost by the objective of the search."""

    value: float
    runs: tuple[LayerRun, ...]

    def stages(self, peers: Sequence[PeerProfile], first_layer: int = 0) -> tuple[StagePlan, ...]:
        """Return the runs as stages. Peer indices refer to `peers`; cut 0 of the chain is layer `first_layer` of the model."""
        return tuple(
            StagePlan(peer=peers[run.peer].id, layers=LayerRange(first_layer + run.start, first_layer + run.end))
            for run in self.runs
        )
