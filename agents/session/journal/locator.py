"""Where a session is: who coordinates it, who keeps its record, and how another peer comes to go on with it."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from meshd.agents.links.links import Links
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.record import SessionRecord, decode_record, encode_record
from meshd.errors import MeshdError, PeerFault, UnknownSession
from meshd.protocol.messages import EndSession, FetchSession, FindSession, SessionData, SessionEnded, SessionFound
from meshd.types import FinishReason, PeerId, SessionId

_FIND_S = 2.0
"""A peer that is silent for longer counts as lost anyway."""
_GRACE_S = 0.25
"""Once the coordinator is found: for the others, one of which may have taken over from it."""
_HEIR_S = 0.5
_FETCH_S = 10.0
"""A long record over a slow link."""
_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class SessionLocation:
    """What one peer knows of a session."""

    peer: PeerId
    coordinates: bool
    epoch: int
    tokens: int

    @property
    def rank(self) -> tuple[int, bool, int, PeerId]:
        """The higher, the later its news. Within an epoch its coordinator knows most; one of an older epoch was replaced."""
        return self.epoch, self.coordinates, self.tokens, self.peer


class SessionOwner(Protocol):
    """The coordinator's side of the locator."""

    def own(self, session: SessionId) -> SessionRecord | None:
        """The record of a session that this peer coordinates, or did and still retains."""

    def release(self, session: SessionId) -> None:
        """Stop coordinating a session and leave its stages open."""

    def finish(self, session: SessionId, forget: bool) -> bool:
        """End a session. Returns: whether it was known here."""


@dataclass(slots=True)
class Locator:
    """Asks the linked peers, and answers them; owns nothing."""

    me: PeerId
    links: Links
    deputy: Deputy
    _sessions: SessionOwner = field(init=False)

    def register(self, sessions: SessionOwner) -> None:
        """Take requests for a session from the links; `sessions` owns those of this peer."""
        self._sessions = sessions
        self.links.register(FindSession, self._on_find)
        self.links.register(FetchSession, self._on_fetch)
        self.links.register(EndSession, self._on_end)

    async def coordinator_of(self, session: SessionId) -> PeerId:
        """Who coordinates it now; this peer itself if it does. Raises: UnknownSession."""
        found = [each for each in await self._find(session) if each.coordinates]
        if not found:
            raise _unknown(session)
        return max(found, key=lambda each: each.rank).peer

    async def elsewhere(self, session: SessionId) -> bool:
        """Whether another peer coordinates it."""
        return any(found.coordinates for found in await self._ask_all(session, _HEIR_S, 0.0))

    async def fetch(self, session: SessionId, *, take: bool) -> SessionRecord:
        """The record, from who knows it best. With `take` the caller goes on with the session, and no one else does.

        Raises: UnknownSession. Cancel: a peer may have released the session already; its record is still there.
        """
        for _ in range(_ROUNDS):
            candidates = sorted(await self._find(session), key=lambda each: each.rank, reverse=True)
            for found in candidates:
                with suppress(MeshdError):
                    return await self._fetch_from(found.peer, session, take)
        raise _unknown(session)

    async def is_heir(self, record: SessionRecord) -> bool:
        """Whether it falls to this peer to go on with an orphan: nobody has, and no other keeper knows more of it."""
        session = record.session
        stored = self.deputy.record(session)
        if stored is None or stored.finish or stored.coordinator != record.coordinator:
            return False  # another peer took it from here meanwhile, or its client ended it
        own_location = SessionLocation(self.me, False, stored.epoch, len(stored.tokens))
        return all(
            found.rank <= own_location.rank for found in [*self._known_here(session), *await self._ask_all(session, _HEIR_S)]
        )

    async def end(self, session: SessionId, *, forget: bool) -> None:
        """Cancel it wherever it runs; with `forget`, have every record dropped. Raises: UnknownSession."""
        known = [self._end_here(session, forget)]

        async def ask(peer: PeerId) -> None:
            with suppress(MeshdError):
                reply, _ = await self.links.request(
                    peer, lambda number: EndSession(request=number, session=session, forget=forget), timeout_s=_FIND_S
                )
                known.append(isinstance(reply, SessionEnded) and reply.known)

        async with asyncio.TaskGroup() as group:
            for peer in self.links.peers():
                group.create_task(ask(peer))
        if not any(known):
            raise _unknown(session)

    async def _find(self, session: SessionId) -> list[SessionLocation]:
        return [*self._known_here(session), *await self._ask_all(session, _FIND_S, _GRACE_S)]

    def _known_here(self, session: SessionId) -> list[SessionLocation]:
        record, coordinates = self._best(session)
        return [SessionLocation(self.me, coordinates, record.epoch, len(record.tokens))] if record is not None else []

    async def _ask_all(self, session: SessionId, within_s: float, grace_s: float | None = None) -> list[SessionLocation]:
        """Those who know it, of those who answer in time; once the coordinator has, the others have `grace_s` more."""
        found: list[SessionLocation] = []
        loop = asyncio.get_running_loop()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s) as deadline, asyncio.TaskGroup() as group:

                async def ask(peer: PeerId) -> None:
                    known = await self._ask(peer, session)
                    if known is None:
                        return
                    found.append(known)
                    if known.coordinates and grace_s is not None and not deadline.expired():
                        deadline.reschedule(min(deadline.when() or loop.time(), loop.time() + grace_s))

                for peer in self.links.peers():
                    group.create_task(ask(peer))
        return found

    async def _ask(self, peer: PeerId, session: SessionId) -> SessionLocation | None:
        try:
            reply, _ = await self.links.request(
                peer, lambda number: FindSession(request=number, session=session), timeout_s=_FIND_S
            )
        except MeshdError:
            return None
        if not isinstance(reply, SessionFound) or not (reply.coordinates or reply.keeps):
            return None
        return SessionLocation(peer, reply.coordinates, reply.epoch, reply.tokens)

    async def _fetch_from(self, peer: PeerId, session: SessionId, take: bool) -> SessionRecord:
        if peer == self.me:
            return self._hand_out(session, self.me, take)
        reply, payload = await self.links.request(
            peer, lambda number: FetchSession(request=number, session=session, take=take), timeout_s=_FETCH_S
        )
        if not isinstance(reply, SessionData):
            raise PeerFault(f"FETCH_SESSION was answered with {type(reply).__name__}")
        record = decode_record(payload)
        if record.session != session:
            raise PeerFault("the record is of another session")
        return record

    def _on_find(self, sender: PeerId, message: FindSession, payload: memoryview) -> SessionFound:
        record, coordinates = self._best(message.session)
        return SessionFound(
            request=message.request,
            coordinates=coordinates,
            keeps=record is not None and not coordinates,
            epoch=record.epoch if record is not None else 0,
            tokens=len(record.tokens) if record is not None else 0,
        )

    def _on_fetch(self, sender: PeerId, message: FetchSession, payload: memoryview) -> tuple[SessionData, bytes]:
        record = self._hand_out(message.session, sender, message.take)
        return SessionData(request=message.request, session=record.session, epoch=record.epoch), encode_record(record)

    def _on_end(self, sender: PeerId, message: EndSession, payload: memoryview) -> SessionEnded:
        return SessionEnded(request=message.request, known=self._end_here(message.session, message.forget))

    def _hand_out(self, session: SessionId, to: PeerId, take: bool) -> SessionRecord:
        """Raises: UnknownSession."""
        record, coordinates = self._best(session)
        if record is None:
            raise _unknown(session)
        if take and coordinates and to != self.me:
            self._sessions.release(session)
        if take:
            self.deputy.hand_to(session, to)
        return record

    def _best(self, session: SessionId) -> tuple[SessionRecord | None, bool]:
        """The latest record here, and whether this peer coordinates it."""
        own, stored = self._sessions.own(session), self.deputy.record(session)
        if own is not None and (stored is None or stored.epoch <= own.epoch):
            return own, True
        return stored, False

    def _end_here(self, session: SessionId, forget: bool) -> bool:
        finished = self._sessions.finish(session, forget)
        return self.deputy.end(session, FinishReason.CANCELLED.value, forget=forget) or finished


def _unknown(session: SessionId) -> UnknownSession:
    return UnknownSession(
        f"no live peer runs or keeps session {session}", hint="records are kept for 10 minutes after an answer's end"
    )
