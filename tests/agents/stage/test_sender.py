"""What a stage sends after a loss: kept outputs within the prefill window, and nothing that the next stage has."""

from typing import Any

import pytest

from meshd.agents.stage.batch import compute
from meshd.protocol.messages import Ack, Failed
from meshd.types import SessionId
from stage_mesh.driver import SESSION
from stage_mesh.mesh import StageMesh
from stage_mesh.sessions import ANSWER, driver, expected, sent_steps, sent_tokens, until_empty


async def test_a_lost_stage_is_computed_again_from_kept_outputs(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a, temperature=0.9, seed=3)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    await session.held_back()
    mesh.isolate(b)
    await session.until(lambda: a.received(Failed))
    (failed,) = a.received(Failed)
    assert (failed.code, failed.blame) == ("peer_lost", b.id)
    assert a.share.leases, "the failed stage keeps its KV"

    session.credit = ANSWER
    await session.next_epoch((a, "0-2"), (c, "2-4"))
    assert [opened.held for opened in session.opened] == [59, 0]
    assert (session.opened[0].kept_from, session.opened[0].kept_to) == (0, 59)
    assert [point.start for point in session.resume_points] == [59, 0], "the surviving stage computes one token"
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh, temperature=0.9, seed=3)
    await session.close(a, c)
    mesh.clock.ahead += 61  # the lost peer gets no CLOSE: its lease must run out
    await until_empty(mesh)


async def test_a_stage_whose_output_breaks_a_bound_blames_its_own_peer_and_sends_nothing(
    mesh: StageMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    monkeypatch.setattr(compute, "_finish", lambda active, token, index: "much too long a reason" * 99)
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.until(lambda: a.received(Failed))
    (failed,) = a.received(Failed)
    assert (failed.code, failed.stage, failed.blame) == ("invalid_value", 1, b.id)
    assert session.tokens == []


async def test_a_replay_stays_within_the_prefill_window(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit, session.chunk = 20, 3
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    await session.held_back()
    mesh.isolate(b)
    a.links.sent.clear()
    await session.next_epoch((a, "0-2"), (c, "2-4"))
    begun = most = 0
    on_ack = a.host.on_ack

    def acknowledged(sender: Any, message: Ack, payload: memoryview) -> None:
        nonlocal begun, most
        most = max(most, len(sent_steps(a)) - begun)
        begun += message.stage == 1
        on_ack(sender, message)

    a.links.dispatcher._handlers[Ack] = acknowledged
    session.grant(ANSWER)
    await session.wait_tokens(ANSWER)
    assert most == 4
    assert [step.tokens for step in sent_steps(a) if step.start < 59] == [3] * 19 + [2]
    assert session.tokens == await expected(mesh)


async def test_a_lost_first_stage_is_computed_again_and_its_output_is_not_sent_twice(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, b)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    mesh.isolate(a)
    session.credit = ANSWER
    await session.next_epoch((c, "0-2"), (b, "2-4"))
    assert [(point.start, point.send_from) for point in session.resume_points] == [(0, 59), (59, 59)]
    await session.wait_tokens(ANSWER)
    assert sent_tokens(c) == ANSWER - 20, "decode steps only, no output of the prefill"
    assert session.tokens == await expected(mesh)


async def test_without_kept_outputs_everything_is_computed_again(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a", outputs=1000), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    await session.held_back()
    mesh.isolate(b)
    session.credit = ANSWER
    await session.next_epoch((a, "0-2"), (c, "2-4"))
    assert session.opened[0].held == 59
    assert session.opened[0].kept_from > 0
    assert [point.start for point in session.resume_points] == [0, 0]
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)


async def test_offered_outputs_are_not_evicted_before_they_are_sent(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a", outputs=60_000), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit = 20
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    await session.held_back()
    mesh.isolate(b)
    session.credit = ANSWER
    await session.open((a, "0-2"), (c, "2-4"), resume=True)
    assert session.opened[0].kept_to == 59
    other = driver(mesh, c)
    other.session = type(SESSION)("6" * 32)
    await other.begin((a, "0-2"), (c, "2-4"))
    await other.wait_tokens(ANSWER)
    session.resume()
    await session.wait_tokens(ANSWER)
    assert session.tokens == other.tokens == await expected(mesh)
    assert [failed.epoch for failed in a.received(Failed)] == [1]


async def test_a_full_lane_slows_a_stage_down_and_no_peer_is_blamed(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.chunk = 3
    mesh.full.add((a.id, b.id))
    await session.begin((a, "0-2"), (b, "2-4"))
    machine = a.host._active[SESSION, 0].machine
    await session.until(lambda: a.links.waiting and machine.ready is not None and a.host._runner.job is None)
    assert machine.sent_to == 3, "the output of one step waits, and the next step waits for room before it computes"
    assert sent_tokens(a) == 0
    mesh.make_room(a, b)
    await session.wait_tokens(ANSWER)
    assert not a.received(Failed)
    assert session.tokens == await expected(mesh)
    await session.close(a, b)
    await until_empty(mesh)


async def test_a_session_whose_next_lane_has_room_runs_while_another_waits(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    waiting, running = driver(mesh, a), driver(mesh, a)
    running.session = SessionId("6" * 32)
    mesh.full.add((a.id, b.id))
    await waiting.begin((a, "0-2"), (b, "2-4"))
    await waiting.until(lambda: a.links.waiting)
    a.listeners.remove(waiting._on_message)
    await running.begin((a, "0-4"))
    await running.wait_tokens(ANSWER)
    assert not a.received(Failed)


async def test_outputs_that_wait_for_room_are_replayed_in_order(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a)
    session.credit, session.chunk = 20, 3
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(20)
    await session.held_back()
    mesh.isolate(b)
    await session.until(lambda: a.received(Failed))
    mesh.full.add((a.id, c.id))
    session.credit = ANSWER
    await session.next_epoch((a, "0-2"), (c, "2-4"))
    await session.until(lambda: a.links.waiting)
    mesh.make_room(a, c)
    await session.wait_tokens(ANSWER)
    assert len(a.received(Failed)) == 1
    assert session.tokens == await expected(mesh)


async def test_a_stage_that_ends_while_its_output_waits_sends_nothing_more(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    mesh.full.add((a.id, b.id))
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.until(lambda: a.links.waiting)
    await session.close(a, b)
    mesh.make_room(a, b)
    await until_empty(mesh)
    assert sent_tokens(a) == 0
