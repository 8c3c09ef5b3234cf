"""Publishes the changes of the listings of `/mesh/v1/` as events, while somebody reads them."""

from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshd.agents.observe.events import LISTINGS, TOLD, Event, Gone, Listing, Lost, Row
from meshd.agents.observe.stream import EventStream
from meshd.clock import Clock

PERIOD_S = 0.5
_AFTERGLOW_S = 60.0
"""Rows are published for this long after the last reader has left: it may come back and resume."""

Key = tuple[Listing, str]
Rows = Mapping[Key, dict[str, Any]]


@dataclass(slots=True)
class RowFeed:
    """Compares the listings with what was published, and publishes the differences."""

    stream: EventStream
    listings: Callable[[Collection[Listing]], Awaitable[Rows]]
    """Returns all rows of some listings. A row's key never means another thing later."""
    clock: Clock
    _published: dict[Key, dict[str, Any]] = field(default_factory=dict)
    _read_at: float = float("-inf")
    _watched_at: float = float("-inf")

    async def run(self) -> None:
        """Publish changes until cancelled. Without readers, nothing is computed."""
        while True:
            await self.clock.sleep(PERIOD_S)
            now = self.clock.monotonic()
            if self.stream.readers:
                self._read_at = now
            if self.stream.watchers:
                self._watched_at = now
            if now - self._read_at < _AFTERGLOW_S:
                await self.refresh()
            elif now - self._watched_at < _AFTERGLOW_S:
                await self.refresh(TOLD)  # other peers get nothing else; a reader that comes gets all that has changed meanwhile
            elif self._published:
                self._published = {}
                self.stream.publish(Lost(events=0))  # for readers that resume later: what was not published they can't know

    async def refresh(self, listings: Collection[Listing] = LISTINGS) -> None:
        """Publish what has changed in these listings since they were published last."""
        rows = await self.listings(listings)
        before = {key: row for key, row in self._published.items() if key[0] in listings}
        for event in changes(before, rows):
            self.stream.publish(event)
        self._published = {key: row for key, row in self._published.items() if key[0] not in listings} | dict(rows)

    def whole(self, listings: Collection[str] = LISTINGS) -> list[bytes]:
        """Return the published rows of these listings as lines of the stream, for a reader that has none."""
        return [
            self.stream.encode(Row(list=listing, key=key, row=row))
            for (listing, key), row in self._published.items()
            if listing in listings
        ]


def changes(before: Rows, after: Rows) -> Iterator[Event]:
    """Yield the events that turn the rows `before` into the rows `after`."""
    for listing, key in sorted(before.keys() - after.keys()):
        yield Gone(list=listing, key=key)
    for (listing, key), row in after.items():
        if before.get((listing, key)) != row:
            yield Row(list=listing, key=key, row=row)
