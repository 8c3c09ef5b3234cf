"""Two sessions in opposite directions over real links whose lanes have room for one frame: neither ever blocks the other."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np
import pytest

from in_process.cables import Cable
from in_process.peers import Peers
from meshd.agents.links.backlog import Backlog
from meshd.agents.links.restoring import history
from meshd.errors import MeshdError
from meshd.kernels.backend import LoadedLayers
from meshd.types import SessionId
from stage_mesh.driver import Driver
from stage_mesh.mesh import StageMesh, StagePeer
from stage_mesh.sessions import LLAMA

DELAY_S = 0.004
FRAME_BYTES = 4096
"""Room for one frame that has not arrived: the largest is a prefill step of seven tokens."""
PROMPT = np.random.default_rng(4).integers(0, 320, 140).tolist()
CHUNK, TOKENS = 7, 200
STEPS_EACH = 2 * (len(PROMPT) // CHUNK + TOKENS)
"""Steps of one session, at both stages."""
STALL_S = 10.0


@asynccontextmanager
async def pair(peers: Peers, weights: LoadedLayers) -> AsyncIterator[tuple[StageMesh, StagePeer, StagePeer]]:
    """Link two peers with stages over sockets, with a delay that is longer than a step takes."""
    one, other = peers.start("a"), peers.start("b")
    async with Cable(delay_s=DELAY_S).to(other.port) as port:
        one.links.connect("127.0.0.1", port, "static")
        await one.next_up()
        await other.next_up()
        async with StageMesh(LLAMA.spec, weights) as mesh:
            yield mesh, *(mesh.start(peer.id[0], links=peer.links, blocks=60) for peer in (one, other))
        await peers.stop()  # while the cable is whole, so that nobody dials again


async def insist(send: Callable[[], Awaitable[None]]) -> None:
    """Repeat what the test itself sends while a lane is full."""
    while True:
        try:
            return await send()
        except MeshdError:
            await asyncio.sleep(0.01)


async def keep_answering(driver: Driver, one: StagePeer, other: StagePeer, steps: int) -> list[list[int]]:
    """Run one session after another, from `one` to `other`. Returns: the answers. Raises: TimeoutError if one stalls."""
    answers: list[list[int]] = []
    while 2 * STEPS_EACH * len(answers) < steps:
        driver.session = SessionId(f"{len(answers):016x}{driver.at.id.encode().hex()[:16]}")
        driver.tokens, driver.epoch, driver.chunk, driver.lease_ms = [], 0, CHUNK, 60_000
        await insist(lambda: driver.open((one, "0-2"), (other, "2-4")))
        driver.send_prompt()
        while len(driver.tokens) < TOKENS:
            before = len(driver.tokens)
            async with asyncio.timeout(STALL_S):
                await driver.until(lambda before=before: len(driver.tokens) > before)
        answers.append(driver.tokens)
        await insist(lambda: driver.close(one, other))
    return answers


@pytest.mark.parametrize("steps", [600, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
async def test_two_sessions_in_opposite_directions_never_stall(
    peers: Peers, weights: LoadedLayers, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    wait, waits = Backlog._wait, 0

    def counted(backlog: Backlog, key: object) -> None:
        nonlocal waits
        waits += 1
        wait(backlog, key)  # type: ignore[arg-type]

    monkeypatch.setattr(history, "KEPT_BYTES", FRAME_BYTES)
    monkeypatch.setattr(history, "REPORT_MESSAGES", 1)
    monkeypatch.setattr(Backlog, "_wait", counted)
    async with pair(peers, weights) as (mesh, a, b):
        drivers = Driver(mesh, a, PROMPT, TOKENS), Driver(mesh, b, PROMPT, TOKENS)
        there, back = await asyncio.gather(keep_answering(drivers[0], a, b, steps), keep_answering(drivers[1], b, a, steps))
        assert len(there) + len(back) >= steps / STEPS_EACH
        assert all(answer == there[0] for answer in there + back)
        assert waits > 0
