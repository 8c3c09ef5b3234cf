"""Finds a session's coordinator and its records in the cluster, and hands the session to another coordinator."""

import asyncio
import hmac
from contextlib import suppress
from dataclasses import dataclass, field
from logging import getLogger
from typing import Protocol

from meshd.agents.links.links import Links
from meshd.agents.service import AnswerSecret
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.keys import NONCE_BYTES, key_of, proof_of, session_of
from meshd.agents.session.journal.record import MAX_TOKENS_BYTES, SessionRecord, decode_record, encode_record, first_part
from meshd.clock import Clock
from meshd.errors import InvalidRequest, MeshdError, PeerFault, UnknownSession
from meshd.protocol.messages import EndSession, FetchSession, FindSession, SessionData, SessionEnded, SessionFound
from meshd.types import FinishReason, PeerId, SessionId

log = getLogger(__name__)

_FIND_S = 2.0
"""Time limit for a peer's reply. A peer that is silent for longer counts as lost anyway."""
_GRACE_S = 0.25
"""How long to wait for other peers once a coordinator has replied: one of them may have taken over from that coordinator."""
_TAKEOVER_FIND_S = 0.5
_FETCH_S = 10.0
"""Time limit for fetching a record: enough for a long record over a slow link."""
_FETCH_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class SessionLocation:
    """What a peer reports about a session that it coordinates or has a record of."""

    peer: PeerId
    coordinates: bool
    epoch: int
    tokens: int

    @property
    def rank(self) -> tuple[int, bool, int, PeerId]:
        """Sort key: the highest is the most recent. Within an epoch the coordinator is ahead of its deputies; a coordinator of an
        older epoch was replaced.
        """
        return self.epoch, self.coordinates, self.tokens, self.peer


class SessionOwner(Protocol):
    """The part of this peer's coordinator that the locator uses."""

    def own(self, session: SessionId) -> SessionRecord | None:
        """Returns: the record of a session that this peer coordinates, or has coordinated and retains; None for any other."""

    async def hand_over(self, session: SessionId, to: PeerId) -> None:
        """Stop coordinating a session and leave its stages open for `to`."""

    def finish(self, session: SessionId, forget: bool) -> bool:
        """Cancel a session; with `forget`, delete its record too. Returns: whether this peer has the session."""


@dataclass(slots=True)
class Locator:
    """Finds, fetches and ends sessions at the linked peers, and answers such requests from linked peers. Owns no state."""

    me: PeerId
    links: Links
    deputy: Deputy
    clock: Clock
    _sessions: SessionOwner = field(init=False)

    def register(self, sessions: SessionOwner) -> None:
        """Register the handlers of FIND_SESSION, FETCH_SESSION and END_SESSION. `sessions`: the owner of this peer's sessions."""
        self._sessions = sessions
        self.links.register(FindSession, self._on_find)
        self.links.register(FetchSession, self._on_fetch)
        self.links.register(EndSession, self._on_end)

    async def coordinator_of(self, session: SessionId) -> PeerId:
        """Returns: the peer that coordinates the session, which may be this peer. Raises: UnknownSession."""
        coordinator = _coordinator_among(await self._find(session))
        if coordinator is None:
            raise _unknown(session)
        return coordinator

    async def other_coordinator(self, record: SessionRecord) -> PeerId | None:
        """Returns: another peer that coordinates the record's session; None if there is none."""
        return _coordinator_among(await self._ask_all(record.session, _TAKEOVER_FIND_S, 0.0, key=record.key))

    async def fetch(self, secret: AnswerSecret, *, take: bool) -> SessionRecord:
        """Fetch the most recent record of the answer with this secret.

        `take`: the coordinator releases the session, and the caller must continue it.

        Raises: UnknownSession.
        Cancel: the coordinator may have released the session already. Its deputies then keep the record for a minute.
        """
        session = session_of(secret)
        for _ in range(_FETCH_ROUNDS):
            locations = sorted(await self._find(session, key_of(secret)), key=lambda location: location.rank, reverse=True)
            for location in locations:
                with suppress(MeshdError):
                    return await self._fetch_from(location.peer, secret, take)
        raise _unknown(session)

    async def should_take_over(self, session: SessionId, coordinator: PeerId) -> bool:
        """Whether this peer must continue a session whose coordinator is lost: no other peer does so or has a later record."""
        stored = self.deputy.look(session)
        if stored is None or stored.finish or stored.coordinator != coordinator:
            return False  # meanwhile another peer has fetched this record, or the client has ended the session
        own_location = SessionLocation(self.me, False, stored.epoch, stored.count)
        return all(
            location.rank <= own_location.rank
            for location in [*self._known_here(session), *await self._ask_all(session, _TAKEOVER_FIND_S, key=stored.key)]
        )

    async def end(self, session: SessionId, *, forget: bool) -> None:
        """Cancel the session on every peer; with `forget`, delete all its records. Raises: UnknownSession."""
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

    async def _find(self, session: SessionId, key: str | None = None) -> list[SessionLocation]:
        return [*self._known_here(session), *await self._ask_all(session, _FIND_S, _GRACE_S, key=key)]

    def _known_here(self, session: SessionId) -> list[SessionLocation]:
        record, coordinates = self._latest_here(session)
        return [SessionLocation(self.me, coordinates, record.epoch, len(record.tokens))] if record is not None else []

    async def _ask_all(
        self, session: SessionId, within_s: float, grace_s: float | None = None, *, key: str | None
    ) -> list[SessionLocation]:
        """Ask all linked peers whether they coordinate the session or have its record.

        within_s: how long to wait for replies, in seconds.
        grace_s: how long to wait for the other peers once a coordinator has replied; None: until `within_s` has passed.
        key: the record's key, to believe only peers that have the record; None: this peer does not know it.
        Returns: the locations that were reported in time.
        """
        found: list[SessionLocation] = []
        loop = asyncio.get_running_loop()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s) as deadline, asyncio.TaskGroup() as group:

                async def ask(peer: PeerId) -> None:
                    location = await self._ask(peer, session, key)
                    if location is None:
                        return
                    found.append(location)
                    if location.coordinates and grace_s is not None and not deadline.expired():
                        deadline.reschedule(min(deadline.when() or loop.time(), loop.time() + grace_s))

                for peer in self.links.peers():
                    group.create_task(ask(peer))
        return found

    async def _ask(self, peer: PeerId, session: SessionId, key: str | None) -> SessionLocation | None:
        nonce = self.clock.random_bytes(NONCE_BYTES).hex()
        try:
            reply, _ = await self.links.request(
                peer, lambda number: FindSession(request=number, session=session, nonce=nonce), timeout_s=_FIND_S
            )
        except MeshdError:
            return None
        if not isinstance(reply, SessionFound) or not (reply.coordinates or reply.keeps):
            return None
        if key is not None and not hmac.compare_digest(reply.proof.encode(), proof_of(key, nonce, peer).encode()):
            log.warning("session %s: %.8s says that it has its record, but does not prove it", session, peer)
            return None
        return SessionLocation(peer, reply.coordinates, reply.epoch, reply.tokens)

    async def _fetch_from(self, peer: PeerId, secret: AnswerSecret, take: bool) -> SessionRecord:
        session = session_of(secret)
        if peer == self.me:
            return await self._hand_out(session, self.me, take)
        reply, payload = await self.links.request(
            peer, lambda number: FetchSession(request=number, session=session, secret=secret, take=take), timeout_s=_FETCH_S
        )
        if not isinstance(reply, SessionData):
            raise PeerFault(f"FETCH_SESSION was answered with {type(reply).__name__}")
        record = decode_record(payload)
        if record.session != session:
            raise PeerFault("FETCH_SESSION was answered with the record of another session")
        return record

    def _on_find(self, sender: PeerId, message: FindSession, payload: memoryview) -> SessionFound:
        record, coordinates = self._latest_here(message.session)
        return SessionFound(
            request=message.request,
            coordinates=coordinates,
            keeps=record is not None and not coordinates,
            epoch=record.epoch if record is not None else 0,
            tokens=len(record.tokens) if record is not None else 0,
            proof=proof_of(record.key, message.nonce, self.me) if record is not None else "",
        )

    async def _on_fetch(self, sender: PeerId, message: FetchSession, payload: memoryview) -> tuple[SessionData, bytes]:
        if session_of(AnswerSecret(message.secret)) != message.session:
            raise InvalidRequest(
                f"the record of session {message.session} is given only to a peer that a client sent the answer's id to",
                hint="ask with the id of the answer",
            )
        record = await self._hand_out(message.session, sender, message.take)
        part = first_part(record, MAX_TOKENS_BYTES)
        return SessionData(request=message.request, session=record.session, epoch=record.epoch), encode_record(part)

    def _on_end(self, sender: PeerId, message: EndSession, payload: memoryview) -> SessionEnded:
        return SessionEnded(request=message.request, known=self._end_here(message.session, message.forget))

    async def _hand_out(self, session: SessionId, to: PeerId, take: bool) -> SessionRecord:
        """Return the record for peer `to`. `take`: make `to` the session's coordinator, and release the session on this peer.

        Raises: UnknownSession.
        """
        record, coordinates = self._latest_here(session)
        if record is None:
            raise _unknown(session)
        if take and coordinates and to != self.me:
            await self._sessions.hand_over(session, to)
        if take:
            self.deputy.hand_to(session, to)
        return record

    def _latest_here(self, session: SessionId) -> tuple[SessionRecord | None, bool]:
        """Returns: (the latest record on this peer, whether this peer coordinates the session)."""
        own, stored = self._sessions.own(session), self.deputy.record(session)
        if own is not None and (stored is None or stored.epoch <= own.epoch):
            return own, True
        return stored, False

    def _end_here(self, session: SessionId, forget: bool) -> bool:
        finished = self._sessions.finish(session, forget)
        return self.deputy.end(session, FinishReason.CANCELLED.value, forget=forget) or finished


def _coordinator_among(locations: list[SessionLocation]) -> PeerId | None:
    """Returns: the most recent of the session's coordinators; None if no peer coordinates it."""
    coordinators = [location for location in locations if location.coordinates]
    return max(coordinators, key=lambda location: location.rank).peer if coordinators else None


def _unknown(session: SessionId) -> UnknownSession:
    return UnknownSession(
        f"no live peer runs or keeps session {session}", hint="records are kept for 10 minutes after an answer's end"
    )
