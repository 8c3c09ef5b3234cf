"""Passes each received message to its handler, and each reply to the request that waits for it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

from meshd.agents.links.log import LinkLog
from meshd.agents.links.task_budget import TaskBudget
from meshd.errors import MeshdError, Overloaded, PeerLost, RemoteFailure
from meshd.protocol.codec import UnknownMessage
from meshd.protocol.framing import EMPTY
from meshd.protocol.messages import Error, Message, Reply, Request
from meshd.protocol.transport import Buffer
from meshd.types import PeerId

log = logging.getLogger("meshd.links")

M = TypeVar("M", bound=Message)
Answer = Reply | tuple[Reply, Buffer] | None
Handler = Callable[[PeerId, M, memoryview], Answer | Awaitable[Answer]]
Send = Callable[[PeerId, Message, Buffer | None], None]

MAX_REQUESTS = 1024
"""Maximum number of this peer's requests that wait for a reply at once."""


@runtime_checkable
class _Closable(Protocol):
    """An awaitable that is closed if it is never awaited, as a coroutine is."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    peer: PeerId
    reply: asyncio.Future[tuple[Reply, memoryview]]


class Dispatcher:
    """Calls the handler of each message and sends the handler's answer. Completes a request when its reply arrives.

    Handlers are called while the event loop reads from a socket; an awaitable that a handler returns runs as a task. A peer whose
    tasks use up its budget is answered with the error `overloaded`.
    """

    def __init__(self, send: Send, linklog: LinkLog) -> None:
        self._send = send
        self._linklog = linklog
        self._handlers: dict[type[Message], Handler[Any]] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._budget = TaskBudget()
        self._last_request = 0
        self.group: asyncio.TaskGroup | None = None
        """Owns the tasks of asynchronous handlers; set while the links run."""

    def register(self, message_type: type[M], handler: Handler[M]) -> None:
        """Register the handler of a message type. Raises: ValueError if the type has one already."""
        if message_type in self._handlers:
            raise ValueError(f"{message_type.__name__} has a handler already")
        self._handlers[message_type] = handler

    def next_request(self) -> int:
        """Returns: a request number that this peer has not used yet."""
        self._last_request += 1
        return self._last_request

    def deliver(self, peer: PeerId, message: Message, payload: memoryview) -> None:
        """Pass a message to its handler, or a reply to the request that waits for it."""
        if isinstance(message, Reply) and message.request:
            if not self._resolve(peer, message, payload):
                # It came too late. An ERROR among them says nothing about what its session does now.
                log.debug("%s of %.8s answers request %d, for which nothing waits", type(message).__name__, peer, message.request)
            return
        handler = self._handlers.get(type(message))
        if handler is None:
            self._unhandled(peer, message)
            return
        try:
            answer = handler(peer, message, payload)
        except Exception as error:
            self._failed(peer, message, error)
            return
        if answer is None or isinstance(answer, Reply | tuple):
            self._answer(peer, message, answer)
        else:
            self._spawn(peer, message, answer, len(payload))

    async def request(
        self, peer: PeerId, message: Request | Callable[[int], Request], payload: Buffer | None, timeout_s: float
    ) -> tuple[Reply, memoryview]:
        """Send a request and wait for its reply. See `Links.request`."""
        asked = message if isinstance(message, Request) else message(self.next_request())
        if len(self._waiting) >= MAX_REQUESTS:
            raise Overloaded(f"{MAX_REQUESTS} requests to peers wait for their reply already")
        waiting = _Waiting(peer, asyncio.get_running_loop().create_future())
        self._waiting[asked.request] = waiting
        try:
            self._send(peer, asked, payload)
            async with asyncio.timeout(timeout_s):
                reply, data = await waiting.reply
        except TimeoutError as error:
            raise PeerLost(f"{peer:.8} gave no answer to {type(asked).__name__} within {timeout_s:g} s") from error
        finally:
            del self._waiting[asked.request]
        if isinstance(reply, Error):
            raise RemoteFailure(reply.message, remote_code=reply.code, hint=reply.hint)
        return reply, data

    def peer_lost(self, peer: PeerId, reason: str) -> None:
        """Fail the requests that wait for a reply from `peer`, with PeerLost."""
        for waiting in self._waiting.values():
            if waiting.peer == peer and not waiting.reply.done():
                waiting.reply.set_exception(PeerLost(reason))

    def cancel_tasks(self) -> None:
        """Cancel all asynchronous handlers."""
        for task in self._tasks:
            task.cancel()

    def _resolve(self, peer: PeerId, reply: Reply, payload: memoryview) -> bool:
        waiting = self._waiting.get(reply.request)
        if waiting is None or waiting.peer != peer:
            return False
        if not waiting.reply.done():
            waiting.reply.set_result((reply, payload))
        return True

    def _spawn(self, peer: PeerId, message: Message, answer: Awaitable[Answer], payload_bytes: int) -> None:
        try:
            if self.group is None:
                raise Overloaded("this peer is about to stop")
            self._budget.enter(peer, message, payload_bytes)
        except Overloaded as error:
            if isinstance(answer, _Closable):
                answer.close()
            self._failed(peer, message, error)
            return
        task = self.group.create_task(self._finish(peer, message, answer))
        self._tasks.add(task)
        task.add_done_callback(partial(self._ended, peer, message, payload_bytes))

    def _ended(self, peer: PeerId, message: Message, payload_bytes: int, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._budget.leave(peer, message, payload_bytes)

    async def _finish(self, peer: PeerId, message: Message, answer: Awaitable[Answer]) -> None:
        try:
            self._answer(peer, message, await answer)
        except Exception as error:
            self._failed(peer, message, error)

    def _answer(self, peer: PeerId, message: Message, answer: Answer) -> None:
        if answer is not None:
            reply, payload = answer if isinstance(answer, tuple) else (answer, None)
            try_send(self._send, peer, reply, payload)

    def _failed(self, peer: PeerId, message: Message, error: Exception) -> None:
        if not isinstance(error, MeshdError):
            log.error("handling %s of %.8s failed", type(message).__name__, peer, exc_info=error)
            error = MeshdError(f"{type(message).__name__} could not be handled: {error!r}")
        elif isinstance(message, Error):
            return
        request = message.request if isinstance(message, Request) else 0
        session = getattr(message, "session", None)
        try_send(
            self._send, peer, Error(request=request, code=error.code, message=error.message, hint=error.hint, session=session), None
        )

    def _unhandled(self, peer: PeerId, message: Message) -> None:
        if isinstance(message, UnknownMessage | Request):
            number = message.number_of if isinstance(message, UnknownMessage) else message.number
            text = f"message {number} is not handled here"
            try_send(self._send, peer, Error(request=message.request, code="unknown_message", message=text, number_of=number))
        elif isinstance(message, Error) and message.request == 0:
            self._linklog.warn(f"error {peer} {message.code}", "%.8s: %s (%s)", peer, message.message, message.code)
        else:
            log.debug("%s of %.8s has no handler", type(message).__name__, peer)


def try_send(
    send: Callable[[PeerId, Message, Buffer | None], None], peer: PeerId, message: Message, payload: Buffer | None = None
) -> None:
    """Send a message and only log a failure. For messages whose receiver notices a loss otherwise, such as by the link's end."""
    try:
        send(peer, message, payload)
    except MeshdError as error:
        log.debug("%s to %.8s not sent: %s", type(message).__name__, peer, error)


def to_view(payload: Buffer | None) -> memoryview:
    """View a payload as bytes, the form in which handlers receive payloads. None gives an empty view."""
    return EMPTY if payload is None else memoryview(payload).cast("B")
