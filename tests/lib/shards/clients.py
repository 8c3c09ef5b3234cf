"""Clients of holders, in place of those that will send requests to peers."""

from collections.abc import Callable
from dataclasses import dataclass, field

from meshd.errors import MeshdError
from meshd.kernels.attention.tree import Part
from meshd.kernels.backend import AttendRequest, RemoteRun
from meshd.protocol.messages import Open
from meshd.types import PeerId, SessionId
from shards.holders import HALVES, Holders
from stage_mesh.mesh import StagePeer

HOLDERS = (PeerId("h" * 52), PeerId("i" * 52))
"""The peers that hold the runs of `HALVES`."""
Answer = Callable[[Part | MeshdError], None]


@dataclass
class Asked:
    """A request that waits for the test to answer it."""

    session: SessionId
    request: AttendRequest
    answer: Answer


@dataclass
class ManualShards:
    """Holders in this process, which answer when the test says so; at once if `eager`."""

    holders: Holders
    eager: bool = False
    refusal: MeshdError | None = None
    """Raised in place of sending a request."""
    asked: list[Asked] = field(default_factory=list)

    def serve(self, *peers: StagePeer, only: set[SessionId] | None = None) -> None:
        """Let sessions that are opened on these peers from now on, or only these sessions, have KV at the holders."""

        def client(message: Open) -> "_Client | None":
            return _Client(self, message.session) if only is None or message.session in only else None

        for peer in peers:
            peer.host._opener.shards_of = client

    def part(self, asked: Asked) -> Part:
        return self.holders.answer(asked.session, asked.request)

    def answer_all(self) -> None:
        """Answer everything that waits, the newest first."""
        waiting, self.asked = self.asked, []
        for each in reversed(waiting):
            each.answer(self.part(each))


@dataclass
class _Client:
    """Implements `ShardClient` for one session."""

    shards: ManualShards
    session: SessionId
    runs: tuple[RemoteRun, ...] = HALVES

    def holder_of(self, run: RemoteRun) -> PeerId:
        return HOLDERS[self.runs.index(run)]

    def ask(self, request: AttendRequest, answer: Answer) -> None:
        if self.shards.refusal is not None:
            raise self.shards.refusal
        self.shards.asked.append(Asked(self.session, request, answer))
        if self.shards.eager:
            self.shards.answer_all()
