"""Holders of KV in this process, each with an arena of its own that lacks everything but its run."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from meshd.kernels.attention.remote import attend_for
from meshd.kernels.attention.tree import Part
from meshd.kernels.backend import AttendRequest, Pass, RemoteRun
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.kv.memory import KvKey, layout_of
from meshd.types import LayerRange, ModelId, ModelSpec

HALVES = (
    RemoteRun(LayerRange(1, 3), range(2), (0, 1)),
    RemoteRun(LayerRange(0, 3), range(4), (1, 2)),
)
"""Of four layers with two KV heads: the first two spans of head 0 in layers 1 and 2, and all of head 1 except in layer 3."""


@dataclass
class Holders:
    """The holders of some sessions' runs: one lease for each run of each session."""

    spec: ModelSpec
    capacity: int
    _leases: dict[Hashable, HostLease] = field(default_factory=dict)

    def answer(self, session: Hashable, request: AttendRequest) -> Part:
        run = request.run
        key = session, run.layers, run.spans, run.kv_heads
        if key not in self._leases:
            kv_key = KvKey(ModelId("fe" * 16), run.layers, run.kv_heads)
            layout = layout_of(self.spec, run.layers, run.kv_heads)
            self._leases[key] = HostArena(1 << 30).open(kv_key, layout, self.capacity)
        return attend_for(self._leases[key], request)


def give_all(running: Pass, requests: Sequence[AttendRequest], holders: Holders) -> None:
    """Answer all requests of a cut. The sessions are named by their segments."""
    running.give([holders.answer(request.segment, request) for request in requests])
