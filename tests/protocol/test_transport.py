"""Connections over real sockets: back-pressure, limits, and one reported reason when a connection ends."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from meshd.errors import InvalidRequest, Overloaded, PeerLost, PeerRefused, ProtocolViolation
from meshd.protocol import transport
from meshd.protocol.framing import MIB, Frame, FrameLimits, frame_head
from meshd.protocol.identity import ClusterKey, Identity, load_identity
from meshd.protocol.messages import Ack, Goodbye, Heartbeat, Message, Probe
from meshd.protocol.transport import Connection
from meshd.state import StateFolder

WAIT_S = 5.0
KEY = ClusterKey(bytes(32))


def listen(host: str, port: int) -> list[socket.socket]:
    listeners = transport.bind(host, port)
    for listener in listeners:
        listener.listen()
    return listeners


@pytest.fixture
def identities(tmp_path: Path) -> Callable[..., Identity]:
    def make(name: str, key: ClusterKey = KEY) -> Identity:
        return load_identity(StateFolder.open(tmp_path / name), key, lambda count: name.encode().ljust(count, b"."))

    return make


@asynccontextmanager
async def pair(alice: Identity, bob: Identity, limits: FrameLimits | None = None) -> AsyncIterator[tuple[Connection, Connection]]:
    """Connect Alice to Bob. Yields: the connection that Alice dialled and the one that Bob accepted."""
    (listener,) = listen("127.0.0.1", 0)
    loop = asyncio.get_running_loop()

    async def accepted() -> Connection:
        raw, _ = await loop.sock_accept(listener)
        return await transport.accept(raw, bob.server, limits=limits or FrameLimits(), now=time.monotonic, handshake_s=1.0)

    try:
        dialled = transport.dial(
            ("127.0.0.1", listener.getsockname()[1]),
            alice.client,
            limits=limits or FrameLimits(),
            now=time.monotonic,
            connect_s=1.0,
            handshake_s=1.0,
        )
        ends = await asyncio.gather(dialled, accepted(), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end
        here, there = ends
        assert isinstance(here, Connection)
        assert isinstance(there, Connection)
        yield here, there
        for connection in (here, there):
            connection.abort("the test is over")
        async with asyncio.timeout(WAIT_S):
            await here.closed()
            await there.closed()
    finally:
        listener.close()


class Receiver:
    """Collects the messages of a connection and the reason of its end."""

    def __init__(self, connection: Connection) -> None:
        self.messages: asyncio.Queue[tuple[Message, memoryview]] = asyncio.Queue()
        self.ends: asyncio.Queue[str] = asyncio.Queue()
        connection.attach(self.on_message, lambda connection, reason: self.ends.put_nowait(reason))

    def on_message(self, connection: Connection, message: Message, frame: Frame) -> None:
        self.messages.put_nowait((message, frame.payload))

    async def message(self) -> tuple[Message, memoryview]:
        async with asyncio.timeout(WAIT_S):
            return await self.messages.get()

    async def end(self) -> str:
        async with asyncio.timeout(WAIT_S):
            return await self.ends.get()


@pytest.mark.parametrize(
    ("after_idle", "control", "expected"),
    [("1\n", "cubic\n", True), ("0\n", "cubic\n", False), ("1\n", "bbr\n", False), ("", "", True)],
)
def test_slow_start_after_a_pause_is_known_from_the_system(
    monkeypatch: pytest.MonkeyPatch, after_idle: str, control: str, expected: bool
) -> None:
    def read(path: Path) -> str:
        if not control:
            raise FileNotFoundError(path)
        return after_idle if path.name == "tcp_slow_start_after_idle" else control

    monkeypatch.setattr(Path, "read_text", read)
    assert transport.has_slow_start() is expected


async def test_both_ends_know_each_other_by_certificate(identities: Callable[..., Identity]) -> None:
    alice, bob = identities("alice"), identities("bob")
    async with pair(alice, bob) as (here, there):
        assert (here.peer, there.peer) == (bob.peer, alice.peer)
        here.send(Goodbye(reason="hello"))
        async with asyncio.timeout(WAIT_S):
            assert await there.first() == Goodbye(reason="hello")


async def test_another_clusters_certificate_is_refused(identities: Callable[..., Identity]) -> None:
    with pytest.raises(PeerRefused, match="not of this cluster"):
        async with pair(identities("alice"), identities("bob", ClusterKey(b"x" * 32))):
            pass


async def test_a_dial_to_an_address_that_does_not_answer_fails() -> None:
    (listener,) = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    for host, reason in (("127.0.0.1", "can't be reached"), ("no host " * 40, "not known")):
        with pytest.raises(PeerLost, match=reason):
            await transport.dial(
                (host, port),
                None,
                limits=FrameLimits(),
                now=time.monotonic,
                connect_s=0.5,
                handshake_s=0.5,  # type: ignore[arg-type]
            )


async def test_messages_to_a_slow_reader_are_bounded_and_arrive(identities: Callable[..., Identity]) -> None:
    async with pair(identities("alice"), identities("bob")) as (here, there):
        receiver = Receiver(there)
        there._transport.pause_reading()
        payload = bytes(4 * MIB)
        sent = 0
        while here.queued_bytes + len(payload) < transport.QUEUE_BYTES:
            here.send(Probe(request=sent), payload)
            sent += 1
        with pytest.raises(Overloaded):
            here.send(Probe(request=sent), bytes(16 * MIB))
        there._transport.resume_reading()
        for request in range(sent):
            message, data = await receiver.message()
            assert (message, len(data)) == (Probe(request=request), len(payload))
        assert here.queued_bytes == 0


async def test_messages_larger_than_the_other_side_accepts_are_not_sent(identities: Callable[..., Identity]) -> None:
    async with pair(identities("alice"), identities("bob"), FrameLimits(4096, 1000)) as (here, there):
        here.accepts = FrameLimits(4096, 1000)
        with pytest.raises(InvalidRequest):
            here.send(Goodbye(reason="x" * 5000))
        with pytest.raises(InvalidRequest):
            here.send(Probe(request=1), bytes(1001))
        receiver = Receiver(there)
        here.accepts = FrameLimits()
        here.send(Probe(request=1), bytes(1001))
        assert "1000 are allowed" in await receiver.end()


async def test_a_violation_ends_the_connection_with_one_reason(identities: Callable[..., Identity]) -> None:
    async with pair(identities("alice"), identities("bob")) as (here, there):
        receiver, sender = Receiver(there), Receiver(here)
        here._transport.write(frame_head(b"\xc1", 0))
        assert "msgpack" in await receiver.end()
        farewell, _ = await sender.message()
        assert getattr(farewell, "code", "") == "protocol_violation"
        await sender.end()
        assert receiver.ends.empty()
        with pytest.raises(PeerLost):
            there.send(Ack(session="5e" * 16, epoch=1, stage=1, next_seq=0, credit=1))
        with pytest.raises(PeerLost):
            there.attach(receiver.on_message, lambda connection, reason: None)


async def test_the_end_of_a_stream_within_a_frame_is_reported(identities: Callable[..., Identity]) -> None:
    async with pair(identities("alice"), identities("bob")) as (here, there):
        receiver = Receiver(there)
        here._transport.write(frame_head(b"123456", 10)[:-2])
        here.close("half a frame is enough")
        assert "within a frame" in await receiver.end()


async def test_a_second_message_before_attach_is_a_violation(identities: Callable[..., Identity]) -> None:
    async with pair(identities("alice"), identities("bob")) as (here, there):
        for sequence in range(2):
            here.send(Heartbeat(sequence=sequence, sent_ns=0))
        async with asyncio.timeout(WAIT_S):
            await there.closed()
        assert "before HELLO was answered" in there.reason


async def test_waiting_for_the_first_message_raises_the_violation(identities: Callable[..., Identity]) -> None:
    async with pair(identities("alice"), identities("bob")) as (here, there):
        here._transport.write(frame_head(b"\xc1", 0))
        with pytest.raises(ProtocolViolation):
            await there.first()


async def test_a_farewell_arrives_before_the_end(identities: Callable[..., Identity]) -> None:
    async with pair(identities("alice"), identities("bob")) as (here, there):
        receiver = Receiver(there)
        here.close("done", Goodbye(reason="bye"))
        assert (await receiver.message())[0] == Goodbye(reason="bye")
        assert await receiver.end() == "the other side closed the connection"


async def test_port_0_chooses_the_same_port_on_every_address() -> None:
    listeners = listen("localhost", 0)
    assert len({listener.getsockname()[1] for listener in listeners}) == 1
    for listener in listeners:
        listener.close()


async def test_a_farewell_follows_the_frame_that_is_being_written_and_queued_frames_are_dropped(
    identities: Callable[..., Identity],
) -> None:
    async with pair(identities("alice"), identities("bob")) as (here, there):
        received = Receiver(there)
        here.attach(lambda connection, message, frame: None, lambda connection, reason: None)
        for number in (1, 2):
            here.send(Probe(request=number), bytes(8 * MIB))
        here.send(Heartbeat(sequence=1, sent_ns=1))
        here.close("this peer stops", Goodbye(reason="this peer stops"))
        message, payload = await received.message()
        assert (message, len(payload)) == (Probe(request=1), 8 * MIB)
        assert (await received.message())[0] == Goodbye(reason="this peer stops")
        assert await received.end() == "the other side closed the connection"
        assert received.messages.empty()


async def test_a_connection_whose_other_side_does_not_read_is_closed_all_the_same(identities: Callable[..., Identity]) -> None:
    async with pair(identities("alice"), identities("bob")) as (here, there):
        there._transport.pause_reading()
        here.send(Probe(request=1), bytes(15 * MIB))
        here.close("this peer stops", Goodbye(reason="this peer stops"))
        async with asyncio.timeout(WAIT_S):
            await here.closed()
        assert here.queued_bytes == 0
