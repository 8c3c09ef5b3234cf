"""One authenticated connection: messages over TLS 1.3 over TCP. The only module that does network I/O."""

import asyncio
import errno
import logging
import os
import socket
import ssl
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import cast

from meshd.errors import AnotherKey, InvalidRequest, MeshdError, NotListening, PeerLost, PeerRefused, ProtocolViolation
from meshd.protocol import codec
from meshd.protocol.flow import SendQueue
from meshd.protocol.framing import EMPTY, KIB, MIB, Frame, FrameLimits, FrameReader, frame_head
from meshd.protocol.identity import peer_of_certificate
from meshd.protocol.messages import Error, Hello, Message
from meshd.protocol.trust import MAX_CHAIN_BYTES
from meshd.types import PeerId

log = logging.getLogger("meshd.transport")

Buffer = bytes | bytearray | memoryview
Address = tuple[str, int]
"""(host, TCP port)."""

QUEUE_BYTES = 32 * MIB
"""Bytes that may be queued on one connection: two of the largest payloads."""
_JOINED = 32 * KIB
"""Maximum bytes of a payload that are copied to follow the header in one write. The rest is written without a copy."""
_CHUNK = 128 * KIB
_TRANSPORT_BYTES = 256 * KIB
"""Encrypted bytes that asyncio may buffer before it pauses the writer."""
_OTHER_CLUSTER = "join it with this cluster's code: `meshd up --key CODE`"
_NO_ROUTE = "connect both devices to the same network; `meshd doctor` shows this device's interfaces"
_CONNECT_HINTS = {
    errno.ECONNREFUSED: "start `meshd up` there; if it runs, its --link must not be a loopback address",
    errno.ETIMEDOUT: "a firewall drops it: type `meshd doctor` on that device, which shows the command that opens the port",
    errno.EHOSTUNREACH: _NO_ROUTE,
    errno.ENETUNREACH: _NO_ROUTE,
}
"""What a user can do when a device can't be reached, by the error of connect(2)."""

_FIRST_PAYLOAD = 32 + MAX_CHAIN_BYTES
"""Largest payload of a connection's first message: a cluster key and the rotations that led to it. HELLO has none. Whoever was a
member once can open connections, so it is small."""
_SHUTDOWN_S = 0.5
_CLOSE_S = 0.5
"""How long a connection that is being closed may take to write its last frame and the farewell."""


class Connection(asyncio.BufferedProtocol):
    """Sends and receives messages on one socket.

    `on_message(connection, message, frame)` is called for each message while the event loop reads from the socket, so it must not
    block. `on_closed(connection, reason)` is called once. Before `attach`, the first message is kept for `first`, and a second
    message closes the connection.
    """

    peer: PeerId
    """Id of the other side, from its certificate."""
    certificate: bytes
    """The other side's certificate, DER."""
    remote: Address

    def __init__(self, limits: FrameLimits, now: Callable[[], float]) -> None:
        self.accepts = FrameLimits()
        """Largest header and payload that the other side accepts, from its HELLO."""
        self.reason = ""
        """Why the connection is closed; empty while it is open."""
        self.hello: Hello | None = None
        """The other side's first message, if it is HELLO."""
        self.first_payload = b""
        self.violated = False
        """Whether this side has closed the connection because of what the other side sent."""
        self.bytes_in = 0
        self.bytes_out = 0
        self.received_at = now()
        """When the last bytes arrived, by the clock `now`. A long message that is still arriving is a sign of life."""
        self._now = now
        self._limits = limits
        self._reader = FrameReader(FrameLimits(limits.max_header, min(limits.max_payload, _FIRST_PAYLOAD)), now)
        self._queue = SendQueue(QUEUE_BYTES, _CHUNK)
        self._waiting: list[Callable[[], None]] = []
        """Callbacks of senders that wait for room in the queue."""
        self._paused = False
        self._first: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._gone = asyncio.Event()
        self._on_message: Callable[[Connection, Message, Frame], None] | None = None
        self._on_closed: Callable[[Connection, str], None] | None = None
        self._when_gone: Callable[[Connection], None] | None = None

    def attach(
        self,
        on_message: Callable[["Connection", Message, Frame], None],
        on_closed: Callable[["Connection", str], None],
        *,
        small: bool = False,
    ) -> None:
        """Set the callbacks for messages and for the end. With `small`, payloads stay limited to those of a first message.

        Raises: PeerLost if the connection has closed already.
        """
        if self.reason:
            raise PeerLost(self.reason)
        if not small:
            self._reader.limits = self._limits
        self._on_message = on_message
        self._on_closed = on_closed

    def when_gone(self, callback: Callable[["Connection"], None]) -> None:
        """Set the function to call when the socket is closed, which may be some time after `on_closed`."""
        self._when_gone = callback
        if self._gone.is_set():
            callback(self)

    async def first(self) -> Message:
        """Wait for the first message. Raises: PeerFault if the connection closes before that."""
        return await self._first

    @property
    def queued_bytes(self) -> int:
        return self._queue.queued_bytes

    def send(self, message: Message, payload: Buffer | None = None) -> None:
        """Write a message, or queue it. Never waits. The payload must not change until it is written.

        Raises: PeerLost if the connection is closed; Overloaded if the queue is full; InvalidRequest if the message is larger than
        the other side accepts.
        """
        view = EMPTY if payload is None else memoryview(payload).cast("B")
        self.send_encoded(self.encode(message, view), view)

    def encode(self, message: Message, payload: memoryview) -> bytes:
        """Encode a message's header, also after the connection has closed.

        Raises: InvalidRequest if the message is larger than the other side accepts.
        """
        header = codec.encode(message)
        if len(header) > self.accepts.max_header or len(payload) > self.accepts.max_payload:
            raise InvalidRequest(
                f"{type(message).__name__} takes {len(header)} bytes of header and {len(payload)} of payload; "
                f"the peer accepts {self.accepts.max_header} and {self.accepts.max_payload}"
            )
        return header

    def send_encoded(self, header: bytes, payload: memoryview) -> None:
        """Write a message that `encode` has encoded, or queue it. Raises: PeerLost, Overloaded as `send` does."""
        if self.reason:
            raise PeerLost(self.reason)
        head = frame_head(header, len(payload))
        joined = b"".join((head, payload[:_JOINED])) if payload else head
        rest = payload[_JOINED:]
        if self._paused or self._queue:
            self._queue.put(joined, rest)
            return
        self._write(joined)
        if rest:
            self._queue.put(rest, begun=True)
            self._pump()

    def when_room(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when at most half of the queue's limit is queued or the connection has closed. Never at once."""
        self._waiting.append(callback)
        self._call_waiting()

    def close(self, reason: str, farewell: Message | None = None) -> None:
        """Finish the frame that is being written, send `farewell`, and close. Other queued messages are dropped.

        `on_closed` is called at once. If the other side does not read, the connection is aborted after `_CLOSE_S`.
        """
        if self.reason:
            return
        # Without the rest of the frame, the other side could not tell the farewell from the frame's bytes.
        self._queue.keep_current()
        if farewell is not None:
            try:
                self.send(farewell)
            except MeshdError as error:
                log.debug("no farewell to %.8s: %s", self.peer, error)
        self._end(reason)
        if self._queue:
            asyncio.get_running_loop().call_later(_CLOSE_S, self._transport.abort)
            self._pump()
        else:
            self._transport.close()

    def abort(self, reason: str) -> None:
        """Close at once and discard unsent bytes."""
        self._end(reason)
        self._queue.clear()
        self._transport.abort()

    async def closed(self) -> None:
        """Wait until the socket is closed."""
        await self._gone.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_TRANSPORT_BYTES)
        self.remote = tuple(self._transport.get_extra_info("peername")[:2])
        self.certificate = self._transport.get_extra_info("ssl_object").getpeercert(binary_form=True) or b""
        try:
            self.peer = peer_of_certificate(self.certificate)
        except PeerRefused as error:
            self.peer = PeerId("")
            self._fail(error)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self.reason:
            return
        self.bytes_in += nbytes
        self.received_at = self._now()
        try:
            for frame in self._reader.received(nbytes):
                self._deliver(codec.decode(frame.header), frame)
                if self.reason:
                    return
        except ProtocolViolation as violation:
            self._fail(violation)

    def eof_received(self) -> None:
        try:
            self._reader.end()
        except ProtocolViolation as violation:
            self._end(str(violation))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(_reason(exc))
        self._queue.clear()
        self._gone.set()
        if self._when_gone is not None:
            self._when_gone(self)

    def _deliver(self, message: Message, frame: Frame) -> None:
        if self._on_message is not None:
            self._on_message(self, message, frame)
        elif not self._first.done():
            self.hello = message if isinstance(message, Hello) else None
            self.first_payload = bytes(frame.payload)
            self._first.set_result(message)
        else:
            raise ProtocolViolation(f"{type(message).__name__} before HELLO was answered")

    def _write(self, data: Buffer) -> None:
        self.bytes_out += len(data)
        self._transport.write(data)

    def _pump(self) -> None:
        while self._queue and not self._paused:
            self._write(self._queue.take())
        self._call_waiting()
        if self.reason and not self._queue:
            self._transport.close()

    def _call_waiting(self) -> None:
        if self._waiting and (self.reason or self._queue.queued_bytes <= QUEUE_BYTES // 2):
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                asyncio.get_running_loop().call_soon(callback)

    def _fail(self, error: MeshdError) -> None:
        self.violated = True
        if not self._first.done():
            self._first.set_exception(error)
            self._first.exception()
        self.close(str(error), Error(code=error.code, message=error.message))

    def _end(self, reason: str) -> None:
        if self.reason:
            return
        self.reason = reason
        self._call_waiting()
        if not self._first.done():
            self._first.set_exception(PeerLost(reason))
            self._first.exception()
        if self._on_closed is not None:
            self._on_closed(self, reason)


def _reason(error: Exception | None) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    return f"the connection broke: {error}" if error else "the other side closed the connection"


def has_slow_start() -> bool:
    """Whether TCP on this system begins with a small window again after a pause of a connection (RFC 5681, section 4.1).

    Linux does so unless it is set not to, or uses BBR, which goes on at the rate that it knows. It is assumed of systems that don't
    say.
    """
    try:
        after_idle = Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").read_text()
        control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text()
    except OSError:
        return True
    return after_idle.strip() != "0" and not control.startswith("bbr")


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind one socket for each address of `host`, without listening yet. Port 0 chooses one free port for all of them.

    Raises: OSError.
    """
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(infos):
            listener = socket.socket(family, kind, protocol)
            sockets.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port, *address[2:]))
            listener.setblocking(False)
            port = port or listener.getsockname()[1]
    except OSError:
        for listener in sockets:
            listener.close()
        raise
    return sockets


async def accept(
    raw: socket.socket, context: ssl.SSLContext, *, limits: FrameLimits, now: Callable[[], float], handshake_s: float
) -> Connection:
    """Complete TLS on an accepted socket.

    Raises: PeerRefused if TLS fails; PeerLost if the connection breaks during the handshake. Cancel: the socket is closed.
    """
    connection = Connection(limits, now)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        await complete_handshake(
            raw,
            asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection, raw, ssl=context, ssl_handshake_timeout=handshake_s, ssl_shutdown_timeout=_SHUTDOWN_S
            ),
            abandon=partial(connection.abort, "cancelled"),
        )
    except ConnectionResetError as error:
        # asyncio's TLS sends no alert when it rejects a certificate; it closes the connection.
        raise PeerRefused("it broke off the TLS handshake, as a peer of another cluster does") from error
    except OSError as error:
        raise _handshake_failure(error) from error
    return connection


async def dial(
    address: Address,
    context: ssl.SSLContext,
    *,
    limits: FrameLimits,
    now: Callable[[], float],
    connect_s: float,
    handshake_s: float,
    server_name: str = "",
) -> Connection:
    """Connect to the first of the host's addresses that answers, and complete TLS.

    Raises: AnotherKey if the other side's certificate is of another authority; PeerRefused if TLS fails otherwise; PeerLost if no
    address answers in time.
    Cancel: nothing stays open.
    """
    raw = await connect(address, connect_s)
    connection = Connection(limits, now)
    try:
        await complete_handshake(
            raw,
            asyncio.get_running_loop().create_connection(
                lambda: connection,
                sock=raw,
                ssl=context,
                server_hostname=server_name,
                ssl_handshake_timeout=handshake_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            ),
            abandon=partial(connection.abort, "cancelled"),
        )
    except OSError as error:
        raise _handshake_failure(error) from error
    return connection


async def complete_handshake(
    raw: socket.socket, connecting: Coroutine[object, object, object], *, abandon: Callable[[], object]
) -> None:
    """Wait for the TLS handshake. `abandon` closes a connection whose handshake was cancelled too late.

    Cancel: shuts the socket down so that the handshake fails, because asyncio leaks the TLS transport of a cancelled handshake.
    """
    task = asyncio.ensure_future(connecting)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        task.add_done_callback(partial(_abandon, abandon))
        with suppress(OSError):
            raw.shutdown(socket.SHUT_RDWR)
        await asyncio.wait([task])
        raise
    finally:
        if not isinstance(asyncio.get_running_loop(), asyncio.BaseEventLoop):
            # uvloop's transport now owns the descriptor, but does not always detach it from `raw`, whose finaliser would then
            # close a descriptor that another connection has reused.
            raw.detach()


def _abandon(abandon: Callable[[], object], connecting: asyncio.Future[object]) -> None:
    if connecting.exception() is None:
        abandon()


async def connect(address: Address, connect_s: float) -> socket.socket:
    """Open a TCP connection to the first address that answers within `connect_s`.

    Raises: PeerLost; NotListening if the last address refuses it.
    """
    loop = asyncio.get_running_loop()
    host, port = address
    failure, hint, lost = "its name has no address", "", PeerLost
    try:
        infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise PeerLost(
            f"{host} is not known: {getattr(error, 'strerror', None) or error}", hint="write its IP address: --peer IP:PORT"
        ) from error
    for family, kind, protocol, _, resolved in infos:
        try:
            raw = socket.socket(family, kind, protocol)
        except OSError as error:  # this process or the system has no descriptors or buffers left
            failure = os.strerror(error.errno or errno.EIO)
            continue
        try:
            raw.setblocking(False)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(connect_s):
                await loop.sock_connect(raw, resolved)
        except OSError as error:
            raw.close()
            # asyncio puts its own words in `strerror`, such as "Connect call failed".
            failure = os.strerror(error.errno) if error.errno else "no answer in time"
            hint = _CONNECT_HINTS.get(error.errno or errno.ETIMEDOUT, "")
            lost = NotListening if error.errno == errno.ECONNREFUSED else PeerLost
        except BaseException:
            raw.close()
            raise
        else:
            return raw
    raise lost(f"{host}:{port} can't be reached: {failure}", hint=hint)


def _handshake_failure(error: Exception) -> MeshdError:
    if isinstance(error, ssl.SSLCertVerificationError):
        return AnotherKey("its certificate is not of this cluster", hint=_OTHER_CLUSTER)
    if isinstance(error, ssl.SSLError):
        if "ALERT" in (error.reason or ""):
            return PeerRefused("it refuses this peer's certificate: it belongs to another cluster", hint=_OTHER_CLUSTER)
        return PeerRefused(f"it does not speak TLS 1.3 as meshd does: {error.reason or error}")
    return PeerLost(f"the TLS handshake broke off: {error}")
