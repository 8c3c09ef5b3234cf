"""The check step of freshly loaded layers."""

import itertools
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from in_process.clusters import make_card
from meshd.agents.placement.resident import ResidentLayers
from meshd.agents.placement.warmup import warm_up
from meshd.kernels.backend import F32, LoadedLayers, Segment, Stage
from meshd.kernels.kv import KVPool
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

        def other(hidden: F32, segments: Sequence[Segment], kv: KVPool) -> F32:
            out = forward(hidden, segments, kv)
            return out if len(hidden) > 1 else np.nextafter(out, np.float32(np.inf))

        stage.forward = other
        return stage


class Disturbed:
    """Layers that take `SLOW_S` longer in two of three steps, as beside other work."""

    def __init__(self, loaded: LoadedLayers) -> None:
        self._loaded = loaded
        self._steps = itertools.count()

    def stage(self, layers: LayerRange) -> Stage:
        stage = self._loaded.stage(layers)
        forward = stage.forward

        def slower(hidden: F32, segments: Sequence[Segment], kv: KVPool) -> F32:
            if next(self._steps) % 3:
                time.sleep(SLOW_S)
            return forward(hidden, segments, kv)

        stage.forward = slower
        return stage


@pytest.mark.parametrize("steady", [True, False])
def test_the_check_detects_whether_a_token_alone_has_the_bits_that_it_has_in_a_batch(steady: bool) -> None:
    resident, loaded = residents()
    if not steady:
        resident.weights = Unsteady(loaded)
    warm_up(resident)
    assert resident.steady is steady
    assert resident.layer_decode_s > 0
    assert resident.pool is not None
    assert resident.pool.blocks_free == 2
    loaded.close()


def test_other_work_that_slows_most_steps_does_not_count_as_the_time_of_the_layers() -> None:
    resident, loaded = residents()
    resident.weights = Disturbed(loaded)
    warm_up(resident)
    assert resident.layer_decode_s < SLOW_S / 2 / len(resident.layers)
    loaded.close()


def residents() -> tuple[ResidentLayers, LoadedLayers]:
    spec, layers = tiny_spec(tied=True), LayerRange(0, 2)
    model = TinyLlama(spec, kinds={"token_embd": "Q8_0"})
    loaded = make_backend("onnxruntime", 1).load(spec, layers, model, embedding=True, head=False)
    card = msgspec.structs.replace(make_card(spec.layers), spec=spec)
    resident = ResidentLayers(card, layers, kv_tokens=64, weight_bytes=0)
    resident.weights, resident.pool = loaded, KVPool(spec, layers, blocks=2)
    return resident, loaded
