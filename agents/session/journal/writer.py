"""The coordinator's side of the journal: other peers, the deputies, keep copies of each session's record in case this peer is lost.

A new deputy gets the record, for a long answer only with its first tokens, and confirms it. After that it gets only tokens, in
batches that it does not acknowledge: the link keeps them in order. A deputy that misses tokens or has no room sends JOURNAL_DROP,
and a record is sent again. Each token costs one append to a list, and each batch one small message. One timer serves all sessions.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.session.journal.deputy import MAX_RECORD_BYTES
from meshd.agents.session.journal.drops import KEEP_ENDED_S, DropQueue
from meshd.agents.session.journal.pending import PendingTokens
from meshd.agents.session.journal.record import MAX_TOKENS_BYTES, SessionRecord, encode_record, first_part, token_bytes
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.messages import Journal, JournalTokens
from meshd.types import Advert, PeerId, SessionId, TokenLogprobs

log = getLogger(__name__)

BATCH_TOKENS = 16
BATCH_S = 0.25
_CHECK_S = 1.0
"""Interval at which a deputy is chosen for sessions that have none."""
_RENEW_S = 120.0
"""Interval at which an unfinished record without new tokens is renewed, because deputies delete records that do not change."""
_CONFIRM_S = 5.0
_FIRST_BYTES = 1 << 20
"""Bytes of tokens in JOURNAL. The others follow in small messages, so that a record is never too large for one."""
_MESSAGES_AT_ONCE = 8
"""Messages with tokens that are sent in a row, at most: they share a lane with the messages of all sessions."""
_BACKLOG_TOKENS = 256
"""If this many tokens wait, only the timer sends them."""
_AVOID_REFUSING_S = 10.0
"""How long a peer that refused a record is not asked again to keep it."""
_AVOID_DROPPED_S = 1.0
"""How long a deputy that sent JOURNAL_DROP is not asked again to keep the record."""
_MAX_TRANSFERS = 8
"""Full records that may be in transit at once: a lost deputy causes many transfers, which must not crowd the links."""
_MAX_ENDED = 256
_DROP_RELEASED_S = 60.0
"""When another peer takes a session over, the old deputy keeps its record this long: by then a new deputy surely has one."""
_DROP_MOVED_S = 10.0
"""When the deputy changes, the old one keeps its record this long: by then the new deputy surely has the record."""


@dataclass(slots=True, eq=False)
class _Entry:
    """One session and the state of its journal."""

    session: SessionId
    record: Callable[[], SessionRecord]
    plan_peers: Callable[[], tuple[PeerId, ...]]
    epoch: int = 0
    finish: str = ""
    ended_at: float = 0.0
    deputy: PeerId | None = None
    confirmed: bool = False
    """Whether the deputy has confirmed the full record. Until then tokens wait."""
    tokens: PendingTokens = field(default_factory=PendingTokens)
    sent_finish: str = ""
    """The finish reason that was last sent to the deputy."""
    sent_at: float = 0.0
    transfer: int = 0
    """Counts the full transfers that were queued or given up, so that a late reply to an older transfer can be ignored."""
    limited: bool = False
    """Whether a warning was logged because the deputy does not get the whole record."""
    too_large: bool = False
    """Whether even the record without tokens is too large for any deputy."""
    avoid: dict[PeerId, float] = field(default_factory=dict)
    """Peer that must not be chosen as deputy -> time until which it is excluded."""


class JournalWriter:
    """Keeps each session's record at one deputy. Owns the tokens and records that have not been sent yet."""

    def __init__(
        self,
        me: PeerId,
        links: Links,
        clock: Clock,
        adverts: Callable[[], list[Advert]],
        excluded: Callable[[SessionId], Collection[PeerId]] = lambda session: (),
    ) -> None:
        """`excluded`: returns peers that must not become a session's deputy, because another writer has chosen them."""
        self._excluded = excluded
        self._me = me
        self._links = links
        self._clock = clock
        self._adverts = adverts
        self._entries: dict[SessionId, _Entry] = {}
        self._unsent: dict[_Entry, None] = {}
        """Entries with tokens that wait for the timer, first in, first out."""
        self._transfers: dict[_Entry, None] = {}
        """Entries whose full record must be sent, first in, first out."""
        self._wake = asyncio.Event()
        self._drops = DropQueue(links, clock)

    def __len__(self) -> int:
        return len(self._entries)

    def deputy_of(self, session: SessionId) -> PeerId | None:
        """Returns: the peer that has confirmed this session's record; None while no peer has."""
        entry = self._entries.get(session)
        return entry.deputy if entry is not None and entry.confirmed else None

    def chosen_for(self, session: SessionId) -> PeerId | None:
        """Returns: the peer that has this session's record, or was asked to keep it; None if there is none."""
        entry = self._entries.get(session)
        return entry.deputy if entry is not None else None

    def begin(self, session: SessionId, record: Callable[[], SessionRecord], plan_peers: Callable[[], tuple[PeerId, ...]]) -> None:
        """Keep this session's record at a deputy from now on. Called again at each new plan, because the record contains the plan.

        record: returns the full record as it is at the time of the call.
        plan_peers: returns the peers of the session's plan. They become deputies only if there is no other peer.
        """
        entry = self._entries.get(session)
        if entry is None:
            entry = self._entries[session] = _Entry(session, record, plan_peers)
        else:
            entry.record, entry.plan_peers, entry.finish = record, plan_peers, ""
            entry.too_large = False
        self._queue_transfer(entry)

    def token(self, session: SessionId, index: int, token: int, logprobs: TokenLogprobs | None) -> None:
        """Journal one more token of the answer."""
        entry = self._entries.get(session)
        if entry is None or entry.deputy is None:
            return  # the full record will include it
        if not entry.tokens.add(index, (token, logprobs)):
            self._start_over(entry)
        elif entry.confirmed:
            if BATCH_TOKENS <= len(entry.tokens.pending) < _BACKLOG_TOKENS:
                self._send(entry)
            else:
                self._unsent[entry] = None

    def end(self, session: SessionId, finish: str, *, keep: bool) -> None:
        """Journal that the answer has ended, or is suspended (`finish` is empty).

        keep: whether the deputy keeps the record for later readers. If false, the deputy is told to delete it.
        """
        entry = self._entries.get(session)
        if entry is None:
            return
        if not keep:
            del self._entries[session]
            self._detach(entry)
            return
        entry.finish, entry.ended_at = finish, self._clock.monotonic()
        self._send(entry)
        self._trim_ended()

    def release(self, session: SessionId) -> None:
        """Stop journaling a session that another peer has taken over. The deputy deletes its record `_DROP_RELEASED_S` later."""
        entry = self._entries.pop(session, None)
        if entry is not None:
            self._detach(entry, _DROP_RELEASED_S)

    def on_peer_gone(self, peer: PeerId) -> None:
        """Choose new deputies for the sessions whose deputy was this peer, because its link is down."""
        for entry in list(self._entries.values()):
            if entry.deputy == peer:
                self._start_over(entry)

    def on_dropped(self, peer: PeerId, session: SessionId) -> None:
        """Choose a deputy for the session again, because `peer` reports that it lacks the record or a part of it."""
        entry = self._entries.get(session)
        if entry is not None and entry.deputy == peer and entry.confirmed:
            self._start_over(entry, _AVOID_DROPPED_S)

    def flush(self) -> None:
        """Send all tokens that wait."""
        for entry in list(self._unsent):
            while entry in self._unsent:
                self._send(entry)

    async def run(self) -> None:
        """Send queued records and tokens, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_MAX_TRANSFERS):
                tasks.create_task(self._run_transfers(), name="journal")
            tasks.create_task(self._tick(), name="journal timer")

    def _queue_transfer(self, entry: _Entry) -> None:
        """Queue a full record transfer, to the current deputy unless it must change."""
        entry.confirmed = False
        entry.transfer += 1
        self._unsent.pop(entry, None)
        self._transfers[entry] = None
        self._wake.set()

    def _start_over(self, entry: _Entry, avoid_s: float = 0.0) -> None:
        """Give up the deputy, choose one again and send it the full record. `avoid_s`: how long the old deputy is excluded."""
        if entry.deputy is not None and avoid_s:
            entry.avoid[entry.deputy] = self._clock.monotonic() + avoid_s
        self._detach(entry)
        self._queue_transfer(entry)

    def _detach(self, entry: _Entry, drop_after_s: float = 0.0) -> None:
        """Give up the deputy, and make it delete the record after `drop_after_s`."""
        peer, entry.deputy = entry.deputy, None
        entry.confirmed = False
        entry.transfer += 1
        self._transfers.pop(entry, None)
        self._unsent.pop(entry, None)
        if peer is not None:
            self._drops.add(peer, entry.session, entry.epoch, drop_after_s)

    async def _run_transfers(self) -> None:
        while True:
            while (entry := self._next_transfer()) is not None:
                await self._transfer(entry)
            self._wake.clear()
            await self._wake.wait()

    def _next_transfer(self) -> _Entry | None:
        """Take the next entry from the queue. Answers that have not ended come first."""
        entry = next((entry for entry in self._transfers if not entry.finish), None) or next(iter(self._transfers), None)
        if entry is not None:
            del self._transfers[entry]
        return entry

    async def _transfer(self, entry: _Entry) -> None:
        """Choose the entry's deputy and send it the full record. On failure, queue another transfer."""
        peer = self._choose(entry, self._adverts()) or entry.deputy
        if peer is None:
            return  # the timer will try again
        if entry.deputy not in (None, peer):
            self._detach(entry, _DROP_MOVED_S)
        entry.deputy = peer
        transfer, whole = entry.transfer, entry.record()
        record = first_part(whole, _FIRST_BYTES)
        data = encode_record(record)
        if len(data) > MAX_RECORD_BYTES:
            self._give_up(entry, len(data))
            return
        sent = len(record.tokens)
        room_bytes = MAX_TOKENS_BYTES - sum(map(token_bytes, record.tokens))
        entry.epoch, entry.tokens = record.epoch, PendingTokens(sent, list(whole.tokens[sent:]), room_bytes)
        self._drops.revoke(peer, entry.session)
        try:
            await self._links.request(
                peer,
                lambda number: Journal(request=number, session=record.session, epoch=record.epoch),
                data,
                timeout_s=_CONFIRM_S,
            )
        except MeshdError as error:
            log.debug("session %s: %.8s does not keep its record: %s", entry.session, peer, error)
            if entry.transfer == transfer:
                self._start_over(entry, _AVOID_REFUSING_S)
            return
        if entry.transfer != transfer:
            self._drop_if_moved(entry.session, peer, record.epoch)
            return
        entry.confirmed, entry.sent_finish, entry.sent_at = True, record.finish, self._clock.monotonic()
        entry.finish = whole.finish or entry.finish
        self._send(entry)

    def _give_up(self, entry: _Entry, size: int) -> None:
        """Keep no record of a session elsewhere, because its prompt and options alone are too large for a deputy."""
        self._detach(entry)
        entry.too_large = True
        self._warn(entry, f"no other peer keeps its record, which has {size} bytes: if this peer is lost, the answer is lost")

    def _warn(self, entry: _Entry, what: str) -> None:
        if not entry.limited:
            entry.limited = True
            log.warning("session %s: %s", entry.session, what)

    def _drop_if_moved(self, session: SessionId, peer: PeerId, epoch: int) -> None:
        """Make a peer delete a record that it confirmed too late, unless it is the session's deputy again."""
        entry = self._entries.get(session)
        if entry is None or entry.deputy != peer:
            self._drops.add(peer, session, epoch)

    def _send(self, entry: _Entry) -> None:
        """Send a confirmed deputy tokens, and the finish reason, that it does not have yet. The timer sends the rest of many."""
        self._unsent.pop(entry, None)
        for _ in range(_MESSAGES_AT_ONCE):
            if not (entry.confirmed and self._has_news(entry)):
                return
            self._send_message(entry)
        if entry.confirmed and self._has_news(entry):
            self._unsent[entry] = None

    def _has_news(self, entry: _Entry) -> bool:
        return bool(entry.tokens.pending) or (entry.sent_finish != entry.finish and not entry.tokens.full)

    def _send_message(self, entry: _Entry) -> None:
        assert entry.deputy is not None
        index, tokens = entry.tokens.take()
        finish = "" if entry.tokens.pending or entry.tokens.full else entry.finish
        if entry.tokens.full:
            self._warn(entry, f"its deputies keep its first {index + len(tokens)} tokens; after a loss the rest is computed again")
        message = JournalTokens(session=entry.session, epoch=entry.epoch, index=index, tokens=tokens, finish=finish)
        try:
            self._links.send(entry.deputy, message)
        except MeshdError as error:
            log.debug("session %s: cannot send tokens to its deputy %.8s: %s", entry.session, entry.deputy, error)
            self._start_over(entry, _AVOID_REFUSING_S)
            return
        entry.sent_finish, entry.sent_at = finish, self._clock.monotonic()

    async def _tick(self) -> None:
        checked = self._clock.monotonic()
        while True:
            await self._clock.sleep(BATCH_S)
            for entry in list(self._unsent):
                self._send(entry)
            now = self._clock.monotonic()
            if now - checked >= _CHECK_S:
                checked = now
                self._check_deputies(now)

    def _check_deputies(self, now: float) -> None:
        """Replace missing and leaving deputies, renew idle records, and remove sessions that ended long ago."""
        self._drops.send_due(now)
        if not self._entries:
            return
        adverts = self._adverts()  # once: an own advert is not cheap, and there may be many entries
        leaving = {advert.peer for advert in adverts if advert.draining}
        for entry in list(self._entries.values()):
            if entry.finish and now - entry.ended_at > KEEP_ENDED_S:
                self._retire(entry)
            elif entry.too_large:
                continue
            elif (entry.deputy is None or (entry.confirmed and entry.deputy in leaving)) and self._choose(
                entry, adverts
            ) is not None:
                self._queue_transfer(entry)
            elif entry.confirmed and not entry.finish and now - entry.sent_at > _RENEW_S:
                self._send_message(entry)

    def _choose(self, entry: _Entry, adverts: Iterable[Advert]) -> PeerId | None:
        now = self._clock.monotonic()
        entry.avoid = {peer: until for peer, until in entry.avoid.items() if until > now}
        avoid = {*entry.avoid, *self._excluded(entry.session)}
        return choose_deputy(self._me, adverts, entry.plan_peers(), avoid, entry.deputy)

    def _trim_ended(self) -> None:
        ended = [entry for entry in self._entries.values() if entry.finish]
        for entry in ended[: max(0, len(ended) - _MAX_ENDED)]:
            self._retire(entry)

    def _retire(self, entry: _Entry) -> None:
        """Stop journaling the session. The deputy's record expires without a message."""
        del self._entries[entry.session]
        self._transfers.pop(entry, None)
        self._unsent.pop(entry, None)


class JournalWriters:
    """Keeps each session's record at two deputies, so that its coordinator and one deputy may be lost at once.

    It has two `JournalWriter`s and passes every call on to both.
    """

    def __init__(self, me: PeerId, links: Links, clock: Clock, adverts: Callable[[], list[Advert]]) -> None:
        first = JournalWriter(me, links, clock, adverts, lambda session: self._chosen(1, session))
        second = JournalWriter(me, links, clock, adverts, lambda session: self._chosen(0, session))
        self._writers = (first, second)

    def __len__(self) -> int:
        return max(map(len, self._writers))

    def _chosen(self, writer: int, session: SessionId) -> tuple[PeerId, ...]:
        deputy = self._writers[writer].chosen_for(session)
        return (deputy,) if deputy is not None else ()

    def deputies_of(self, session: SessionId) -> list[PeerId]:
        """Returns: the peers that have confirmed this session's record."""
        return [deputy for writer in self._writers if (deputy := writer.deputy_of(session)) is not None]

    def begin(self, session: SessionId, record: Callable[[], SessionRecord], plan_peers: Callable[[], tuple[PeerId, ...]]) -> None:
        """See `JournalWriter.begin`."""
        for writer in self._writers:
            writer.begin(session, record, plan_peers)

    def token(self, session: SessionId, index: int, token: int, logprobs: TokenLogprobs | None) -> None:
        """See `JournalWriter.token`."""
        for writer in self._writers:
            writer.token(session, index, token, logprobs)

    def end(self, session: SessionId, finish: str, *, keep: bool) -> None:
        """See `JournalWriter.end`."""
        for writer in self._writers:
            writer.end(session, finish, keep=keep)

    def release(self, session: SessionId) -> None:
        """See `JournalWriter.release`."""
        for writer in self._writers:
            writer.release(session)

    def on_peer_gone(self, peer: PeerId) -> None:
        """See `JournalWriter.on_peer_gone`."""
        for writer in self._writers:
            writer.on_peer_gone(peer)

    def on_dropped(self, peer: PeerId, session: SessionId) -> None:
        """See `JournalWriter.on_dropped`."""
        for writer in self._writers:
            writer.on_dropped(peer, session)

    def flush(self) -> None:
        """See `JournalWriter.flush`."""
        for writer in self._writers:
            writer.flush()

    async def run(self) -> None:
        """See `JournalWriter.run`."""
        async with asyncio.TaskGroup() as tasks:
            for writer in self._writers:
                tasks.create_task(writer.run())


def choose_deputy(
    me: PeerId,
    adverts: Iterable[Advert],
    plan_peers: Collection[PeerId],
    avoid: Collection[PeerId],
    present: PeerId | None = None,
) -> PeerId | None:
    """Choose a deputy among the live peers that are not leaving.

    A peer outside the plan is preferred, because one fault should not hit both; then the present deputy; then the peer with
    the lowest round-trip time.

    Returns: None if there is no such peer.
    """
    advert_of = {advert.peer: advert for advert in adverts}
    own = advert_of.get(me)
    links = own.links if own is not None else {}
    candidates = [peer for peer, advert in advert_of.items() if peer != me and not advert.draining and peer not in avoid]
    rtt_s = {peer: links[peer].rtt_s if peer in links else float("inf") for peer in candidates}
    return min(candidates, key=lambda peer: (peer in plan_peers, peer != present, rtt_s[peer], peer), default=None)
