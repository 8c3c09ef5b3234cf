"""Opens links, as the peer that dials and as the one that accepts: TLS and HELLO on both lanes, or a clear reason for a failure."""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import msgspec

from meshd.agents.links.half_open import HalfOpen, origin_of
from meshd.agents.links.link import Link
from meshd.agents.links.link_table import STOPS, LinkTable
from meshd.agents.links.log import LinkLog
from meshd.clock import Clock
from meshd.errors import AnotherKey, MeshdError, PeerLost, PeerRefused, ProtocolViolation
from meshd.protocol import transport
from meshd.protocol.framing import FrameLimits
from meshd.protocol.handshake import HelloAgreement, check_answer, check_hello
from meshd.protocol.identity import RETURN_SERVER, Identity
from meshd.protocol.messages import Goodbye, Hello, Lane
from meshd.protocol.transport import Address, Connection
from meshd.types import PeerId

log = logging.getLogger("meshd.links")
_CLOSE_S = 1.0
MAX_LINKS_PER_HOST = 32
"""Each member can make any number of identities, so links are limited per address too: no single host can take all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DialOutcome:
    """What a dial of an address showed, or why another device's connection made no link."""

    address: Address
    """Where the other device listens, as far as it is known."""
    peer: PeerId | None
    """The id that the other device has proved. None: it has proved none."""
    name: str = ""
    """The name in its HELLO; empty if there was none."""
    refused: bool = False
    """Whether a retry is unlikely to help."""
    reason: str = ""
    """Why there is no link. Empty: `peer` answers at the address, and is linked or is this peer itself."""
    hint: str = ""


OnOutcome = Callable[[DialOutcome], None]


class ReturnDesk(Protocol):
    """Talks with peers that have another key of this cluster. Each has proved its id, and nothing else."""

    async def ask(self, connection: Connection) -> None:
        """Talk with a peer that this one has dialled. Raises: MeshdError, with the reason why there is no link."""
        ...

    async def answer(self, connection: Connection) -> None:
        """Talk with a peer that has dialled this one. Raises: as `ask`."""
        ...


_KEY_CHANGED = "the cluster's key has just changed"


class LinkOpener:
    """Dials and accepts connections, and records refusals in the link log."""

    def __init__(
        self,
        identity: Identity,
        greeting: Hello,
        table: LinkTable,
        clock: Clock,
        linklog: LinkLog,
        on_outcome: OnOutcome,
        *,
        max_links: int,
        max_half_open: int,
    ) -> None:
        self.greeting = greeting
        """This peer's HELLO. Its `link` and `lane` are set for each connection."""
        self.identity = identity
        """Replaced when the cluster key is rotated. Each connection is checked against the present one before it joins a link."""
        self.desk: ReturnDesk | None = None
        self._table = table
        self._clock = clock
        self._linklog = linklog
        self._on_outcome = on_outcome
        self._limits = FrameLimits(greeting.max_header, greeting.max_payload)
        self._connections: set[Connection] = set()
        """All connections whose socket is open, also those that are being closed."""
        self._max_links = max_links
        self._max_welcomed = max_half_open
        # A part is left for connections that are being ended to make room.
        self._half_open = HalfOpen(max(2, max_half_open * 3 // 4))
        self._welcomed = 0
        """Number of accepted sockets whose handshake runs or is being ended."""

    def listens_on(self, port: int) -> None:
        """Set the port that this peer's HELLO announces."""
        self.greeting = msgspec.structs.replace(self.greeting, port=port)

    async def close(self) -> None:
        """Close all connections, and wait until their sockets are closed, for at most `_CLOSE_S`."""
        for connection in list(self._connections):
            connection.abort(STOPS)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                for connection in list(self._connections):
                    await connection.closed()

    async def dial(self, address: Address) -> PeerId:
        """Open a link with the peer at this address, unless this peer has a link with it already.

        Returns: the id of the peer that answers at the address; it may be this peer's own id.
        Raises: PeerLost if the peer can't be reached or the link ends before it is up; PeerRefused and ProtocolViolation. All of
        them are reported to `on_outcome`.
        Cancel: the connections are closed.
        """
        try:
            control = await self._connect(address)
        except AnotherKey as error:
            await self._ask_desk(address, error)
            raise
        except MeshdError as error:
            self._failed(address, None, error)
            raise
        try:
            self._check_key(control)
            if control.peer == self.identity.peer:
                await self._meet_own(control)
            elif self._table.get(control.peer) is None:
                await self._dial_link(control)
        except MeshdError as error:
            self._failed(address, control, error)
            raise
        finally:
            link = self._table.get(control.peer)
            if link is None or link.lanes.get(Lane.CONTROL) is not control:
                control.abort("no link came of it")
        if link is not None:
            link.note_address(address)
            link.note_address((control.remote[0], address[1]))
        self._on_outcome(DialOutcome(address=address, peer=control.peer))
        return control.peer

    async def reach(self, address: Address) -> PeerId:
        """Dial an address and end the connection at once, whether there is a link with that peer or not.

        Returns: the id of the peer that answers at the address.
        Raises: PeerLost, PeerRefused. Nothing is reported to `on_outcome`.
        """
        connection = await self._connect(address)
        connection.close("the check is over", Goodbye(reason="a check of reachability"))
        return connection.peer

    async def _ask_desk(self, address: Address, why: AnotherKey) -> None:
        """Exchange rotations with a peer that has another key of this cluster. Raises: why there is no link with it now."""
        connection: Connection | None = None
        try:
            if self.desk is None:
                raise why
            try:
                connection = await self._connect(address, returning=True)
            except AnotherKey:
                raise why from None  # it is of another cluster
            async with asyncio.timeout(self._table.timing.handshake_s):
                await self.desk.ask(connection)
            raise PeerLost("it had another key of this cluster, and the newer one was given: it is dialled again")
        except TimeoutError as error:
            lost = PeerLost("it has another key of this cluster, and did not answer in time")
            self._failed(address, connection, lost)
            raise lost from error
        except MeshdError as error:
            self._failed(address, connection, error)
            raise
        finally:
            if connection is not None:
                connection.close("the rotations were exchanged")

    def _check_key(self, connection: Connection) -> None:
        """Check that a connection's certificate is of the present authority. Raises: PeerLost if the key has changed meanwhile."""
        if not self.identity.key.issuer.has_signed(connection.certificate):
            raise PeerLost(_KEY_CHANGED)

    async def _connect(self, address: Address, *, returning: bool = False) -> Connection:
        timing = self._table.timing
        connection = await transport.dial(
            address,
            self.identity.return_client if returning else self.identity.client,
            limits=self._limits,
            now=self._clock.monotonic,
            connect_s=timing.connect_s,
            handshake_s=timing.handshake_s,
            server_name=RETURN_SERVER if returning else "",
        )
        self._note_open(connection)
        return connection

    def _note_open(self, connection: Connection) -> None:
        self._connections.add(connection)
        connection.when_gone(self._connections.discard)

    async def _dial_link(self, control: Connection) -> None:
        if crowd := self._crowd(control.remote[0]):
            raise PeerLost(crowd)
        link = self._table.begin_dialled(control.peer, int.from_bytes(self._clock.random_bytes(8), "big") >> 1)
        try:
            agreement = await self._greet(control, Lane.CONTROL, link.number, restores=self._table.broken(control.peer))
            self._table.join(link, Lane.CONTROL, control, agreement)
            bulk = await self._connect(control.remote)
            try:
                if bulk.peer != control.peer:
                    raise PeerLost("another peer answered at its address")
                self._table.join(link, Lane.BULK, bulk, await self._greet(bulk, Lane.BULK, link.number))
            except BaseException:
                bulk.abort("no link came of it")
                raise
            if link.gone.is_set():
                raise PeerLost("the link was withdrawn")
            self._table.bring_up(link)
            link.beat(self._clock.monotonic())
        except BaseException as error:
            link.end(str(error) or "given up")
            raise

    async def _greet(self, connection: Connection, lane: Lane, number: int, *, restores: Link | None = None) -> HelloAgreement:
        asked = self._hello(lane, number, restores)
        connection.send(asked)
        try:
            async with asyncio.timeout(self._table.timing.handshake_s):
                agreement = check_hello(await connection.first(), connection.peer)
        except TimeoutError as error:
            raise PeerLost("it did not answer HELLO in time") from error
        check_answer(agreement.hello, asked)
        return agreement

    async def _meet_own(self, connection: Connection) -> None:
        agreement = await self._greet(connection, Lane.CONTROL, 0)
        self._check_own(agreement.hello, connection)

    async def welcome(self, raw: socket.socket, remote: Address) -> None:
        """Do TLS and HELLO on an accepted socket, and add it to its link. Cancel: the socket is closed."""
        host = remote[0]
        task = asyncio.current_task()
        if self._welcomed >= self._max_welcomed or task is None:
            raw.close()
            self._linklog.warn("crowd", "%d connections have not said HELLO; one of %s was closed", self._welcomed, host)
            return
        self._welcomed += 1
        number = self._half_open.enter(host, task.cancel)
        try:
            await self._greeted(raw, number)
        except PeerRefused as error:
            self._linklog.refused(host, None, str(error))
        except (MeshdError, TimeoutError) as error:
            log.debug("a connection from %s made no link: %s", host, error)
        finally:
            self._half_open.leave(number)
            self._welcomed -= 1

    async def _greeted(self, raw: socket.socket, number: int) -> None:
        timing = self._table.timing
        async with asyncio.timeout(timing.handshake_s):
            connection = await transport.accept(
                raw, self.identity.server, limits=self._limits, now=self._clock.monotonic, handshake_s=timing.handshake_s
            )
            self._note_open(connection)
            try:
                if self.desk is not None and self.identity.key.return_issuer.has_signed(connection.certificate):
                    await self._answer_returning(connection, self.desk)
                    return
                hello = await connection.first()
                self._check_key(connection)
                self._half_open.leave(number)
                self._admit(connection, check_hello(hello, connection.peer))
            except PeerRefused as error:
                # From this HELLO the other device can tell its user why it was refused.
                connection.close(str(error), self._hello(Lane.CONTROL, 0))
                self._failed(_listening(connection), connection, error)
            except ProtocolViolation as error:
                connection.close(str(error), Goodbye(reason=str(error)))
                self._failed(_listening(connection), connection, error)
            except BaseException as error:
                connection.abort(str(error) or "it did not say HELLO in time")
                raise

    async def _answer_returning(self, connection: Connection, desk: ReturnDesk) -> None:
        reason = "the rotations were exchanged"
        try:
            await desk.answer(connection)
        except MeshdError as error:
            reason = str(error)
            self._failed((connection.remote[0], 0), connection, error)
        connection.close(reason)

    def _admit(self, connection: Connection, agreement: HelloAgreement) -> None:
        hello = agreement.hello
        if hello.peer == self.identity.peer:
            connection.send(self._hello(Lane(hello.lane), hello.link))
            connection.close("it is this very peer")
            self._check_own(hello, connection)
        elif hello.lane == Lane.BULK:
            self._admit_bulk(connection, agreement)
        else:
            self._admit_control(connection, agreement)

    def _admit_control(self, connection: Connection, agreement: HelloAgreement) -> None:
        if agreement.hello.history and not self._table.may_restore(agreement.hello):
            # From this HELLO the other side can tell that what it would restore is gone here. It dials again without it.
            connection.close("the link that it would restore is gone", self._hello(Lane.CONTROL, agreement.hello.link))
            return
        crowd = "" if self._table.get(connection.peer) is not None else self._crowd(connection.remote[0])
        link = None if crowd else self._table.begin_accepted(agreement)
        if link is None:
            reason = crowd or "there is a link already"
            connection.close(reason, Goodbye(reason=reason))
            return
        self._table.join(link, Lane.CONTROL, connection, agreement)
        connection.send(self._hello(Lane.CONTROL, link.number, link.restores))
        link.note_address((connection.remote[0], agreement.hello.port))

    def _admit_bulk(self, connection: Connection, agreement: HelloAgreement) -> None:
        link = self._table.get(connection.peer)
        if link is None or link.dialled or link.joined or link.number != agreement.hello.link:
            connection.close("no link waits for it", Goodbye(reason="no link waits for this lane"))
            return
        self._table.join(link, Lane.BULK, connection, agreement)
        connection.send(self._hello(Lane.BULK, link.number))

    def _hello(self, lane: Lane, number: int, restores: Link | None = None) -> Hello:
        greeting = msgspec.structs.replace(self.greeting, lane=lane, link=number)
        if restores is None:
            return greeting
        history = restores.history
        return msgspec.structs.replace(
            greeting, history=history.number, lost=restores.number, received=(history.received[0], history.received[1])
        )

    def _check_own(self, hello: Hello, connection: Connection) -> None:
        if hello.incarnation != self.greeting.incarnation:
            raise PeerRefused(
                f"another device ({hello.name}, {connection.remote[0]}) has this peer's identity: its state folder was copied",
                hint="remove identity.key from the copy and start it again",
            )

    def _crowd(self, host: str) -> str:
        """Returns: why there can be no further link with this host; empty if there can."""
        if len(self._table) >= self._max_links:
            return f"no room for more links: there are {self._max_links} already"
        origin = origin_of(host)
        if sum(_host_of(link) == origin for link in self._table) >= MAX_LINKS_PER_HOST:
            return f"no room for more links with {host}: there are {MAX_LINKS_PER_HOST} already"
        return ""

    def _failed(self, address: Address, connection: Connection | None, error: MeshdError) -> None:
        """Report why no link came of an address. `connection` is set once TLS has shown which peer the other device is."""
        hello = connection.hello if connection is not None else None
        peer = connection.peer if connection is not None else None
        refused = isinstance(error, PeerRefused | ProtocolViolation)
        if refused:
            self._linklog.refused(f"{address[0]}:{address[1]}", peer, str(error))
        self._on_outcome(
            DialOutcome(
                address=address,
                peer=peer,
                name=hello.name if hello is not None else "",
                refused=refused,
                reason=error.message,
                hint=error.hint,
            )
        )


def _listening(connection: Connection) -> Address:
    """Returns: where the other side of an accepted connection listens, by its HELLO; port 0 if that is unknown."""
    return connection.remote[0], connection.hello.port if connection.hello is not None else 0


def _host_of(link: Link) -> str:
    control = link.lanes.get(Lane.CONTROL)
    return origin_of(control.remote[0]) if control is not None else ""
