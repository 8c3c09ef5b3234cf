"""The layers in this peer's memory: which of them serve a request, and how much memory they reserve."""

from typing import Any, cast

import msgspec
import numpy as np

from in_process.adverts import CARD
from in_process.journals import HandClock
from meshd.agents.observe.stream import EventStream
from meshd.agents.placement.resident import HoldingChanges, LoadState, ResidentLayers, ResidentModels
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.kv.memory import KvKey, layout_of
from meshd.kernels.kv.share import KvShare
from meshd.types import LayerRange, PeerId


def resident(start: int, end: int, kv_tokens: int = 64, state: LoadState = LoadState.ACTIVE) -> ResidentLayers:
    return ResidentLayers(CARD, LayerRange(start, end), kv_tokens, weight_bytes=1000, state=state)


def test_only_active_layers_that_contain_the_request_serve_it() -> None:
    active = resident(0, 10)
    models = ResidentModels(HostArena(1 << 30), [active, resident(10, 20, state=LoadState.WARM)])
    assert models.find(CARD.id, LayerRange(2, 5)) is active
    assert models.find(CARD.id, LayerRange(5, 11)) is None
    assert models.find(CARD.id, LayerRange(12, 15)) is None


def test_the_entry_with_the_most_free_kv_serves() -> None:
    small, large = resident(0, 2), resident(0, 2)
    small.kv, large.kv = (KvShare(HostArena(1 << 30), CARD.id, CARD.spec, LayerRange(0, 2), tokens) for tokens in (64, 128))
    assert ResidentModels(HostArena(1 << 30), [small, large]).find(CARD.id, LayerRange(0, 2)) is large
    large.kv.open(LayerRange(0, 2), 3 * 32)
    assert ResidentModels(HostArena(1 << 30), [small, large]).find(CARD.id, LayerRange(0, 2)) is small


def test_failed_layers_reserve_no_memory() -> None:
    active = resident(0, 2)
    models = ResidentModels(HostArena(1 << 30), [active, resident(2, 4, state=LoadState.FAILED)])
    assert models.reserved_bytes == active.reserved_bytes == 1000 + 64 * CARD.kv_bytes_per_token_layer() * 2


def test_only_an_unused_active_standby_gives_way() -> None:
    copy = resident(0, 2)
    assert not copy.gives_way
    copy.standby = True
    assert copy.gives_way
    copy.sessions = 1
    assert not copy.gives_way


def test_kv_is_counted_once_before_during_and_after_a_session() -> None:
    """Reserved memory is what a session uses and what it does not; what it has freed is to be taken from the system again."""
    held, arena = resident(0, 2, kv_tokens=128), HostArena(1 << 30)
    models = ResidentModels(arena, [held])
    held.kv = share = KvShare(arena, CARD.id, CARD.spec, held.layers, 128)
    reserved, whole = models.reserved_bytes, models.untouched_bytes
    assert whole == share.bytes == reserved - 1000
    lease = share.open(held.layers, 64)
    assert isinstance(lease, HostLease)
    values = np.ones((64, CARD.spec.kv_heads, CARD.spec.head_dim), np.float32)
    for layer in held.layers:
        lease.write(layer, 0, values, values)
    assert (held.kv_tokens_free, held.in_use) == (64, True)
    assert models.untouched_bytes == whole // 2
    lease.forget()
    assert (held.kv_tokens_free, held.in_use) == (128, False)
    assert models.untouched_bytes == whole
    assert models.reserved_bytes == reserved


def test_kv_without_layers_on_this_peer_is_counted_too() -> None:
    arena = HostArena(1 << 30)
    models = ResidentModels(arena, [resident(0, 2)])
    before = models.reserved_bytes, models.untouched_bytes
    lease = arena.open(KvKey(CARD.id, LayerRange(4, 6)), layout_of(CARD.spec, LayerRange(4, 6)), 64)
    assert models.reserved_bytes - before[0] == models.untouched_bytes - before[1] == lease.reserved_bytes
    values = np.ones((32, CARD.spec.kv_heads, CARD.spec.head_dim), np.float32)
    for layer in (4, 5):
        lease.write(layer, 0, values, values)
    assert models.untouched_bytes - before[1] == lease.reserved_bytes // 2


async def test_states_and_progress_of_layers_are_published_once_each() -> None:
    stream = EventStream(PeerId("p"), "desk", HandClock(1.0))
    holdings = ResidentModels(HostArena(1 << 30))
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
