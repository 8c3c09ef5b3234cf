"""The stream of a peer's events: numbered, kept for a while so that a reader can resume, and bounded in every direction.

An event is encoded once, for all readers. A reader has no queue of its own: it has a place in the kept events, so a slow reader
costs nothing and delays nobody. A reader whose place is no longer kept gets a `lost` event and goes on with the oldest kept one.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from itertools import islice

import msgspec

from meshd.agents.observe.events import MAX_TEXT, Event, Gone, Lost, Row
from meshd.clock import Clock
from meshd.types import PeerId

KEPT_EVENTS, KEPT_BYTES = 4096, 4 << 20
"""Limits of the events that are kept for readers: those of about a minute of a busy cluster."""


@dataclass(frozen=True, slots=True)
class Published:
    """An event in the stream."""

    number: int
    """Counts up by one, from the microsecond of the Unix epoch at which the daemon started: never used again after a restart."""
    kind: str
    listing: str
    """The listing of a row; empty for other kinds."""
    line: bytes
    """The event as a JSON object."""
    own: bool
    """Whether this peer published it. Others came from other peers."""


class EventStream:
    """The events of this peer. Must be used on the event loop's thread."""

    def __init__(self, me: PeerId, name: str, clock: Clock) -> None:
        self._me, self._name, self._clock = me, name, clock
        self._kept: deque[Published] = deque()
        self._size = 0
        self._born = self._last = int(clock.wall() * 1e6)
        self.watchers = 0
        """Number of other peers that get this peer's events. Set by `admin/event_relay.py`."""
        self.on_publish: Callable[[Event], None] = lambda event: None
        """Called with each event of this peer. Set by `compose`."""
        self.published = 0
        """Number of this peer's own events since the start."""
        self.lost = 0
        """Number of events that readers and other peers missed because they were too slow."""
        self._readers = 0
        self._changed = asyncio.Event()

    @property
    def readers(self) -> int:
        """Number of readers on this peer."""
        return self._readers

    @property
    def last(self) -> int:
        """The number of the newest event."""
        return self._last

    def publish(self, event: Event) -> None:
        """Add an event of this peer."""
        self.published += 1
        self._add(event, self.encode(event), own=True)
        self.on_publish(event)

    def encode(self, event: Event) -> bytes:
        """Return the event as a line of the stream, without adding it."""
        return _encode(event, self._me, self._name, self._clock.wall())

    def relay(self, event: Event, peer: PeerId, name: str, at: float) -> bytes:
        """Add an event that another peer has published and that is checked. `at`: when, in seconds since the Unix epoch.

        Returns: the event as a line of the stream.
        """
        line = _encode(event, peer, name, at)
        self._add(event, line, own=False)
        return line

    def since(self, after: int) -> tuple[int, list[Published]]:
        """Return the number of events after number `after` that are not kept any more, and those that are, at once."""
        first = self._last - len(self._kept) + 1
        missed = max(0, first - 1 - after)
        self.lost += missed
        return missed, list(islice(self._kept, max(0, after + 1 - first), None))

    async def read(self, after: int | None = None) -> AsyncGenerator[Published, None]:
        """Yield the events from now on, or all that follow number `after`.

        Cancel: the reader leaves.
        """
        place = self._last if after is None else after
        self._readers += 1
        try:
            if not self._born <= place <= self._last:  # a number of an earlier life of the daemon
                place = self._last
                yield self._lost(place, 0)
            while True:
                first = self._last - len(self._kept) + 1
                if place + 1 < first:
                    missed, place = first - 1 - place, first - 1
                    self.lost += missed
                    yield self._lost(place, missed)
                    continue  # the reader may have taken its time again
                if place == self._last:
                    self._changed.clear()
                    await self._changed.wait()
                    continue
                event = self._kept[place + 1 - first]
                place = event.number
                yield event
        finally:
            self._readers -= 1

    def _add(self, event: Event, line: bytes, *, own: bool) -> None:
        self._last += 1
        self._kept.append(Published(self._last, kind_of(event), listing_of(event), line, own))
        self._size += len(line)
        while len(self._kept) > KEPT_EVENTS or self._size > KEPT_BYTES:
            self._size -= len(self._kept.popleft().line)
        self._changed.set()

    def _lost(self, number: int, events: int) -> Published:
        return Published(number, "lost", "", self.encode(Lost(events=events)), own=True)


def kind_of(event: Event) -> str:
    """Return the value of the event's `type`."""
    return str(type(event).__struct_config__.tag)


def listing_of(event: Event) -> str:
    """Return the listing whose row the event is about; empty if it is about none."""
    return event.list if isinstance(event, Row | Gone) else ""


def _encode(event: Event, peer: PeerId, name: str, at: float) -> bytes:
    texts = ((field, getattr(event, field)) for field in event.__struct_fields__)
    if cut := {field: text[:MAX_TEXT] for field, text in texts if isinstance(text, str) and len(text) > MAX_TEXT}:
        event = msgspec.structs.replace(event, **cut)
    publisher = msgspec.json.encode({"at": at, "peer": peer, "name": name})
    return b"%b,%b" % (publisher[:-1], msgspec.json.encode(event)[1:])  # one object, without a copy of a row's parts
