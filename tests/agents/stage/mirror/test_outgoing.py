"""Copies of a running stage on another peer: mirrors that take over, moves, and copies that fail."""

import pytest

from meshd.errors import RemoteFailure
from meshd.protocol.messages import Close, KvBlocks, Mirror, Mirrored
from stage_mesh.driver import SESSION
from stage_mesh.mesh import StageMesh
from stage_mesh.sessions import ANSWER, driver, expected, leftovers, until_empty


async def test_a_mirror_takes_over_with_the_same_tokens(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a, temperature=0.7, seed=9)
    session.credit = 30
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.mirror(1, c)
    await session.wait_tokens(30)
    await session.until(lambda: any(mirrored.held >= 40 for mirrored in a.received(Mirrored)))
    assert c.host.rows(lambda model: "tiny")[0]["role"] == "mirror 2-4"
    assert c.host.sessions == 0
    mesh.isolate(b)
    session.credit = ANSWER
    await session.next_epoch((a, "0-2"), (c, "2-4"))
    held = session.opened[1].held
    assert session.opened[1].mirrored
    assert 69 - 32 < held < 69, "a mirror lacks less than a block"
    assert [point.start for point in session.resume_points] == [69, held]
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh, temperature=0.7, seed=9)
    await session.close(a, c)
    mesh.clock.ahead += 61
    await until_empty(mesh)


async def test_a_move_copies_while_decoding_continues(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 30
    await session.begin((b, "0-2"), (a, "2-4"))
    await session.wait_tokens(20)
    await session.mirror(0, c, eager=True)
    await session.wait_tokens(30)
    await session.until(lambda: a.received(Mirrored) and b.host._mirrors_out._all()[0].machine.held == 69)
    session.credit = ANSWER
    await session.next_epoch((c, "0-2"), (a, "2-4"))
    assert [opened.held for opened in session.opened] == [69, 69]
    assert [point.start for point in session.resume_points] == [69, 69]
    a.links.send(b.id, Close(session=SESSION, epoch=1, reason="moved"))
    await session.until(lambda: not leftovers(b))
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(a, c)
    await until_empty(mesh)


async def test_a_move_there_and_back_sends_only_new_kv(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((b, "0-4"))
    await session.wait_tokens(20)
    await session.mirror(0, c, eager=True)
    await session.until(lambda: c.received(KvBlocks) or any(mirrored.held == 59 for mirrored in a.received(Mirrored)))
    session.credit = 40
    await session.next_epoch((c, "0-4"))
    await session.wait_tokens(40)
    await session.mirror(0, b, eager=True)  # b still has the KV that it computed in the first epoch
    await session.until(lambda: any(mirrored.held == 79 and mirrored.target == b.id for mirrored in a.received(Mirrored)))
    assert sum(message.tokens for _, message in c.links.sent if isinstance(message, KvBlocks)) == 79 - 59
    assert len(b.share.leases) == 1
    session.credit = ANSWER
    await session.next_epoch((b, "0-4"))
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(b, c)
    await until_empty(mesh)


async def test_an_impossible_copy_is_reported_and_the_stage_continues(mesh: StageMesh) -> None:
    a, b, c, d = mesh.start("a"), mesh.start("b"), mesh.start("c", "0-2", spare=0), mesh.start("d", blocks=2)
    session = driver(mesh, a)
    await session.begin((b, "0-4"))
    for target, message_part in ((c, "of a copy: .* 0 free"), (d, "no KV for"), (b, "own peer")):
        with pytest.raises(RemoteFailure, match=message_part):
            await session.mirror(0, target)
    session.send(0, Mirror, stage=0, target=d.id)
    await session.until(lambda: a.received(Mirrored))
    assert "did not ask" in a.received(Mirrored)[-1].error
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(b)
    await until_empty(mesh)


async def test_a_copy_ends_with_the_link_to_its_target_and_its_cache_with_the_lease(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((b, "0-4"))
    await session.mirror(0, c)
    await session.wait_tokens(20)
    mesh.cut(b, c)
    await session.until(lambda: any(mirrored.error for mirrored in a.received(Mirrored)))
    assert leftovers(c)
    session.grant(ANSWER)
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(b, c)
    await until_empty(mesh)


async def test_a_mirror_that_is_stopped_receives_no_more_kv(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 10
    await session.begin((b, "0-4"))
    await session.wait_tokens(10)
    await session.mirror(0, c, eager=True)
    await session.until(lambda: any(mirrored.held == 49 for mirrored in a.received(Mirrored)))
    await session.mirror(0, None)
    session.grant(ANSWER)
    await session.wait_tokens(ANSWER)
    assert c.host.rows(lambda model: "tiny")[0]["tokens"] == 49
