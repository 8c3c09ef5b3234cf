"""What readers of events learn about the layers on a peer."""

from typing import Any, cast

import msgspec

from in_process.answers import CARD
from in_process.journals import HandClock
from meshd.agents.observe.stream import EventStream
from meshd.agents.placement.changes import HoldingChanges
from meshd.agents.placement.resident import LoadState, ResidentLayers, ResidentModels
from meshd.types import LayerRange, PeerId


async def test_states_and_progress_are_published_once_each() -> None:
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
