"""Whole sessions over real stages of a small model: any split gives the same tokens, and nothing is left over."""

import asyncio
import random
from typing import Any

import pytest

from meshd.agents.stage.flow.session import StageState
from meshd.errors import RemoteFailure
from meshd.protocol.messages import Close, Closed, FetchProgress, Resume, StageProgress, StepKind
from stage_mesh.driver import SESSION
from stage_mesh.mesh import StageMesh, StagePeer
from stage_mesh.sessions import ANSWER, driver, expected, until_empty


@pytest.mark.parametrize("cuts", [("0-4",), ("0-1", "1-4"), ("0-1", "1-2", "2-4")])
async def test_any_cut_gives_the_same_tokens_and_close_frees_all(mesh: StageMesh, cuts: tuple[str, ...]) -> None:
    peers = [mesh.start(name) for name in "abc"[: len(cuts)]]
    session = driver(mesh, peers[0])
    await session.begin(*zip(peers, cuts, strict=True))
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(*peers)
    assert sum(closed.freed_blocks for closed in peers[0].received(Closed)) == 4 * len(peers)
    await until_empty(mesh)


async def test_two_stages_at_one_peer(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    await session.begin((a, "0-1"), (b, "1-2"), (a, "2-3"), (a, "3-4"))
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(a, b)
    await until_empty(mesh)


async def test_a_stage_reports_its_progress(mesh: StageMesh) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    session = driver(mesh, a)
    session.credit = 10
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.wait_tokens(10)
    await session.until(lambda: a.host._active[SESSION, 0].machine.state is StageState.WAITING)

    async def progress(peer: StagePeer, epoch: int) -> tuple[Any, ...]:
        def fetch(request: int) -> FetchProgress:
            return FetchProgress(request=request, session=SESSION, epoch=epoch)

        return (await a.links.request(peer.id, fetch, timeout_s=1))[0].stages

    assert await progress(a, 1) == (StageProgress(0, 50, 49, 3600.0),), "one step waits for credit"
    assert await progress(b, 1) == (StageProgress(1, 49, 49, 0.0),)
    assert await progress(b, 2) == ()


async def test_nothing_leaks_after_random_opens_losses_and_copies(mesh: StageMesh) -> None:
    for seed in range(25):
        await _run_random_actions(mesh, seed)
        for peer in mesh.peers.values():
            peer.inbox.clear()
            peer.links.sent.clear()


async def _run_random_actions(mesh: StageMesh, seed: int) -> None:
    """Open stages, cut links, copy KV, renew leases and close at random. Check that everything is free once the leases ran out."""
    dice = random.Random(seed)
    peers = [mesh.peers.get(type(SESSION)(name * 52)) or mesh.start(name, blocks=10) for name in "abcd"]  # type: ignore[call-overload]
    session = driver(mesh, peers[0], max_tokens=40)
    session.chunk = dice.choice((5, 40))
    for _ in range(dice.randint(4, 14)):
        action = dice.choice(["open", "open", "next epoch", "cut", "mirror", "mirror", "renew", "close", "wait", "late", "repair"])
        cuts = dice.choice([("0-4",), ("0-2", "2-4"), ("0-1", "1-3", "3-4")])
        stages = [(dice.choice(peers), layers) for layers in cuts]
        try:
            if action == "open":
                await session.open(*stages, resume=dice.random() < 0.7)
                if dice.random() < 0.3:
                    session.send_prompt()
            elif action == "next epoch":
                session.tokens = session.tokens[: dice.randint(0, 40)]
                await session.next_epoch(*stages)
            elif action == "mirror" and session.plan:
                await session.mirror(
                    dice.randrange(len(session.plan.stages)), dice.choice([*peers, None]), eager=dice.random() < 0.5
                )
            elif action == "renew":
                session.renew(*dice.sample(peers, 2))
            elif action == "cut":
                mesh.cut(*dice.sample(peers, 2))
            elif action == "close":
                closing = Close(session=SESSION, epoch=dice.randint(0, session.epoch), reason="a test")
                peers[0].links.send(dice.choice(peers).id, closing)
            elif action == "late" and session.plan:
                stage = dice.randrange(len(session.plan.stages))
                session.send(stage, Resume, stage=stage, start=dice.randint(0, 50), send_from=dice.randint(0, 50))
                start = dice.randint(0, 50)
                fields = {"seq": dice.randint(0, 5), "start": start, "tokens": 1, "committed": start + 1}
                session.send_step(0, bytes(4), kind=dice.choice(list(StepKind)), **fields)
            elif action == "repair":
                mesh.down.clear()
        except Exception as error:
            if not isinstance(error, RemoteFailure) and type(error).__name__ not in ("PeerLost", "TimeoutError"):
                raise
        await asyncio.sleep(dice.choice((0, 0, 0.003, 0.02)))
    session.at.listeners.clear()
    mesh.down.clear()
    await asyncio.sleep(0.03)  # messages in transit may still start a lease
    mesh.clock.ahead += 61
    await until_empty(mesh)
