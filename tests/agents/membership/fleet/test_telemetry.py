"""What is published of a peer, and what is not."""

import json

from meshd.agents.membership.fleet.telemetry import PUBLISHED, Meter, event_line
from meshd.agents.observe.events import KINDS, LogLine, NoticeGiven, Row, SessionChanged
from meshd.agents.observe.stream import EventStream
from meshd.clock import SystemClock
from meshd.types import PeerId


def test_an_event_has_only_its_listed_fields() -> None:
    stream = EventStream(PeerId("a" * 52), "one", SystemClock())
    stream.publish(
        SessionChanged(session="5" * 32, model="m", state="failed", was="running", tokens=3, reason="the prompt was: hush")
    )
    stream.publish(LogLine(level="info", logger="x", text="hush", session=""))
    stream.publish(NoticeGiven(message="hush", hint=""))
    stream.publish(Row(list="sessions", key="x", row={"prompt": "hush"}))
    stream.relay(SessionChanged(session="6" * 32, model="m", state="x", was="", tokens=0, reason=""), PeerId("b" * 52), "two", 1.0)
    lines = [line for event in stream.since(stream.last - 5)[1] if (line := event_line(event)) is not None]
    assert [kind for kind, _ in lines] == ["session"]
    assert set(json.loads(lines[0][1])) == {"at", "session", "model", "state", "was", "tokens"}


def test_every_published_kind_and_field_exists() -> None:
    for kind, fields in PUBLISHED.items():
        assert kind in KINDS
        assert set(fields) <= set(kind.__struct_fields__)


def test_a_rate_is_over_the_time_since_the_last_measurement() -> None:
    tokens = 100
    meter = Meter(lambda: tokens, lambda: 2, lambda: 1)
    assert meter.measure(10.0, 1_800_000_000.0)["tokens_per_s"] == 0.0
    tokens = 150
    measured = meter.measure(20.0, 1_800_000_010.0)
    assert measured["tokens_per_s"] == 5.0
    assert measured["at"] == 1_800_000_010_000
    assert (measured["peers"], measured["sessions"]) == (2, 1)
    assert measured["memory_free_bytes"] > 0
