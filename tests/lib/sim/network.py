"""A seeded network: what `meshd.agents.links.links` does over sockets, here over virtual time.

A link is two lanes in each direction, each in order, as TCP gives it. Heartbeats are not sent one by one: the network
knows whether they would have arrived, and a side that would have missed them for 2 s gives the link up. Messages held back by a cut
arrive when the cut heals, if the link still exists; of the messages in transit when a link breaks, those after a random time are
lost.
"""

import asyncio
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from meshd.agents.links.link import _lane_of
from meshd.agents.links.log import LinkLog
from meshd.agents.links.rpc import Dispatcher, Handler, M, to_view
from meshd.agents.links.table import LEFT, OnDown, OnUp
from meshd.errors import InvalidRequest, Overloaded, PeerLost
from meshd.protocol.codec import decode, encode
from meshd.protocol.framing import MAX_HEADER, MAX_PAYLOAD
from meshd.protocol.messages import FEATURES, PROTOCOL_VERSION, Advertise, Hello, Lane, Message, Reply, Request, SessionMessage
from meshd.protocol.transport import QUEUE_BYTES, Buffer
from meshd.types import LinkStats, PeerId
from sim.loop import OWNER, Owner, SimClock, SimLoop
from sim.trace import Trace
from sim.wires import Harsh, Link, Path, Pipe

_SILENCE_S = 2.0
_BEAT_S = 0.5
_MAX_LOCAL = 4096
_LATEST_REDIAL_S = 0.25
_HEADER_BYTES = 120
_ADVERTS_ENCODED = 0.05
"""Those of many peers are long, and go out by the dozen: so many of them are really encoded and read."""
Pair = tuple[PeerId, PeerId]


class SimLinks:
    """What agents use of `meshd.agents.links.links.Links`, for one incarnation of one peer."""

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
        self.gone = False
        self.context = owner.context()
        self._network = network
        self._local = 0
        self._stop = asyncio.Event()
        self.dispatcher = Dispatcher(self.send, LinkLog(clock))

    def register(self, message_type: type[M], handler: Handler[M]) -> None:
        self.dispatcher.register(message_type, handler)

    def send(self, peer: PeerId, message: Message, payload: Buffer | None = None) -> None:
        assert OWNER.get() is self.owner, "a peer's code runs as somebody else: a fault of the simulator"
        if peer == self.id:
            self._send_local(message, payload)
            return
        link = self.links.get(peer)
        if link is None or peer not in self.links or self.id not in link.up:
            raise PeerLost(f"{peer:.8} is not linked with this peer")
        self._network.send(self, peer, link, message, payload)

    async def request(
        self, peer: PeerId, message: Request | Callable[[int], Request], payload: Buffer | None = None, *, timeout_s: float
    ) -> tuple[Reply, memoryview]:
        return await self.dispatcher.request(peer, message, payload, timeout_s)

    def next_request(self) -> int:
        return self.dispatcher.next_request()

    def connect(self, host: str, port: int, source: str) -> None:
        """Nothing to do: the network links all peers that can reach one another."""

    def forget(self, host: str, port: int, source: str) -> None:
        pass

    def peers(self) -> list[PeerId]:
        return [peer for peer, link in self.links.items() if self.id in link.up]

    def silence_s(self, peer: PeerId) -> float:
        link = self.links.get(peer)
        if link is None or self.id not in link.up:
            return float("inf")
        return self._network.silence_s(peer, self.id)

    def addresses(self, peer: PeerId) -> list[str]:
        return [f"sim-{peer[:8]}:6375"]

    def rows(self) -> list[Any]:
        return []

    def refusals(self) -> list[Any]:
        return []

    async def run(self) -> None:
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
        self._network.delivered(self.id, self.id, message)
        self.dispatcher.deliver(self.id, message, to_view(payload))


class SimNetwork:
    """All links, and what is wrong with them."""

    def __init__(self, loop: SimLoop, rng: random.Random, trace: Trace) -> None:
        self.harsh = Harsh()
        self.repeats = 0.0
        """How often a session's message comes twice, in order with the others."""
        self.messages = 0
        self.sent_by_kind: dict[str, int] = {}
        self._loop = loop
        self._rng = rng
        self._trace = trace
        self._paths: dict[Pair, Path] = {}
        self._ends: dict[PeerId, SimLinks] = {}
        self._redials: dict[Pair, asyncio.TimerHandle] = {}
        self._links = 0

    def path(self, source: PeerId, target: PeerId) -> Path:
        return self._paths[source, target]

    def set_path(self, source: PeerId, target: PeerId, path: Path) -> None:
        self._paths[source, target] = path

    def attach(self, end: SimLinks) -> None:
        """Let this peer listen and dial."""
        self._ends[end.id] = end
        for other in self._ends:
            if other != end.id:
                self._unblock_if(other, end.id)
                self._unblock_if(end.id, other)
                self._redial(end.id, other)

    def detach(self, end: SimLinks, reason: str, *, silently: bool = False) -> None:
        """Remove a peer. With `silently` the others get no notice, as after a power cut."""
        if end.gone:
            return
        end.gone = True
        if self._ends.get(end.id) is end:
            del self._ends[end.id]
        for other, link in list(end.links.items()):
            if silently:
                self._block(end.id, other)
            else:
                self._tell_ended(end, other, link, reason)
        end.links.clear()
        end.dispatcher.cancel_tasks()

    def stands_still(self, peer: PeerId) -> None:
        """Freeze its process: it sends nothing."""
        for other in self._ends:
            if other != peer:
                self._block(peer, other)

    def moves_again(self, peer: PeerId) -> None:
        for other in self._ends:
            if other != peer:
                self._unblock_if(peer, other)
                self._redial(peer, other)

    def cut(self, source: PeerId, target: PeerId) -> None:
        """Stop everything in this direction, without notice to either side."""
        self._paths[source, target].cut = True
        self._block(source, target)

    def heal(self, source: PeerId, target: PeerId) -> None:
        self._paths[source, target].cut = False
        self._unblock_if(source, target)
        self._release(source, target)
        self._redial(source, target)

    def break_link(self, one: PeerId, other: PeerId) -> None:
        """Reset the link: both sides notice, and messages in transit are lost from a random time on."""
        end = self._ends.get(one)
        link = end.links.get(other) if end is not None else None
        if end is None or link is None:
            return
        link.lost_after = min(link.lost_after, self._loop.time() + self._rng.random() * 0.01)
        self._loop.call_soon(self._end, end, other, link, "connection reset", context=end.context)

    def break_lossy(self) -> None:
        """Reset the links that have lost a single message."""
        for end in list(self._ends.values()):
            for other, link in list(end.links.items()):
                if link.lossy:
                    self.break_link(end.id, other)

    def silence_s(self, source: PeerId, target: PeerId) -> float:
        since = self._paths[source, target].blocked_since
        return 0.0 if since is None else self._loop.time() - since

    def _blocked(self, source: PeerId, target: PeerId) -> bool:
        end = self._ends.get(source)
        return self._paths[source, target].cut or end is None or end.owner.stopped

    def _block(self, source: PeerId, target: PeerId) -> None:
        path = self._paths[source, target]
        if path.blocked_since is not None:
            return
        since = path.blocked_since = self._loop.time()
        listener = self._ends.get(target)
        if listener is not None:
            wait = _SILENCE_S + self._rng.random() * _BEAT_S
            self._loop.call_later(wait, self._give_up, listener, source, path, since, context=listener.context)

    def _unblock_if(self, source: PeerId, target: PeerId) -> None:
        if not self._blocked(source, target):
            self._paths[source, target].blocked_since = None

    def _give_up(self, listener: SimLinks, source: PeerId, path: Path, since: float) -> None:
        link = listener.links.get(source)
        if path.blocked_since == since and link is not None and listener.id in link.up:
            self._end(listener, source, link, f"silent for {self._loop.time() - since:.1f} s")

    def _redial(self, one: PeerId, other: PeerId, wait: float | None = None) -> None:
        pair = (one, other) if one < other else (other, one)
        if pair in self._redials:
            return
        wait = self._rng.random() * _LATEST_REDIAL_S if wait is None else wait
        self._redials[pair] = self._loop.call_later(wait, self._dial, *pair)

    def _dial(self, one: PeerId, other: PeerId) -> None:
        """Both sides dial. Nothing happens while they cannot reach one another: the change that ends this dials again."""
        del self._redials[one, other]
        ends = self._ends.get(one), self._ends.get(other)
        if ends[0] is None or ends[1] is None or self._blocked(one, other) or self._blocked(other, one):
            return
        links = ends[0].links.get(other), ends[1].links.get(one)
        if links[0] is not None and links[0] is links[1]:
            return
        self._links += 1
        link = Link(self._links)
        for source, target in ((one, other), (other, one)):
            for lane in Lane:
                link.pipes[source, lane] = Pipe()
            self._paths[source, target].told = None
        there, back = self._paths[one, other], self._paths[other, one]
        ready_s = 2 * (there.delay_s * there.slow + back.delay_s * back.slow)
        # The dialler speaks first: that is when the other side has the link.
        self._loop.call_later(ready_s + there.delay_s * there.slow, self._bring_up, ends[1], ends[0], link, context=ends[1].context)
        self._loop.call_later(ready_s, self._bring_up, ends[0], ends[1], link, context=ends[0].context)

    def _bring_up(self, end: SimLinks, other: SimLinks, link: Link) -> None:
        if end.gone or link.ended:
            return
        old = end.links.get(other.id)
        if old is not None and old.number > link.number:
            return
        if old is not None:
            self._end(end, other.id, old, "it has dialled anew")
        end.links[other.id] = link
        link.up.add(end.id)
        self._trace.note("up", end.name, other.name)
        hello = Hello(
            version=PROTOCOL_VERSION,
            features=tuple(sorted(FEATURES)),
            software="meshd/sim",
            peer=other.id,
            name=other.name,
            incarnation=other.incarnation,
            link=link.number,
            lane=Lane.CONTROL,
            max_header=MAX_HEADER,
            max_payload=MAX_PAYLOAD,
            port=6375,
        )
        end.on_up(other.id, hello, (f"sim-{other.id[:8]}", 6375))

    def _end(self, end: SimLinks, other: PeerId, link: Link, reason: str) -> None:
        """End the link on this side and notify the other one."""
        if end.links.get(other) is not link:
            return
        self._tell_ended(end, other, link, "connection closed")
        self._down(end, other, link, reason)

    def _tell_ended(self, end: SimLinks, other: PeerId, link: Link, reason: str) -> None:
        """Notify the other side, after everything that was sent before."""
        link.ended.add(end.id)
        far = self._ends.get(other)
        if far is None or far.links.get(end.id) is not link:
            return
        if self._paths[end.id, other].cut:
            self._block(end.id, other)  # it notices the silence
            return
        last = max(link.pipes[end.id, lane].last_arrival for lane in Lane)
        arrival = max(self._loop.time() + self._delay_s(self._paths[end.id, other]), min(last, link.lost_after)) + 1e-6
        self._loop.call_at(arrival, self._down, far, end.id, link, reason, context=far.context)

    def _down(self, end: SimLinks, other: PeerId, link: Link, reason: str) -> None:
        if end.gone or end.links.get(other) is not link:
            return
        link.ended.add(end.id)
        link.up.discard(end.id)
        del end.links[other]
        self._trace.note("down", end.name, other[:4], reason)
        end.dispatcher.peer_lost(other, reason)
        end.on_down(other, reason)
        self._redial(end.id, other)

    def send(self, end: SimLinks, target: PeerId, link: Link, message: Message, payload: Buffer | None) -> None:
        pipe = link.pipes[end.id, _lane_of(message, payload)]
        size = _HEADER_BYTES + (0 if payload is None else memoryview(payload).nbytes)
        if pipe.queued_bytes + size > QUEUE_BYTES:
            raise Overloaded(f"{pipe.queued_bytes} bytes wait for {target:.8} already", retry_after_s=0.1)
        carried = self._through_the_wire(message, size)
        self._put(end.id, target, link, pipe, carried, payload, size)
        if self.repeats and isinstance(message, SessionMessage) and self._rng.random() < self.repeats:
            self._put(end.id, target, link, pipe, carried, payload, size)

    def _through_the_wire(self, message: Message, size: int) -> Message:
        """As the receiver reads it. Raises: InvalidRequest, as a connection does."""
        if isinstance(message, Advertise) and self._rng.random() > _ADVERTS_ENCODED:
            return message
        header = encode(message)
        if len(header) > MAX_HEADER or size - _HEADER_BYTES > MAX_PAYLOAD:
            raise InvalidRequest(f"{type(message).__name__} is too long: {len(header)} bytes of header, {size} in all")
        return decode(header)

    def _put(
        self, source: PeerId, target: PeerId, link: Link, pipe: Pipe, message: Message, payload: Buffer | None, size: int
    ) -> None:
        path = self._paths[source, target]
        pipe.queued_bytes += size
        if path.cut:
            pipe.held.append((message, b"" if payload is None else bytes(payload), size))
            return
        now = self._loop.time()
        pipe.free_at = max(now, pipe.free_at) + size * path.slow / path.bandwidth_bytes_s
        arrival = max(pipe.free_at + self._delay_s(path), pipe.last_arrival + 1e-9)
        deliver = partial(self._deliver, source, target, link, pipe, message, payload, size)
        receiver = self._ends.get(target)
        if receiver is None:
            return  # the receiver is gone
        harsh, chance = self.harsh, self._rng.random() if (self.harsh.drop or self.harsh.repeat or self.harsh.reorder) else 1.0
        if chance < harsh.drop:
            link.lossy = True
            return
        if chance < harsh.drop + harsh.reorder:
            self._loop.call_at(arrival + self._rng.random() * 0.2, deliver, context=receiver.context)
            return
        pipe.last_arrival = arrival
        self._loop.call_at(arrival, deliver, context=receiver.context)
        if chance > 1 - harsh.repeat:
            self._loop.call_at(arrival + self._rng.random() * 0.5, deliver, context=receiver.context)

    def _release(self, source: PeerId, target: PeerId) -> None:
        end = self._ends.get(source)
        link = end.links.get(target) if end is not None else None
        if link is None:
            return
        for lane in Lane:
            pipe = link.pipes[source, lane]
            held, pipe.held = pipe.held, []
            for message, payload, size in held:
                pipe.queued_bytes -= size
                self._put(source, target, link, pipe, message, payload, size)

    def _deliver(
        self, source: PeerId, target: PeerId, link: Link, pipe: Pipe, message: Message, payload: Buffer | None, size: int
    ) -> None:
        pipe.queued_bytes = max(0, pipe.queued_bytes - size)
        receiver = self._ends.get(target)
        if receiver is None or receiver.links.get(source) is not link or self._loop.time() > link.lost_after:
            return
        path = self._paths[source, target]
        if path.cut:  # cut while it was under way
            pipe.queued_bytes += size
            pipe.held.append((message, b"" if payload is None else bytes(payload), size))
            return
        self.delivered(source, target, message)
        # Copied only on arrival, so that a sender that changes a sent payload is detected.
        receiver.dispatcher.deliver(source, message, memoryview(b"" if payload is None else bytes(memoryview(payload).cast("B"))))

    def delivered(self, source: PeerId, target: PeerId, message: Message) -> None:
        self.messages += 1
        kind = type(message).__name__
        self.sent_by_kind[kind] = self.sent_by_kind.get(kind, 0) + 1
        self._trace.message(source, target, message)

    def _delay_s(self, path: Path) -> float:
        return (path.delay_s + self._rng.random() * path.jitter_s) * path.slow

    def stats(self, source: PeerId, target: PeerId) -> LinkStats:
        """As measured when the link came up."""
        path, back = self._paths[source, target], self._paths[target, source]
        if path.told is None:
            delay = path.delay_s * path.slow
            stats = LinkStats(
                rtt_s=delay + back.delay_s * back.slow,
                bandwidth_bytes_s=path.bandwidth_bytes_s / path.slow,
                hop_s=delay + 8192 * path.slow / path.bandwidth_bytes_s,
                measured_at=self._loop.time(),
            )
            path.told = self._loop.time(), stats
        return path.told[1]


class SimProber:
    """Implements what agents use of `meshd.agents.links.probe.LinkProber`; a measurement takes a moment."""

    def __init__(self, links: SimLinks, network: SimNetwork, clock: SimClock, on_change: Callable[[], None]) -> None:
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
        self._stats[peer] = self._network.stats(self._links.id, peer)
        self._on_change()
        return self._stats[peer]
