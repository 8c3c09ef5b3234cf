"""The coordinator: moves of answers that it coordinates, or that another peer does."""

from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from in_process.answers import CARD, AnswerSite
from in_process.journals import Keeper, Keepers, S
from in_process.peers import Peers, until
from meshd.agents.observe.spans import Spans
from meshd.agents.observe.story import Story
from meshd.agents.observe.stream import EventStream
from meshd.agents.placement.model_library import ModelLibrary
from meshd.agents.placement.weights.headers import HeaderFetcher
from meshd.agents.service import GenerationRequest
from meshd.agents.session import coordinator as coordinator_module
from meshd.agents.session.admission import Admission
from meshd.agents.session.answer import Answer
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.journal.writer import JournalWriters
from meshd.agents.session.plan.move import Mover
from meshd.agents.session.plan.retry import PlanRetrier
from meshd.agents.session.session import SessionState
from meshd.errors import InvalidRequest, InvalidSampling, PeerFault, RemoteFailure
from meshd.models.store.store import Store
from meshd.protocol.messages import HandedOver, HandOver, Journaled, Move, Moved, Reply
from meshd.telemetry import Telemetry
from meshd.types import PeerId, SamplingParams, SessionId
from sim.toy.text import toy_text

TEXT = toy_text(CARD)


def coordinator_of(keeper: Keeper) -> Coordinator:
    """A coordinator without a model library and a router: no test here makes a plan."""
    nothing = cast("Any", None)
    links, clock = keeper.peer.links, keeper.clock
    retrier = PlanRetrier(links, nothing, list, clock, mirror=False, take=nothing, other_coordinator=nothing)
    return Coordinator(
        me=keeper.id,
        links=links,
        library=nothing,
        router=nothing,
        admission=Admission(running=1, waiting=1, wait_s=1),
        retrier=retrier,
        mover=Mover(retrier, nothing, list, clock),
        journal=nothing,
        deputy=keeper.deputy,
        locator=keeper.locator,
        clock=clock,
        telemetry=Telemetry(),
        story=Story(clock),
        spans=Spans(),
        events=EventStream(PeerId("me"), "here", clock),
        names=lambda peer: peer[:4],
        readiness_of=lambda: (True, 1.0, ""),
        leaving=lambda: False,
    )


@pytest.mark.parametrize("right", [True, False])
async def test_a_move_is_forwarded_to_the_coordinator_and_any_other_reply_is_its_fault(peers: Peers, right: bool) -> None:
    async with Keepers(peers).linked("a", "b") as (a, b):
        b.answer()
        plan = AnswerSite(peers.start("c")).plan()

        def on_move(sender: PeerId, message: Move, payload: memoryview) -> Reply:
            if right:
                return Moved(request=message.request, pause_s=0.5, plan=plan)
            return Journaled(request=message.request, session=message.session)

        b.peer.links.register(Move, on_move)
        if right:
            assert (await coordinator_of(a).move(S, a.id, None)).pause_s == 0.5
        else:
            with pytest.raises(PeerFault, match="MOVE was answered with Journaled"):
                await coordinator_of(a).move(S, a.id, None)


async def test_answers_are_retained_up_to_a_number_of_bytes(peers: Peers, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Keepers(peers).linked("a", "b") as (a, _):
        coordinator = coordinator_of(a)
        coordinator.journal = JournalWriters(a.id, a.peer.links, a.clock, list)
        site = AnswerSite(peers.start("c"))
        record = msgspec.structs.replace(site.answer.record, prompt=tuple(range(1000, 3000)))
        records = [msgspec.structs.replace(record, session=SessionId(f"{number:032}")) for number in range(6)]
        answers = [Answer(record, CARD, TEXT, site._context()) for record in records]
        monkeypatch.setattr(coordinator_module, "_MAX_RETAINED_BYTES", 3 * answers[0].output.size)
        for answer in answers:
            coordinator._retain(answer)
        assert list(coordinator.retained.values()) == answers[-3:]
        monkeypatch.setattr(coordinator_module, "_MAX_RETAINED_BYTES", 1)
        coordinator._retain(answers[0])
        assert list(coordinator.retained.values()) == answers[:1]


@pytest.mark.parametrize("ran", [True, False])
async def test_an_answer_that_never_ran_is_not_retained_because_nobody_knows_its_id(peers: Peers, ran: bool) -> None:
    async with Keepers(peers).linked("a", "b") as (a, _):
        coordinator = coordinator_of(a)
        coordinator.journal = JournalWriters(a.id, a.peer.links, a.clock, list)
        site = AnswerSite(peers.start("c"))
        answer = Answer(site.answer.record, CARD, TEXT, coordinator._context)
        coordinator.admission.enter_ahead()
        coordinator._run(answer, a.clock.monotonic())
        if ran:
            answer.machine.kv_plan = site.plan()
        answer.plan_failed(InvalidRequest("it fits nowhere"))
        assert answer.status == "failed"
        assert list(coordinator.retained) == ([answer.session] if ran else [])
        assert coordinator.admission.running == 0


async def test_a_superseded_answer_is_handed_over_to_its_other_coordinator(peers: Peers) -> None:
    async with Keepers(peers).linked("a", "b") as (a, b):
        received: list[tuple[PeerId, HandOver]] = []

        async def on_hand_over(sender: PeerId, message: HandOver, payload: memoryview) -> Reply:
            received.append((sender, message))
            return HandedOver(request=message.request, known=True)

        for keeper in (a, b):
            keeper.peer.links.register(HandOver, on_hand_over)
        coordinator = coordinator_of(a)
        coordinator.journal = JournalWriters(a.id, a.peer.links, a.clock, list)
        answer = Answer(AnswerSite(peers.start("c")).answer.record, CARD, TEXT, coordinator._context)
        answer.machine.state = SessionState.RECOVERING
        answer.machine.holders.update((a.id, b.id))
        coordinator.admission.enter_ahead()
        coordinator._run(answer, a.clock.monotonic())
        answer.tasks.search(_supersede(answer, b.id))  # in a task that is cancelled when the answer is released
        await until(lambda: not coordinator._hand_overs and answer.machine.released)
        assert {(sender, message.session, message.to) for sender, message in received} == {(a.id, answer.session, b.id)}
        assert len(received) == 2, "one for each peer that has its KV"
        assert answer.status == "suspended"
        assert coordinator.answers == {} == dict(coordinator.retained)
        assert coordinator.admission.running == 0


async def _supersede(answer: Answer, coordinator: PeerId) -> None:
    answer.context.on_superseded(answer, coordinator)


async def test_a_move_of_a_session_that_is_not_coordinated_here_is_refused(peers: Peers) -> None:
    async with Keepers(peers).linked("a", "b") as (a, b):
        b.answer()
        coordinator_of(b).register()
        with pytest.raises(RemoteFailure, match="is not coordinated here"):
            await coordinator_of(a).move(S, a.id, None)


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (SamplingParams(logit_bias={60_000: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias=dict.fromkeys(range(6000), 1.0)), "logit_bias"),
        (SamplingParams(repetition_penalty=1e-300, top_p=0.5), "repetition_penalty"),
    ],
)
async def test_sampling_parameters_that_no_peer_could_use_are_refused_at_once(
    peers: Peers, tmp_path: Path, sampling: SamplingParams, param: str
) -> None:
    async with Keepers(peers).linked("a", "b") as (a, _):
        coordinator = coordinator_of(a)
        links, headers = a.peer.links, cast("HeaderFetcher", None)  # no header is fetched
        coordinator.library = ModelLibrary(
            links=links, store=Store(tmp_path), adverts=list, on_change=lambda: None, headers=headers
        )
        coordinator.library.local[CARD.id] = CARD
        with pytest.raises(InvalidSampling) as refused:
            await coordinator.generate(GenerationRequest(model=CARD.name, prompt=(1, 2), sampling=sampling))
        assert refused.value.param == param
        assert coordinator.admission.running == 0
