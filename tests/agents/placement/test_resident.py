"""The layers in this peer's memory: which of them serve a request, and how much memory they reserve."""

import numpy as np

from in_process.adverts import CARD
from meshd.agents.placement.resident import LoadState, ResidentLayers, ResidentModels
from meshd.kernels.kv import KVPool
from meshd.types import LayerRange


def resident(start: int, end: int, kv_tokens: int = 64, state: LoadState = LoadState.ACTIVE) -> ResidentLayers:
    return ResidentLayers(CARD, LayerRange(start, end), kv_tokens, weight_bytes=1000, state=state)


def test_only_active_layers_that_contain_the_request_serve_it() -> None:
    active = resident(0, 10)
    models = ResidentModels([active, resident(10, 20, state=LoadState.WARM)])
    assert models.find(CARD.id, LayerRange(2, 5)) is active
    assert models.find(CARD.id, LayerRange(5, 11)) is None
    assert models.find(CARD.id, LayerRange(12, 15)) is None


def test_the_entry_with_the_most_free_kv_serves() -> None:
    small, large = resident(0, 2), resident(0, 2)
    small.pool, large.pool = (KVPool(CARD.spec, LayerRange(0, 2), blocks) for blocks in (2, 4))
    assert ResidentModels([small, large]).find(CARD.id, LayerRange(0, 2)) is large
    large.pool.allocate(3 * 32)
    assert ResidentModels([small, large]).find(CARD.id, LayerRange(0, 2)) is small


def test_failed_layers_reserve_no_memory() -> None:
    active = resident(0, 2)
    models = ResidentModels([active, resident(2, 4, state=LoadState.FAILED)])
    assert models.reserved_bytes == active.reserved_bytes == 1000 + 64 * CARD.kv_bytes_per_token_layer() * 2


def test_only_an_unused_active_standby_gives_way() -> None:
    copy = resident(0, 2)
    assert not copy.gives_way
    copy.standby = True
    assert copy.gives_way
    copy.sessions = 1
    assert not copy.gives_way


def test_kv_that_a_session_has_freed_is_not_counted_as_memory_that_is_yet_to_be_taken() -> None:
    held = resident(0, 2, kv_tokens=128)
    held.pool = pool = KVPool(CARD.spec, LayerRange(0, 2), blocks=4)
    whole = held.untouched_bytes
    table = pool.allocate(64)
    values = np.ones((64, CARD.spec.kv_heads, CARD.spec.head_dim), np.float32)
    for layer in range(2):
        pool.write(layer, table, 0, values, values)
    pool.free(table)
    assert pool.blocks_free == 4
    assert held.untouched_bytes == whole // 2
