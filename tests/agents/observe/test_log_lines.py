"""Lines of the log as events: with the session that they are about, from any thread, and not too many."""

import asyncio
import logging

import msgspec

from meshd.agents.observe.log_lines import LINES_AT_ONCE, LogLines, published
from meshd.agents.observe.stream import EventStream
from meshd.clock import SystemClock
from meshd.types import PeerId

LOG = logging.getLogger("meshd.test")
LOG.setLevel(logging.INFO)
SESSION = "0123456789abcdef" * 2


async def lines_of(stream: EventStream, start: int) -> list[tuple[str, str, str]]:
    reader = stream.read(start)
    lines = [msgspec.json.decode((await anext(reader)).line) for _ in range(stream.last - start)]
    await reader.aclose()
    return [(line["level"], line["text"], line["session"]) for line in lines]


async def test_lines_become_events_and_name_their_session() -> None:
    stream = EventStream(PeerId("p"), "desk", SystemClock())
    start = stream.last
    with published(stream, SystemClock()):
        LOG.info("session %s goes on", SESSION)
        LOG.debug("not shown")
        await asyncio.to_thread(LOG.error, "a disk is full")
        await asyncio.sleep(0)
    LOG.warning("after the end")
    assert await lines_of(stream, start) == [("info", f"session {SESSION} goes on", SESSION), ("error", "a disk is full", "")]


async def test_a_line_whose_arguments_are_wrong_does_not_fail_what_logs_it() -> None:
    stream = EventStream(PeerId("p"), "desk", SystemClock())
    start = stream.last
    handler = LogLines(stream, SystemClock(), asyncio.get_running_loop(), lambda level: None)
    handler.handle(logging.makeLogRecord({"msg": "%d seconds", "args": ("two",), "levelno": logging.INFO, "name": "meshd.x"}))
    assert await lines_of(stream, start) == [("info", "%d seconds", "")]


async def test_a_flood_of_lines_does_not_displace_other_events() -> None:
    stream = EventStream(PeerId("p"), "desk", SystemClock())
    start = stream.last
    with published(stream, SystemClock()):
        for number in range(10 * LINES_AT_ONCE):
            LOG.info("line %d", number)
    assert stream.last - start < 2 * LINES_AT_ONCE
