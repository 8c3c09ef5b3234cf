"""Sessions of a lost coordinator: which ones this peer continues, and what happens when that is not possible at once."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from ids import peer_id
from in_process.journals import Keeper, Keepers, S, named, record
from in_process.peers import Peers
from meshd.agents.session import takeover
from meshd.agents.session.journal.record import SessionRecord
from meshd.agents.session.takeover import Takeovers
from meshd.errors import NoPeer, Overloaded
from meshd.types import PeerId, SessionId

LOST = peer_id("lost")


@dataclass
class Heir:
    """A peer with records of a coordinator that was lost. `failures` are raised by the first attempts to continue a session."""

    keepers: Keepers
    keeper: Keeper
    takeovers: Takeovers = field(init=False)
    failures: list[Exception] = field(default_factory=list)
    running: list[SessionId] = field(default_factory=list)
    attempts: int = 0

    def __post_init__(self) -> None:
        keeper = self.keeper
        self.takeovers = Takeovers(
            keeper.peer.links, keeper.deputy, keeper.locator, keeper.clock, lambda session: session in self.running, self.take
        )

    async def take(self, known: SessionRecord) -> None:
        self.attempts += 1
        if self.failures:
            raise self.failures.pop(0)
        self.running.append(known.session)

    def keep(self, session: SessionId = S, coordinator: PeerId = LOST, **fields: object) -> None:
        known = record(session, coordinator=coordinator, tokens=3, **fields)
        self.keeper.deputy.store.keep(known, self.keeper.clock.now)
        self.takeovers.add(session, coordinator)

    async def after(self, seconds: float) -> None:
        """Let this time pass, as the coordinator's loop does."""
        self.keeper.clock.now += seconds
        self.takeovers.tick(self.keeper.clock.now)
        await self.keepers.until(lambda: not self.takeovers._tasks)


@pytest.fixture
async def heir(peers: Peers) -> AsyncIterator[Heir]:
    keepers = Keepers(peers)
    async with keepers.linked("a", "b") as (a, _):
        yield Heir(keepers, a)


async def test_a_session_is_continued_when_its_coordinator_stays_lost(heir: Heir) -> None:
    heir.keep()
    await heir.after(0.1)
    assert heir.running == []
    await heir.after(0.5)
    assert heir.running == [S]
    assert len(heir.takeovers) == 0


async def test_a_session_that_can_not_be_continued_yet_is_tried_again(heir: Heir, caplog: pytest.LogCaptureFixture) -> None:
    """The peer is full, or no live peer has the model. The answer may be a background one that nobody will ask for."""
    heir.failures = [Overloaded("full"), Overloaded("full"), NoPeer("no live peer has the file")]
    heir.keep()
    for _ in range(4):
        await heir.after(2.0)
    assert heir.running == [S]
    assert heir.attempts == 4
    assert len(caplog.records) == 2, "one line for each reason"


async def test_attempts_end_with_the_time_that_records_are_kept(heir: Heir) -> None:
    heir.failures = [Overloaded("full")] * 5
    heir.keep()
    await heir.after(1.0)
    assert len(heir.takeovers) == 1
    await heir.after(600.0)
    assert len(heir.takeovers) == 0
    assert heir.running == []


async def test_a_session_is_not_taken_from_a_coordinator_that_is_back_a_client_or_another_peer(heir: Heir) -> None:
    back = heir.keepers.all[1].id
    heir.keep(named("back"), back)
    heir.keep(named("resumed here"))
    heir.running.append(named("resumed here"))
    heir.keep(named("taken"))
    heir.keeper.deputy.hand_to(named("taken"), back)
    heir.keep(named("dropped"))
    heir.keeper.deputy.forget(named("dropped"))
    await heir.after(1.0)
    assert heir.attempts == len(heir.takeovers) == 0


async def test_many_sessions_are_taken_over_some_at_a_time_and_their_number_is_bounded(
    heir: Heir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "MAX_RECORDS", 20)
    for number in range(25):
        heir.keep(named(f"{number}"))
    assert len(heir.takeovers) == 20
    heir.keeper.clock.now += 1.0
    heir.takeovers.tick(heir.keeper.clock.now)
    assert len(heir.takeovers._tasks) == takeover._AT_ONCE
    for _ in range(3):
        await heir.after(0.1)
    assert len(heir.running) == 20
