"""The layers in this peer's memory: which of them serve a request, and how much memory they reserve."""

from typing import Any, cast

import msgspec
import numpy as np

from in_process.adverts import CARD
from in_process.journals import HandClock
from meshd.agents.observe.stream import EventStream
from meshd.agents.placement.resident import HoldingChanges, LoadState, ResidentLayers, ResidentModels
from meshd.kernels.kv import KVPool
from meshd.types import LayerRange, PeerId


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


async def test_states_and_progress_of_layers_are_published_once_each() -> None:
    stream = EventStream(PeerId("p"), "desk", HandClock(1.0))
    holdings = ResidentModels()
    changes = HoldingChanges(holdings, stream)
    start = stream.last
    layers = ResidentLayers(card=CARD, layers=LayerRange(0, 1), kv_tokens=64, weight_bytes=1)
    holdings.entries.append(layers)
    for progress in (0.0, 0.0, 0.01, 0.5, 0.51, 1.0):
        layers.progress = progress
        changes.changed()
    for state in (LoadState.WARM, LoadState.ACTIVE, LoadState.ACTIVE, LoadState.DRAINING):
        layers.state = state
        changes.changed()
    holdings.entries.clear()
    changes.changed()
    changes.changed()
    reader = stream.read(start)
    told = [cast("dict[str, Any]", msgspec.json.decode((await anext(reader)).line)) for _ in range(stream.last - start)]
    await reader.aclose()
    assert {line["layers"] for line in told} == {"0-1"}
    assert [(line["type"], line.get("was"), line.get("state", line.get("progress"))) for line in told] == [
        ("holding", "", "loading"),
        ("load", None, 0.5),
        ("load", None, 1.0),
        ("holding", "loading", "warm"),
        ("holding", "warm", "active"),
        ("holding", "active", "draining"),
        ("holding", "draining", "released"),
    ]
