"""One peer's side of the simulated network."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshd.agents.links.link_table import LEFT, OnDown, OnUp
from meshd.agents.links.log import LinkLog
from meshd.agents.links.open import ReturnDesk
from meshd.agents.links.rpc import Dispatcher, Handler, M, to_view
from meshd.agents.supervisor import Supervise
from meshd.errors import Overloaded, PeerLost
from meshd.protocol.messages import Lane, Message, Reply, Request
from meshd.protocol.transport import Buffer
from meshd.types import LinkStats, PeerId
from sim.loop import OWNER, Owner, SimClock
from sim.network.wires import Link

if TYPE_CHECKING:
    from sim.network.network import SimNetwork

_MAX_LOCAL = 4096


class SimLinks:
    """Replaces `meshd.agents.links.links.Links` in one process of a peer. Has only the methods that agents use."""

    def __init__(
        self,
        network: "SimNetwork",
        owner: Owner,
        me: PeerId,
        name: str,
        incarnation: int,
        clock: SimClock,
        on_up: OnUp,
        on_down: OnDown,
    ) -> None:
        self.id = me
        self.name = name
        self.owner = owner
        self.incarnation = incarnation
        self.on_up, self.on_down = on_up, on_down
        self.links: dict[PeerId, Link] = {}
        self.broken: dict[PeerId, Link] = {}
        """Links that have ended and may be restored."""
        self.detached = False
        self.authority = b""
        """Public key of the authority of this peer's cluster key. Peers with different ones can't link."""
        self.desk: ReturnDesk | None = None
        self.context = owner.context()
        self._network = network
        self._local = 0
        """Number of messages to this peer itself that are not delivered yet."""
        self._stop = asyncio.Event()
        self.dispatcher = Dispatcher(self.send, LinkLog(clock))

    def register(self, message_type: type[M], handler: Handler[M]) -> None:
        self.dispatcher.register(message_type, handler)

    def send(self, peer: PeerId, message: Message, payload: Buffer | None = None) -> None:
        """Send a message to a peer, which may be this peer itself. Raises: PeerLost, Overloaded, InvalidRequest."""
        assert OWNER.get() is self.owner, "fault of the simulator: a peer's code runs in the context of another owner"
        if peer == self.id:
            self._send_local(message, payload)
            return
        link = self.known(peer)
        if link is None:
            raise PeerLost(f"{peer:.8} is not linked with this peer")
        self._network.delivery.send(self, peer, link, message, payload)

    def when_room(self, peer: PeerId, lane: Lane, callback: Callable[[], None]) -> None:
        link = self.known(peer)
        if link is None:
            asyncio.get_running_loop().call_soon(callback)
        elif self.id not in link.up:
            link.waiting.setdefault(self.id, []).append(callback)
        else:
            self._network.delivery.when_room(self.id, link.pipes[self.id, lane], callback)

    def idle_s(self, peer: PeerId, lane: Lane) -> float:
        link = self.known(peer)
        return float("inf") if link is None else self._network.delivery.idle_s(link.pipes[peer, lane])

    async def request(
        self, peer: PeerId, message: Request | Callable[[int], Request], payload: Buffer | None = None, *, timeout_s: float
    ) -> tuple[Reply, memoryview]:
        return await self.dispatcher.request(peer, message, payload, timeout_s)

    def next_request(self) -> int:
        return self.dispatcher.next_request()

    def connect(self, host: str, port: int, source: str) -> None:
        """Do nothing: the network links all peers that can reach one another."""

    def forget(self, host: str, port: int, source: str) -> None:
        """Do nothing, for the same reason as `connect`."""

    def answer_returning(self, desk: ReturnDesk) -> None:
        self.desk = desk

    def change_key(self, identity: Any, stays: Callable[[PeerId], bool], reason: str) -> None:
        self.authority = identity.issuer.public
        for peer in self.peers():
            if not stays(peer):
                self._network.end(self, peer, reason)
        self._network.dial_all(self)

    def cut(self, peer: PeerId, reason: str) -> None:
        self._network.end(self, peer, reason)

    def dial_rarely(self, rarely: bool) -> None:
        """Do nothing: the network dials for all peers."""

    def peers(self) -> list[PeerId]:
        return [*self.links, *self.broken]

    def known(self, peer: PeerId) -> Link | None:
        """Returns: the link that is up, or the broken one that may be restored."""
        return self.links.get(peer) or self.broken.get(peer)

    def is_broken(self, peer: PeerId) -> bool:
        return peer in self.broken

    def silence_s(self, peer: PeerId) -> float:
        link = self.known(peer)
        return float("inf") if link is None else self._network.silence_s(peer, self.id)

    def addresses(self, peer: PeerId) -> list[str]:
        return [f"sim-{peer[:8]}:6375"]

    def rows(self) -> list[Any]:
        return []

    def refusals(self) -> list[Any]:
        return []

    async def run(self, supervise: Supervise) -> None:
        """Join the network, and stay until `close` is called. Cancel: leaves the network."""
        try:
            async with asyncio.TaskGroup() as group:
                self.dispatcher.group = group
                self._network.attach(self)
                await self._stop.wait()
                self.dispatcher.cancel_tasks()
        finally:
            self.dispatcher.group = None
            self._network.detach(self, "this peer stops")

    async def close(self, reason: str) -> None:
        self._network.detach(self, f"{LEFT}: {reason}")
        self._stop.set()

    def _send_local(self, message: Message, payload: Buffer | None) -> None:
        if self._local >= _MAX_LOCAL:
            raise Overloaded(f"{_MAX_LOCAL} messages of this peer to itself wait already", retry_after_s=0.1)
        self._local += 1
        asyncio.get_running_loop().call_soon(self._deliver_local, message, payload)

    def _deliver_local(self, message: Message, payload: Buffer | None) -> None:
        self._local -= 1
        self._network.delivery.note_arrival(self.id, self.id, message)
        self.dispatcher.deliver(self.id, message, to_view(payload))


class SimProber:
    """Replaces `meshd.agents.links.probe.LinkProber`; a measurement takes 50 ms."""

    def __init__(self, links: SimLinks, network: "SimNetwork", clock: SimClock, on_change: Callable[[], None]) -> None:
        self._links = links
        self._network = network
        self._clock = clock
        self._on_change = on_change
        self._stats: dict[PeerId, LinkStats] = {}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            await asyncio.Event().wait()

    def stats(self) -> dict[PeerId, LinkStats]:
        return dict(self._stats)

    def link_up(self, peer: PeerId) -> None:
        self.link_down(peer)
        if self._group is not None:
            self._group.create_task(self.probe(peer))

    def link_down(self, peer: PeerId) -> None:
        self._stats.pop(peer, None)

    async def probe(self, peer: PeerId) -> LinkStats | None:
        await self._clock.sleep(0.05)
        if peer not in self._links.links:
            return None
        self._stats[peer] = self._network.delivery.stats(self._links.id, peer)
        self._on_change()
        return self._stats[peer]
