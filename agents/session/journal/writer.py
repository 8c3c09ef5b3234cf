"""The coordinator's side of the journal: another peer, the deputy, keeps a copy of each session's record in case this one is lost.

A new deputy gets the whole record and confirms it. After that it gets only tokens, in batches that nobody acknowledges:
the link keeps them in order, and a deputy that misses some, or has no room, says JOURNAL_DROP and the record goes out whole again.
A token costs an append, a batch one small message, and one timer serves all sessions.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.session.journal.drops import KEEP_ENDED_S, DropQueue
from meshd.agents.session.journal.pending import PendingTokens
from meshd.agents.session.journal.record import SessionRecord, encode_record
from meshd.clock import Clock
from meshd.errors import MeshdError
from meshd.protocol.messages import Journal, JournalTokens
from meshd.types import Advert, PeerId, SessionId, TokenLogprobs

log = getLogger(__name__)

BATCH_TOKENS = 16
BATCH_S = 0.25
_CARE_S = 1.0
"""How often those without a deputy look for one."""
_RENEW_S = 120.0
"""An unfinished record that nothing was added to is confirmed this often; deputies forget what they hear nothing of."""
_ANSWER_S = 5.0
_AVOID_S = 10.0
"""A peer that refused a record is not asked for this long."""
_AGAIN_S = 1.0
"""And one that had it, and has it no more, this long."""
_AT_ONCE = 8
"""Whole records that may be under way: a lost deputy leaves many, and they must not crowd the link."""
_MAX_ENDED = 256
_RELEASED_S = 60.0
"""After another peer took a session, its new deputy has long had the record."""
_MOVED_S = 10.0
"""Likewise after another deputy was asked."""


@dataclass(slots=True, eq=False)
class _Entry:
    session: SessionId
    record: Callable[[], SessionRecord]
    plan_peers: Callable[[], tuple[PeerId, ...]]
    epoch: int = 0
    finish: str = ""
    ended_at: float = 0.0
    deputy: PeerId | None = None
    confirmed: bool = False
    """The deputy has confirmed the record. Until then tokens wait."""
    tokens: PendingTokens = field(default_factory=PendingTokens)
    reported: str = ""
    """The answer's end as the deputy knows it."""
    reported_at: float = 0.0
    turn: int = 0
    """Rises whenever the whole record is to go out: what an older turn still waits for counts no more."""
    avoid: dict[PeerId, float] = field(default_factory=dict)
    """Until when."""


class JournalWriter:
    """Owns what is on its way to deputies."""

    def __init__(
        self,
        me: PeerId,
        links: Links,
        clock: Clock,
        adverts: Callable[[], list[Advert]],
        taken: Callable[[SessionId], Collection[PeerId]] = lambda session: (),
    ) -> None:
        """`taken`: who has this session's record by other means, and is no deputy for it here."""
        self._taken = taken
        self._me = me
        self._links = links
        self._clock = clock
        self._adverts = adverts
        self._entries: dict[SessionId, _Entry] = {}
        self._unsent: dict[_Entry, None] = {}
        """Kept ones with tokens that wait for the timer."""
        self._due: dict[_Entry, None] = {}
        """Those whose whole record is to go out."""
        self._wake = asyncio.Event()
        self._drops = DropQueue(links, clock)

    def __len__(self) -> int:
        return len(self._entries)

    def deputy_of(self, session: SessionId) -> PeerId | None:
        """Who keeps this session's record; None while nobody does."""
        entry = self._entries.get(session)
        return entry.deputy if entry is not None and entry.confirmed else None

    def chosen_for(self, session: SessionId) -> PeerId | None:
        """Who keeps this session's record, or is asked to."""
        entry = self._entries.get(session)
        return entry.deputy if entry is not None else None

    def begin(self, session: SessionId, record: Callable[[], SessionRecord], plan_peers: Callable[[], tuple[PeerId, ...]]) -> None:
        """Keep this session's record with a deputy from now on; again at each new plan, which the record names.

        `record` gives all that is known of the session at the time.
        """
        entry = self._entries.get(session)
        if entry is None:
            entry = self._entries[session] = _Entry(session, record, plan_peers)
        else:
            entry.record, entry.plan_peers, entry.finish = record, plan_peers, ""
        self._hand_over(entry)

    def token(self, session: SessionId, index: int, token: int, logprobs: TokenLogprobs | None) -> None:
        """One more token of the answer. Costs an append."""
        entry = self._entries.get(session)
        if entry is None or entry.deputy is None:
            return  # the whole record will tell it
        if not entry.tokens.add(index, (token, logprobs)):
            self._start_over(entry)
        elif entry.confirmed:
            if len(entry.tokens.pending) >= BATCH_TOKENS:
                self._send(entry)
            else:
                self._unsent[entry] = None

    def end(self, session: SessionId, finish: str, *, keep: bool) -> None:
        """The answer has ended, or is suspended (no `finish`). `keep`: the deputy still tells of it; otherwise it forgets it."""
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
        """Another peer has taken the session over: its deputy's record goes too, once the new coordinator surely has one."""
        entry = self._entries.pop(session, None)
        if entry is not None:
            self._detach(entry, _RELEASED_S)

    def on_peer_gone(self, peer: PeerId) -> None:
        """A link is down: whoever had its deputy there gets another one at once."""
        for entry in list(self._entries.values()):
            if entry.deputy == peer:
                self._start_over(entry)

    def on_dropped(self, peer: PeerId, session: SessionId) -> None:
        """A deputy does not have the record, or not all of it."""
        entry = self._entries.get(session)
        if entry is not None and entry.deputy == peer and entry.confirmed:
            self._start_over(entry, _AGAIN_S)

    def flush(self) -> None:
        """Send what waits for the timer."""
        for entry in list(self._unsent):
            self._send(entry)

    async def run(self) -> None:
        """Send what waits. Ends only by being cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(_AT_ONCE):
                tasks.create_task(self._hand_over_due(), name="journal")
            tasks.create_task(self._tick(), name="journal timer")

    def _hand_over(self, entry: _Entry) -> None:
        """Queue a full record transfer, to the current deputy unless it must change."""
        entry.confirmed = False
        entry.turn += 1
        self._unsent.pop(entry, None)
        self._due[entry] = None
        self._wake.set()

    def _start_over(self, entry: _Entry, avoid_s: float = 0.0) -> None:
        """Choose a deputy again and send it the whole record: the present one misses part of it."""
        if entry.deputy is not None and avoid_s:
            entry.avoid[entry.deputy] = self._clock.monotonic() + avoid_s
        self._detach(entry)
        self._hand_over(entry)

    def _detach(self, entry: _Entry, drop_after_s: float = 0.0) -> None:
        """Give up the deputy, and have it drop the record after `drop_after_s`."""
        peer, entry.deputy = entry.deputy, None
        entry.confirmed = False
        entry.turn += 1
        self._due.pop(entry, None)
        self._unsent.pop(entry, None)
        if peer is not None:
            self._drops.add(peer, entry.session, entry.epoch, drop_after_s)

    async def _hand_over_due(self) -> None:
        while True:
            while (entry := self._next_due()) is not None:
                await self._hand_over_one(entry)
            self._wake.clear()
            await self._wake.wait()

    def _next_due(self) -> _Entry | None:
        """Running answers first."""
        entry = next((entry for entry in self._due if not entry.finish), None) or next(iter(self._due), None)
        if entry is not None:
            del self._due[entry]
        return entry

    async def _hand_over_one(self, entry: _Entry) -> None:
        now = self._clock.monotonic()
        entry.avoid = {peer: until for peer, until in entry.avoid.items() if until > now}
        peer = self._choose(entry) or entry.deputy
        if peer is None:
            return  # the timer tries again
        if entry.deputy not in (None, peer):
            self._detach(entry, _MOVED_S)
        entry.deputy = peer
        turn, record = entry.turn, entry.record()
        entry.epoch, entry.tokens = record.epoch, PendingTokens(sent=len(record.tokens))
        self._drops.revoke(peer, entry.session)
        try:
            await self._links.request(
                peer,
                lambda number: Journal(request=number, session=record.session, epoch=record.epoch),
                encode_record(record),
                timeout_s=_ANSWER_S,
            )
        except MeshdError as error:
            log.debug("session %s: %.8s does not keep its record: %s", entry.session, peer, error)
            if entry.turn == turn:
                self._start_over(entry, _AVOID_S)
            return
        if entry.turn != turn:
            self._drop_if_moved(entry.session, peer, record.epoch)
            return
        entry.confirmed, entry.reported, entry.reported_at = True, record.finish, self._clock.monotonic()
        entry.finish = record.finish or entry.finish
        self._send(entry)

    def _drop_if_moved(self, session: SessionId, peer: PeerId, epoch: int) -> None:
        """Its answer came when the record had gone elsewhere, or was forgotten."""
        present = self._entries.get(session)
        if present is None or present.deputy != peer:
            self._drops.add(peer, session, epoch)

    def _send(self, entry: _Entry) -> None:
        """Send the deputy what it does not have yet."""
        if not entry.confirmed:
            return
        self._unsent.pop(entry, None)
        while entry.confirmed and (entry.tokens.pending or entry.reported != entry.finish):
            self._send_message(entry)

    def _send_message(self, entry: _Entry) -> None:
        assert entry.deputy is not None
        index, tokens = entry.tokens.take()
        finish = "" if entry.tokens.pending else entry.finish
        message = JournalTokens(session=entry.session, epoch=entry.epoch, index=index, tokens=tokens, finish=finish)
        try:
            self._links.send(entry.deputy, message)
        except MeshdError as error:
            log.debug("session %s: its journal goes no further at %.8s: %s", entry.session, entry.deputy, error)
            self._start_over(entry, _AVOID_S)
            return
        entry.reported, entry.reported_at = finish, self._clock.monotonic()

    async def _tick(self) -> None:
        checked = self._clock.monotonic()
        while True:
            await self._clock.sleep(BATCH_S)
            self.flush()
            now = self._clock.monotonic()
            if now - checked >= _CARE_S:
                checked = now
                self._check_deputies(now)

    def _check_deputies(self, now: float) -> None:
        """Deputies for those without one, or with one that leaves; signs of life; an end for what ended long ago."""
        self._drops.send_due(now)
        if not self._entries:
            return
        leaving = {advert.peer for advert in self._adverts() if advert.draining}
        for entry in list(self._entries.values()):
            if entry.finish and now - entry.ended_at > KEEP_ENDED_S:
                self._retire(entry)
            elif entry.deputy is None or (entry.confirmed and entry.deputy in leaving and self._choose(entry) is not None):
                self._hand_over(entry)
            elif entry.confirmed and not entry.finish and now - entry.reported_at > _RENEW_S:
                self._send_message(entry)

    def _choose(self, entry: _Entry) -> PeerId | None:
        avoid = {*entry.avoid, *self._taken(entry.session)}
        return choose_deputy(self._me, self._adverts(), entry.plan_peers(), avoid, entry.deputy)

    def _trim_ended(self) -> None:
        ended = [entry for entry in self._entries.values() if entry.finish]
        for entry in ended[: max(0, len(ended) - _MAX_ENDED)]:
            self._retire(entry)

    def _retire(self, entry: _Entry) -> None:
        """Care no more; the deputy forgets it by itself."""
        del self._entries[entry.session]
        self._due.pop(entry, None)
        self._unsent.pop(entry, None)


class JournalWriters:
    """Two deputies for every session: its coordinator and one of them may be lost at once. To its users it is one JournalWriter."""

    def __init__(self, me: PeerId, links: Links, clock: Clock, adverts: Callable[[], list[Advert]]) -> None:
        first = JournalWriter(me, links, clock, adverts, lambda session: self._chosen(1, session))
        second = JournalWriter(me, links, clock, adverts, lambda session: self._chosen(0, session))
        self._writers = (first, second)

    def __len__(self) -> int:
        return max(map(len, self._writers))

    def _chosen(self, of: int, session: SessionId) -> tuple[PeerId, ...]:
        deputy = self._writers[of].chosen_for(session)
        return (deputy,) if deputy is not None else ()

    def deputies_of(self, session: SessionId) -> list[PeerId]:
        """Who keeps this session's record now."""
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
    """Of the live peers that stay: one outside the plan, so that no fault takes both, the present one, or else the nearest.

    None: there is none.
    """
    known = {advert.peer: advert for advert in adverts}
    own = known.get(me)
    near = own.links if own is not None else {}
    candidates = [peer for peer, advert in known.items() if peer != me and not advert.draining and peer not in avoid]
    rtt_s = {peer: near[peer].rtt_s if peer in near else float("inf") for peer in candidates}
    return min(candidates, key=lambda peer: (peer in plan_peers, peer != present, rtt_s[peer], peer), default=None)
