"""A session decodes while layers are checked: it waits for at most one step of the check, which measures the right times."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from meshd.agents.placement.ready.warmup import warm_up
from meshd.agents.placement.resident import ResidentLayers
from meshd.clock import SystemClock
from meshd.kernels.backend import Hidden, LoadedLayers, Pass, Segment, Stage
from meshd.kernels.kv.share import KvShare
from meshd.kernels.registry import make_backend
from meshd.types import LayerRange
from stage_mesh.mesh import MODEL, StageMesh, StagePeer, card_of
from stage_mesh.sessions import ANSWER, LLAMA, driver, expected

LONG = 400
"""Number of tokens of an answer that takes longer than a check."""
CHECK_S, SESSION_S = 0.02, 0.05
"""How much longer each step of the check and each pass of the session takes than it would."""


class Slowed:
    """Layers whose steps take `seconds` longer."""

    def __init__(self, loaded: LoadedLayers, seconds: float) -> None:
        self._loaded, self._seconds = loaded, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded, name)

    def stage(self, layers: LayerRange) -> Stage:
        stage = self._loaded.stage(layers)
        begin = stage.begin

        def slower(hidden: Hidden, segments: Sequence[Segment]) -> Pass:
            time.sleep(self._seconds)
            return begin(hidden, segments)

        stage.begin = slower  # type: ignore[method-assign]
        return stage


class Jobs:
    """Records when each job of a compute thread was submitted and began."""

    def __init__(self, peer: StagePeer) -> None:
        self.begun: list[tuple[bool, float, float]] = []
        """(background, submitted, begun), in the order of the beginnings."""
        self._submit = peer.compute.submit
        peer.compute.submit = self.submit  # type: ignore[method-assign]

    def submit(self, work: Callable[[], Any], done: Any, failed: Any, *, background: bool = False) -> None:
        submitted = time.monotonic()

        def recorded() -> Any:
            self.begun.append((background, submitted, time.monotonic()))
            return work()

        self._submit(recorded, done, failed, background=background)

    def background_before(self, index: int) -> int:
        """How many background jobs began between the submission of a job and its beginning."""
        _, submitted, begun = self.begun[index]
        return sum(background and submitted < when < begun for background, _, when in self.begun)


@pytest.fixture(scope="module")
def weights() -> Iterator[LoadedLayers]:
    loaded = make_backend("onnxruntime", threads=1).load(LLAMA.spec, LayerRange(0, 4), LLAMA, embedding=True, head=True)
    yield loaded
    loaded.close()


def loaded_on(peer: StagePeer, weights: LoadedLayers) -> ResidentLayers:
    """Make resident layers that have yet to be checked."""
    card, layers = card_of(LLAMA.spec), LayerRange(0, 4)
    resident = ResidentLayers(card, layers, kv_tokens=512, weight_bytes=0, weights=weights)
    resident.kv = KvShare(peer.residents.arena, MODEL, LLAMA.spec, layers, 512)
    return resident


async def test_a_decode_waits_for_one_step_of_two_checks_at_most(weights: LoadedLayers) -> None:
    async with StageMesh(LLAMA.spec, weights) as mesh:
        plain = await expected(mesh)
        a = mesh.start("a")
        jobs, session = Jobs(a), driver(mesh, a, max_tokens=LONG)
        session.lease_ms = 60_000
        await session.begin((a, "0-4"))
        await session.wait_tokens(2)
        slow = Slowed(weights, CHECK_S)
        await asyncio.gather(*(warm_up(loaded_on(a, slow), a.compute, SystemClock()) for _ in range(2)))
        await session.wait_tokens(ANSWER)
    assert session.tokens[:ANSWER] == plain
    steps = [index for index, (background, _, _) in enumerate(jobs.begun) if not background]
    waits = [jobs.background_before(index) for index in steps]
    assert max(waits) == 0, "a step waited for a background job that began after it"
    turns = [background for background, _, _ in jobs.begun]
    assert sum(one != other for one, other in pairwise(turns)) > 10, "both must have run in turns"


async def test_the_measured_times_are_those_without_the_session(weights: LoadedLayers) -> None:
    async with StageMesh(LLAMA.spec, Slowed(weights, SESSION_S)) as mesh:
        a = mesh.start("a")
        session = driver(mesh, a, max_tokens=LONG)
        session.lease_ms = 60_000
        await session.begin((a, "0-4"))
        await session.wait_tokens(2)
        resident = loaded_on(a, weights)
        await warm_up(resident, a.compute, SystemClock())
        assert len(session.tokens) < LONG, "the session ended before the check, which proves nothing"
    assert resident.layer_decode_s is not None
    assert 0 < resident.layer_decode_s * len(resident.layers) < SESSION_S / 2
