"""The check step of freshly loaded layers."""

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from in_process.clocks import SetClock
from in_process.clusters import make_card
from meshd.agents.device.compute import ComputeThread
from meshd.agents.placement.ready import warmup
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


class Paced:
    """Layers of which each step takes `step_s` by the clock, and all but one of `often` steps `SLOW_S` longer, as beside others.

    With `often` 1, no step is disturbed.
    """

    def __init__(self, loaded: LoadedLayers, clock: SetClock, step_s: float, often: int = 1) -> None:
        self._loaded, self._clock, self._step_s, self._often = loaded, clock, step_s, often
        self._steps = itertools.count()

    def stage(self, layers: LayerRange) -> Stage:
        stage = self._loaded.stage(layers)
        forward = stage.forward

        def paced(hidden: F32, segments: Sequence[Segment]) -> F32:
            disturbed = next(self._steps) % self._often != 0
            self._clock.now += self._step_s + SLOW_S * disturbed
            return forward(hidden, segments)

        stage.forward = paced
        return stage


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """The clock that steps are timed by."""
    clock = SetClock()
    monkeypatch.setattr(warmup, "time", SimpleNamespace(perf_counter=clock.monotonic))
    return clock


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


async def test_other_work_that_slows_most_steps_does_not_count_as_the_time_of_the_layers(
    compute: ComputeThread, clock: SetClock
) -> None:
    resident, loaded = residents()
    resident.weights = Paced(loaded, clock, step_s=0.01, often=3)
    await warm_up(resident, compute, clock)
    assert resident.layer_decode_s == pytest.approx(0.01 / len(resident.layers))
    loaded.close()


@pytest.mark.parametrize(("step_s", "again_s", "measured"), [(0.01, 0.0125, False), (0.01, 0.008, False), (0.01, 0.0135, True)])
async def test_times_that_were_measured_before_are_used_if_the_layers_still_take_as_long(
    compute: ComputeThread, clock: SetClock, step_s: float, again_s: float, measured: bool
) -> None:
    resident, loaded = residents()
    resident.weights = Paced(loaded, clock, step_s)
    assert await warm_up(resident, compute, clock)
    before = LayerTimes.of(resident)
    again, _ = residents(loaded)
    again.weights = Paced(loaded, clock, again_s)
    assert await warm_up(again, compute, clock, before) is measured
    assert (LayerTimes.of(again) == before) is not measured
    assert again.layer_decode_s == pytest.approx((again_s if measured else step_s) / len(again.layers))
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
