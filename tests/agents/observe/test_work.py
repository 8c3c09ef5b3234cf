"""What readers of events learn of the steps that a peer computes."""

import asyncio
from typing import Any

import msgspec

from in_process.journals import HandClock
from meshd.agents.admin.event_relay import _EVENTS
from meshd.agents.observe.events import MAX_STAGES, Work
from meshd.agents.observe.stream import EventStream
from meshd.agents.observe.work import Phase, WorkMeter
from meshd.types import PeerId


def make(clock: HandClock | None = None) -> tuple[EventStream, WorkMeter]:
    clock = clock or HandClock(1.0)
    stream = EventStream(PeerId("p"), "desk", clock)
    return stream, WorkMeter(stream, clock)


def step(meter: WorkMeter, session: str, phase: Phase, tokens: int, busy_s: float, stage: int = 0) -> None:
    meter.add(session, stage, phase, model="m", layers="0-4", tokens=tokens, busy_s=busy_s, sent_bytes=64 * tokens)


def published(stream: EventStream, after: int) -> list[dict[str, Any]]:
    return [msgspec.json.decode(event.line) for event in stream.since(after)[1]]


def test_steps_are_added_up_for_each_stage_and_phase() -> None:
    stream, meter = make()
    stream.watchers = 1
    start = stream.last
    step(meter, "s", "prefill", 30, 0.25)
    for _ in range(3):
        step(meter, "s", "decode", 1, 0.5)
    meter.publish(2.0)
    meter.publish(1.0)  # nothing was computed since
    (event,) = published(stream, start)
    assert (event["type"], event["period_s"], event["steps"], event["tokens"], event["busy_s"]) == ("work", 2.0, 4, 3, 1.75)
    decode, prefill = event["stages"]
    assert (decode["phase"], decode["steps"], decode["tokens"], decode["busy_s"], decode["sent_bytes"]) == (
        "decode",
        3,
        3,
        1.5,
        192,
    )
    assert (prefill["phase"], prefill["steps"], prefill["tokens"], prefill["layers"]) == ("prefill", 1, 30, "0-4")


def test_without_readers_nothing_is_counted() -> None:
    stream, meter = make()
    start = stream.last
    step(meter, "s", "decode", 1, 0.5)
    stream.watchers = 1
    meter.publish(1.0)
    assert published(stream, start) == []


def test_the_busiest_stages_are_listed_and_the_sums_are_those_of_all() -> None:
    stream, meter = make()
    stream.watchers = 1
    start = stream.last
    for number in range(MAX_STAGES + 8):
        step(meter, f"s{number}", "decode", 1, float(number))
    meter.publish(1.0)
    (event,) = published(stream, start)
    assert event["steps"] == MAX_STAGES + 8
    assert [each["busy_s"] for each in event["stages"]] == [float(number) for number in range(MAX_STAGES + 7, 7, -1)]
    assert isinstance(_EVENTS.decode(stream.since(start)[1][0].line), Work)  # another peer takes it


async def test_work_is_published_once_in_a_period() -> None:
    clock = HandClock(1.0)
    stream, meter = make(clock)
    stream.watchers = 1
    start = stream.last
    running = asyncio.create_task(meter.run())
    step(meter, "s", "decode", 1, 0.5)
    await clock.move(1.0)
    step(meter, "s", "decode", 1, 0.5)
    await clock.move(1.5)
    running.cancel()
    assert [(event["period_s"], event["steps"]) for event in published(stream, start)] == [(1.0, 1), (1.0, 1)]
