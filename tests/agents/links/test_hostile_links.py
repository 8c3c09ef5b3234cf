"""A peer of the cluster that breaks the protocol: its link closes with one reason, and other links stay."""

import asyncio
import struct
import time
from typing import Any

import msgpack
import msgspec
import pytest

from in_process.peers import WAIT_S, Peer, Peers, until
from meshd.protocol import transport
from meshd.protocol.codec import encode
from meshd.protocol.framing import FrameLimits, frame_head
from meshd.protocol.messages import PROTOCOL_VERSION, Ack, Error, Goodbye, Heartbeat, Hello, Lane, Message


def hello_of(peer: Peer, /, **changes: Any) -> Hello:
    greeting = Hello(
        version=PROTOCOL_VERSION,
        features=("f32",),
        software="other/1",
        peer=peer.id,
        name="other",
        incarnation=5,
        link=77,
        lane=Lane.CONTROL,
        max_header=65536,
        max_payload=1 << 24,
        port=1,
    )
    return msgspec.structs.replace(greeting, **changes)


async def connect(peer: Peer, target: Peer) -> transport.Connection:
    """Open a connection with the peer's certificate, without sending a message."""
    address = ("127.0.0.1", target.port)
    return await transport.dial(
        address, peer.identity.client, limits=FrameLimits(), now=time.monotonic, connect_s=1.0, handshake_s=1.0
    )


async def greet(peer: Peer, target: Peer, /, **changes: Any) -> tuple[transport.Connection, Message]:
    connection = await connect(peer, target)
    connection.send(hello_of(peer, **changes))
    async with asyncio.timeout(WAIT_S):
        return connection, await connection.first()


async def whole_link(peer: Peer, target: Peer) -> list[transport.Connection]:
    lanes = [(await greet(peer, target, lane=lane))[0] for lane in Lane]
    lanes[0].send(Heartbeat(sequence=1, sent_ns=1))
    await target.next_up()
    return lanes


JUNK = {
    "an endless header": struct.pack(">II", 2**32 - 1, 0),
    "an endless payload": struct.pack(">II", 4, 2**32 - 1) + b"abcd",
    "no header": struct.pack(">II", 0, 0),
    "no msgpack": frame_head(b"\xc1\xc1", 0) + b"",
    "no message": frame_head(msgpack.packb([3, {"sequence": "one"}]), 0),
    "deep nesting": frame_head(b"\x91" * 4000 + b"\xc0", 0),
    "HELLO again": None,
}


@pytest.mark.parametrize("junk", JUNK, ids=str)
async def test_junk_closes_its_own_link_with_a_reason_and_no_other_link(
    peers: Peers, caplog: pytest.LogCaptureFixture, junk: str
) -> None:
    target, friend, hostile = peers.start("t"), peers.start("f"), peers.start("h")
    friend.dial(target)
    assert await target.next_up() == friend.id
    control, bulk = await whole_link(hostile, target)
    raw = JUNK[junk] or frame_head(encode(hello_of(hostile)), 0)
    bulk._transport.write(raw)
    async with asyncio.timeout(WAIT_S):
        lost, reason = await target.downs.get()
        await control.closed()
        await bulk.closed()
    assert lost == hostile.id
    assert reason
    assert [record.name for record in caplog.records if record.levelname == "WARNING"] == ["meshd.links"]
    assert target.links.peers() == [friend.id]
    target.links.send(friend.id, Ack(session="5e" * 16, epoch=1, stage=1, next_seq=0, credit=1))


async def test_an_unknown_message_is_answered_with_an_error_and_the_link_stays(peers: Peers) -> None:
    target, other = peers.start("t"), peers.start("o")
    answers: asyncio.Queue[Message] = asyncio.Queue()
    control, _ = await whole_link(other, target)
    control.attach(lambda connection, message, frame: answers.put_nowait(message), lambda connection, reason: None)
    control._transport.write(frame_head(msgpack.packb([9999, {"request": 12, "new": True}]), 3) + b"abc")
    async with asyncio.timeout(WAIT_S):
        while not isinstance(answer := await answers.get(), Error):
            pass
    assert (answer.code, answer.request, answer.number_of) == ("unknown_message", 12, 9999)
    assert target.links.peers() == [other.id]
    control.abort("done")


async def test_another_major_version_is_refused_answered_and_listed(peers: Peers) -> None:
    target, other = peers.start("t"), peers.start("o")
    connection, answer = await greet(other, target, version=(PROTOCOL_VERSION[0] + 1, 0), software="meshd/9")
    assert isinstance(answer, Hello)
    assert answer.version == PROTOCOL_VERSION
    await connection.closed()
    (row,) = target.links.refusals()
    assert (row["address"], row["peer"]) == ("127.0.0.1:1", other.id)
    assert f"protocol {PROTOCOL_VERSION[0] + 1}.0 (meshd/9)" in row["reason"]
    (outcome,) = target.outcomes
    assert (outcome.peer, outcome.name, outcome.refused) == (other.id, "other", True)
    assert target.story == []


@pytest.mark.parametrize("changes", [{"peer": "x" * 52}, {"lane": 7}, {"max_header": 1}, {"max_payload": 1 << 30}], ids=repr)
async def test_a_false_hello_is_refused(peers: Peers, changes: dict[str, Any]) -> None:
    target, other = peers.start("t"), peers.start("o")
    connection, answer = await greet(other, target, **changes)
    assert isinstance(answer, Goodbye)
    await connection.closed()
    assert target.links.refusals()[0]["peer"] == other.id
    assert target.story == []


async def test_a_bulk_lane_without_its_control_lane_is_refused(peers: Peers) -> None:
    target, other = peers.start("t"), peers.start("o")
    _, answer = await greet(other, target, lane=Lane.BULK)
    assert isinstance(answer, Goodbye)


async def test_a_message_before_both_lanes_are_up_ends_the_link(peers: Peers) -> None:
    target, other = peers.start("t"), peers.start("o")
    control, answer = await greet(other, target)
    assert isinstance(answer, Hello)
    control.send(Heartbeat(sequence=1, sent_ns=1))
    async with asyncio.timeout(WAIT_S):
        await control.closed()
    assert target.story == []


async def test_both_lanes_end_when_one_breaks(peers: Peers) -> None:
    target, other = peers.start("t"), peers.start("o")
    control, bulk = await whole_link(other, target)
    bulk.abort("broken")
    async with asyncio.timeout(WAIT_S):
        await target.downs.get()
        await control.closed()


async def test_a_connection_beyond_the_half_open_limit_takes_the_place_of_the_oldest(peers: Peers) -> None:
    target, other = peers.start("t"), peers.start("o")
    silent = [await connect(other, target) for _ in range(target.links._opener._half_open.most_per_host + 3)]
    await until(lambda: [bool(connection.reason) for connection in silent[:4]] == [True, True, True, False])
    assert not any(connection.reason for connection in silent[3:])
    other.dial(target)
    assert await target.next_up() == other.id
    for connection in silent:
        connection.abort("done")
    await until(lambda: len(target.links._opener._half_open) == 0)
