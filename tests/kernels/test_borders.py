"""Weights that only stages over parts of the loaded layers need: their size, and that they are freed with the last such stage."""

import gc
from collections.abc import Iterator

import pytest

from meshd.kernels.backend import Backend, LoadedLayers
from meshd.types import LayerRange
from tiny.llama import tiny_spec
from tiny.sized import SizedWeights

WHOLE = LayerRange(0, 4)


@pytest.fixture(params=["Q4_1", "Q8_0", "F16"])
def layers(backend: Backend, request: pytest.FixtureRequest) -> Iterator[LoadedLayers]:
    spec = tiny_spec()
    loaded = backend.load(spec, WHOLE, SizedWeights(spec, request.param), embedding=False, head=False)
    yield loaded
    loaded.close()


def test_stages_over_parts_take_what_was_predicted_and_share_it(layers: LoadedLayers) -> None:
    whole = layers.weight_bytes
    parts = [LayerRange(0, 2), LayerRange(2, 4), LayerRange(1, 2), LayerRange(1, 4)]
    for count in range(1, len(parts) + 1):
        stages = [layers.stage(part) for part in parts[:count]]
        predicted = layers.border_bytes(parts[:count])
        assert layers.weight_bytes - whole == pytest.approx(predicted, rel=0.02)
        del stages
        gc.collect()
        assert layers.weight_bytes == whole


def test_a_stage_over_all_layers_takes_nothing_more(layers: LoadedLayers) -> None:
    whole = layers.weight_bytes
    stage = layers.stage(WHOLE)
    assert (layers.border_bytes([stage.layers]), layers.weight_bytes) == (0, whole)


def test_a_stage_keeps_its_weights_while_others_come_and_go(layers: LoadedLayers) -> None:
    whole = layers.weight_bytes
    kept = layers.stage(LayerRange(0, 2))
    other = layers.stage(LayerRange(1, 2))
    del other
    gc.collect()
    assert layers.weight_bytes - whole == pytest.approx(layers.border_bytes([kept.layers]), rel=0.02)
