"""Brings the events of all peers to the readers of one peer.

While a peer has readers, it asks the peers that it is linked with for their events, and asks again before each lease ends. What
they send is checked and bounded like any other message: a peer tells only of itself, and its name and id are set here.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from logging import getLogger
from typing import Annotated, Final

import msgspec

from meshd.agents.budget import TokenBucket
from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.events import KINDS, TOLD, Event, Gone, Lost, Missed, Row
from meshd.agents.observe.rows import Key, RowFeed
from meshd.agents.observe.stream import EventStream
from meshd.clock import Clock
from meshd.protocol.messages import PeerEvents, WatchEvents
from meshd.types import PeerId

log = getLogger(__name__)

FEATURE: Final = "events"
LEASE_S, RENEW_S = 15.0, 5.0
BATCH_S = 0.2
"""Events are collected for so long before they are sent."""
BATCH_BYTES: Final = 64 << 10
MAX_WATCHERS = 16
EVENTS_PER_S, EVENTS_AT_ONCE = 500.0, 5000
"""Events that are taken from one peer. Further ones are counted."""
MAX_ROWS, MAX_ROWS_BYTES = 2048, 4 << 20
"""Rows that one peer may have here. A row over these limits is left out."""
MAX_KEY = 200


class _Envelope(msgspec.Struct):
    at: Annotated[float, msgspec.Meta(ge=0, le=1e12)]


_EVENTS: msgspec.json.Decoder[Event] = msgspec.json.Decoder(reduce(operator.or_, KINDS))
_ENVELOPES = msgspec.json.Decoder(_Envelope)


@dataclass(slots=True)
class _Watched:
    """A peer whose events come here."""

    budget: TokenBucket = field(default_factory=lambda: TokenBucket(EVENTS_PER_S, EVENTS_AT_ONCE))
    rows: dict[Key, bytes] = field(default_factory=dict)
    """Its rows as lines of the stream, by listing and key, for readers that come later."""
    rows_bytes: int = 0
    lost: int = 0
    """Events over its budget that its readers have not been told of."""


@dataclass(slots=True)
class _Watcher:
    """Another peer that this peer's events are sent to."""

    until: float
    """When its lease ends, in monotonic time."""
    place: int
    """Number of the last event that was sent to it, or left out."""


@dataclass(slots=True)
class EventRelay:
    """Sends this peer's events to others that ask for them, and asks others for theirs while somebody reads them here."""

    links: Links
    stream: EventStream
    rows: RowFeed
    names: Callable[[PeerId], str]
    clock: Clock
    _watchers: dict[PeerId, _Watcher] = field(default_factory=dict)
    _watched: dict[PeerId, _Watched] = field(default_factory=dict)
    _asked_at: float = float("-inf")

    def register(self) -> None:
        """Register the handlers of WATCH_EVENTS and PEER_EVENTS."""
        self.links.register(WatchEvents, self._on_watch)
        self.links.register(PeerEvents, self._on_events)

    async def run(self) -> None:
        """Ask and tell until cancelled."""
        while True:
            await self.clock.sleep(BATCH_S)
            self._ask(self.clock.monotonic())
            self._tell(self.clock.monotonic())

    def whole(self) -> list[bytes]:
        """Return the rows of other peers as lines of the stream, for a reader that has none."""
        return [line for watched in self._watched.values() for line in watched.rows.values()]

    def on_peer_gone(self, peer: PeerId) -> None:
        """Forget a lost peer. Its rows are gone."""
        self._watchers.pop(peer, None)
        self.stream.watchers = len(self._watchers)
        self._forget(peer)

    # What other peers send.

    def _ask(self, now: float) -> None:
        """Ask the other peers for their events, or ask again, while this peer has readers."""
        if not self.stream.readers:
            for peer in list(self._watched):
                self._forget(peer)
                try_send(self.links.send, peer, WatchEvents(lease_ms=0))  # else it would send no rows when the next reader comes
            self._asked_at = float("-inf")
        elif now - self._asked_at >= RENEW_S:
            self._asked_at = now
            for peer in self.links.peers():
                if FEATURE in self.links.features(peer):
                    self._watched.setdefault(peer, _Watched())
                    try_send(self.links.send, peer, WatchEvents(lease_ms=int(1000 * LEASE_S)))

    def _forget(self, peer: PeerId) -> None:
        watched = self._watched.pop(peer, None)
        if watched is not None:
            self._clear(peer, watched)

    def _clear(self, peer: PeerId, watched: _Watched) -> None:
        """Publish that all rows of a peer are gone."""
        for listing, key in sorted(watched.rows):
            self._publish(peer, self.clock.wall(), Gone(list=listing, key=key))
        watched.rows.clear()
        watched.rows_bytes = 0

    def _on_events(self, sender: PeerId, message: PeerEvents, payload: memoryview) -> None:
        watched = self._watched.get(sender)
        if watched is None:
            return  # its last events, after the last reader has left
        if message.lost:
            self._clear(sender, watched)
            self._publish(sender, self.clock.wall(), Missed(events=message.lost))
        now = self.clock.monotonic()
        for line in bytes(payload[:BATCH_BYTES]).splitlines():
            if not watched.budget.take(now):
                watched.lost += 1
                continue
            try:
                event, at = _EVENTS.decode(line), _ENVELOPES.decode(line).at
            except msgspec.MsgspecError as error:
                log.debug("an event of %s is not usable: %s", self.names(sender), error)
                continue
            self._take(sender, watched, at, event)
        if watched.lost and watched.budget.has(now):
            self._publish(sender, self.clock.wall(), Missed(events=watched.lost))
            watched.lost = 0

    def _take(self, sender: PeerId, watched: _Watched, at: float, event: Event) -> None:
        match event:
            case Row(list=listing, key=key) | Gone(list=listing, key=key) if listing in TOLD and len(key) <= MAX_KEY:
                self._take_row(sender, watched, at, msgspec.structs.replace(event, key=f"{sender} {key}"))
            case Row() | Gone() | Lost() | Missed():
                return  # about what this peer knows itself
            case _:
                self._publish(sender, at, event)

    def _take_row(self, sender: PeerId, watched: _Watched, at: float, event: Row | Gone) -> None:
        key = event.list, event.key
        before = watched.rows.pop(key, None)
        watched.rows_bytes -= len(before or b"")
        if isinstance(event, Row) and len(watched.rows) < MAX_ROWS and watched.rows_bytes < MAX_ROWS_BYTES:
            watched.rows[key] = line = self._publish(sender, at, event)
            watched.rows_bytes += len(line)
        elif before is not None:
            self._publish(sender, at, Gone(list=event.list, key=event.key))

    def _publish(self, peer: PeerId, at: float, event: Event) -> bytes:
        return self.stream.relay(event, peer, self.names(peer), at)

    # What this peer sends.

    def _on_watch(self, sender: PeerId, message: WatchEvents, payload: memoryview) -> None:
        if not message.lease_ms:
            self._watchers.pop(sender, None)
            self.stream.watchers = len(self._watchers)
            return
        until = self.clock.monotonic() + min(message.lease_ms / 1000, LEASE_S)
        known = self._watchers.get(sender)
        if known is not None:
            known.until = until
        elif len(self._watchers) < MAX_WATCHERS:
            self._watchers[sender] = _Watcher(until, self.stream.last)
            self.stream.watchers = len(self._watchers)
            self._send(sender, self.rows.whole(TOLD), 0)

    def _tell(self, now: float) -> None:
        for peer, watcher in list(self._watchers.items()):
            if watcher.until < now:
                del self._watchers[peer]
                continue
            lost, events = self.stream.since(watcher.place)
            watcher.place = self.stream.last
            if lost:
                rows = self.rows.whole(TOLD)
                self._send(peer, rows, lost)
            else:
                self._send(peer, [event.line for event in events if event.own and event.listing in ("", *TOLD)], 0)
        self.stream.watchers = len(self._watchers)

    def _send(self, peer: PeerId, lines: list[bytes], lost: int) -> None:
        """Send lines in batches. A line that is longer than a batch is left out."""
        batch: list[bytes] = []
        size = 0
        for line in (*lines, b""):
            if (batch and (not line or size + len(line) + 1 > BATCH_BYTES)) or (not line and lost):
                try_send(self.links.send, peer, PeerEvents(lost=lost), b"\n".join(batch))
                batch, size, lost = [], 0, 0
            if line and len(line) < BATCH_BYTES:
                batch.append(line)
                size += len(line) + 1
