"""When KV is freed, and which coordinator may continue a session."""

import asyncio

from meshd.protocol.messages import Failed, Mirrored
from stage_mesh.driver import Driver
from stage_mesh.mesh import StageMesh, StagePeer
from stage_mesh.sessions import ANSWER, driver, expected, leftovers, refused, until_empty


async def half_an_answer(mesh: StageMesh) -> tuple[StagePeer, StagePeer, StagePeer, Driver, Driver]:
    """Begin an answer that `a` coordinates and `c` computes. Returns: the peers, its driver, and one at `b` with its tokens."""
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    first, second = driver(mesh, a), driver(mesh, b)
    first.credit = 10
    await first.begin((c, "0-4"))
    await first.wait_tokens(10)
    second.tokens, second.epoch = list(first.tokens), 1
    return a, b, c, first, second


async def test_another_coordinator_takes_over_only_if_the_first_is_unreachable_or_hands_over(mesh: StageMesh) -> None:
    a, b, c, _, second = await half_an_answer(mesh)
    assert a.id in await refused(second, (c, "0-4"), resume=True)
    mesh.cut(a, c)
    second.epoch = 0
    assert a.id in await refused(second, (c, "0-4"), resume=True), "the same epoch"
    await second.next_epoch((c, "0-4"), predecessors=(a.id,))
    second.grant(ANSWER)
    await second.wait_tokens(ANSWER)
    assert second.tokens == await expected(mesh)
    third = driver(mesh, a)
    mesh.down.clear()
    third.tokens, third.epoch = second.tokens[:30], 2
    assert b.id in await refused(third, (c, "0-4"), resume=True), "the coordinator has not handed it over"
    third.epoch = 2
    assert await third.hand_over(a, c) == [False], "only the coordinator itself may hand it over"
    assert await second.hand_over(a, c) == [True]
    await third.next_epoch((c, "0-4"))
    assert third.opened[0].held > 0
    await third.wait_tokens(ANSWER)
    assert third.tokens == second.tokens
    second.renew(c)
    assert not b.received(Failed)


async def test_a_coordinator_that_is_linked_again_after_a_restart_does_not_stand_in_the_way(mesh: StageMesh) -> None:
    a, _, c, first, second = await half_an_answer(mesh)
    mesh.cut(a, c)
    mesh.down.clear()
    first.renew(c)
    assert a.id in await refused(second, (c, "0-4"), resume=True), "only the link flapped: it still renews the lease"
    mesh.cut(a, c)
    mesh.down.clear()
    second.epoch = 1
    await second.next_epoch((c, "0-4"), predecessors=(a.id,))
    second.grant(ANSWER)
    await second.wait_tokens(ANSWER)
    assert second.tokens == await expected(mesh)


async def test_a_session_that_was_given_to_this_peer_but_never_begun_here_can_be_taken_over(mesh: StageMesh) -> None:
    """The client that asked this peer to continue the answer has left before the record came."""
    a, _, c, first, second = await half_an_answer(mesh)
    assert await first.hand_over(c, c) == [True]
    assert c.id in await refused(second, (c, "0-4"), resume=True)
    mesh.idle.add(c.id)
    second.epoch = 1
    await second.next_epoch((c, "0-4"), predecessors=(a.id, c.id))
    second.grant(ANSWER)
    await second.wait_tokens(ANSWER)
    assert second.tokens == await expected(mesh)


async def test_kv_of_a_peer_that_never_was_the_coordinator_is_not_used(mesh: StageMesh) -> None:
    """A member that knows a session's id reserves it at a peer that the session does not use yet, fills KV there and leaves."""
    a, b, c, d = (mesh.start(name) for name in "abcd")
    forger = driver(mesh, d)
    forger.prompt = [7] * 40
    forger.credit = 10
    await forger.begin((c, "0-4"))
    await forger.wait_tokens(10)
    session = driver(mesh, a)
    session.credit = 10
    await session.begin((b, "0-4"))
    await session.wait_tokens(10)
    mesh.isolate(b)
    mesh.cut(d, c)
    session.credit = ANSWER
    await session.next_epoch((c, "0-4"))
    assert [opened.held for opened in session.opened] == [0]
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)


async def test_a_peer_without_the_session_answers_renew_with_peer_lost(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.epoch = 4
    session.renew(b)
    await session.until(lambda: a.received(Failed))
    (failed,) = a.received(Failed)
    assert (failed.epoch, failed.code, failed.blame) == (4, "peer_lost", None)


async def test_a_lease_that_runs_out_frees_everything(mesh: StageMesh) -> None:
    a, b, c, d = (mesh.start(name) for name in "abcd")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((b, "0-2"), (c, "2-4"))
    await session.wait_tokens(20)
    await session.mirror(1, d)
    await session.until(lambda: any(mirrored.held for mirrored in a.received(Mirrored)))
    mesh.clock.ahead += 9
    session.renew(b, c)
    await asyncio.sleep(0.1)
    mesh.clock.ahead += 9
    await session.until(lambda: not leftovers(d))
    assert leftovers(b)
    assert leftovers(c)
    assert not a.received(Failed)
    mesh.clock.ahead += 9
    await until_empty(mesh)


async def test_kv_of_a_failed_stage_is_freed_when_the_lease_runs_out(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    mesh.cut(a, b)
    assert a.host.sessions == b.host.sessions == 0
    assert leftovers(a)
    assert leftovers(b)
    mesh.clock.ahead += 11
    await until_empty(mesh)


async def test_no_lease_is_longer_than_a_minute(mesh: StageMesh) -> None:
    a = mesh.start("a")
    session = driver(mesh, a)
    session.lease_ms = 10**9
    await session.begin((a, "0-4"))
    mesh.clock.ahead += 61
    await until_empty(mesh)
