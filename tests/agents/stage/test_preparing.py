"""OPEN is accepted at once and prepared beside the event loop: what ends the preparation, and that nothing of it is left over."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Collection, Iterator
from typing import Any

import pytest

from meshd.agents.links import task_budget
from meshd.agents.stage import opening
from meshd.errors import RemoteFailure
from meshd.kernels.backend import LoadedLayers, Stage
from meshd.kernels.registry import make_backend
from meshd.kernels.sampling.sampler import Sampler
from meshd.protocol.messages import Opened
from meshd.types import LayerRange, SessionId
from stage_mesh.driver import Driver
from stage_mesh.mesh import StageMesh, StagePeer
from stage_mesh.sessions import ANSWER, LLAMA, driver, expected, leftovers, stage_of, until_empty


class Gated:
    """Layers whose stages over parts are made when a test lets them."""

    def __init__(self, loaded: LoadedLayers) -> None:
        self.loaded = loaded
        self.gate = threading.Event()
        self.gate.set()
        self.threads: list[int] = []
        """The threads that made a stage over a part of the layers."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loaded, name)

    def border_bytes(self, parts: Collection[LayerRange]) -> int:
        return self.loaded.border_bytes(parts)

    def stage(self, layers: LayerRange) -> Stage:
        if layers != self.loaded.layers:
            self.threads.append(threading.get_ident())
            assert self.gate.wait(10)
        return self.loaded.stage(layers)


@pytest.fixture
def loaded() -> Iterator[LoadedLayers]:
    layers = make_backend("onnxruntime", threads=1).load(LLAMA.spec, LayerRange(0, 4), LLAMA, embedding=True, head=True)
    yield layers
    layers.close()


@pytest.fixture
async def gated(loaded: LoadedLayers) -> AsyncIterator[Gated]:
    layers = Gated(loaded)
    yield layers
    layers.gate.set()
    gc.collect()


@pytest.fixture
async def mesh(gated: Gated) -> AsyncIterator[StageMesh]:
    async with StageMesh(LLAMA.spec, gated) as started:
        yield started


async def open_first(session: Driver, peer: StagePeer, layers: str = "0-2") -> Opened:
    """Open the first stage of a new epoch, over a part of the layers."""
    other = next(each for each in session.mesh.peers.values() if each is not peer)
    session.plan, session.epoch = session.plan_of((peer, layers), (other, "2-4")), session.epoch + 1
    return await session.open_stage(0, resume=session.epoch > 1)


async def begin_open(session: Driver, peer: StagePeer) -> "asyncio.Task[Opened]":
    """Send OPEN while the gate is closed, and wait until it is accepted."""
    task = asyncio.ensure_future(open_first(session, peer))
    await session.until(lambda: len(peer.host._preparing))
    return task


async def until_read(peer: StagePeer) -> None:
    async with asyncio.timeout(5):
        while peer.resident.stages.reading_bytes or peer.resident.sessions:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def another(session: Driver) -> Driver:
    session.session = SessionId("6" * 32)
    return session


async def test_memory_is_reserved_at_once_and_the_loop_does_not_wait(mesh: StageMesh, gated: Gated) -> None:
    a, _ = mesh.start("a"), mesh.start("b")
    gated.gate.clear()
    task = await begin_open(driver(mesh, a), a)
    assert a.blocks_used > 0
    assert a.resident.stages.reading_bytes > 0
    assert (a.host.sessions, task.done()) == (1, False), "a peer that is drained waits for it"
    gated.gate.set()
    await task
    assert a.host.sessions == 1
    assert a.resident.stages.border_bytes == gated.border_bytes([LayerRange(0, 2)]) > 0
    assert a.resident.stages.reading_bytes == 0
    assert threading.get_ident() not in gated.threads


async def test_close_ends_the_preparation_and_what_was_read_stays_for_the_next_session(mesh: StageMesh, gated: Gated) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    gated.gate.clear()
    session = driver(mesh, a)
    task = await begin_open(session, a)
    await session.close(a)
    with pytest.raises(RemoteFailure, match="was not opened"):
        await task
    assert a.blocks_used == 0
    assert a.resident.sessions == 1  # the thread that reads keeps the layers
    gated.gate.set()
    await until_read(a)
    await until_empty(mesh)
    assert len(gated.threads) == 1
    await driver(mesh, a).open((a, "0-2"), (b, "2-4"))
    assert len(gated.threads) == 2  # only b had to read


async def test_an_open_beyond_the_budget_of_its_coordinator_keeps_no_memory(
    mesh: StageMesh, gated: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _ = mesh.start("a"), mesh.start("b")
    monkeypatch.setattr(task_budget, "PER_KIND", 1)
    gated.gate.clear()
    task = await begin_open(driver(mesh, a), a)
    used = a.blocks_used
    with pytest.raises(RemoteFailure, match="under way already"):
        await open_first(another(driver(mesh, a)), a)
    assert (len(a.host._preparing), a.blocks_used) == (1, used)
    gated.gate.set()
    await task


async def test_a_lease_that_runs_out_ends_the_preparation(mesh: StageMesh, gated: Gated) -> None:
    a, _ = mesh.start("a"), mesh.start("b")
    gated.gate.clear()
    task = await begin_open(driver(mesh, a), a)
    mesh.clock.ahead += 11
    with pytest.raises(RemoteFailure, match="the lease ran out"):
        await task
    gated.gate.set()
    await until_empty(mesh)


async def test_the_deadline_ends_the_preparation(mesh: StageMesh, gated: Gated) -> None:
    a, _ = mesh.start("a"), mesh.start("b")
    gated.gate.clear()
    session = driver(mesh, a)
    session.deadline_ms = 50
    with pytest.raises(RemoteFailure, match=r"not prepared within 0\.05 s") as caught:
        await (await begin_open(session, a))
    assert caught.value.remote_code == "model_loading"
    gated.gate.set()
    await until_read(a)
    await until_empty(mesh)


async def test_a_repeated_open_waits_for_the_same_preparation(mesh: StageMesh, gated: Gated) -> None:
    a, _ = mesh.start("a"), mesh.start("b")
    gated.gate.clear()
    session = driver(mesh, a)
    first = await begin_open(session, a)
    again = asyncio.ensure_future(session.open_stage(0, resume=False))
    await asyncio.sleep(0.02)
    gated.gate.set()
    assert (await first).blocks == (await again).blocks
    assert len(gated.threads) == 1
    assert a.host.sessions == 1


async def test_a_new_epoch_ends_the_preparation_of_the_one_before(mesh: StageMesh, gated: Gated) -> None:
    a, _ = mesh.start("a"), mesh.start("b")
    gated.gate.clear()
    session = driver(mesh, a)
    first = await begin_open(session, a)
    second = asyncio.ensure_future(begin_open(session, a))
    with pytest.raises(RemoteFailure, match="a new epoch"):
        await first
    gated.gate.set()
    await (await second)
    await session.close(a)
    await until_empty(mesh)


async def test_sessions_of_the_same_layers_share_one_stage(mesh: StageMesh, gated: Gated) -> None:
    a, b = mesh.start("a"), mesh.start("b")
    gated.gate.clear()
    tasks = [await begin_open(session, a) for session in (driver(mesh, a), another(driver(mesh, a)))]
    gated.gate.set()
    await asyncio.gather(*tasks)
    one, two = a.host._active.values()
    assert one.stage is two.stage
    assert one.layers_key == two.layers_key
    assert len(gated.threads) == 1
    assert not leftovers(b)


async def test_a_stage_that_no_session_uses_is_freed_when_room_is_short(
    mesh: StageMesh, gated: Gated, loaded: LoadedLayers
) -> None:
    whole, room = loaded.weight_bytes, gated.border_bytes([LayerRange(0, 2)])
    a, _ = mesh.start("a", spare=room + 1000), mesh.start("b")
    session = driver(mesh, a)
    await open_first(session, a, "0-2")
    other = another(driver(mesh, a))
    with pytest.raises(RemoteFailure, match="more than are free here") as caught:
        await open_first(other, a, "1-3")
    assert caught.value.remote_code == "out_of_memory"
    assert stage_of(a).stage.layers == LayerRange(0, 2)
    await session.close(a)
    await until_empty(mesh)
    assert loaded.weight_bytes - whole == pytest.approx(room, rel=0.05)
    await open_first(other, a, "0-3")
    assert list(a.resident.stages.made) == [LayerRange(0, 3)]
    gc.collect()
    assert loaded.weight_bytes - whole == pytest.approx(gated.border_bytes([LayerRange(0, 3)]), rel=0.05)


async def test_many_known_tokens_are_counted_beside_the_loop(mesh: StageMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
    whole = await expected(mesh, **penalties)
    threads: list[int] = []

    def made(*arguments: Any) -> Sampler:
        threads.append(threading.get_ident())
        return Sampler(*arguments)

    monkeypatch.setattr(opening, "_MANY_TOKENS", 8)
    monkeypatch.setattr(opening, "Sampler", made)
    a = mesh.start("a")
    session = driver(mesh, a, **penalties)
    await session.begin((a, "0-4"))
    await session.wait_tokens(ANSWER)
    assert session.tokens == whole
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()
