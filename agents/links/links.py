"""The links of this peer: one authenticated pair of connections with each other peer, dialled again when it breaks.

Everything runs in one event loop. The loop calls message handlers while it reads from a socket, so they must not block; a handler
that takes time returns an awaitable.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import meshd
from meshd.agents.links.dial import Dialler
from meshd.agents.links.estimate import LinkEstimate
from meshd.agents.links.link import Link
from meshd.agents.links.link_table import STOPS, LinkTable, OnDown, OnUp, Timing
from meshd.agents.links.log import LinkLog, RefusalRow
from meshd.agents.links.meters.clock_offset import ClockOffset
from meshd.agents.links.meters.link_rows import LinkRow, link_row
from meshd.agents.links.meters.traffic import Traffic
from meshd.agents.links.open import LinkOpener, OnOutcome, ReturnDesk
from meshd.agents.links.restoring.restorer import LinkRestorer
from meshd.agents.links.rpc import Dispatcher, Handler, M, to_view
from meshd.agents.supervisor import Supervise, unsupervised
from meshd.clock import Clock
from meshd.errors import ConfigError, Overloaded, PeerLost
from meshd.protocol import transport
from meshd.protocol.framing import MAX_HEADER, MAX_PAYLOAD
from meshd.protocol.identity import Identity
from meshd.protocol.messages import FEATURES, PROTOCOL_VERSION, Goodbye, Hello, Lane, Message, Reply, Request
from meshd.protocol.transport import Buffer
from meshd.types import PeerId
from meshd.values import Address

log = logging.getLogger("meshd.links")
_CLOSE_S = 0.9
_BACKLOG = 128
_MAX_LOCAL = 4096
"""Maximum number of this peer's messages to itself that wait for their handlers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSettings:
    """The address that links listen on, and their timing."""

    host: str = "0.0.0.0"
    port: int = 6375
    """0 means any free port."""
    sockets: tuple[socket.socket, ...] = ()
    """Sockets that are bound to the address already; none: `Links.bind` binds them."""
    max_links: int = 256
    max_half_open: int = 64
    """Most accepted connections that have not sent HELLO yet. A further one takes the place of an older one."""
    timing: Timing = field(default_factory=Timing)
    slow_start: bool = True
    """See `LinkStats.slow_start`."""


class Links:
    """The actor that owns all links.

    A link that breaks is dialled again at once. While both processes live, that shows nowhere: what is sent meanwhile is kept, and
    each message arrives once (`restoring/`).

    `on_up(peer, hello, address)` is called before the first message of a link, `on_down(peer, reason)` when the peer is lost. For
    a peer that restarts, `on_down` is called and then `on_up`. `on_outcome(outcome)` is called after each dial, and when another
    device's connection made no link.
    """

    def __init__(
        self,
        identity: Identity,
        name: str,
        incarnation: int,
        settings: LinkSettings,
        clock: Clock,
        on_up: OnUp,
        on_down: OnDown,
        on_outcome: OnOutcome,
    ) -> None:
        self.id = identity.peer
        self._settings = settings
        self._clock = clock
        self._linklog = LinkLog(clock)
        self._dispatcher = Dispatcher(self.send, self._linklog)
        self._table = LinkTable(
            self.id, self._dispatcher, clock, self._linklog, settings.timing, on_up, on_down, slow_start=settings.slow_start
        )
        greeting = _greeting(self.id, name, incarnation)
        self._opener = LinkOpener(
            identity,
            greeting,
            self._table,
            clock,
            self._linklog,
            on_outcome,
            max_links=settings.max_links,
            max_half_open=settings.max_half_open,
        )
        self._dialler = Dialler(self._opener.dial, self.id, self._table, clock)
        self._restorer = LinkRestorer(self._opener.dial, self._table, clock)
        self._table.on_break = self._restore
        self._listeners: list[socket.socket] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._local = 0

    @property
    def identity(self) -> Identity:
        """This peer's present identity. Its certificate and cluster key change with a rotation."""
        return self._opener.identity

    def answer_returning(self, desk: ReturnDesk) -> None:
        """Set who talks with peers that have another key of this cluster. Without one they are refused."""
        self._opener.desk = desk

    def change_key(self, identity: Identity, stays: Callable[[PeerId], bool], reason: str) -> None:
        """Use another cluster key for connections from now on, and end the links with peers that do not stay.

        The links with those that stay go on: a link is authenticated by the peer's own key, which no other member can certify for
        itself. Connections that are being opened are checked against the new key before they join a link.
        """
        self._opener.identity = identity
        for peer in {link.peer for link in (*self._table, *self._table.all_known())}:
            if not stays(peer):
                self.cut(peer, reason)
        self._dialler.wake()

    def cut(self, peer: PeerId, reason: str) -> None:
        """End the link with a peer, if there is one."""
        link, broken = self._table.get(peer), self._table.broken(peer)
        if link is not None:
            link.end(reason, Goodbye(reason=reason))
        if broken is not None:
            self._table.give_up(broken, reason)

    def dial_rarely(self, rarely: bool) -> None:
        """Set whether addresses at which no link comes up are dialled only every 10 minutes."""
        self._dialler.rarely = rarely

    def register(self, message_type: type[M], handler: Handler[M]) -> None:
        """Register `handler(peer, message, payload)` for messages of this type.

        The handler returns None, a Reply or (Reply, payload); or an awaitable of one of these, which runs as a task. An exception
        that the handler raises is sent to the peer as ERROR. The handler may keep `payload`.

        Raises: ValueError if the type has a handler already.
        """
        self._dispatcher.register(message_type, handler)

    def send(self, peer: PeerId, message: Message, payload: Buffer | None = None) -> None:
        """Send a message, or queue it until the socket is writable or a broken link is restored.

        A message to this peer itself goes to its own handlers, in order. The caller must not change the payload afterwards.

        Raises: PeerLost, Overloaded; InvalidRequest if the message is larger than the peer accepts.
        """
        if peer == self.id:
            self._send_local(message, payload)
            return
        link = self._table.known(peer)
        if link is None:
            raise PeerLost(f"{peer:.8} is not linked with this peer")
        link.send(message, payload)

    def when_room(self, peer: PeerId, lane: Lane, callback: Callable[[], None]) -> None:
        """Call `callback` once, when a lane that was full has room again or its link has ended. Never at once."""
        link = self._table.known(peer)
        if link is None:
            asyncio.get_running_loop().call_soon(callback)
        else:
            link.when_room(lane, callback)

    async def request(
        self,
        peer: PeerId,
        message: Request | Callable[[int], Request],
        payload: Buffer | None = None,
        *,
        timeout_s: float,
    ) -> tuple[Reply, memoryview]:
        """Send a request and wait for its reply. `message` is the request, or a function that makes it from a new request number.

        Returns: the reply and its payload.
        Raises: RemoteFailure if the peer answers ERROR; PeerLost if the link ends or no reply comes in time; Overloaded,
        InvalidRequest.
        Cancel: a late reply is dropped.
        """
        return await self._dispatcher.request(peer, message, payload, timeout_s)

    def next_request(self) -> int:
        """Returns: a request number that this peer has not used yet."""
        return self._dispatcher.next_request()

    def connect(self, host: str, port: int, source: str) -> None:
        """Dial an address now, and with back-off until `source` forgets it. The source `static` never forgets an address."""
        self._dialler.connect((host, port), source)

    async def reach(self, host: str, port: int) -> PeerId:
        """Dial an address once, for a check. Returns: the id of the peer that answers. Raises: PeerLost, PeerRefused."""
        return await self._opener.reach((host, port))

    def forget(self, host: str, port: int, source: str) -> None:
        """Remove a source of an address. An address without sources is no longer dialled."""
        self._dialler.forget((host, port), source)

    def peers(self) -> list[PeerId]:
        """Returns: the peers whose link is up, or broken but not given up."""
        return [link.peer for link in self._table.all_known()]

    def silence_s(self, peer: PeerId) -> float:
        """Returns: seconds since the last message of a peer; infinity if it has no link."""
        link = self._table.known(peer)
        return self._clock.monotonic() - link.heard if link is not None else float("inf")

    def is_broken(self, peer: PeerId) -> bool:
        """Whether the link with a peer is broken, and will be restored or given up within `Timing.restore_s`."""
        return self._table.broken(peer) is not None

    def unused_s(self, peer: PeerId) -> float:
        """Returns: seconds since the last message of a session on the link with a peer; infinity if it has no link."""
        link = self._table.known(peer)
        return self._clock.monotonic() - link.used_at if link is not None else float("inf")

    def estimate(self, peer: PeerId) -> LinkEstimate | None:
        """Returns: what is known of the link with a peer; None if it has none."""
        link = self._table.known(peer)
        return link.estimate if link is not None else None

    def clock_of(self, peer: PeerId) -> ClockOffset:
        """Returns: what is known of a linked peer's clock; without a link, nothing."""
        link = self._table.known(peer)
        return link.clock if link is not None else ClockOffset()

    @property
    def restored_total(self) -> int:
        """How often a broken link was restored since the start."""
        return self._table.restored_total

    @property
    def refusals_total(self) -> int:
        """Number of links that were refused since the start, by this peer or by another device."""
        return self._linklog.total

    @property
    def traffic(self) -> Traffic:
        """Bytes by what they carry, and those of links that have ended."""
        return self._table.traffic

    def idle_s(self, peer: PeerId, lane: Lane) -> float:
        """Returns: seconds since the last bytes from `peer` arrived on a lane, which may be a part of a message; infinity if it has
        no link."""
        link = self._table.known(peer)
        return self._clock.monotonic() - link.lanes[lane].received_at if link is not None else float("inf")

    def addresses(self, peer: PeerId) -> list[str]:
        """Returns: the addresses (`host:port`) at which a linked peer was reached or says that it listens, oldest first."""
        link = self._table.known(peer)
        return [str(Address(*address)) for address in link.addresses] if link is not None else []

    def rows(self) -> list[LinkRow]:
        """Describe the links that are up, or broken but not given up."""
        return [link_row(link, self._clock.monotonic()) for link in self._table.all_known()]

    def refusals(self) -> list[RefusalRow]:
        """Returns: the latest 64 peers and other devices that were refused a link, with reasons."""
        return self._linklog.rows()

    def bind(self) -> int:
        """Start listening, if that is not done yet. Returns: the port. Raises: ConfigError if the address can't be used."""
        if not self._listeners:
            host, port = self._settings.host, self._settings.port
            self._listeners = list(self._settings.sockets) or bind(host, port)
            try:
                for listener in self._listeners:
                    listener.setblocking(False)
                    listener.listen(_BACKLOG)
            except OSError as error:
                raise _unusable(host, port, error) from error
            self._opener.listens_on(self._listeners[0].getsockname()[1])
        return self._opener.greeting.port

    async def run(self, supervise: Supervise = unsupervised) -> None:
        """Run all links until `close` is called. Raises: ConfigError as `bind` does. Cancel: all connections are aborted."""
        self.bind()
        try:
            async with asyncio.TaskGroup() as group:
                self._dispatcher.group = group
                for listener in self._listeners:
                    self._own(group.create_task(supervise("accepting links", partial(self._listen, group, listener))))
                self._own(group.create_task(supervise("heartbeats", self._beat)))
                self._dialler.start(group)
                await self._stop.wait()
                self._cancel_tasks()
        finally:
            self._dispatcher.group = None
            for link in self._table:
                link.end(STOPS, on_purpose=True)
            self._give_up_broken(STOPS)
            await self._opener.close()
            for listener in self._listeners:
                listener.close()

    async def close(self, reason: str) -> None:
        """Send GOODBYE on every link and end `run`, within a second."""
        self._dialler.stop()
        links = list(self._table)
        for link in links:
            link.end(reason, Goodbye(reason=reason))
        self._give_up_broken(reason)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                for link in links:
                    await link.closed()
        for link in links:
            for connection in link.lanes.values():
                connection.abort(reason)
        self._stop.set()

    def _restore(self, link: Link) -> None:
        """Dial the peer of a link that has broken, unless this peer is about to stop."""
        group = self._dispatcher.group
        if group is None or self._stop.is_set():
            self._table.give_up(link, link.reason)
        else:
            self._own(group.create_task(self._restorer.restore(link), name=f"restore {link.peer:.8}"))

    def _give_up_broken(self, reason: str) -> None:
        for link in self._table.all_known():
            self._table.give_up(link, reason)

    async def _listen(self, group: asyncio.TaskGroup, listener: socket.socket) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(listener, ready.set)  # a cancelled sock_accept may leave a connection open
        try:
            while True:
                await ready.wait()
                ready.clear()
                try:
                    raw, remote = listener.accept()
                except BlockingIOError:
                    continue
                except OSError as error:
                    self._linklog.warn("accept", "connections can't be accepted, trying again: %s", error)
                    loop.remove_reader(listener)  # which would call again and again for the connection that waits
                    await self._clock.sleep(self._settings.timing.heartbeat_s)
                    loop.add_reader(listener, ready.set)
                    continue
                raw.setblocking(False)
                task = group.create_task(self._opener.welcome(raw, remote[:2]))
                task.add_done_callback(partial(_close_unwelcomed, raw))
                self._own(task)
        finally:
            loop.remove_reader(listener)

    async def _beat(self) -> None:
        while True:
            await self._clock.sleep(self._settings.timing.heartbeat_s)
            self._table.check()

    def _own(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _cancel_tasks(self) -> None:
        self._dialler.stop()
        self._dispatcher.cancel_tasks()
        for task in self._tasks:
            task.cancel()

    def _send_local(self, message: Message, payload: Buffer | None) -> None:
        if self._local >= _MAX_LOCAL:
            raise Overloaded(f"{_MAX_LOCAL} messages of this peer to itself wait already", retry_after_s=0.1)
        self._local += 1
        asyncio.get_running_loop().call_soon(self._deliver_local, message, to_view(payload))

    def _deliver_local(self, message: Message, payload: memoryview) -> None:
        self._local -= 1
        self._dispatcher.deliver(self.id, message, payload)

    def features(self, peer: PeerId) -> frozenset[str]:
        """Return the optional features that this peer and `peer` both have; none without a link."""
        link = self._table.known(peer)
        return link.agreement.features if link is not None and link.agreement is not None else frozenset()


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind the address of links, without listening yet. Raises: ConfigError if it can't be used."""
    try:
        return transport.bind(host, port)
    except OSError as error:
        raise _unusable(host, port, error) from error


def _unusable(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"links can't listen on {host}:{port}: {error.strerror or error}", hint="choose another address with --link HOST:PORT"
    )


def _greeting(own: PeerId, name: str, incarnation: int) -> Hello:
    return Hello(
        version=PROTOCOL_VERSION,
        features=tuple(sorted(FEATURES)),
        software=f"meshd/{meshd.__version__}",
        peer=own,
        name=name,
        incarnation=incarnation,
        link=0,
        lane=Lane.CONTROL,
        max_header=MAX_HEADER,
        max_payload=MAX_PAYLOAD,
        port=0,
    )


def _close_unwelcomed(raw: socket.socket, welcome: asyncio.Task[None]) -> None:
    """Close the socket of a `welcome` task that was cancelled before its first step, and so could not close the socket itself."""
    if welcome.cancelled():
        raw.close()
