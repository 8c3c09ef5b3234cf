"""The receiver of messages from stages: an answer gets only those whose sender runs one of its stages."""

from typing import cast

import pytest

from in_process.answers import CARD, AnswerSite
from in_process.peers import Peers
from meshd.agents.session.plan.move import Mover
from meshd.agents.session.plan.retry import PlanRetrier
from meshd.agents.session.session import SessionState
from meshd.agents.session.stages.receiver import StageReceiver, blamed_peer
from meshd.errors import InvalidSampling
from meshd.protocol.messages import Error, Failed
from meshd.types import LayerRange, PeerId, Plan, PlanId, StagePlan, TokenLogprobs

STRANGER = PeerId("stranger")


@pytest.fixture
async def site(peers: Peers) -> AnswerSite:
    site = AnswerSite(peers.start("a"))
    await site.open()
    return site


@pytest.fixture
def receiver(site: AnswerSite) -> StageReceiver:
    """A receiver without retrier and mover, which only MIRRORED messages need."""
    return StageReceiver({site.answer.session: site.answer}, cast("PlanRetrier", None), cast("Mover", None), lambda peer: "name")


async def test_tokens_count_only_from_the_last_stage(site: AnswerSite, receiver: StageReceiver) -> None:
    receiver.on_tokens(STRANGER, site.tokens(0, 7))
    assert site.answer.output.tokens == []
    receiver.on_tokens(site.peer.id, site.tokens(0, 7, 8))
    assert site.answer.output.tokens == [(7, None), (8, None)]


@pytest.mark.parametrize(
    ("tokens", "logprobs"),
    [((CARD.spec.vocab,), 0), ((7, CARD.spec.vocab, 8), 0), ((7, 8), 1), ((7,), 2)],
    ids=["outside the vocabulary", "one of them outside the vocabulary", "too few logprobs", "too many logprobs"],
)
async def test_tokens_that_cannot_be_are_their_senders_fault_and_none_of_them_counts(
    site: AnswerSite, receiver: StageReceiver, tokens: tuple[int, ...], logprobs: int
) -> None:
    receiver.on_tokens(site.peer.id, site.tokens(0, *tokens, logprobs=(TokenLogprobs(-0.5),) * logprobs))
    assert site.answer.output.tokens == []
    assert site.answer.machine.state is SessionState.RECOVERING
    assert site.answer.recovery.distrusted(site.clock.now) == {site.peer.id}


async def test_an_error_counts_only_from_a_peer_of_the_plan(site: AnswerSite, receiver: StageReceiver) -> None:
    error = Error(code="out_of_memory", message="no memory", session=site.answer.session)
    receiver.on_error(STRANGER, error)
    receiver.on_error(site.peer.id, Error(code="out_of_memory", message="no memory"))
    assert site.answer.machine.state is SessionState.PREFILLING
    receiver.on_error(site.peer.id, error)
    assert site.answer.machine.state is SessionState.RECOVERING


@pytest.mark.parametrize(
    ("sender", "blame", "blamed"),
    [
        ("b", "b", "b"),
        ("b", "a", "a"),
        ("b", "c", "c"),
        ("b", "d", "b"),
        ("b", "elsewhere", "b"),
        ("a", "d", "d"),
        ("c", "me", "me"),
    ],
)
def test_a_failed_stage_blames_itself_a_neighbour_or_the_coordinator(sender: str, blame: str, blamed: str) -> None:
    stages = tuple(StagePlan(peer=PeerId(peer), layers=LayerRange(number, number + 1)) for number, peer in enumerate("abcd"))
    plan = Plan(id=PlanId("p"), model=CARD.id, stages=stages, prefill_chunk_tokens=2, context=64)
    assert blamed_peer(plan, PeerId("me"), PeerId(sender), PeerId(blame)) == blamed
    assert blamed_peer(plan, PeerId("me"), PeerId(sender), None) is None


async def test_a_request_that_the_last_stage_cannot_sample_for_is_not_a_fault_of_its_peer(
    site: AnswerSite, receiver: StageReceiver
) -> None:
    failed = Failed(session=site.answer.session, epoch=1, step=0, stage=0, code=InvalidSampling.code, message="not finite")
    receiver._on_failed(site.peer.id, failed, memoryview(b""))
    assert isinstance(site.answer.machine.error, InvalidSampling)
    assert site.answer.recovery.distrusted(site.clock.now) == set()
