"""Conversations of two simulated peers that have different cluster keys: the real `TrustExchange` over simulated connections."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshd.errors import MeshdError, PeerLost, ProtocolViolation
from meshd.protocol.framing import Frame
from meshd.protocol.messages import Message
from meshd.types import PeerId

if TYPE_CHECKING:
    from sim.loop import SimLoop
    from sim.network.links import SimLinks

_WITHIN_S = 5.0


class ReturnConnection:
    """One end of a connection under the authority of returning peers. Has the part of `Connection` that `TrustExchange` uses."""

    far: "ReturnConnection"

    def __init__(self, loop: "SimLoop", links: "SimLinks", peer: PeerId, delay_s: Callable[[], float | None]) -> None:
        """`delay_s` returns how long a message to the other end takes; None: it is lost."""
        self.peer = peer
        self.reason = ""
        self.first_payload = b""
        self.links = links
        self._loop = loop
        self._delay_s = delay_s
        self._first: asyncio.Future[Message] = loop.create_future()
        self._on_message: Callable[[Any, Message, Frame], None] | None = None
        self._on_closed: Callable[[Any, str], None] | None = None

    def send(self, message: Message, payload: bytes = b"") -> None:
        if self.reason:
            raise PeerLost(self.reason)
        self._to_far(self.far.receive, message, bytes(payload))

    async def first(self) -> Message:
        return await self._first

    def attach(self, on_message: Any, on_closed: Any, *, small: bool) -> None:
        assert small, "a past member could have much memory taken"
        if self.reason:
            raise PeerLost(self.reason)
        self._on_message, self._on_closed = on_message, on_closed

    def close(self, reason: str) -> None:
        if not self.reason:
            self._end(reason)
            self._to_far(self.far._end, reason)

    def receive(self, message: Message, payload: bytes) -> None:
        if self.reason:
            return
        try:
            if self._on_message is not None:
                self._on_message(self, message, Frame(b"", memoryview(payload)))
            elif not self._first.done():
                self.first_payload = payload
                self._first.set_result(message)
            else:
                raise ProtocolViolation("a message before the first one was answered")
        except ProtocolViolation as violation:
            self.close(str(violation))

    def _to_far(self, call: Callable[..., None], *args: object) -> None:
        delay_s = self._delay_s()
        if delay_s is not None:
            self._loop.call_later(delay_s, call, *args, context=self.far.links.context)

    def _end(self, reason: str) -> None:
        if self.reason:
            return
        self.reason = reason
        if not self._first.done():
            self._first.set_exception(PeerLost(reason))
            self._first.exception()
        if self._on_closed is not None:
            self._on_closed(self, reason)


async def converse(connection: ReturnConnection, talk: Callable[[Any], Any]) -> None:
    """Run one side's part of the conversation, and close the connection."""
    try:
        async with asyncio.timeout(_WITHIN_S):
            await talk(connection)
    except (MeshdError, TimeoutError) as error:
        connection.close(str(error) or "timeout")
    else:
        connection.close("the rotations were exchanged")
