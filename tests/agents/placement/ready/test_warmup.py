"""The check step of freshly loaded layers."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Sequence

import msgspec
import numpy as np
import pytest

from in_process.clusters import make_card
from meshd.agents.device.compute import ComputeThread
from meshd.agents.placement.ready.layer_times import LayerTimes
from meshd.agents.placement.ready.warmup import warm_up
from meshd.agents.placement.resident import ResidentLayers
from meshd.clock import SystemClock
from meshd.kernels.backend import F32, LoadedLayers, Segment, Stage
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.share import KvShare
from meshd.kernels.registry import make_backend
from meshd.types import LayerRange
from tiny.llama import TinyLlama, tiny_spec

SLOW_S = 0.05


class Unsteady:
    """Layers whose last bits depend on how many tokens are computed at once."""

    def __init__(self, loaded: LoadedLayers) -> None:
        self._loaded = loaded

    def stage(self, layers: LayerRange) -> Stage:
        stage = self._loaded.stage(layers)
        forward = stage.forward

        def other(hidden: F32, segments: Sequence[Segment]) -> F32:
            out = forward(hidden, segments)
            return out if len(hidden) > 1 else np.nextafter(out, np.float32(np.inf))

        stage.forward = other
        return stage


class Disturbed:
    """Layers that take `SLOW_S` longer in all but one of `often` steps, as beside other work; with 1, in all."""

    def __init__(self, loaded: LoadedLayers, often: int = 3) -> None:
        self._loaded, self._often = loaded, often
        self._steps = itertools.count()

    def stage(self, layers: LayerRange) -> Stage:
        stage = self._loaded.stage(layers)
        forward = stage.forward

        def slower(hidden: F32, segments: Sequence[Segment]) -> F32:
            if next(self._steps) % self._often or self._often == 1:
                time.sleep(SLOW_S)
            return forward(hidden, segments)

        stage.forward = slower
        return stage


@pytest.fixture
async def compute() -> AsyncIterator[ComputeThread]:
    thread = ComputeThread()
    yield thread
    thread.close()


@pytest.mark.parametrize("steady", [True, False])
async def test_the_check_detects_whether_a_token_alone_has_the_bits_that_it_has_in_a_batch(
    compute: ComputeThread, steady: bool
) -> None:
    resident, loaded = residents()
    if not steady:
        resident.weights = Unsteady(loaded)
    await warm_up(resident, compute, SystemClock())
    assert resident.steady is steady
    assert resident.layer_decode_s > 0
    assert resident.kv is not None
    assert resident.kv_tokens_free == 64
    loaded.close()


async def test_other_work_that_slows_most_steps_does_not_count_as_the_time_of_the_layers(compute: ComputeThread) -> None:
    resident, loaded = residents()
    resident.weights = Disturbed(loaded)
    await warm_up(resident, compute, SystemClock())
    assert resident.layer_decode_s < SLOW_S / 2 / len(resident.layers)
    loaded.close()


async def test_times_that_were_measured_before_are_used_if_the_layers_still_take_as_long(compute: ComputeThread) -> None:
    resident, loaded = residents()
    assert await warm_up(resident, compute, SystemClock())
    before = LayerTimes.of(resident)
    again, _ = residents(loaded)
    for _ in range(20):  # on a busy machine the few compared steps may take longer
        if not await warm_up(again, compute, SystemClock(), before):
            break
    assert LayerTimes.of(again) == before
    again.weights = Disturbed(loaded, often=1)
    assert await warm_up(again, compute, SystemClock(), before)
    assert again.layer_decode_s > 10 * before.layer_decode_s
    loaded.close()


async def test_layers_with_known_times_are_checked_all_the_same(compute: ComputeThread) -> None:
    resident, loaded = residents()
    known = LayerTimes(layer_decode_s=1.0, layer_prefill_s=1.0)
    resident.weights = Unsteady(loaded)
    await warm_up(resident, compute, SystemClock(), known)
    assert not resident.steady
    loaded.close()


async def test_a_cancelled_check_frees_its_kv_after_the_running_step(compute: ComputeThread) -> None:
    resident, loaded = residents()
    begun, go = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert go.wait(5)

    blocked = asyncio.ensure_future(compute.call(hold))
    await asyncio.to_thread(begun.wait, 5)
    check = asyncio.ensure_future(warm_up(resident, compute, SystemClock()))
    await asyncio.sleep(0.01)
    check.cancel()
    await asyncio.wait([check])
    assert resident.kv_tokens_free < 64
    go.set()
    await blocked
    await compute.call(lambda: None, background=True)
    assert resident.kv_tokens_free == 64
    loaded.close()


def residents(loaded: LoadedLayers | None = None) -> tuple[ResidentLayers, LoadedLayers]:
    spec, layers = tiny_spec(tied=True), LayerRange(0, 2)
    model = TinyLlama(spec, kinds={"token_embd": "Q8_0"})
    loaded = loaded or make_backend("onnxruntime", 1).load(spec, layers, model, embedding=True, head=False)
    card = msgspec.structs.replace(make_card(spec.layers), spec=spec)
    resident = ResidentLayers(card, layers, kv_tokens=64, weight_bytes=0)
    resident.weights, resident.kv = loaded, KvShare(HostArena(1 << 30), card.id, spec, layers, 64)
    return resident, loaded
