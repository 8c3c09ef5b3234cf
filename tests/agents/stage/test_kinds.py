"""Sessions of a model whose layers remember in every way: split, mirrored, moved, killed, and computed anew."""

from collections.abc import AsyncIterator

import numpy as np
import pytest

from hybrid.model import SPEC, VOCAB, HybridLoaded, PlainHybrid, memory_of
from meshd.kernels.kv import memory
from meshd.protocol.messages import Close, Mirrored
from opaque.stage import OpaqueLoaded
from stage_mesh.driver import SESSION, Driver
from stage_mesh.mesh import StageMesh, StagePeer
from stage_mesh.sessions import leftovers, until_empty

ANSWER = 50
PROMPT = np.random.default_rng(1).integers(0, VOCAB, 150).tolist()


@pytest.fixture(scope="module")
def answer() -> list[int]:
    return PlainHybrid().answer(PROMPT, ANSWER)


@pytest.fixture(params=["plain", "opaque"])
async def mesh(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StageMesh]:
    monkeypatch.setattr(memory, "_memory_of", memory_of)
    async with StageMesh(SPEC, HybridLoaded() if request.param == "plain" else OpaqueLoaded(HybridLoaded())) as started:
        yield started


def driver(mesh: StageMesh, at: StagePeer, credit: int) -> Driver:
    session = Driver(mesh, at, PROMPT, ANSWER)
    session.credit = credit
    return session


@pytest.mark.parametrize("eager", [True, False])
async def test_a_mirror_takes_over_after_a_kill_with_the_same_tokens(mesh: StageMesh, answer: list[int], eager: bool) -> None:
    a, b, c = mesh.start("a", "0-6"), mesh.start("b", "0-6"), mesh.start("c", "0-6")
    session = driver(mesh, a, credit=20)
    await session.begin((a, "0-1"), (b, "1-4"), (a, "4-6"))
    await session.mirror(1, c, eager=eager)
    await session.wait_tokens(20)
    await session.until(lambda: b.host._mirrors_out._all()[0].machine.lag < 32)
    mesh.isolate(b)
    session.credit = ANSWER
    await session.next_epoch((a, "0-1"), (c, "1-4"), (a, "4-6"))
    assert session.opened[1].mirrored
    assert session.opened[1].held > 169 - 32
    await session.wait_tokens(ANSWER)
    assert session.tokens == answer
    await session.close(a, c)
    mesh.clock.ahead += 61
    await until_empty(mesh)


async def test_a_move_in_mid_answer_keeps_the_tokens_and_leaves_nothing_behind(mesh: StageMesh, answer: list[int]) -> None:
    a, b, c = mesh.start("a", "0-6"), mesh.start("b", "0-6"), mesh.start("c", "0-6")
    session = driver(mesh, a, credit=30)
    await session.begin((b, "0-6"))
    await session.wait_tokens(10)
    await session.mirror(0, c, eager=True)
    await session.wait_tokens(30)
    await session.until(lambda: a.received(Mirrored) and b.host._mirrors_out._all()[0].machine.held == 179)
    session.credit = ANSWER
    await session.next_epoch((c, "0-6"))
    assert (session.opened[0].held, session.opened[0].held_from) == (179, 160)
    a.links.send(b.id, Close(session=SESSION, epoch=1, reason="moved"))
    await session.until(lambda: not leftovers(b))
    await session.wait_tokens(ANSWER)
    assert session.tokens == answer
    await session.close(a, c)
    await until_empty(mesh)


async def test_a_stage_that_was_lost_is_computed_anew(mesh: StageMesh, answer: list[int]) -> None:
    a, b, c = mesh.start("a", "0-6"), mesh.start("b", "0-6"), mesh.start("c", "0-6")
    session = driver(mesh, a, credit=20)
    await session.begin((a, "0-2"), (b, "2-6"))
    await session.wait_tokens(20)
    mesh.isolate(b)
    session.credit = ANSWER
    await session.next_epoch((a, "0-2"), (c, "2-6"))
    assert session.opened[1].held == 0
    await session.wait_tokens(ANSWER)
    assert session.tokens == answer
