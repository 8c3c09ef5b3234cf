"""Copies on a peer that has not loaded the layers: it needs the model's spec and memory, not the weights."""

import pytest

from meshd.agents.placement.resident import LoadState, ResidentLayers
from meshd.errors import RemoteFailure
from meshd.kernels.kv.share import KvShare
from meshd.protocol.messages import Mirrored
from meshd.types import LayerRange
from stage_mesh.driver import Driver
from stage_mesh.mesh import MODEL, StageMesh, StagePeer, card_of
from stage_mesh.sessions import ANSWER, driver, expected, refused, until_empty

LAYERS = LayerRange(2, 4)


async def mirrored_on_a_peer_without_the_layers(mesh: StageMesh) -> tuple[StagePeer, StagePeer, StagePeer, Driver]:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c", "0-1")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    await session.mirror(1, c, eager=True)
    await session.until(lambda: any(mirrored.held == 59 for mirrored in a.received(Mirrored)))
    return a, b, c, session


async def test_a_peer_without_the_layers_keeps_a_copy_and_takes_over_once_it_has_loaded_them(mesh: StageMesh) -> None:
    a, b, c, session = await mirrored_on_a_peer_without_the_layers(mesh)
    assert c.share.leases == []
    (row,) = c.host.rows(lambda model: "tiny")
    assert (row["role"], row["tokens"]) == ("mirror 2-4", 59)
    assert "place them first" in await refused(session, (a, "0-2"), (c, "2-4"), resume=True)
    loaded = ResidentLayers(card_of(mesh.spec), LAYERS, 768, 0, LoadState.ACTIVE, 1.0, weights=mesh.weights)
    loaded.kv = KvShare(c.residents.arena, MODEL, mesh.spec, LAYERS, 768)
    c.residents.entries.append(loaded)
    mesh.isolate(b)
    session.credit = ANSWER
    await session.next_epoch((a, "0-2"), (c, "2-4"))
    assert (session.opened[1].held, session.opened[1].mirrored) == (59, True)
    assert loaded.in_use, "the layers stay while a stage computes on the copy"
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(a, c)
    mesh.clock.ahead += 61
    await until_empty(mesh)
    assert loaded.sessions == 0


async def test_a_copy_without_layers_takes_only_memory_that_nothing_else_reserves(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b", "0-1", spare=128 * 2 * 512 - 1)
    session = driver(mesh, a)
    session.plan, session.epoch = session.plan_of((a, "2-4")), 1
    with pytest.raises(RemoteFailure, match="no KV for 128 tokens of a copy"):
        await session.expect_copy(0, b, tokens=128)
    await session.expect_copy(0, b, tokens=96)
    assert b.residents.arena.reserved_bytes == 96 * 2 * 512
    await session.close(b)
    await until_empty(mesh)
