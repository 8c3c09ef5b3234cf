"""Peers with real links that store each other's session records, in one process. The test moves the clock of their journals."""

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from ids import model_id, peer_id
from in_process.peers import SLOW, Peer, Peers, until
from meshd.agents.admin.story_collector import StoryCollector
from meshd.agents.links.link_table import Timing
from meshd.agents.observe.story import Story
from meshd.agents.service import AnswerSecret
from meshd.agents.session.journal.deputy import Deputy
from meshd.agents.session.journal.keys import key_of, session_of
from meshd.agents.session.journal.locator import Locator
from meshd.agents.session.journal.record import SessionRecord
from meshd.agents.session.journal.writer import JournalWriter
from meshd.types import Advert, Capability, LinkStats, PeerId, Rates, SamplingParams, SessionId, TokenLogprobs

SECRET = AnswerSecret("5e" * 16)
S = session_of(SECRET)
_SECRETS: dict[SessionId, AnswerSecret] = {S: SECRET}
CAPABILITY = Capability(
    backend="none",
    processor="none",
    threads=1,
    memory_total_bytes=1,
    memory_free_bytes=1,
    rates=Rates(decode_bytes_s=1, prefill_flops_s=1, memory_bytes_s=1, attention_bytes_s=1, disk_bytes_s=1, layer_overhead_s=0),
)


class HandClock:
    """A clock that stands still until a test moves it. Sleepers wake in the order of their times."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    def random_bytes(self, count: int) -> bytes:
        return bytes(count)

    async def sleep(self, seconds: float) -> None:
        self._count += 1
        asleep: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, self._count, asleep))
        await asleep

    async def move(self, seconds: float) -> None:
        """Move the clock forward, and wake each sleeper when the clock reaches its time."""
        end = self.now + seconds
        await _settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            at, _, asleep = heapq.heappop(self._sleepers)
            self.now = at
            if not asleep.done():
                asleep.set_result(None)
            await _settle()
        self.now = end


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def named(name: str) -> SessionId:
    """Return the id of the session of a test's own name."""
    secret = AnswerSecret(f"{name:x>32}")
    _SECRETS[session_of(secret)] = secret
    return session_of(secret)


def secret(session: SessionId) -> AnswerSecret:
    """Return the secret of the answer of a session of `named`."""
    return _SECRETS[session]


def record(session: SessionId = S, *, tokens: int = 0, **other: object) -> SessionRecord:
    """Build the record of a session whose answer tokens are 100, 101, ..."""
    fields: dict[str, object] = {
        "session": session,
        "key": key_of(_SECRETS[session]),
        "model": model_id("m"),
        "coordinator": peer_id("c"),
        "epoch": 1,
        "prompt": (1, 2, 3),
        "max_tokens": 64,
        "sampling": SamplingParams(),
        "tokens": answer(tokens),
    }
    return SessionRecord(**(fields | other))  # type: ignore[arg-type]


def answer(tokens: int, start: int = 0) -> tuple[tuple[int, TokenLogprobs | None], ...]:
    """Build the answer tokens 100 + `start`, ..., 99 + `tokens`, without logprobs."""
    return tuple((100 + index, None) for index in range(start, tokens))


def advert(peer: PeerId, rtt_s: dict[PeerId, float] | None = None, *, name: str = "", draining: bool = False) -> Advert:
    links = {other: LinkStats(rtt_s=rtt, bandwidth_bytes_s=1e9) for other, rtt in (rtt_s or {}).items()}
    return Advert(
        peer=peer,
        name=name or peer[:4],
        incarnation=1,
        revision=1,
        version="0",
        capability=CAPABILITY,
        draining=draining,
        links=links,
    )


@dataclass
class Answer:
    """A running session on its coordinator, and its journal."""

    writer: JournalWriter
    record: SessionRecord
    plan: tuple[PeerId, ...] = ()

    def begin(self) -> None:
        self.writer.begin(self.record.session, lambda: self.record, lambda: self.plan)

    def make(self, tokens: int) -> None:
        """Add this many tokens to the answer."""
        have = len(self.record.tokens)
        self.record = msgspec.structs.replace(self.record, tokens=answer(have + tokens))
        for index, (token, logprobs) in enumerate(self.record.tokens[have:], have):
            self.writer.token(self.record.session, index, token, logprobs)

    def replan(self, *plan: PeerId) -> None:
        self.record = msgspec.structs.replace(self.record, epoch=self.record.epoch + 1)
        self.plan = plan
        self.begin()

    def end(self, finish: str = "stop", *, keep: bool = True) -> None:
        self.record = msgspec.structs.replace(self.record, finish=finish)
        self.writer.end(self.record.session, finish, keep=keep)


@dataclass
class Keeper:
    """A peer that writes the journals of its own sessions and is a deputy for others."""

    peer: Peer
    clock: HandClock
    writer: JournalWriter = field(init=False)
    deputy: Deputy = field(init=False)
    locator: Locator = field(init=False)
    story_collector: StoryCollector = field(init=False)
    answers: dict[SessionId, Answer] = field(default_factory=dict)
    orphans: list[tuple[SessionId, PeerId]] = field(default_factory=list)
    released: list[SessionId] = field(default_factory=list)
    ended: list[tuple[SessionId, bool]] = field(default_factory=list)
    draining: set[PeerId] = field(default_factory=set)
    """Peers that drain according to the adverts that this peer has."""
    rtt_s: dict[PeerId, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        links, me = self.peer.links, self.peer.id
        self.writer = JournalWriter(me, links, self.clock, self._adverts)
        self.deputy = Deputy(
            links,
            self.clock,
            on_orphan=lambda session, coordinator: self.orphans.append((session, coordinator)),
            on_dropped=self.writer.on_dropped,
            coordinates=lambda session: session in self.answers,
        )
        self.locator = Locator(me, links, self.deputy, self.clock)
        self.story_collector = StoryCollector(me, links, Story(self.clock), self.clock, names=lambda peer: peer[:4])
        for agent in (self.deputy, self.story_collector):
            agent.register()
        self.locator.register(self)

    @property
    def id(self) -> PeerId:
        return self.peer.id

    def answer(self, session: SessionId = S, *, tokens: int = 0, plan: tuple[PeerId, ...] = (), **other: object) -> Answer:
        """Start a session that this peer coordinates, and begin its journal."""
        made = Answer(self.writer, record(session, tokens=tokens, coordinator=self.id, **other), plan)
        self.answers[session] = made
        made.begin()
        return made

    def kept(self, session: SessionId = S) -> int | None:
        """Return the number of answer tokens that this peer stores as a deputy; None if it has no record."""
        known = self.deputy.record(session)
        assert known is None or known.tokens == answer(len(known.tokens))
        return len(known.tokens) if known is not None else None

    def _adverts(self) -> list[Advert]:
        others = [advert(peer, draining=peer in self.draining) for peer in self.peer.links.peers()]
        return [advert(self.id, self.rtt_s), *others]

    def own(self, session: SessionId) -> SessionRecord | None:
        made = self.answers.get(session)
        return made.record if made is not None else None

    async def hand_over(self, session: SessionId, to: PeerId) -> None:
        self.released.append(session)
        del self.answers[session]
        self.writer.release(session)

    def finish(self, session: SessionId, forget: bool) -> bool:
        self.ended.append((session, forget))
        return session in self.answers

    async def live(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.writer.run())
            tasks.create_task(self.deputy.run())
            tasks.create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            gone, _ = await self.peer.downs.get()
            self.writer.on_peer_gone(gone)
            self.deputy.on_peer_gone(gone)


@dataclass
class Keepers:
    """Peers that are all linked with each other."""

    peers: Peers
    clock: HandClock = field(default_factory=HandClock)
    all: list[Keeper] = field(default_factory=list)

    @asynccontextmanager
    async def linked(self, *names: str, timing: Timing = SLOW) -> AsyncIterator[list[Keeper]]:
        self.all = [Keeper(self.peers.start(name, timing=timing), self.clock) for name in names]
        for one in self.all:
            for other in self.all:
                if one.id < other.id:
                    one.peer.dial(other.peer)
        await until(lambda: all(len(one.peer.links.peers()) == len(names) - 1 for one in self.all))
        tasks = [asyncio.get_running_loop().create_task(one.live()) for one in self.all]
        try:
            yield self.all
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for messages over the links, while the journals' clock stands still."""
        await until(condition)
