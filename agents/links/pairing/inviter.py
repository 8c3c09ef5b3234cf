"""The inviter: a listener that exists only while an invite is open, and gives the join code to the one device that has the code.

An invite ends when a device has joined, when its time is over, when it is closed, or after three wrong tries. Tries count in all,
not by address, because whoever guesses may have many. A try counts before it is answered: a stranger who opens many connections
at once has no more tries than one who opens them in turn.
"""

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshd.agents.cluster_service import InviteState, InviteStep
from meshd.agents.links.half_open import HalfOpen
from meshd.agents.links.pairing import channel as channels
from meshd.agents.links.pairing.channel import PairingChannel
from meshd.clock import Clock
from meshd.errors import InvalidRequest, MeshdError
from meshd.protocol import transport
from meshd.protocol.pairing.certificate import make_certificate
from meshd.protocol.pairing.code import InviteCode
from meshd.protocol.pairing.exchange import InviterSide
from meshd.protocol.pairing.messages import Admit, Answer, Confirm, Invitation, Join, Stored, decode_joiner, encode_invitation
from meshd.values import Address

log = logging.getLogger(__name__)

TRIES = 3
HANDSHAKE_S = 5.0
"""Longest time for TLS and the first message of a connection."""
TRY_S = 15.0
"""Longest time of a try. A slow device needs a second or two for SPAKE2."""
STEP_S = 1.0
_BACKLOG = 128
_HALF_OPEN = 16
"""Most connections that have not sent their first message. A further one takes the place of an older one, see `HalfOpen`."""
_ACCEPT_AGAIN_S = 0.2

Advertise = Callable[[int, int], Coroutine[Any, Any, None]]
"""(the invite's number, port) -> advertises the listener on the LAN until it is cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InviterSettings:
    """What an invite gives, and where it listens."""

    name: str
    join_code: Callable[[], str]
    """Reads the present join code: it may change while an invite is open."""
    host: str
    link_port: Callable[[], int]
    """The listener takes the next port if that is free, so that a firewall can be told."""
    hosts: Callable[[], list[str]]
    """Addresses of this device, for a joiner that multicast does not reach."""
    folder: Path
    advertise: Advertise


@dataclass(slots=True)
class _Open:
    """The invite that is open."""

    code: InviteCode
    context: ssl.SSLContext
    fingerprint: bytes
    """Of the listener's certificate."""
    until: float
    listeners: list[socket.socket]
    port: int
    tries: int = 0
    running: int = 0
    """Tries that have not ended yet."""
    given: str = ""
    """The device that was sent the join code."""
    state: InviteState = "waiting"
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, state: InviteState) -> None:
        """End the invite. Once the join code was sent, the invite has been used, however it ends."""
        if not self.ended.is_set():
            self.state = "sent" if self.given and state != "joined" else state
            self.ended.set()


class Inviter:
    """Holds at most one open invite."""

    def __init__(self, settings: InviterSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._open: _Open | None = None
        self._half_open = HalfOpen(_HALF_OPEN)

    def row(self) -> InviteStep | None:
        """Describe the open invite, without its code; None if there is none."""
        return self._step(self._open) if self._open is not None else None

    def close(self) -> bool:
        """Close the open invite. Returns: False if there is none."""
        if self._open is None:
            return False
        self._open.end("closed")
        return True

    async def invite(self, minutes: float) -> AsyncGenerator[InviteStep, None]:
        """Open an invite, and yield its state each second until it has ended. The first step has the code.

        Leaving the iterator closes the invite.

        Raises: InvalidRequest if one is open already; StorageError, ConfigError.
        """
        if self._open is not None:
            raise InvalidRequest("an invite of this device is open already", hint="close it with `meshd invite --close`")
        opened = self._begin(minutes)
        serving = asyncio.create_task(self._serve(opened), name="invite")
        try:
            yield self._step(opened, code=str(opened.code))
            while not opened.ended.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(STEP_S):
                        await opened.ended.wait()
                yield self._step(opened)
        finally:
            opened.end("closed")
            serving.cancel()
            try:
                await asyncio.wait([serving])
            finally:
                self._open = None

    def _begin(self, minutes: float) -> _Open:
        settings, clock = self._settings, self._clock
        certificate = make_certificate(clock.random_bytes)
        context = channels.listener_context(certificate, settings.folder)
        try:
            listeners = _bind(settings.host, settings.link_port() + 1)
        except OSError as error:
            raise InvalidRequest(f"an invite can't listen on {settings.host}: {error.strerror or error}") from error
        code = InviteCode.generate(clock.random_bytes)
        until = clock.monotonic() + 60 * minutes
        port: int = listeners[0].getsockname()[1]
        self._open = _Open(code, context, certificate.fingerprint, until, listeners, port)
        return self._open

    def _step(self, opened: _Open, code: str = "") -> InviteStep:
        return InviteStep(
            state=opened.state,
            number=opened.code.number,
            code=code,
            left_s=max(0.0, opened.until - self._clock.monotonic()),
            tries_left=max(0, TRIES - opened.tries),
            joined=opened.given,
            addresses=tuple(str(Address(host, opened.port)) for host in self._settings.hosts()),
        )

    async def _serve(self, opened: _Open) -> None:
        """Listen until cancelled."""
        try:
            for listener in opened.listeners:
                listener.listen(_BACKLOG)
            log.info("an invite is open on port %d", opened.port)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._advertised(opened))
                tasks.create_task(self._expire(opened))

                def welcome(raw: socket.socket, host: str) -> None:
                    task = tasks.create_task(self._welcome(opened, raw, host))
                    task.add_done_callback(lambda _: raw.close())

                for listener in opened.listeners:
                    tasks.create_task(self._listen(listener, welcome))
        except Exception:
            log.exception("an invite failed")
            opened.end("failed")
        finally:
            for listener in opened.listeners:
                listener.close()
            log.info("the invite has ended: %s", opened.state)

    async def _expire(self, opened: _Open) -> None:
        """End the invite when its time is over, whether its steps are read or not: a terminal can be suspended."""
        await self._clock.sleep(opened.until - self._clock.monotonic())
        opened.end("expired")

    async def _advertised(self, opened: _Open) -> None:
        try:
            await self._settings.advertise(opened.code.number, opened.port)
        except MeshdError as error:
            log.warning("the invite is not announced on the LAN: %s", error)

    async def _listen(self, listener: socket.socket, welcome: Callable[[socket.socket, str], None]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                raw, remote = await loop.sock_accept(listener)
            except OSError as error:
                log.warning("connections of joiners can't be accepted, trying again: %s", error)
                await self._clock.sleep(_ACCEPT_AGAIN_S)
            else:
                welcome(raw, remote[0])

    async def _welcome(self, opened: _Open, raw: socket.socket, host: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        number = self._half_open.enter(host, task.cancel)
        channel: PairingChannel | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                channel = await channels.accept(raw, opened.context, opened.fingerprint, HANDSHAKE_S)
                join = await channel.receive(Join)
            self._half_open.leave(number)
            await self._try(opened, channel, join, host)
        except (MeshdError, TimeoutError) as error:
            log.debug("a connection from %s did not join: %s", host, error)
        except Exception:
            log.exception("a connection of a joiner failed")
        finally:
            self._half_open.leave(number)
            if channel is not None:
                channel.abort()

    async def _try(self, opened: _Open, channel: PairingChannel, join: Join, host: str) -> None:
        """Run one try, if there is one left. Raises: MeshdError, TimeoutError."""
        if opened.tries >= TRIES or opened.ended.is_set():
            return
        opened.tries += 1
        opened.running += 1
        try:
            async with asyncio.timeout(TRY_S):
                await self._exchange(opened, channel, join)
        finally:
            opened.running -= 1
            if not opened.given and not opened.ended.is_set():
                log.warning("a wrong try of the invite, from %s: %d left", host, TRIES - opened.tries)
                if opened.tries >= TRIES and not opened.running:
                    opened.end("tries")

    async def _exchange(self, opened: _Open, channel: PairingChannel, join: Join) -> None:
        side = InviterSide(opened.code, channel.fingerprint, self._clock.random_bytes)
        share, proof = await asyncio.to_thread(side.answer, join.share)
        await channel.send(Answer(share=share, proof=proof))
        confirm = await channel.receive(Confirm)
        side.check(confirm.proof)
        name = decode_joiner(side.open(confirm.sealed))
        if opened.given or opened.ended.is_set():  # another joiner had the code too, and was faster
            return
        settings = self._settings
        invitation = Invitation(join_code=settings.join_code(), name=settings.name, link_port=settings.link_port())
        # From here on the code is used, whatever becomes of this connection.
        opened.given = name
        try:
            await channel.send(Admit(sealed=side.seal(encode_invitation(invitation))))
            side.open((await channel.receive(Stored)).sealed)
        except BaseException:
            opened.end("sent")
            raise
        opened.end("joined")
        log.info("%s has joined by an invite", name)


def _bind(host: str, port: int) -> list[socket.socket]:
    """Bind this port, or any free one if it is taken. Raises: OSError."""
    try:
        return transport.bind(host, port if port < 65536 else 0)
    except OSError:
        return transport.bind(host, 0)
