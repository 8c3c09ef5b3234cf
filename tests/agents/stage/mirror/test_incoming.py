"""Copies that a target stores: how long they stay, what is copied again, and which chunks it rejects."""

import asyncio

import msgspec
import numpy as np
import pytest

from meshd.errors import RemoteFailure
from meshd.protocol.messages import Failed, KvBlocks, KvOffer, KvStored, Mirrored
from meshd.types import LayerRange
from stage_mesh.driver import SESSION
from stage_mesh.mesh import StageMesh, StagePeer
from stage_mesh.sessions import ANSWER, driver, expected, until_empty
from tiny.kv import make_lease

NOT_FINITE, LONGER = -1, 1


async def test_a_copy_outlives_one_epoch_without_a_new_offer(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    await session.mirror(1, a, eager=True)
    await session.until(lambda: any(mirrored.held == 59 for mirrored in a.received(Mirrored)))
    session.credit = 30
    await session.next_epoch((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(30)
    b.links.sent.clear()
    await session.mirror(1, a, eager=True)
    await session.until(lambda: any(mirrored.epoch == 2 and mirrored.held == 69 for mirrored in a.received(Mirrored)))
    assert [message.position for _, message in b.links.sent if isinstance(message, KvBlocks)] == [59]
    for _ in range(2):
        assert [row["role"] for row in a.host.rows(lambda model: "tiny")] == ["stage 0", "mirror 2-4"]
        await session.next_epoch((a, "0-2"), (b, "2-4"))
    await session.until(lambda: [row["role"] for row in a.host.rows(lambda model: "tiny")] == ["stage 0"])
    session.grant(ANSWER)
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)


async def test_kv_beyond_the_start_of_the_epoch_is_copied_again(mesh: StageMesh) -> None:
    """Stages may have computed more tokens than the coordinator knows. Computed again, these may differ on some backends."""
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 30
    await session.begin((b, "0-4"))
    await session.mirror(0, c, eager=True)
    await session.until(lambda: b.host._mirrors_out._all() and b.host._mirrors_out._all()[0].machine.held == 69)
    session.tokens = session.tokens[:10]
    session.credit = 12
    await session.next_epoch((b, "0-4"))
    await session.wait_tokens(12)
    b.links.sent.clear()
    await session.mirror(0, c, eager=True)
    await session.until(lambda: c.host.rows(lambda model: "tiny")[0]["tokens"] == 51)
    (offer,) = [message for _, message in b.links.sent if isinstance(message, KvOffer)]
    assert offer.valid == 49
    assert [message.position for _, message in b.links.sent if isinstance(message, KvBlocks)] == [49]


@pytest.mark.parametrize(
    ("changes", "payload"), [({}, LONGER), ({"tokens": 0}, 0), ({"tokens": 129}, 128), ({}, NOT_FINITE), ({"tokens": 2}, 1)]
)
async def test_an_invalid_chunk_ends_the_copy(mesh: StageMesh, changes: dict[str, int], payload: int) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.plan, session.epoch = session.plan_of((a, "0-4")), 1
    await session.expect_copy(0, b, tokens=128)
    offer = KvOffer(request=1, session=SESSION, epoch=1, layers=LayerRange(0, 4))
    reply, _ = await a.links.request(b.id, offer, timeout_s=1)
    assert reply.held == 0
    answers: list[KvStored] = []
    a.links.dispatcher._handlers[KvStored] = lambda sender, message, rest: answers.append(message)
    data = forged_kv(b, abs(payload), np.nan if payload == NOT_FINITE else 1.0) if payload else b""
    data += bytes(100) if not changes and payload == LONGER else b""
    blocks = KvBlocks(session=SESSION, epoch=1, layers=LayerRange(0, 4), position=0, tokens=1)
    a.links.send(b.id, msgspec.structs.replace(blocks, **changes), data)
    a.links.send(b.id, blocks, forged_kv(b, 1))
    await asyncio.sleep(0.02)
    assert [bool(message.error) for message in answers] == [True, True]
    await until_empty(mesh)


def forged_kv(peer: StagePeer, tokens: int, value: float = 1.0) -> bytes:
    """Return the payload of a chunk with the first `tokens` positions of all layers."""
    spec, layers = peer.resident.card.spec, peer.resident.layers
    lease = make_lease(spec, layers, tokens)
    for layer in layers:
        for rows in lease.rows(layer):
            rows[:tokens] = value
    return lease.copy_out(layers, 0, tokens)


async def offered(sender: StagePeer, target: StagePeer, epoch: int, layers: LayerRange) -> str:
    """Offer a copy that nobody asked for. Returns: the error message."""
    offer = KvOffer(request=sender.links.next_request(), session=SESSION, epoch=epoch, layers=layers)
    with pytest.raises(RemoteFailure) as caught:
        await sender.links.request(target.id, offer, timeout_s=1)
    return str(caught.value)


async def test_a_copy_from_a_peer_that_the_coordinator_did_not_name_is_refused(mesh: StageMesh) -> None:
    """A deputy knows the session, its epoch and its coordinator. That is not enough to give KV to the peer that will take over."""
    a, b, c, d = (mesh.start(name) for name in "abcd")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((b, "0-4"))
    await session.wait_tokens(20)
    assert "did not ask" in await offered(d, c, 1, LayerRange(0, 4)), "no copy is expected at all"
    await session.mirror(0, c, eager=True)
    await session.until(lambda: any(mirrored.held == 59 for mirrored in a.received(Mirrored)))
    for epoch in (1, 2, 2**30):
        assert "did not ask" in await offered(d, c, epoch, LayerRange(0, 4))
        blocks = KvBlocks(session=SESSION, epoch=epoch, layers=LayerRange(0, 4), position=0, tokens=4)
        d.links.send(c.id, blocks, forged_kv(c, 4))
    await asyncio.sleep(0.02)
    mesh.isolate(b)
    session.credit = ANSWER
    await session.next_epoch((c, "0-4"))
    assert session.opened[0].held == 59
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)


async def test_a_forged_copy_does_not_end_a_running_stage(mesh: StageMesh) -> None:
    a, b, d = (mesh.start(name) for name in "abd")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((b, "0-4"))
    await session.wait_tokens(20)
    forger = driver(mesh, d)
    forger.plan, forger.epoch = forger.plan_of((d, "0-4")), 2**30
    with pytest.raises(RemoteFailure, match="coordinator that is alive"):
        await forger.expect_copy(0, b)
    assert "did not ask" in await offered(d, b, 2**30, LayerRange(0, 4))
    assert b.host.sessions == 1
    session.grant(ANSWER)
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    assert not a.received(Failed)
