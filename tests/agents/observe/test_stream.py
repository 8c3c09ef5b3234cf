"""The stream of a peer's events: every reader gets every event in order, resumes by a number, and learns what it has missed."""

import asyncio

import msgspec

from in_process.journals import HandClock
from meshd.agents.observe.events import MAX_TEXT, NoticeGiven, Row
from meshd.agents.observe.stream import KEPT_BYTES, KEPT_EVENTS, EventStream, Published
from meshd.types import PeerId

BORN = 5_000_000


def new_stream() -> EventStream:
    return EventStream(PeerId("p"), "desk", HandClock(BORN / 1e6))


def tell(stream: EventStream, *messages: str) -> None:
    for message in messages:
        stream.publish(NoticeGiven(message=message, hint=""))


async def take(stream: EventStream, count: int, after: int | None = None) -> list[Published]:
    reader = stream.read(after)
    try:
        async with asyncio.timeout(1):
            return [await anext(reader) for _ in range(count)]
    finally:
        await reader.aclose()


async def test_every_reader_gets_every_event_in_order_from_where_it_began() -> None:
    stream = new_stream()
    tell(stream, "before")
    readers = [asyncio.create_task(take(stream, 2)) for _ in range(2)]
    await asyncio.sleep(0)
    assert stream.readers == 2
    tell(stream, "a", "b")
    for events in await asyncio.gather(*readers):
        assert [event.number for event in events] == [BORN + 2, BORN + 3]
        first = msgspec.json.decode(events[0].line)
        assert first == {"at": 5.0, "peer": "p", "name": "desk", "type": "notice", "message": "a", "hint": ""}
    assert stream.readers == 0


async def test_a_reader_resumes_after_a_number() -> None:
    stream = new_stream()
    tell(stream, "a", "b", "c")
    assert [event.number for event in await take(stream, 2, after=BORN + 1)] == [BORN + 2, BORN + 3]


async def test_a_reader_that_is_too_late_learns_how_much_it_missed() -> None:
    stream = new_stream()
    reader = stream.read(BORN)
    tell(stream, *map(str, range(KEPT_EVENTS + 7)))
    lost, first = await anext(reader), await anext(reader)
    assert (lost.kind, msgspec.json.decode(lost.line)["events"]) == ("lost", 7)
    assert first.number == lost.number + 1 == BORN + 8
    tell(stream, *map(str, range(KEPT_EVENTS)))  # it reads too slowly, too
    lost, next_one = await anext(reader), await anext(reader)
    assert (lost.kind, msgspec.json.decode(lost.line)["events"]) == ("lost", KEPT_EVENTS - 1)
    assert next_one.number == lost.number + 1
    await reader.aclose()


async def test_a_number_of_another_life_of_the_daemon_is_not_resumed() -> None:
    stream = new_stream()
    tell(stream, "a")
    for number in (0, BORN - 1, BORN + 2):
        (lost,) = await take(stream, 1, after=number)
        assert (lost.kind, lost.number) == ("lost", BORN + 1)


async def test_the_bytes_of_kept_events_and_of_each_text_are_bounded() -> None:
    stream = new_stream()
    row = Row(list="sessions", key="s", row={"text": "x" * 400_000})
    for _ in range(12):
        stream.publish(NoticeGiven(message="y" * 1000, hint=""))
        stream.relay(row, PeerId("q"), "attic", 1.0)
    lost, *_ = await take(stream, 2, after=BORN)
    assert msgspec.json.decode(lost.line)["events"] > 0
    kept = await take(stream, stream.last - lost.number, after=lost.number)
    assert sum(len(event.line) for event in kept) <= KEPT_BYTES
    notice = next(msgspec.json.decode(event.line) for event in kept if event.kind == "notice")
    assert notice["message"] == "y" * MAX_TEXT
