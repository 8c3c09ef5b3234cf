"""The events of other peers: they come while somebody reads, and each peer tells only of itself, and only so much."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from in_process.peers import Peer, Peers, until
from meshd.agents.admin import event_relay
from meshd.agents.admin.event_relay import EVENTS_AT_ONCE, MAX_ROWS, EventRelay
from meshd.agents.admin.view import ClusterView
from meshd.agents.observe.events import NoticeGiven
from meshd.agents.observe.rows import Key, RowFeed
from meshd.agents.observe.stream import EventStream
from meshd.clock import SystemClock
from meshd.protocol.messages import PeerEvents, WatchEvents
from meshd.types import PeerId


class CountingRelay(EventRelay):
    """A relay that counts the batches of events that have come."""

    batches = 0

    def _on_events(self, sender: PeerId, message: PeerEvents, payload: memoryview) -> None:
        self.batches += 1
        super()._on_events(sender, message, payload)


class Site:
    """A peer with a relay and one session."""

    def __init__(self, peer: Peer) -> None:
        self.peer, clock = peer, SystemClock()
        self.stream = EventStream(peer.id, "own", clock)
        self.listed: dict[Key, dict[str, Any]] = {("sessions", "s"): {"id": "s"}, ("peers", "p"): {"id": "p"}}
        self.rows = RowFeed(self.stream, self._listings, clock)
        self.relay = CountingRelay(peer.links, self.stream, self.rows, lambda other: f"name of {other:.4}", clock)
        self.relay.register()
        self.running = [asyncio.create_task(self.relay.run()), asyncio.create_task(self.rows.run())]

    async def _listings(self, wanted: Collection[str]) -> dict[Key, dict[str, Any]]:
        return {key: row for key, row in self.listed.items() if key[0] in wanted}

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Read this peer's stream inside the block. Yields the events so far."""
        events: list[dict[str, Any]] = []

        async def read() -> None:
            async for event in self.stream.read():
                events.append(msgspec.json.decode(event.line))  # noqa: PERF401

        reader = asyncio.create_task(read())
        try:
            yield events
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def tell(self, other: "Site", *lines: object, lost: int = 0) -> None:
        """Send lines to another peer, whether it has asked for them or not."""
        self.peer.links.send(other.peer.id, PeerEvents(lost=lost), "\n".join(map(json.dumps, lines)).encode())


@pytest.fixture
async def pair(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Site, Site]]:
    monkeypatch.setattr(event_relay, "BATCH_S", 0.02)
    a, b = Site(peers.start("a")), Site(peers.start("b"))
    a.peer.dial(b.peer)
    await a.peer.next_up()
    await b.peer.next_up()
    yield a, b
    for task in (*a.running, *b.running):
        task.cancel()


def foreign(events: list[dict[str, Any]], site: Site) -> list[dict[str, Any]]:
    """Return the events of `site` among those that another peer read."""
    return [event for event in events if event["peer"] == site.peer.id]


async def test_rows_and_happenings_of_another_peer_come_while_somebody_reads(pair: tuple[Site, Site]) -> None:
    a, b = pair
    async with a.reading() as events:
        await until(lambda: b.stream.watchers == 1)
        await until(lambda: any(event["type"] == "row" for event in foreign(events, b)))
        b.stream.publish(NoticeGiven(message="hello", hint=""))
        await until(lambda: any(event["type"] == "notice" for event in foreign(events, b)))
        (row,) = (event for event in foreign(events, b) if event["type"] == "row")
        assert (row["list"], row["key"], row["row"]) == ("sessions", f"{b.peer.id} s", {"id": "s"})  # not its list of peers
        assert {event["name"] for event in foreign(events, b)} == {f"name of {b.peer.id:.4}"}
        del b.listed["sessions", "s"]
        await until(lambda: foreign(events, b)[-1]["type"] == "gone")
        assert b.stream.readers == 0
        assert not foreign([msgspec.json.decode(event.line) for event in b.stream.since(0)[1]], a)  # nobody reads at b


async def test_the_rows_of_a_peer_are_gone_with_its_link_or_with_the_last_reader(pair: tuple[Site, Site]) -> None:
    a, b = pair
    async with a.reading() as events:
        await until(lambda: bool(foreign(events, b)))
        a.relay.on_peer_gone(b.peer.id)
        await until(lambda: foreign(events, b)[-1]["type"] == "gone")
    async with a.reading() as events:
        await until(lambda: a.relay._watched != {})
        start = a.stream.last
    await until(lambda: a.relay._watched == {})
    assert [event.kind for event in a.stream.since(start)[1]].count("gone") <= 1
    async with a.reading() as events:  # at once, while the lease of the last reader would last
        await until(lambda: any(event["type"] == "row" for event in foreign(events, b)))
    await until(lambda: b.stream.watchers == 0)


async def test_a_peer_that_does_not_ask_again_is_told_nothing_more(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.peer.links.send(b.peer.id, WatchEvents(lease_ms=10_000))
    await until(lambda: b.stream.watchers == 1)
    monotonic = b.relay.clock.monotonic
    b.relay.clock = type("Later", (SystemClock,), {"monotonic": lambda self: monotonic() + event_relay.LEASE_S + 1})()
    await until(lambda: b.stream.watchers == 0)


async def test_a_second_reader_has_the_rows_of_other_peers_at_once(pair: tuple[Site, Site]) -> None:
    a, b = pair
    view = cast("Any", SimpleNamespace(stream=a.stream, rows=a.rows, relay=a.relay))
    view._rows_of_all = lambda: ClusterView._rows_of_all(view)
    async with a.reading() as events:
        await until(lambda: any(event["type"] == "row" for event in foreign(events, b)))
        async with aclosing(ClusterView.events(view, None)) as lines:
            rows = [msgspec.json.decode((await anext(lines)).line) for _ in range(3)]
    assert [(row["peer"] == b.peer.id, row["list"]) for row in rows] == [(False, "sessions"), (False, "peers"), (True, "sessions")]


async def test_rows_of_a_peer_take_a_bounded_room(pair: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    monkeypatch.setattr(event_relay, "MAX_ROWS_BYTES", 2000)
    async with a.reading() as events:
        await until(lambda: a.relay._watched != {})
        row = {"type": "row", "at": 1.0, "list": "plans", "row": {"id": "x" * 1000}}
        b.tell(a, *[row | {"key": str(number)} for number in range(9)])
        b.tell(a, row | {"key": "0", "row": {"id": "y"}}, {"type": "notice", "at": 1.0, "message": "the end", "hint": ""})
        await until(lambda: any(event.get("message") == "the end" for event in events))
        watched = a.relay._watched[b.peer.id]
        assert watched.rows_bytes == sum(map(len, watched.rows.values())) < 4000
        assert a.relay.whole()[-1].endswith(b'"row":{"id":"y"}}')


async def test_a_peer_can_tell_only_of_itself_and_only_what_it_alone_knows(pair: tuple[Site, Site]) -> None:
    a, b = pair
    notice = {"type": "notice", "at": 1.0, "message": "hi", "hint": ""}
    b.tell(a, notice)  # nobody has asked
    await until(lambda: a.relay.batches == 1)  # else it may arrive after the relay has asked, and then it counts
    async with a.reading() as events:
        await until(lambda: a.relay._watched != {})
        b.listed.clear()
        b.tell(
            a,
            notice | {"peer": a.peer.id, "name": "own", "message": "x" * 10_000},
            {"type": "row", "at": 1.0, "list": "peers", "key": "p", "row": {"id": "p"}},
            {"type": "gone", "at": 1.0, "list": "sessions", "key": "never told"},
            {"type": "lost", "at": 1.0, "events": 5},
            {"type": "notice", "at": "yesterday", "message": "", "hint": ""},
            {"type": "notice", "message": "without a time", "hint": ""},
            {"type": "no such type", "at": 1.0},
            ["not", "an", "object"],
            notice | {"message": "the end"},
        )
        await until(lambda: any(event.get("message") == "the end" for event in events))
        told = [event for event in foreign(events, b) if event["type"] not in ("row", "gone") or event["list"] == "peers"]
        assert [(event["type"], len(event["message"])) for event in told] == [("notice", 500), ("notice", 7)]
        assert not [event for event in events if event["peer"] == a.peer.id and event["type"] == "notice"]


async def test_a_peer_that_tells_too_much_is_cut_short_and_that_is_said(pair: tuple[Site, Site]) -> None:
    a, b = pair
    async with a.reading() as events:
        await until(lambda: a.relay._watched != {})
        for batch in range(0, 2 * MAX_ROWS, 64):
            rows = [{"type": "row", "at": 1.0, "list": "plans", "key": str(batch + n), "row": {}} for n in range(64)]
            b.tell(a, *rows)
        await until(lambda: len(a.relay._watched[b.peer.id].rows) >= MAX_ROWS)
        for _ in range(0, 2 * EVENTS_AT_ONCE, 500):
            b.tell(a, *[{"type": "notice", "at": 1.0, "message": "", "hint": ""}] * 500)
        await until(lambda: a.relay._watched[b.peer.id].lost > 0)
        assert len(a.relay._watched[b.peer.id].rows) == MAX_ROWS
        await asyncio.sleep(0.1)
        b.tell(a, {"type": "notice", "at": 1.0, "message": "", "hint": ""})
        await until(lambda: any(event["type"] == "missed" for event in events))


async def test_a_watcher_that_the_sender_left_behind_gets_the_rows_again(pair: tuple[Site, Site]) -> None:
    a, b = pair
    async with a.reading() as events:
        await until(lambda: bool(foreign(events, b)))
        for number in range(5000):
            b.stream.publish(NoticeGiven(message=str(number), hint=""))
        await until(lambda: any(event["type"] == "missed" for event in foreign(events, b)))
        await until(lambda: foreign(events, b)[-1]["type"] == "row")
        kinds = [event["type"] for event in foreign(events, b)]
        assert kinds[kinds.index("missed") - 1] == "gone"


async def test_there_is_a_limit_of_watchers(pair: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair
    monkeypatch.setattr(event_relay, "MAX_WATCHERS", 0)
    a.peer.links.send(b.peer.id, WatchEvents(lease_ms=1000))
    await asyncio.sleep(0.1)
    assert b.stream.watchers == 0
