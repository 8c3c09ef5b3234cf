"""Opens links, as the peer that dials and as the one that accepts: TLS and HELLO on both lanes, or a clear reason for a failure."""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable

import msgspec

from meshd.agents.links.link_table import LinkTable
from meshd.agents.links.log import LinkLog
from meshd.clock import Clock
from meshd.errors import MeshdError, PeerLost, PeerRefused, ProtocolViolation
from meshd.protocol import transport
from meshd.protocol.framing import FrameLimits
from meshd.protocol.handshake import HelloAgreement, check_answer, check_hello
from meshd.protocol.identity import Identity
from meshd.protocol.messages import Goodbye, Hello, Lane
from meshd.protocol.transport import Address, Connection
from meshd.types import PeerId

log = logging.getLogger("meshd.links")
HALF_OPEN_PER_HOST = 16


class LinkOpener:
    """Dials and accepts connections, and records refusals in the link log."""

    def __init__(
        self,
        identity: Identity,
        greeting: Hello,
        table: LinkTable,
        clock: Clock,
        linklog: LinkLog,
        on_notice: Callable[[str], None],
        on_address: Callable[[PeerId, Address], None],
        *,
        max_links: int,
        max_half_open: int,
    ) -> None:
        self.greeting = greeting
        """This peer's HELLO. Its `link` and `lane` are set for each connection."""
        self._identity = identity
        self._table = table
        self._clock = clock
        self._linklog = linklog
        self._on_notice = on_notice
        self._on_address = on_address
        self._limits = FrameLimits(greeting.max_header, greeting.max_payload)
        self._max_links = max_links
        self._max_half_open = max_half_open
        self._half_open: Counter[str] = Counter()

    def listens_on(self, port: int) -> None:
        """Set the port that this peer's HELLO announces."""
        self.greeting = msgspec.structs.replace(self.greeting, port=port)

    async def dial(self, address: Address) -> PeerId:
        """Open a link with the peer at this address, unless this peer has a link with it already.

        Returns: the id of the peer that answers at the address; it may be this peer's own id.
        Raises: PeerLost if the peer can't be reached or the link ends before it is up; PeerRefused and ProtocolViolation, which are
        also recorded in the link log.
        Cancel: the connections are closed.
        """
        control = await self._connect(address)
        try:
            if control.peer == self._identity.peer:
                await self._meet_own(control)
            elif self._table.get(control.peer) is None:
                if len(self._table) >= self._max_links:
                    raise PeerLost(f"this peer has {self._max_links} links, and no room for more")
                await self._dial_link(control)
        except (PeerRefused, ProtocolViolation) as error:
            self._refuse(_text(address), control.peer, error)
            raise
        finally:
            link = self._table.get(control.peer)
            if link is None or link.lanes.get(Lane.CONTROL) is not control:
                control.abort("no link came of it")
        self._on_address(control.peer, address)
        return control.peer

    async def _connect(self, address: Address) -> Connection:
        timing = self._table.timing
        try:
            return await transport.dial(
                address,
                self._identity.client,
                limits=self._limits,
                now=self._clock.monotonic,
                connect_s=timing.connect_s,
                handshake_s=timing.handshake_s,
            )
        except PeerRefused as error:
            self._refuse(_text(address), None, error)
            raise

    async def _dial_link(self, control: Connection) -> None:
        link = self._table.begin_dialled(control.peer, int.from_bytes(self._clock.random_bytes(8), "big") >> 1)
        try:
            agreement = await self._greet(control, Lane.CONTROL, link.number)
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

    async def _greet(self, connection: Connection, lane: Lane, number: int) -> HelloAgreement:
        asked = self._hello(lane, number)
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
        if self._half_open.total() >= self._max_half_open or self._half_open[host] >= HALF_OPEN_PER_HOST:
            raw.close()
            self._linklog.warn(f"crowd {host}", "%s opens too many connections without a HELLO; further ones are closed", host)
            return
        self._half_open[host] += 1
        try:
            await self._greeted(raw)
        except PeerRefused as error:
            self._refuse(host, None, error)
        except (MeshdError, TimeoutError) as error:
            log.debug("a connection from %s made no link: %s", host, error)
        finally:
            self._half_open -= Counter({host: 1})

    async def _greeted(self, raw: socket.socket) -> None:
        timing = self._table.timing
        async with asyncio.timeout(timing.handshake_s):
            connection = await transport.accept(
                raw, self._identity.server, limits=self._limits, now=self._clock.monotonic, handshake_s=timing.handshake_s
            )
            try:
                self._admit(connection, check_hello(await connection.first(), connection.peer))
            except PeerRefused as error:
                # From this HELLO the other device can tell its user why it was refused.
                connection.close(str(error), self._hello(Lane.CONTROL, 0))
                self._refuse(connection.remote[0], connection.peer, error)
            except ProtocolViolation as error:
                connection.close(str(error), Goodbye(reason=str(error)))
                self._refuse(connection.remote[0], connection.peer, error)
            except BaseException as error:
                connection.abort(str(error) or "it did not say HELLO in time")
                raise

    def _admit(self, connection: Connection, agreement: HelloAgreement) -> None:
        hello = agreement.hello
        answer = self._hello(Lane(hello.lane), hello.link)
        if hello.peer == self._identity.peer:
            connection.send(answer)
            connection.close("it is this very peer")
            self._check_own(hello, connection)
        elif hello.lane == Lane.BULK:
            self._admit_bulk(connection, agreement, answer)
        else:
            self._admit_control(connection, agreement, answer)

    def _admit_control(self, connection: Connection, agreement: HelloAgreement, answer: Hello) -> None:
        crowded = len(self._table) >= self._max_links and self._table.get(connection.peer) is None
        link = None if crowded else self._table.begin_accepted(agreement)
        if link is None:
            reason = "no room for more links" if crowded else "there is a link already"
            connection.close(reason, Goodbye(reason=reason))
            return
        self._table.join(link, Lane.CONTROL, connection, agreement)
        connection.send(answer)
        self._on_address(connection.peer, (connection.remote[0], agreement.hello.port))

    def _admit_bulk(self, connection: Connection, agreement: HelloAgreement, answer: Hello) -> None:
        link = self._table.get(connection.peer)
        if link is None or link.dialled or link.joined or link.number != agreement.hello.link:
            connection.close("no link waits for it", Goodbye(reason="no link waits for this lane"))
            return
        self._table.join(link, Lane.BULK, connection, agreement)
        connection.send(answer)

    def _hello(self, lane: Lane, number: int) -> Hello:
        return msgspec.structs.replace(self.greeting, lane=lane, link=number)

    def _check_own(self, hello: Hello, connection: Connection) -> None:
        if hello.incarnation != self.greeting.incarnation:
            raise PeerRefused(
                f"another device ({hello.name}, {connection.remote[0]}) has this peer's identity: its state folder was copied",
                hint="remove identity.key from the copy and start it again",
            )

    def _refuse(self, address: str, peer: PeerId | None, error: MeshdError) -> None:
        if self._linklog.refused(address, peer, str(error)) and peer is not None:
            self._on_notice(f"{address}: {error}")


def _text(address: Address) -> str:
    return f"{address[0]}:{address[1]}"
