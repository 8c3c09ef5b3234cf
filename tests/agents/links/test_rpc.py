"""The dispatcher without a network: sent messages go to a list."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Generator
from typing import Any

import pytest

from in_process.peers import until
from meshd.agents.links.log import LinkLog
from meshd.agents.links.rpc import Dispatcher, to_view
from meshd.agents.links.task_budget import LASTING_PER_PEER, PER_KIND
from meshd.clock import SystemClock
from meshd.errors import NotReady, Overloaded, PeerLost, RemoteFailure
from meshd.protocol.codec import UnknownMessage
from meshd.protocol.framing import EMPTY
from meshd.protocol.messages import Error, FetchWeights, Message, Place, Probe, ProbeAck
from meshd.protocol.transport import Buffer
from meshd.types import LayerRange, PeerId

ANN, BOB = PeerId("a" * 52), PeerId("b" * 52)
Sent = list[tuple[PeerId, Message, Buffer | None]]


def ack(request: int) -> ProbeAck:
    return ProbeAck(request=request)


def place(request: int) -> Place:
    return Place(request=request, model="m", ref="", layers=LayerRange(0, 1), kv_tokens=1, deadline_ms=1)


@pytest.fixture
def sent() -> Sent:
    return []


@pytest.fixture
async def dispatcher(sent: Sent) -> AsyncIterator[Dispatcher]:
    dispatcher = Dispatcher(lambda peer, message, payload: sent.append((peer, message, payload)), LinkLog(SystemClock()))
    async with asyncio.TaskGroup() as group:
        dispatcher.group = group
        yield dispatcher
        dispatcher.cancel_tasks()


async def test_a_reply_counts_only_from_the_peer_that_was_asked(dispatcher: Dispatcher, sent: Sent) -> None:
    waiting = asyncio.create_task(dispatcher.request(ANN, lambda number: Probe(request=number), None, 5.0))
    await asyncio.sleep(0)
    assert [(peer, type(message)) for peer, message, _ in sent] == [(ANN, Probe)]
    dispatcher.deliver(BOB, ack(1), EMPTY)
    dispatcher.deliver(ANN, ack(2), EMPTY)
    await asyncio.sleep(0)
    assert not waiting.done()
    dispatcher.deliver(ANN, ack(1), memoryview(b"payload"))
    dispatcher.deliver(ANN, ack(1), EMPTY)  # a repeated reply
    reply, payload = await waiting
    assert (reply, bytes(payload)) == (ack(1), b"payload")


async def test_a_request_fails_by_an_error_reply_a_lost_peer_or_a_timeout(dispatcher: Dispatcher) -> None:
    def ask(timeout_s: float) -> "asyncio.Task[object]":
        return asyncio.create_task(dispatcher.request(ANN, lambda number: Probe(request=number), None, timeout_s))

    refused, lost, late = ask(5.0), ask(5.0), ask(0.001)
    await asyncio.sleep(0)
    dispatcher.deliver(ANN, Error(request=1, code="not_ready", message="still loading", hint="wait"), EMPTY)
    with pytest.raises(RemoteFailure, match="still loading"):
        await refused
    with pytest.raises(PeerLost, match=r"gave no answer to Probe within 0\.001 s"):
        await late
    dispatcher.peer_lost(BOB, "another one")
    assert not lost.done()
    dispatcher.peer_lost(ANN, "it left")
    with pytest.raises(PeerLost, match="it left"):
        await lost


async def test_an_error_that_answers_a_request_too_late_is_not_an_error_of_the_session(dispatcher: Dispatcher) -> None:
    """Under load a request of an older epoch is given up and answered later: that must not end the session's present epoch."""
    handled: list[Error] = []
    dispatcher.register(Error, lambda peer, message, payload: handled.append(message))
    waiting = asyncio.create_task(dispatcher.request(ANN, lambda number: Probe(request=number), None, 0.001))
    with pytest.raises(PeerLost):
        await waiting
    dispatcher.deliver(ANN, Error(request=1, code="superseded", message="epoch 3 is past", session="5" * 32), EMPTY)
    assert handled == []
    rejected = Error(code="protocol_violation", message="a step was rejected", session="5" * 32)
    dispatcher.deliver(ANN, rejected, EMPTY)
    assert handled == [rejected]


async def test_a_cancelled_request_drops_its_late_reply(dispatcher: Dispatcher, sent: Sent) -> None:
    waiting = asyncio.create_task(dispatcher.request(ANN, Probe(request=7), None, 5.0))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    dispatcher.deliver(ANN, ack(7), EMPTY)
    assert len(sent) == 1


async def test_a_handler_answers_at_once_or_later(dispatcher: Dispatcher, sent: Sent) -> None:
    async def later(peer: PeerId, message: Probe, payload: memoryview) -> tuple[ProbeAck, Buffer]:
        await asyncio.sleep(0)
        return ack(message.request), b"late"

    def handle(peer: PeerId, message: Probe, payload: memoryview) -> object:
        return later(peer, message, payload) if message.request == 1 else ack(message.request)

    dispatcher.register(Probe, handle)  # type: ignore[arg-type]
    dispatcher.deliver(ANN, Probe(request=1), EMPTY)
    dispatcher.deliver(ANN, Probe(request=2), EMPTY)
    assert sent == [(ANN, ack(2), None)]
    await until(lambda: len(sent) == 2)
    assert sent[1] == (ANN, ack(1), b"late")


@pytest.mark.parametrize(("error", "code"), [(NotReady("loading"), NotReady.code), (ZeroDivisionError(), "internal_error")])
async def test_what_a_handler_raises_is_sent_as_an_error(dispatcher: Dispatcher, sent: Sent, error: Exception, code: str) -> None:
    def fails(peer: PeerId, message: Probe, payload: memoryview) -> None:
        raise error

    dispatcher.register(Probe, fails)
    dispatcher.deliver(ANN, Probe(request=3), EMPTY)
    (_, answer, _), *others = sent
    assert isinstance(answer, Error)
    assert (answer.request, answer.code, others) == (3, code, [])


def errors(sent: Sent, peer: PeerId) -> list[tuple[int, str]]:
    return [(message.request, message.code) for to, message, _ in sent if to == peer and isinstance(message, Error)]


async def test_a_busy_peer_is_answered_overloaded_and_others_are_handled(dispatcher: Dispatcher, sent: Sent) -> None:
    async def never(peer: PeerId, message: Probe, payload: memoryview) -> None:
        await asyncio.Event().wait()

    dispatcher.register(Probe, never)
    for request in range(1000):
        dispatcher.deliver(ANN, Probe(request=request), EMPTY)
    assert errors(sent, ANN) == [(request, Overloaded.code) for request in range(PER_KIND, 1000)]
    for request in range(PER_KIND):
        dispatcher.deliver(BOB, Probe(request=request), EMPTY)
    assert errors(sent, BOB) == []


async def test_an_awaitable_that_is_refused_is_told(dispatcher: Dispatcher, sent: Sent) -> None:
    closed = []

    class Reserved(Awaitable[None]):
        def __await__(self) -> Generator[Any, Any, None]:
            return asyncio.Event().wait().__await__()

        def close(self) -> None:
            closed.append(self)

    dispatcher.register(Probe, lambda peer, message, payload: Reserved())
    for request in range(PER_KIND + 3):
        dispatcher.deliver(ANN, Probe(request=request), EMPTY)
    assert len(closed) == len(errors(sent, ANN)) == 3


async def test_requests_that_last_take_no_room_from_short_ones(dispatcher: Dispatcher, sent: Sent) -> None:
    """A PLACE may take an hour while weights are fetched."""

    async def never(peer: PeerId, message: Message, payload: memoryview) -> None:
        await asyncio.Event().wait()

    dispatcher.register(Place, never)
    dispatcher.register(FetchWeights, never)
    for request in range(500):
        dispatcher.deliver(ANN, place(request), EMPTY)
    assert errors(sent, ANN) == [(request, Overloaded.code) for request in range(LASTING_PER_PEER, 500)]
    sent.clear()
    for request in range(PER_KIND):
        dispatcher.deliver(ANN, FetchWeights(request=request, model="m", offset=0, length=1), EMPTY)
    assert errors(sent, ANN) == []


async def test_a_handler_that_ends_gives_its_room_back(dispatcher: Dispatcher, sent: Sent) -> None:
    async def soon(peer: PeerId, message: Probe, payload: memoryview) -> ProbeAck:
        await asyncio.sleep(0)
        return ack(message.request)

    dispatcher.register(Probe, soon)
    for request in range(10 * PER_KIND):
        dispatcher.deliver(ANN, Probe(request=request), memoryview(bytes(1000)))
        await asyncio.sleep(0)
    await until(lambda: len(sent) == 10 * PER_KIND)
    assert errors(sent, ANN) == []
    assert len(dispatcher._budget) == 0


async def test_an_unknown_or_unhandled_request_is_answered_and_an_unhandled_error_is_not(
    dispatcher: Dispatcher, sent: Sent
) -> None:
    dispatcher.deliver(ANN, UnknownMessage(number_of=999, request=4), EMPTY)
    dispatcher.deliver(ANN, Probe(request=5), EMPTY)
    dispatcher.deliver(ANN, Error(code="not_ready", message="for nobody"), EMPTY)
    answers = [message for _, message, _ in sent]
    assert [(answer.request, answer.code, answer.number_of) for answer in answers if isinstance(answer, Error)] == [
        (4, "unknown_message", 999),
        (5, "unknown_message", Probe.number),
    ]


def test_a_message_type_has_at_most_one_handler() -> None:
    dispatcher = Dispatcher(lambda *_: None, LinkLog(SystemClock()))
    dispatcher.register(Probe, lambda *_: None)
    with pytest.raises(ValueError, match="Probe has a handler already"):
        dispatcher.register(Probe, lambda *_: None)


def test_a_payload_is_viewed_as_bytes() -> None:
    assert to_view(None).nbytes == 0
    assert len(to_view(memoryview(bytes(8)).cast("I"))) == 8
