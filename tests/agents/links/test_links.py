"""Links between real peers on loopback: they come up, carry messages, break and come up again."""

import asyncio
import gc
import socket
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

from in_process.cables import Cable
from in_process.frames import one_step
from in_process.peers import QUICK, WAIT_S, Peer, Peers, until
from meshd.agents.links.link_table import LEFT
from meshd.errors import InvalidRequest, NotReady, Overloaded, PeerLost, RemoteFailure
from meshd.protocol.framing import MIB
from meshd.protocol.identity import ClusterKey
from meshd.protocol.messages import Ack, Lane, Message, Place, Placed, Probe, StepKind, Steps, Unplace
from meshd.types import LayerRange, PeerId


async def linked(*all_peers: Peer) -> None:
    await until(lambda: all(len(peer.links.peers()) == len(all_peers) - 1 for peer in all_peers))


def place(request: int, tokens: int = 64) -> Place:
    return Place(request=request, model="fe" * 16, ref="file:x", layers=LayerRange(0, 2), kv_tokens=tokens, deadline_ms=1000)


def ack() -> Ack:
    return Ack(session="5e" * 16, epoch=1, stage=1, next_seq=0, credit=1)


def fill_lane(source: Peer, target: Peer) -> int:
    """Send prefill steps until the bulk lane is full. Returns: how many were sent."""
    sent = 0
    with suppress(Overloaded):
        while sent < 100:
            source.links.send(target.id, one_step(sent, 8 * MIB, StepKind.PREFILL), bytes(8 * MIB))
            sent += 1
    assert sent < 100
    return sent


async def test_when_one_peer_dials_both_have_the_link(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    a.dial(b)
    assert (await a.next_up(), await b.next_up()) == (b.id, a.id)
    assert (a.story, b.story) == (["up b"], ["up a"])
    (row,) = a.links.rows()
    assert (row["peer"], row["name"], row["dialled"], row["features"]) == (b.id, "b", True, ["events", "f32", "mqtt"])
    assert a.links.addresses(b.id) == [f"127.0.0.1:{b.port}"]
    assert b.links.addresses(a.id) == [f"127.0.0.1:{a.port}"]
    await until(lambda: a.links.rows()[0]["rtt_min_ms"] is not None)


async def test_five_peers_that_all_dial_all_have_one_link_each_and_lose_none(peers: Peers) -> None:
    five = [peers.start(f"p{number}") for number in range(5)]
    for peer in five:
        for other in five:
            peer.dial(other)
    await linked(*five)
    for peer in five:
        assert len(peer.links.rows()) == 4
        assert not any(line.startswith("down") for line in peer.story), peer.story
        assert not any(outcome.refused for outcome in peer.outcomes)


async def test_a_peer_at_two_addresses_has_one_link_and_both_addresses(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b", host="0.0.0.0")
    a.dial(b, "127.0.0.1")
    a.dial(b, "127.0.0.2")
    await until(lambda: len(a.links.addresses(b.id)) == 2)
    assert a.links.peers() == [b.id]
    assert a.story == ["up b"]


async def test_messages_arrive_in_order_with_their_payloads(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    got: list[tuple[int, bytes]] = []
    for peer in (a, b):
        peer.links.register(Steps, lambda sender, message, payload: got.append((message.steps[0].seq, bytes(payload))))
    a.dial(b)
    await a.next_up()
    sizes = [0, 4, 8192, 65536, 40_000, 8]
    for target in (b.id, a.id):
        got.clear()
        for step, size in enumerate(sizes):
            a.links.send(target, one_step(step, size), bytes([step]) * size)
        await until(lambda: len(got) == len(sizes))
        assert got == [(step, bytes([step]) * size) for step, size in enumerate(sizes)]


async def test_a_short_prefill_step_never_overtakes_a_long_one(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    got: list[int] = []
    b.links.register(Steps, lambda sender, message, payload: got.append(message.steps[0].seq))
    a.dial(b)
    await a.next_up()
    for number in range(20):
        for seq, size in ((2 * number, 128 * 576 * 4), (2 * number + 1, 20 * 576 * 4)):
            a.links.send(b.id, one_step(seq, size, StepKind.PREFILL), bytes(size))
        await until(lambda: len(got) % 2 == 0)
    await until(lambda: len(got) == 40)
    assert got == list(range(40))


async def test_a_sender_is_called_when_a_full_lane_has_room(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    got: list[int] = []
    b.links.register(Steps, lambda sender, message, payload: got.append(message.steps[0].seq))
    a.dial(b)
    await a.next_up()
    payload = bytes(8 * MIB)
    sent, room = fill_lane(a, b), asyncio.Event()
    a.links.when_room(b.id, Lane.BULK, room.set)
    assert not room.is_set()
    async with asyncio.timeout(WAIT_S):
        await room.wait()
    a.links.send(b.id, one_step(sent, len(payload), StepKind.PREFILL), payload)
    await until(lambda: got == list(range(sent + 1)))


async def test_a_sender_that_waits_for_room_is_called_when_the_link_ends(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    a.dial(b)
    await a.next_up()
    fill_lane(a, b)
    called: list[str] = []
    a.links.when_room(b.id, Lane.BULK, lambda: called.append("room"))
    await b.links.close("b stops")
    await until(lambda: called == ["room"])
    a.links.when_room(b.id, Lane.BULK, lambda: called.append("not linked"))
    await until(lambda: called == ["room", "not linked"])


async def test_a_long_message_that_is_still_arriving_counts_as_a_sign_of_life(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    b.links.register(Steps, lambda sender, message, payload: None)
    assert b.links.idle_s(a.id, Lane.BULK) == float("inf")
    a.dial(b)
    await a.next_up()
    await b.next_up()
    await until(lambda: b.links.idle_s(a.id, Lane.BULK) > 0.3)
    a.links.send(b.id, one_step(0, 4 * MIB, StepKind.PREFILL), bytes(4 * MIB))
    await until(lambda: b.links.idle_s(a.id, Lane.BULK) < 0.2)


async def test_large_payloads_arrive_whole_and_do_not_delay_small_ones(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    got: list[str] = []
    payload = bytes(range(256)) * (15 * MIB // 256)
    intact: list[bool] = []

    def on_steps(sender: PeerId, message: Steps, data: memoryview) -> None:
        got.append("large")
        intact.append(data == payload)

    b.links.register(Steps, on_steps)
    b.links.register(Ack, lambda sender, message, data: got.append("small"))
    a.dial(b)
    await a.next_up()
    a.links.send(b.id, one_step(0, len(payload), StepKind.PREFILL), payload)
    a.links.send(b.id, ack())
    await until(lambda: len(got) == 2)
    assert got == ["small", "large"]
    assert intact == [True]


async def test_requests_are_answered_at_once_or_later_or_with_a_payload(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")

    async def on_place(sender: PeerId, message: Place, payload: memoryview) -> tuple[Placed, memoryview]:
        await asyncio.sleep(0)
        return Placed(request=message.request, layers=message.layers, kv_tokens=message.kv_tokens), payload

    b.links.register(Place, on_place)
    a.links.register(Place, lambda sender, message, payload: Placed(request=message.request, layers=message.layers, kv_tokens=7))
    a.dial(b)
    await a.next_up()
    reply, payload = await a.links.request(b.id, place, b"data", timeout_s=WAIT_S)
    assert isinstance(reply, Placed)
    assert (reply.layers, reply.kv_tokens, bytes(payload)) == (LayerRange(0, 2), 64, b"data")
    reply, _ = await b.links.request(a.id, place(b.links.next_request()), timeout_s=WAIT_S)
    assert reply.kv_tokens == 7
    reply, _ = await a.links.request(a.id, place, timeout_s=WAIT_S)
    assert reply.kv_tokens == 7


async def test_an_error_in_a_handler_is_answered_with_its_code(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")

    def busy(sender: PeerId, message: Message, payload: memoryview) -> None:
        raise NotReady("the model is loading", progress=0.5)

    async def broken(sender: PeerId, message: Message, payload: memoryview) -> None:
        raise ZeroDivisionError

    b.links.register(Place, busy)
    b.links.register(Unplace, broken)
    a.dial(b)
    await a.next_up()
    with pytest.raises(RemoteFailure, match="loading") as raised:
        await a.links.request(b.id, place, timeout_s=WAIT_S)
    assert raised.value.remote_code == "model_loading"
    with pytest.raises(RemoteFailure) as raised:
        await a.links.request(b.id, lambda number: Unplace(request=number, model="fe" * 16), timeout_s=WAIT_S)
    assert raised.value.remote_code == "internal_error"
    with pytest.raises(RemoteFailure) as raised:
        await b.links.request(a.id, place, timeout_s=WAIT_S)
    assert raised.value.remote_code == "unknown_message"
    assert a.links.peers() == [b.id]


async def test_a_request_fails_at_its_timeout_or_when_its_peer_stops(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    asked = asyncio.Event()

    async def never(sender: PeerId, message: Place, payload: memoryview) -> None:
        asked.set()
        await asyncio.Event().wait()

    b.links.register(Place, never)
    a.dial(b)
    await a.next_up()
    with pytest.raises(PeerLost, match=r"within 0\.05 s"):
        await a.links.request(b.id, place, timeout_s=0.05)
    asked.clear()
    waiting = asyncio.ensure_future(a.links.request(b.id, place, timeout_s=WAIT_S))
    async with asyncio.timeout(WAIT_S):
        await asked.wait()
    await b.stop()
    with pytest.raises(PeerLost, match=LEFT):
        await waiting
    with pytest.raises(PeerLost):
        a.links.send(b.id, ack())


async def test_a_message_that_is_too_large_is_refused_at_the_sender(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    a.dial(b)
    await a.next_up()
    with pytest.raises(InvalidRequest, match="accepts"):
        a.links.send(b.id, one_step(0, 17 * MIB), bytes(17 * MIB))
    assert a.links.peers() == [b.id]


@pytest.mark.parametrize("message", [ack(), one_step(0, 0)], ids=["acknowledgement", "steps"])
async def test_a_link_is_in_use_while_it_carries_a_session(peers: Peers, message: Message) -> None:
    a, b = peers.start("a"), peers.start("b")
    a.dial(b)
    await a.next_up()
    await asyncio.sleep(0.5)
    assert min(a.links.unused_s(b.id), b.links.unused_s(a.id)) >= 0.5
    a.links.send(b.id, message)
    await until(lambda: max(a.links.unused_s(b.id), b.links.unused_s(a.id)) < 0.5)


async def test_a_goodbye_arrives_at_once_and_closing_takes_less_than_a_second(peers: Peers) -> None:
    a, b, c = peers.start("a"), peers.start("b"), peers.start("c")
    for peer in (b, c):
        a.dial(peer)
    await linked_to(a, b, c)
    began = time.monotonic()
    await a.stop()
    assert time.monotonic() - began < 1.0
    for peer in (b, c):
        lost, reason = await peer.next_down()
        assert lost == a.id
        assert reason.startswith(LEFT)


async def test_a_peer_that_stops_while_it_sends_a_large_frame_has_left(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    a.dial(b)
    await linked(a, b)
    for number in (1, 2):
        b.links.send(a.id, Probe(request=number), bytes(8 * MIB))
    await b.stop()
    assert (await a.next_down())[1].startswith(LEFT)


async def linked_to(hub: Peer, *others: Peer) -> None:
    await until(lambda: len(hub.links.peers()) == len(others) and all(peer.links.peers() == [hub.id] for peer in others))


async def test_a_restarted_peer_replaces_its_old_link(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    b.dial(a)
    await a.next_up()
    again = peers.start("b", incarnation=2)
    again.dial(a)
    await until(lambda: a.story == ["up b", "down: it has restarted", "up b"])
    assert a.links.peers() == [again.id]


async def test_a_peer_of_another_cluster_is_refused_and_listed(peers: Peers) -> None:
    a, stranger = peers.start("a"), peers.start("s", key=ClusterKey(b"x" * 32))
    stranger.dial(a)
    await until(lambda: bool(a.links.refusals()) and bool(stranger.links.refusals()))
    (row,) = a.links.refusals()
    assert row["address"] == "127.0.0.1"
    assert "cluster" in row["reason"]
    assert "not of this cluster" in stranger.links.refusals()[0]["reason"]
    assert a.story == stranger.story == []


async def test_a_link_outlives_the_source_of_its_address(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    a.dial(b, source="mdns")
    await a.next_up()
    a.links.forget("127.0.0.1", b.port, "mdns")
    assert a.links.peers() == [b.id]
    await until(lambda: a.links.rows()[0]["rtt_ms"] is not None)
    assert a.story == ["up b"]


def _send_many(sender: Peer, receiver: Peer, payload: bytes) -> None:
    for step in range(64):
        sender.links.send(receiver.id, one_step(step, len(payload)), payload)


async def test_a_silent_cut_is_noticed_and_the_link_comes_back(peers: Peers) -> None:
    a, b = peers.start("a", timing=QUICK), peers.start("b", timing=QUICK)
    cable = Cable()
    async with cable.to(b.port) as port:
        a.links.connect("127.0.0.1", port, "static")
        await a.next_up()
        await b.next_up()
        cable.whole.clear()
        for peer in (a, b):
            _, reason = await peer.next_down()
            assert reason.startswith("silent for")
        cable.whole.set()
        assert await a.next_up() == b.id
        assert await b.next_up() == a.id
        await a.stop()
        await b.stop()


async def test_a_slow_reader_makes_the_sender_overloaded_and_its_queue_stays_bounded(peers: Peers) -> None:
    a, b = peers.start("a", timing=QUICK), peers.start("b", timing=QUICK)
    cable = Cable()
    async with cable.to(b.port) as port:
        a.links.connect("127.0.0.1", port, "static")
        await a.next_up()
        payload = bytes(8 * MIB)
        with pytest.raises(Overloaded):
            _send_many(a, b, payload)
        assert a.links.rows()[0]["queued_bytes"] <= 32 * MIB
        await a.stop()
        await b.stop()


def test_links_work_on_uvloop_too(tmp_path: Path) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def scenario() -> None:
        peers = Peers(tmp_path)
        try:
            await test_requests_are_answered_at_once_or_later_or_with_a_payload(peers)
            await test_large_payloads_arrive_whole_and_do_not_delay_small_ones(Peers(tmp_path / "large"))
            await test_a_peer_of_another_cluster_is_refused_and_listed(Peers(tmp_path / "stranger"))
            await test_a_silent_cut_is_noticed_and_the_link_comes_back(Peers(tmp_path / "cut"))
        finally:
            await peers.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


@pytest.mark.parametrize("turns", range(4))
async def test_a_peer_that_ends_while_it_accepts_a_connection_leaves_none_open(peers: Peers, turns: int) -> None:
    """The moment counts: one of the first turns of the event loop after the connection has arrived."""
    a = peers.start("a")
    await asyncio.sleep(0.05)
    with socket.socket() as dialling:
        dialling.setblocking(False)
        dialling.connect_ex(("127.0.0.1", a.port))
        for _ in range(turns):
            await asyncio.sleep(0)
        await a.kill()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        await asyncio.sleep(0.02)
        gc.collect()
    assert [str(warning.message) for warning in warned] == []
