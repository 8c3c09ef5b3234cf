"""Sessions of a model whose layers have a window: what has left it is given back, and every way to continue keeps the tokens."""

import gc
from collections.abc import AsyncIterator, Iterator

import msgspec
import numpy as np
import psutil
import pytest

from meshd.kernels.backend import LoadedLayers
from meshd.kernels.kv.memory import PAGE_TOKENS, REWIND_TOKENS
from meshd.protocol.messages import Mirrored
from stage_mesh.driver import Driver
from stage_mesh.mesh import StageMesh, StagePeer
from stage_mesh.sessions import load, until_empty
from tiny.llama import TinyLlama, tiny_spec

WINDOW, ANSWER = 9, 40
PROMPT = np.random.default_rng(5).integers(0, 320, 250).tolist()
SPEC = msgspec.structs.replace(tiny_spec(tied=True), window=WINDOW, windowed=(True, False, True, True))
ROW_BYTES = 2 * 2 * 32 * 4


@pytest.fixture(scope="module", params=["onnxruntime", "opaque"])
def windowed(request: pytest.FixtureRequest) -> Iterator[LoadedLayers]:
    loaded = load(request.param, TinyLlama(SPEC, kinds={"token_embd": "Q8_0"}))
    yield loaded
    loaded.close()


@pytest.fixture
async def mesh(windowed: LoadedLayers) -> AsyncIterator[StageMesh]:
    async with StageMesh(SPEC, windowed) as started:
        yield started


def driver(mesh: StageMesh, at: StagePeer, credit: int = ANSWER) -> Driver:
    session = Driver(mesh, at, PROMPT, ANSWER)
    session.credit = credit
    return session


async def expected(mesh: StageMesh) -> list[int]:
    alone = mesh.start("z")
    session = driver(mesh, alone)
    session.chunk = 64
    await session.begin((alone, "0-4"))
    await session.wait_tokens(ANSWER)
    await session.close(alone)
    return session.tokens


async def test_a_session_keeps_of_its_windowed_layers_only_what_a_recovery_may_read(mesh: StageMesh) -> None:
    a = mesh.start("a")
    session = driver(mesh, a, credit=20)
    await session.begin((a, "0-4"))
    await session.wait_tokens(20)
    (lease,) = a.share.leases
    kept = WINDOW + REWIND_TOKENS + 2 * PAGE_TOKENS
    assert lease.used_bytes <= (3 * kept + 288) * ROW_BYTES
    assert lease.used_bytes >= 288 * ROW_BYTES
    session.grant(ANSWER)
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    await session.close(a)
    await until_empty(mesh)


async def test_a_mirror_that_begins_late_takes_over_without_what_left_the_window(mesh: StageMesh) -> None:
    a, b, c = mesh.start("a"), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a, credit=20)
    await session.begin((a, "0-1"), (b, "1-4"))
    await session.wait_tokens(20)
    await session.mirror(1, c, eager=True)
    await session.until(lambda: any(mirrored.held == 269 for mirrored in a.received(Mirrored)))
    sizes = [c.share.leases[0].used_bytes, b.share.leases[0].used_bytes]
    assert sizes[0] == sizes[1], "the copy holds what the original holds"
    mesh.isolate(b)
    session.credit = ANSWER
    await session.next_epoch((a, "0-1"), (c, "1-4"))
    (first, second) = session.opened
    assert (second.held, second.mirrored) == (269, True)
    assert 0 < second.held_from <= 269 - REWIND_TOKENS + PAGE_TOKENS
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)
    assert first.held_from > 0
    await session.close(a, c)
    mesh.clock.ahead += 61
    await until_empty(mesh)


async def test_a_stage_that_would_start_behind_its_window_computes_everything_again(mesh: StageMesh) -> None:
    """The next stage is lost, and of the outputs that it needs none was kept."""
    a, b, c = mesh.start("a", outputs=0), mesh.start("b"), mesh.start("c")
    session = driver(mesh, a, credit=20)
    await session.begin((a, "0-2"), (b, "2-4"))
    await session.mirror(1, c, eager=False)
    await session.until(lambda: any(mirrored.held >= 64 for mirrored in a.received(Mirrored)))
    await session.wait_tokens(5)
    mesh.isolate(b)
    cached = next(iter(c.host._kv_manager)).caches[0]
    cached.lease.kv.truncate(cached.layers, 0, 0)
    cached.filled = 0
    session.credit = ANSWER
    await session.next_epoch((a, "0-2"), (c, "2-4"))
    assert [point.start for point in session.resume_points] == [0, 0]
    await session.wait_tokens(ANSWER)
    assert session.tokens == await expected(mesh)


async def test_memory_after_200_sessions_is_as_after_the_first(mesh: StageMesh) -> None:
    """A session has 0.2 MB of KV: 190 that stay would be 38 MB."""
    a, process = mesh.start("a"), psutil.Process()

    async def session() -> None:
        short = Driver(mesh, a, PROMPT[:100], 1)
        short.chunk = 100
        await short.begin((a, "0-4"))
        await short.wait_tokens(1)
        await short.close(a)
        a.listeners.clear()
        a.links.sent.clear()
        a.inbox.clear()

    for _ in range(10):
        await session()
    gc.collect()
    before = process.memory_info().rss
    for _ in range(190):
        await session()
    gc.collect()
    assert a.residents.arena.reserved_bytes == a.residents.arena.used_bytes == 0
    assert process.memory_info().rss - before < 16 << 20  # the heap of a long test run grows by a few MB of its own
