"""The rows that events add up to."""

import asyncio
from collections.abc import Collection
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from in_process.journals import HandClock
from meshd.agents.observe.events import Gone, Row
from meshd.agents.observe.rows import Key, RowFeed, changes
from meshd.agents.observe.stream import EventStream
from meshd.types import PeerId

LISTINGS = st.dictionaries(
    st.tuples(st.sampled_from(["peers", "links"]), st.sampled_from("abc")),
    st.dictionaries(st.just("n"), st.integers(0, 2)),
    max_size=5,
)


@given(st.lists(LISTINGS, max_size=5))
def test_events_add_up_to_the_rows(states: list[dict[Key, dict[str, Any]]]) -> None:
    rows: dict[Key, dict[str, Any]] = {}
    for before, after in zip([{}, *states], states, strict=False):
        for event in changes(before, after):
            match event:
                case Row(list=listing, key=key, row=row):
                    rows[listing, key] = row
                case Gone(list=listing, key=key):
                    del rows[listing, key]
        assert rows == after
        assert not list(changes(after, after))


class Feed:
    """A feed whose listings the test sets, and the kinds of events that a reader has got."""

    def __init__(self) -> None:
        self.clock = HandClock(0.0)
        self.stream = EventStream(PeerId("p"), "desk", self.clock)
        self.rows: dict[Key, dict[str, Any]] = {("peers", "a"): {"n": 1}}
        self.read = 0
        self.feed = RowFeed(self.stream, self.listings, self.clock)

    async def listings(self, wanted: Collection[str]) -> dict[Key, dict[str, Any]]:
        self.read += 1
        return {key: row for key, row in self.rows.items() if key[0] in wanted}

    async def lines(self, after: int) -> list[dict[str, Any]]:
        """Read the stream from number `after` to its present end."""
        reader = self.stream.read(after)
        lines = [msgspec.json.decode((await anext(reader)).line) for _ in range(self.stream.last - after)]
        await reader.aclose()
        return lines


async def test_a_feed_publishes_only_what_has_changed() -> None:
    feed = Feed()
    start = feed.stream.last
    for _ in range(2):
        await feed.feed.refresh()
    feed.rows["peers", "b"] = {"n": 2}
    await feed.feed.refresh()
    del feed.rows["peers", "a"]
    await feed.feed.refresh()
    told = [(line["type"], line["key"], line.get("row")) for line in await feed.lines(start)]
    assert told == [("row", "a", {"n": 1}), ("row", "b", {"n": 2}), ("gone", "a", None)]
    (whole,) = map(msgspec.json.decode, feed.feed.whole())
    assert (whole["type"], whole["list"], whole["key"], whole["row"]) == ("row", "peers", "b", {"n": 2})


async def test_rows_are_computed_while_somebody_reads_and_a_minute_longer() -> None:
    feed = Feed()
    running = asyncio.create_task(feed.feed.run())
    await feed.clock.move(60)
    assert feed.read == 0
    start = feed.stream.last
    reader = feed.stream.read()
    first = asyncio.ensure_future(anext(reader))
    await feed.clock.move(2)
    assert (await first).kind == "row"
    await reader.aclose()
    reads = feed.read
    await feed.clock.move(200)
    assert reads < feed.read < reads + 2 * 62
    feed.rows.clear()
    assert [line["type"] for line in await feed.lines(start)] == ["row", "lost"]  # nobody knows what changes from now on
    running.cancel()


async def test_for_other_peers_only_what_they_are_told_is_computed_and_a_reader_gets_the_rest() -> None:
    feed = Feed()
    await feed.feed.refresh()
    start = feed.stream.last
    running = asyncio.create_task(feed.feed.run())
    feed.stream.watchers = 1
    feed.rows = {("peers", "b"): {"n": 2}, ("sessions", "s"): {"n": 3}}
    await feed.clock.move(2)
    assert [(line["type"], line["list"], line["key"]) for line in await feed.lines(start)] == [("row", "sessions", "s")]
    reader = feed.stream.read(start)
    await anext(reader)
    await feed.clock.move(1)
    told = [(line["type"], line["list"], line["key"]) for line in await feed.lines(start)]
    assert told == [("row", "sessions", "s"), ("gone", "peers", "a"), ("row", "peers", "b")]
    await reader.aclose()
    running.cancel()
