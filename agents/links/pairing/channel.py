"""The channel of a pairing: TLS 1.3 to a listener whose certificate nobody signed, and messages in it.

TLS alone proves nothing here. Each side puts the fingerprint of the listener's certificate into SPAKE2, so that the code proves
that the channel has only two ends.
"""

import asyncio
import socket
import ssl
import tempfile
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from meshd.errors import PeerLost, ProtocolViolation, StorageError
from meshd.protocol import transport
from meshd.protocol.pairing.certificate import InviteCertificate, fingerprint_of
from meshd.protocol.pairing.messages import MAX_BYTES, PREFIX_BYTES, AnyMessage, PairingMessage, decode, encode, length_of
from meshd.protocol.transport import Address

_SHUTDOWN_S = 0.5
M = TypeVar("M", bound=PairingMessage)


class PairingChannel:
    """One connection. All waits end with the connection; the caller sets the deadlines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fingerprint: bytes) -> None:
        self.fingerprint = fingerprint
        """SHA-256 of the listener's certificate, as this side knows it."""
        self._reader = reader
        self._writer = writer

    async def send(self, message: AnyMessage) -> None:
        """Send a message. Raises: PeerLost."""
        try:
            self._writer.write(encode(message))
            await self._writer.drain()
        except OSError as error:
            raise _lost(error) from error

    async def receive(self, kind: type[M]) -> M:
        """Wait for the next message. Raises: PeerLost; ProtocolViolation if it is malformed or of another kind."""
        try:
            prefix = await self._reader.readexactly(PREFIX_BYTES)
            body = await self._reader.readexactly(length_of(prefix))
        except asyncio.IncompleteReadError as error:
            raise PeerLost("the other side closed the connection") from error
        except OSError as error:
            raise _lost(error) from error
        message = decode(body)
        if not isinstance(message, kind):
            raise ProtocolViolation(f"{type(message).__name__}, where {kind.__name__} must come")
        return message

    async def ended(self) -> None:
        """Wait until the other side closes the connection, and discard what it still sends."""
        try:
            while await self._reader.read(MAX_BYTES):
                pass
        except OSError:
            return

    def abort(self) -> None:
        """Close at once. What was sent but not written yet is lost."""
        self._writer.transport.abort()

    async def close(self) -> None:
        """Write what was sent, and close. The caller limits the wait."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return
        finally:
            self.abort()


def listener_context(certificate: InviteCertificate, folder: Path) -> ssl.SSLContext:
    """Make the TLS context of a listener. OpenSSL reads keys only from files: one is in `folder` for a moment, for its owner only.

    Raises: StorageError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".invite.") as file:  # its mode is 0600
            file.write(certificate.pem)
            file.flush()
            context.load_cert_chain(file.name)
    except OSError as error:
        raise StorageError(
            f"{folder} can't be used: {error.strerror or error}", hint="free space, or fix its permissions"
        ) from error
    return context


def _joiner_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # SPAKE2 verifies the certificate, see above
    return context


async def accept(raw: socket.socket, context: ssl.SSLContext, fingerprint: bytes, handshake_s: float) -> PairingChannel:
    """Complete TLS on an accepted socket. Raises: PeerLost. Cancel: the socket is closed."""
    raw.setblocking(False)
    reader = asyncio.StreamReader(limit=MAX_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    loop = asyncio.get_running_loop()
    connecting = loop.connect_accepted_socket(
        lambda: protocol, raw, ssl=context, ssl_handshake_timeout=handshake_s, ssl_shutdown_timeout=_SHUTDOWN_S
    )
    return await _opened(raw, reader, protocol, connecting, fingerprint)


async def connect(address: Address, *, connect_s: float, handshake_s: float) -> PairingChannel:
    """Connect to a listener. Raises: PeerLost. Cancel: nothing stays open."""
    raw = await transport.connect(address, connect_s)
    reader = asyncio.StreamReader(limit=MAX_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    connecting = asyncio.get_running_loop().create_connection(
        lambda: protocol,
        sock=raw,
        ssl=_joiner_context(),
        server_hostname="",
        ssl_handshake_timeout=handshake_s,
        ssl_shutdown_timeout=_SHUTDOWN_S,
    )
    return await _opened(raw, reader, protocol, connecting, b"")


async def _opened(
    raw: socket.socket,
    reader: asyncio.StreamReader,
    protocol: asyncio.StreamReaderProtocol,
    connecting: Coroutine[Any, Any, tuple[asyncio.Transport, asyncio.BaseProtocol]],
    fingerprint: bytes,
) -> PairingChannel:
    opened: list[asyncio.Transport] = []

    async def handshake() -> None:
        opened.append((await connecting)[0])

    try:
        await transport.complete_handshake(raw, handshake(), abandon=partial(_abort_all, opened))
    except OSError as error:
        raise _lost(error) from error
    (tls,) = opened
    if not fingerprint:
        fingerprint = fingerprint_of(tls.get_extra_info("ssl_object").getpeercert(binary_form=True) or b"")
    return PairingChannel(reader, asyncio.StreamWriter(tls, protocol, reader, asyncio.get_running_loop()), fingerprint)


def _abort_all(opened: list[asyncio.Transport]) -> None:
    for each in opened:
        each.abort()


def _lost(error: OSError) -> PeerLost:
    reason = error.reason if isinstance(error, ssl.SSLError) else error.strerror
    return PeerLost(f"the connection broke off: {reason or error or type(error).__name__}")
