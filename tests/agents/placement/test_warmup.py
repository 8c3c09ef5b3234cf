"""What is found out about a fresh load."""

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from in_process.clusters import make_card
from meshd.agents.placement.loads import ResidentLayers
from meshd.agents.placement.warmup import warm_up
from meshd.kernels.backend import F32, LoadedLayers, Segment, Stage
from meshd.kernels.kv import KVPool
from meshd.kernels.registry import make_backend
from meshd.types import LayerRange
from tiny.llama import TinyLlama, tiny_spec


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


@pytest.mark.parametrize("steady", [True, False])
def test_whether_a_token_has_the_same_bits_alone_is_found_out(steady: bool) -> None:
    spec, layers = tiny_spec(tied=True), LayerRange(0, 2)
    model = TinyLlama(spec, kinds={"token_embd": "Q8_0"})
    loaded = make_backend("onnxruntime", 1).load(spec, layers, model, embedding=True, head=False)
    card = msgspec.structs.replace(make_card(spec.layers), spec=spec)
    load = ResidentLayers(card, layers, kv_tokens=64, weight_bytes=0)
    load.weights = loaded if steady else Unsteady(loaded)
    load.pool = KVPool(spec, layers, blocks=2)
    warm_up(load)
    assert load.steady is steady
    assert load.layer_decode_s > 0
    assert load.pool.blocks_free == 2
    loaded.close()
