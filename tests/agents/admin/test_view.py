"""Operations on the cluster: names are resolved to peers, prefixes of ids to sessions."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from in_process.journals import advert
from meshd.agents.admin.listings import Listings
from meshd.agents.admin.plan_rows import PlanRows
from meshd.agents.admin.view import ClusterView
from meshd.agents.service import AnswerSecret
from meshd.agents.session.journal.keys import session_of
from meshd.agents.session.recovery_history import Recovered
from meshd.errors import InvalidRequest, NoPeer, UnknownSession
from meshd.protocol.messages import Moved
from meshd.types import LayerRange, ModelId, PeerId, Plan, PlanId, SessionId, StagePlan

ATTIC, DESK = PeerId("attic" * 10 + "aa"), PeerId("desk" * 13)
SECRET = AnswerSecret("dd55" * 8)
FIRST, SECOND = SessionId("aa11" * 8), SessionId("aa22" * 8)
STAGED = SessionId("bb33" * 8)
PLAN = Plan(
    id=PlanId("p"),
    model=ModelId("m"),
    stages=(StagePlan(peer=ATTIC, layers=LayerRange(0, 12)), StagePlan(peer=DESK, layers=LayerRange(12, 30))),
    prefill_chunk_tokens=64,
    context=128,
)


@dataclass
class RecordedAgents:
    """Stands for the agents behind the view, and records their calls."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)

    async def drain(self, peer: PeerId, undo: bool, timeout_s: float) -> int:
        self.calls.append((peer, undo, timeout_s))
        return 3

    async def move(self, session: SessionId, target: PeerId, source: PeerId | None) -> Moved:
        self.calls.append((session, target, source))
        return Moved(request=0, pause_s=0.25, plan=PLAN)

    async def collect(self, session: SessionId) -> list[dict[str, Any]]:
        self.calls.append((session,))
        return [{"what": "planned"}]


def _answer(session: SessionId) -> SimpleNamespace:
    return SimpleNamespace(
        session=session,
        card=SimpleNamespace(id=ModelId("m")),
        machine=SimpleNamespace(state=SimpleNamespace(value="decoding"), tokens=[1, 2], epoch=3),
        prompt_tokens=7,
        ttft_s=0.25,
        plan_header="attic:0-12,desk:12-30",
        numerics_header="",
        recoveries=[Recovered(2, "replay", "loss", "desk: silent", 0.31), Recovered(3, "kept", "move", "moved to desk", 0.002)],
        mirrors={1: (ATTIC, 96)},
    )


@pytest.fixture
def agents() -> RecordedAgents:
    return RecordedAgents()


@pytest.fixture
def view(agents: RecordedAgents) -> ClusterView:
    names = {ATTIC: "attic", DESK: "desk"}
    coordinator = SimpleNamespace(
        answers={FIRST: _answer(FIRST)},
        retained={SECOND: _answer(SECOND)},
        move=agents.move,
        journal=SimpleNamespace(deputies_of=lambda session: [DESK]),
    )
    membership = SimpleNamespace(
        adverts=lambda: [advert(peer, name=name) for peer, name in names.items()],
        name_of=names.get,
        description=SimpleNamespace(peer=ATTIC),
    )
    library = SimpleNamespace(cards=lambda: {ModelId("m"): SimpleNamespace(name="smollm2")})
    stages = SimpleNamespace(rows=lambda name_of: [{"id": STAGED, "role": "stage 1"}])
    plan_rows = PlanRows(membership.adverts, cast("Any", membership.name_of))
    agents_of = cast("Any", (membership, library, coordinator, stages))
    listings = Listings(*agents_of, plan_rows)
    parts = {
        "membership": membership,
        "library": library,
        "router": None,
        "placer": None,
        "coordinator": coordinator,
        "stages": stages,
        "drainer": SimpleNamespace(drain=agents.drain),
        "story_collector": SimpleNamespace(collect=agents.collect),
        "trace_collector": None,
        "stream": None,
        "listings": listings,
        "rows": None,
        "relay": None,
        "reload_settings": dict,
        "exchange": None,
        "files": None,
        "about": dict,
        "inviter": None,
        "checks": None,
    }
    return ClusterView(**cast("dict[str, Any]", parts))


async def test_a_peer_is_drained_by_its_name_or_the_beginning_of_its_id(view: ClusterView, agents: RecordedAgents) -> None:
    assert await view.drain("desk", timeout_s=5.0) == {"peer": DESK, "name": "desk", "sessions_left": 3}
    await view.drain("attica", undo=True, timeout_s=1.0)
    assert agents.calls == [(DESK, False, 5.0), (ATTIC, True, 1.0)]
    with pytest.raises(NoPeer, match="attic, desk"):
        await view.drain("cellar")


async def test_a_session_is_moved_to_a_peer(view: ClusterView, agents: RecordedAgents) -> None:
    moved = await view.migrate(FIRST, "desk")
    assert moved == {"session": FIRST, "plan": "attic:0-12,desk:12-30", "pause_ms": 250.0}
    await view.migrate("aa11", "desk", "attic")
    assert agents.calls == [(FIRST, DESK, None), (FIRST, DESK, ATTIC)]
    with pytest.raises(NoPeer):
        await view.migrate(FIRST, "desk", "cellar")


@pytest.mark.parametrize(
    ("text", "session"),
    [
        (FIRST, FIRST),
        (f"resp_{SECRET}", session_of(SECRET)),
        (f"chatcmpl-{SECRET}", session_of(SECRET)),
        ("aa2", SECOND),
        ("b", STAGED),
        ("cc44" * 8, SessionId("cc44" * 8)),
    ],
)
async def test_a_session_is_found_by_its_id_its_answers_id_or_the_beginning(
    view: ClusterView, agents: RecordedAgents, text: str, session: SessionId
) -> None:
    assert await view.story(text) == [{"what": "planned"}]
    assert agents.calls == [(session,)]


@pytest.mark.parametrize(("text", "error"), [("cc", UnknownSession), ("", UnknownSession), ("aa", InvalidRequest)])
async def test_a_text_that_matches_no_session_or_several_is_refused(view: ClusterView, text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await view.story(text)


async def test_the_error_for_an_ambiguous_beginning_counts_the_sessions_and_lists_three(view: ClusterView) -> None:
    sessions = [SessionId(f"{digit:032x}") for digit in range(12)]
    view.coordinator.retained.update({session: cast("Any", _answer(session)) for session in sessions})
    with pytest.raises(InvalidRequest) as refused:
        await view.migrate("0", "desk")
    assert str(refused.value) == f"'0' matches 12 sessions: {', '.join(sessions[:3])}, ...; write more of the id"


def test_a_sessions_row_shows_its_recoveries(view: ClusterView) -> None:
    own, staged = view.sessions()
    assert own == {
        "id": FIRST,
        "role": "coordinator",
        "model": "smollm2",
        "state": "decoding",
        "tokens": 2,
        "prompt_tokens": 7,
        "ttft_s": 0.25,
        "epoch": 3,
        "plan": "attic:0-12,desk:12-30",
        "numerics": "",
        "method": "kept",
        "recoveries": [
            {"epoch": 2, "method": "replay", "reason": "desk: silent", "pause_ms": 310.0, "other_numerics": ""},
            {"epoch": 3, "method": "kept", "reason": "moved to desk", "pause_ms": 2.0, "other_numerics": ""},
        ],
        "mirrors": [{"stage": 1, "peer": ATTIC, "name": "attic", "held": 96}],
        "deputies": [DESK],
    }
    assert staged == {"id": STAGED, "role": "stage 1"}
