"""A chain of stages as the searches handle it: peers by index, layers by cut."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from meshd.planner.profile import PeerProfile
from meshd.types import LayerRange, StagePlan

Array = NDArray[np.float64]


class LayerRun(NamedTuple):
    """Layers `[start, end)` on a peer (its index)."""

    peer: int
    start: int
    end: int


class Chain(NamedTuple):
    """A whole chain and what it costs."""

    value: float
    runs: tuple[LayerRun, ...]

    def stages(self, peers: Sequence[PeerProfile], first_layer: int = 0) -> tuple[StagePlan, ...]:
        """The runs as stages on these peers; the chain's cut 0 is at `first_layer`."""
        return tuple(
            StagePlan(peer=peers[run.peer].id, layers=LayerRange(first_layer + run.start, first_layer + run.end))
            for run in self.runs
        )
