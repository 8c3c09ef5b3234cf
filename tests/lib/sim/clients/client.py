"""A client: sends its request to a random peer, resumes at another one after an error, and checks each part of the answer."""

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from meshd.agents.service import AnswerSecret, Finished, TextDelta
from meshd.errors import Cancelled, ContextTooLong, InvalidRequest, MeshdError, Unavailable, UnknownModel, UnknownSession
from meshd.types import SessionId
from sim.clients.connection import Connection, ConnectionLost, SessionNamed, handle
from sim.clients.requests import ClientRequest, CorrectAnswer
from sim.peer.process import SimProcess

if TYPE_CHECKING:
    from sim.world import World

_LINGERS = 0.3
"""Probability that a client keeps a lost connection open while it turns to another peer, so that its answer has two readers."""
_LINGERS_S = 4.0
_NEVER_RIGHT = (InvalidRequest, ContextTooLong, UnknownModel)
"""Errors that no fault excuses."""


class WrongAnswer(AssertionError):
    """A client got a wrong answer or an error that no fault excuses, or its answer did not end in time."""


class Client:
    """Sends one request, and resumes its answer until it is complete or cancelled."""

    def __init__(self, world: "World", request: ClientRequest) -> None:
        self.world = world
        self.request = request
        self.session: SessionId | None = None
        self.secret: AnswerSecret | None = None
        self.ended = ""
        """`exact` (the whole correct answer arrived), `mixed` (an answer of several numerics, which were named) or `cancelled`.

        Empty: not ended."""
        self.errors: list[str] = []
        self.pauses: list[float] = []
        """Seconds of waiting for each new delta, from the delta before or from the start of the connection."""
        self.began = 0.0
        self._last_token_at = 0.0

    async def run(self) -> None:
        world, request = self.world, self.request
        await asyncio.sleep(request.starts_at)
        self.began = world.loop.time()
        while not self.ended:
            process = await world.some_process()
            wait_s = await self._attempt(process)
            if self.ended:
                break
            await asyncio.sleep(wait_s)
        world.trace.note("client", request.number, self.ended, len(request.seen))

    async def _attempt(self, process: SimProcess) -> float:
        """Open a connection and read until the answer or the connection ends. Returns: seconds to wait before the next attempt."""
        world, request = self.world, self.request
        connection = Connection(process)
        self._last_token_at = world.loop.time()
        world.connections.append(connection)
        world.trace.note("client", request.number, "asks", process.spec.name, (self.session or "")[:6])
        connection.handler = world.loop.create_task(handle(connection, request, self.secret), context=process.owner.context())
        process.handlers.append(connection.handler)
        at, lingers = 0, False
        try:
            while True:
                event = await connection.next(request.patience_s)
                match event:
                    case SessionNamed(session, secret):
                        if self.session is not None and session != self.session:
                            raise WrongAnswer(f"client {request.number} asked for {self.session} and got {session}")
                        self.session, self.secret = session, secret
                    case TextDelta():
                        self._take(at, event)
                        at += 1
                        if request.reads_s:
                            await asyncio.sleep(request.reads_s)
                        if at == request.cancels_at:
                            self.ended = "cancelled"
                            await self._cancel(process)
                            return 0.0
                        if at == request.leaves_at:
                            request.leaves_at = None
                            return request.stays_away_s
                    case Finished():
                        self._finish(at, event)
                        return 0.0
                    case ConnectionLost(why):
                        self.errors.append(why)
                        world.trace.note("client", request.number, "lost", why)
                        lingers = world.rng_clients.random() < _LINGERS
                        return world.rng_clients.random()
                    case MeshdError():
                        return self._failed(process, event)
                    case Exception():
                        raise WrongAnswer(f"client {request.number} got an error that is no MeshdError: {event!r}") from event
        finally:
            if lingers:
                world.loop.call_later(_LINGERS_S, connection.close)
            else:
                connection.close()
            process.handlers.remove(connection.handler)
            world.connections.remove(connection)

    async def _cancel(self, process: SimProcess) -> None:
        if process.killed or self.session is None:
            return
        session = self.session

        async def end() -> None:
            with suppress(MeshdError):
                await process.coordinator.end(session)

        await asyncio.wait([self.world.loop.create_task(end(), context=process.owner.context())], timeout=10.0)

    def _take(self, at: int, delta: TextDelta) -> None:
        """Check the delta with number `at`: it must equal the delta received before with this number, or continue the answer."""
        request = self.request
        item = (delta.text, tuple(token.token_id for token in delta.tokens))
        if at < len(request.seen):
            if request.seen[at] == item:
                return
            if not self._is_mixed():
                raise WrongAnswer(f"client {request.number}: event {at} was {request.seen[at]} and is {item} when read again")
            del request.seen[at:]  # tokens that no deputy knew of are decided again, and with other numerics perhaps otherwise
        if self.ended:
            raise WrongAnswer(f"client {request.number}: a token after the end")
        request.seen.append(item)
        so_far = "".join(text for text, _ in request.seen)
        answers = [answer for answer in self._answers() if answer.text.startswith(so_far)]
        if not answers and not self._is_mixed():
            texts = [answer.text for answer in self._answers()]
            raise WrongAnswer(
                f"client {request.number}: {len(so_far)} tokens are not the reference's: {so_far!r}, expected one of {texts}"
            )
        if request.generation.sampling.logprobs is not None and not self._is_mixed():
            self._check_logprobs(delta, answers)
        now = self.world.loop.time()
        self.pauses.append(now - self._last_token_at)
        self.world.note_pause(self, now - self._last_token_at)
        self._last_token_at = now

    def _answers(self) -> list[CorrectAnswer]:
        """Return the correct answers under the numerics with which this session was planned."""
        assert self.session is not None
        planned = self.world.numerics.planned[self.session]
        return [answer for numerics, answer in self.request.answers.items() if numerics in planned]

    def _is_mixed(self) -> bool:
        """Whether the session's story says that it was computed with several numerics: then its tokens are not known before."""
        return self.session in self.world.numerics.mixed

    def _check_logprobs(self, delta: TextDelta, answers: list[CorrectAnswer]) -> None:
        request = self.request
        first = sum(len(ids) for _, ids in request.seen) - len(delta.tokens)
        for index, token in enumerate(delta.tokens, first):
            got = token.token_id, token.logprob
            known = [(answer.expected.tokens[index], answer.expected.logprobs[index]) for answer in answers]
            if got not in [(token_id, None if logprobs is None else logprobs.chosen) for token_id, logprobs in known]:
                raise WrongAnswer(f"client {request.number}: token {index} has other logprobs than the reference")

    def _finish(self, at: int, end: Finished) -> None:
        request = self.request
        if at != len(request.seen):
            raise WrongAnswer(f"client {request.number}: the answer ended after {at} events, but it had {len(request.seen)} before")
        so_far = "".join(text for text, _ in request.seen)
        got = (so_far, end.reason, end.completion_tokens)
        expected = [(answer.text, answer.finish, answer.completion_tokens) for answer in self._answers()]
        if got not in expected and not (self._is_mixed() and end.completion_tokens <= (request.generation.max_tokens or 0)):
            raise WrongAnswer(f"client {request.number}: the answer ended as {got}, expected one of {expected}")
        self.ended = "exact" if got in expected else "mixed"

    def _failed(self, process: SimProcess, error: MeshdError) -> float:
        """Handle a peer's error. Returns: seconds to wait before the next attempt. Raises: WrongAnswer if no fault excuses it."""
        world, request = self.world, self.request
        self.errors.append(f"{error.code}: {error}")
        world.trace.note("client", request.number, "error", process.spec.name, error.code, error)
        if isinstance(error, _NEVER_RIGHT):
            raise WrongAnswer(f"client {request.number} got {type(error).__name__}: {error}")
        if isinstance(error, UnknownSession):
            if world.health.is_affected(process.spec.id):
                return 0.5  # this peer may be cut off from the peers that know the session
            if not world.health.may_have_lost_records():
                raise WrongAnswer(
                    f"client {request.number}: session {self.session} is unknown though no two peers were lost: {error}"
                )
            # The session's record is lost: the client starts a new answer and reads it from the beginning.
            self.session = self.secret = None
            request.seen.clear()
            return 0.1
        if request.seen and not isinstance(error, Cancelled):
            world.judge_error(self, process, error)
        wait_s = error.retry_after_s if isinstance(error, Unavailable) else 0.5
        return min(wait_s, 2.0)
