"""Links between real peers that break while both live: nothing is lost or repeated, and neither peer notices a loss."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext

import pytest

from in_process.cables import Cable
from in_process.frames import one_step
from in_process.peers import QUICK, SLOW, WAIT_S, Peer, Peers, until
from meshd.errors import PeerLost
from meshd.protocol.messages import Heartbeat, Lane, Message, Place, Placed, StepKind, Steps
from meshd.protocol.transport import Address
from meshd.types import LayerRange, PeerId

GIVEN_UP_S = SLOW.restore_s + 0.3


class Inbox:
    """Records the steps that a peer receives, by kind."""

    def __init__(self, peer: Peer) -> None:
        self.got: dict[StepKind, list[int]] = {kind: [] for kind in StepKind}
        peer.links.register(Steps, self._on_steps)

    def _on_steps(self, sender: PeerId, message: Steps, payload: memoryview) -> None:
        (step,) = message.steps
        assert payload == bytes([step.seq % 256]) * step.size
        self.got[step.kind].append(step.seq)


def send(source: Peer, target: Peer, seq: int, size: int, kind: StepKind) -> None:
    source.links.send(target.id, one_step(seq, size, kind), bytes([seq % 256]) * size)


async def linked(a: Peer, port: int, b: Peer) -> None:
    a.links.connect("127.0.0.1", port, "static")
    await a.next_up()
    await until(lambda: b.links.peers() == [a.id])


@asynccontextmanager
async def unreachable(peer: Peer) -> AsyncIterator[None]:
    """Have a peer announce an address that takes connections and never answers, so that it dials and nobody dials it."""
    dead = Cable()
    dead.whole.clear()
    async with dead.to(peer.port) as port:
        peer.links._opener.listens_on(port)
        yield


@pytest.mark.parametrize("both_dial", [False, True])
async def test_a_link_that_snaps_again_and_again_loses_and_repeats_nothing(peers: Peers, both_dial: bool) -> None:
    a, b = peers.start("a"), peers.start("b")
    cable, inboxes = Cable(), (Inbox(a), Inbox(b))
    async with cable.to(b.port) as port, nullcontext() if both_dial else unreachable(a):
        await linked(a, port, b)
        for seq in range(1500):
            for source, target in ((a, b), (b, a)):
                send(source, target, seq, 2304, StepKind.DECODE)
                if seq % 10 == 0:
                    send(source, target, seq, 200_000, StepKind.PREFILL)
            if seq % 250 == 100:
                cable.snap()  # if both dial, b may have dialled a's own address the last time, and the link is not in the cable
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.001)
        for inbox in inboxes:
            await until(lambda inbox=inbox: len(inbox.got[StepKind.DECODE]) == 1500 and len(inbox.got[StepKind.PREFILL]) == 150)
            assert inbox.got[StepKind.DECODE] == list(range(1500))
            assert inbox.got[StepKind.PREFILL] == list(range(0, 1500, 10))
        assert a.links.restored_total >= 1 if both_dial else a.links.restored_total == 6
        assert (a.story, b.story) == (["up b"], ["up a"])
        for peer, other in ((a, b), (b, a)):
            sent = peer.links._table.known(other.id).history.sent
            await until(lambda sent=sent: sum(len(lane.kept) for lane in sent) == 0)


async def test_a_request_outlives_the_link_that_it_was_sent_on(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    asked, answer, calls = asyncio.Event(), asyncio.Event(), 0

    async def on_place(sender: PeerId, message: Place, payload: memoryview) -> tuple[Placed, memoryview]:
        nonlocal calls
        calls += 1
        asked.set()
        await answer.wait()
        return Placed(request=message.request, layers=message.layers, kv_tokens=7), payload

    def place(request: int) -> Place:
        return Place(request=request, model="fe" * 16, ref="file:x", layers=LayerRange(0, 2), kv_tokens=64, deadline_ms=1000)

    b.links.register(Place, on_place)
    cable = Cable()
    async with cable.to(b.port) as port:
        await linked(a, port, b)
        waiting = asyncio.ensure_future(a.links.request(b.id, place, b"data", timeout_s=WAIT_S))
        await asked.wait()
        cable.snap()
        answer.set()
        await until(lambda: a.links.restored_total == 1)
        _, payload = await waiting
        assert (bytes(payload), calls) == (b"data", 1)


async def test_messages_wait_while_the_link_is_broken_and_senders_of_too_many_are_slowed(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    inbox, cable, room = Inbox(b), Cable(), asyncio.Event()
    async with cable.to(b.port) as port:
        await linked(a, port, b)
        cable.snap()
        await until(lambda: a.links._table.broken(b.id) is not None)
        a.links.when_room(b.id, Lane.BULK, room.set)
        for seq in range(5):
            send(a, b, seq, 1000, StepKind.DECODE)
        assert a.links.peers() == [b.id]
        assert not room.is_set()
        await until(lambda: inbox.got[StepKind.DECODE] == list(range(5)))
        await until(room.is_set)


async def test_a_peer_whose_process_has_ended_is_lost_at_once(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    await linked(a, b.port, b)
    began = time.monotonic()
    await b.kill()
    lost, reason = await a.next_down()
    assert time.monotonic() - began < 0.3
    assert lost == b.id
    assert "nothing listens there any more" in reason
    assert a.links.peers() == []


async def test_the_side_that_was_dialled_notices_the_end_of_a_process_as_well(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    await linked(a, b.port, b)
    began = time.monotonic()
    await a.kill()
    assert "nothing listens there any more" in (await b.next_down())[1]
    assert time.monotonic() - began < 0.3


async def test_a_peer_that_cannot_be_reached_again_is_lost_after_a_second(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    cable = Cable()
    async with cable.to(b.port) as port, unreachable(a):
        await linked(a, port, b)
        cable.whole.clear()
        began = time.monotonic()
        cable.snap()
        assert "reset" in (await a.next_down())[1]
        assert 0.8 * SLOW.restore_s < time.monotonic() - began < GIVEN_UP_S
        cable.whole.set()
        assert await a.next_up() == b.id


async def test_a_dial_that_fails_unexpectedly_ends_no_other_link(peers: Peers, caplog: pytest.LogCaptureFixture) -> None:
    a, b, c = peers.start("a"), peers.start("b"), peers.start("c")
    cable, real, fails = Cable(), a.links._restorer._dial, 3

    async def dial(address: Address) -> PeerId:
        nonlocal fails
        fails -= 1
        if fails >= 0:
            raise OSError("no descriptors")
        return await real(address)

    a.links._restorer._dial = dial
    async with cable.to(b.port) as port, unreachable(a):
        await linked(a, c.port, c)
        await linked(a, port, b)
        cable.snap()
        await until(lambda: a.links.restored_total == 1)
        assert sorted(a.links.peers()) == sorted([b.id, c.id])
        assert caplog.text.count("no descriptors") >= 3


async def test_a_restarted_process_is_no_restored_link(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    cable = Cable()
    async with cable.to(b.port) as port:
        await linked(a, port, b)
        again = peers.start("b", incarnation=2)
        await b.kill()
        again.dial(a)
        await until(lambda: a.story[:2] == ["up b", "down: it has restarted"] and a.story[-1] == "up b")
        assert again.story == ["up a"]
        assert a.links.restored_total == 0


async def test_a_break_that_only_the_dialler_notices_is_mended_at_once(peers: Peers) -> None:
    await _half_open(peers, dialler=True, acceptor=False)


async def test_a_break_that_only_the_other_side_notices_is_mended_at_once(peers: Peers) -> None:
    await _half_open(peers, dialler=False, acceptor=True)


async def _half_open(peers: Peers, *, dialler: bool, acceptor: bool) -> None:
    a, b = peers.start("a"), peers.start("b")
    inboxes, cable = (Inbox(a), Inbox(b)), Cable()
    async with cable.to(b.port) as port:
        await linked(a, port, b)
        began = time.monotonic()
        cable.snap(dialler=dialler, acceptor=acceptor)
        for seq in range(20):
            send(a, b, seq, 100, StepKind.DECODE)
            send(b, a, seq, 100, StepKind.DECODE)
        for inbox in inboxes:
            await until(lambda inbox=inbox: inbox.got[StepKind.DECODE] == list(range(20)))
        assert time.monotonic() - began < 0.5  # well before the next heartbeat would show it
        assert (a.story, b.story) == (["up b"], ["up a"])


async def test_silence_is_no_break(peers: Peers) -> None:
    a, b = peers.start("a", timing=QUICK), peers.start("b", timing=QUICK)
    cable = Cable()
    async with cable.to(b.port) as port:
        await linked(a, port, b)
        cable.whole.clear()
        assert (await a.next_down())[1].startswith("silent for")
        assert a.links._table.broken(b.id) is None
        cable.whole.set()


async def test_a_peer_that_breaks_the_protocol_gets_no_second_try_with_the_same_bytes(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    inbox = Inbox(b)
    await linked(a, b.port, b)
    send(a, b, 0, 100, StepKind.DECODE)
    await until(lambda: bool(inbox.got[StepKind.DECODE]))
    forged: Message = Heartbeat(sequence=1, sent_ns=1, received=(10**9, 0))
    a.links.send(b.id, forged)
    assert "1000000000 messages were received" in (await b.next_down())[1]
    await a.next_down()
    await until(lambda: a.links.peers() == [b.id])
    assert a.links.restored_total == 0
    assert inbox.got[StepKind.DECODE] == [0]


async def test_a_link_that_is_cut_on_purpose_is_not_restored(peers: Peers) -> None:
    a, b = peers.start("a"), peers.start("b")
    cable = Cable()
    async with cable.to(b.port) as port:
        await linked(a, port, b)
        cable.whole.clear()
        cable.snap()
        await until(lambda: a.links._table.broken(b.id) is not None)
        a.links.cut(b.id, "it was excluded")
        assert await a.next_down() == (b.id, "it was excluded")
        try:
            send(a, b, 0, 1, StepKind.DECODE)
        except PeerLost:
            return
        raise AssertionError("a peer that was cut off is still sent to")
