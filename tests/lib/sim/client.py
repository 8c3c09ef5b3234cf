"""A client: asks at some peer, reads at its own pace, goes and comes back, and holds what it gets against the reference."""

import asyncio
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meshd.agents.service import Finished, Generation, TextDelta
from meshd.errors import Cancelled, ContextTooLong, InvalidRequest, MeshdError, Unavailable, UnknownModel, UnknownSession
from meshd.types import SessionId
from sim.peer import Life
from sim.requests import Wish

if TYPE_CHECKING:
    from sim.world import World

_AHEAD = 4
"""Events that may wait for a client in its connection."""
_LINGERS = 0.3
"""How often a client that has lost patience leaves its old connection open for a while: then there are two readers."""
_LINGERS_S = 4.0
_NEVER_RIGHT = (InvalidRequest, ContextTooLong, UnknownModel)


class Wrong(AssertionError):
    """A client was given what it must never be given."""


@dataclass(frozen=True, slots=True)
class _Named:
    session: SessionId


@dataclass(frozen=True, slots=True)
class _Broken:
    why: str


@dataclass(eq=False, slots=True)
class Connection:
    """A client's connection with the HTTP edge of one peer; its handler runs as that peer."""

    life: Life
    events: deque[Any] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    room: asyncio.Event = field(default_factory=asyncio.Event)
    handler: asyncio.Task[None] | None = None
    closed: bool = False

    def push(self, event: object) -> None:
        if not self.closed and not self.life.dead:
            self.events.append(event)
            self.wake.set()

    def break_off(self, why: str) -> None:
        """The peer is gone."""
        self.events.append(_Broken(why))
        self.wake.set()

    async def next(self, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                while not self.events:
                    self.wake.clear()
                    await self.wake.wait()
        except TimeoutError:
            return _Broken(f"nothing for {timeout_s:g} s")
        event = self.events.popleft()
        self.room.set()
        return event

    async def has_room(self) -> None:
        while len(self.events) >= _AHEAD:
            self.room.clear()
            await self.room.wait()

    def close(self) -> None:
        """The client goes."""
        self.closed = True
        if self.handler is not None and not self.life.dead:
            self.handler.cancel()


async def _handle(connection: Connection, wish: Wish, session: SessionId | None) -> None:
    """The edge's part."""
    coordinator = connection.life.coordinator
    try:
        generation: Generation
        if session is None:
            generation = await coordinator.generate(wish.request)
        else:
            generation = await coordinator.resume(session)
        connection.push(_Named(generation.session))
        events = generation.events()
        try:
            async for event in events:
                connection.push(event)
                await connection.has_room()
        finally:
            await events.aclose()  # type: ignore[attr-defined]
    except Exception as error:
        connection.push(error)


class Client:
    """One wish, from its start to its end."""

    def __init__(self, world: "World", wish: Wish) -> None:
        self.world = world
        self.wish = wish
        self.session: SessionId | None = None
        self.ended = ""
        self.attempts = 0
        self.errors: list[str] = []
        self.pauses: list[float] = []
        """Before each token, as one connection showed it."""
        self._coordinators: list[Life] = []
        self._last_token_at = 0.0
        self.began = 0.0

    async def run(self) -> None:
        world, wish = self.world, self.wish
        await asyncio.sleep(wish.starts_at)
        self.began = world.loop.time()
        while not self.ended:
            life = await world.some_life()
            self.attempts += 1
            wait_s = await self._attempt(life)
            if self.ended:
                break
            await asyncio.sleep(wait_s)
        world.trace.note("client", wish.number, self.ended, len(wish.seen))

    async def _attempt(self, life: Life) -> float:
        """One connection, until something ends it; how long to wait before the next."""
        world, wish = self.world, self.wish
        connection = Connection(life)
        self._last_token_at = world.loop.time()
        world.connections.append(connection)
        self._coordinators.append(life)
        world.trace.note("client", wish.number, "asks", life.spec.name, (self.session or "")[:6])
        connection.handler = world.loop.create_task(_handle(connection, wish, self.session), context=life.owner.context())
        life.handlers.append(connection.handler)
        at, lingers = 0, False
        try:
            while True:
                event = await connection.next(wish.patience_s)
                match event:
                    case _Named(session):
                        if self.session is not None and session != self.session:
                            raise Wrong(f"client {wish.number} asked for {self.session} and got {session}")
                        self.session = session
                        world.sessions[session] = self
                    case TextDelta():
                        self._take(at, event)
                        at += 1
                        if wish.reads_s:
                            await asyncio.sleep(wish.reads_s)
                        if at == wish.cancels_at:
                            self.ended = "cancelled"
                            await self._cancel(life)
                            return 0.0
                        if at == wish.leaves_at:
                            wish.leaves_at = None
                            return wish.stays_away_s
                    case Finished():
                        self._finish(at, event)
                        return 0.0
                    case _Broken(why):
                        self.errors.append(why)
                        world.trace.note("client", wish.number, "lost", why)
                        lingers = world.rng_clients.random() < _LINGERS
                        return world.rng_clients.random()
                    case MeshdError():
                        return self._failed(life, event)
                    case Exception():
                        raise Wrong(f"client {wish.number} met an error that is not ours: {event!r}") from event
        finally:
            if lingers:
                world.loop.call_later(_LINGERS_S, connection.close)
            else:
                connection.close()
            life.handlers.remove(connection.handler)
            world.connections.remove(connection)

    async def _cancel(self, life: Life) -> None:
        if life.dead or self.session is None:
            return
        session = self.session

        async def end() -> None:
            with suppress(MeshdError):
                await life.coordinator.end(session)

        await asyncio.wait([self.world.loop.create_task(end(), context=life.owner.context())], timeout=10.0)

    def _take(self, at: int, delta: TextDelta) -> None:
        """The delta of this number: new, or the very one that was seen before."""
        wish = self.wish
        item = (delta.text, tuple(token.token_id for token in delta.tokens))
        if at < len(wish.seen):
            if wish.seen[at] != item:
                raise Wrong(f"client {wish.number}: event {at} was {wish.seen[at]} and is {item} when read again")
            return
        if self.ended:
            raise Wrong(f"client {wish.number}: a token after the end")
        wish.seen.append(item)
        so_far = "".join(text for text, _ in wish.seen)
        if not wish.text.startswith(so_far):
            raise Wrong(f"client {wish.number}: {len(so_far)} tokens are not the reference's: {so_far!r} for {wish.text!r}")
        if wish.request.sampling.logprobs is not None:
            self._check_logprobs(delta)
        now = self.world.loop.time()
        self.pauses.append(now - self._last_token_at)
        self.world.note_pause(self, now - self._last_token_at)
        self._last_token_at = now

    def _check_logprobs(self, delta: TextDelta) -> None:
        wish = self.wish
        first = sum(len(ids) for _, ids in wish.seen) - len(delta.tokens)
        for index, token in enumerate(delta.tokens, first):
            told = wish.expected.logprobs[index]
            if token.token_id != wish.expected.tokens[index] or told is None or token.logprob != told.chosen:
                raise Wrong(f"client {wish.number}: token {index} has other logprobs than the reference")

    def _finish(self, at: int, end: Finished) -> None:
        wish = self.wish
        if at != len(wish.seen):
            raise Wrong(f"client {wish.number}: the answer ended after {at} events where {len(wish.seen)} were seen before")
        so_far = "".join(text for text, _ in wish.seen)
        got = (so_far, end.reason, end.completion_tokens)
        if got != (wish.text, wish.finish, wish.completion_tokens):
            raise Wrong(f"client {wish.number}: ended as {got}, not as {(wish.text, wish.finish, wish.completion_tokens)}")
        self.ended = "exact"

    def _failed(self, life: Life, error: MeshdError) -> float:
        """An error is right only where the mesh could not do better; how long the client waits before it asks again."""
        world, wish = self.world, self.wish
        self.errors.append(f"{error.code}: {error}")
        world.trace.note("client", wish.number, "error", life.spec.name, error.code, error)
        if isinstance(error, _NEVER_RIGHT):
            raise Wrong(f"client {wish.number} got {type(error).__name__}: {error}")
        if isinstance(error, UnknownSession):
            if world.is_unwell(life):
                return 0.5  # it can't know: perhaps another peer does
            if not world.may_have_lost(self._coordinators):
                raise Wrong(f"client {wish.number}: session {self.session} is unknown though no two peers were lost: {error}")
            # Its record is gone: the client starts a new answer and has seen nothing of it.
            self.session = None
            wish.seen.clear()
            self.attempts = 0
            return 0.1
        if wish.seen and not isinstance(error, Cancelled):
            world.judge_error(self, life, error)
        wait_s = error.retry_after_s if isinstance(error, Unavailable) else 0.5
        return min(wait_s, 2.0)
