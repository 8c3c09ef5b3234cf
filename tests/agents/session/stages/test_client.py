"""The messages that a coordinator sends to the stages of an answer."""

import msgspec
import numpy as np
import pytest

from in_process.answers import AnswerSite
from in_process.peers import Peers, until
from meshd.agents.session.events import CloseStages, OpenStages, ResumeStages
from meshd.agents.session.plan.resume import ResumePoint, StageHeld
from meshd.agents.session.stages.client import RENEW_S
from meshd.errors import InvalidSampling, PeerFault
from meshd.protocol.messages import Ack, Close, Error, Journaled, Open, Opened, Renew, Resume, Step, StepKind, Steps
from meshd.types import PeerId, SamplingParams


@pytest.fixture
async def site(peers: Peers) -> AnswerSite:
    return AnswerSite(peers.start("a"))


def ids(payload: bytes) -> list[int]:
    return np.frombuffer(payload, "<i4").tolist()


async def test_open_returns_what_the_stage_still_has_of_the_session(site: AnswerSite) -> None:
    session = site.answer.session
    site.reply = Opened(request=0, session=session, epoch=2, blocks=1, held=5, mirrored=True, kept_from=2, kept_to=4)
    held = await site.answer.stages.open(OpenStages(2, site.plan(), 64, 3), 0, [])
    assert held == StageHeld(5, True, 2, 4)
    [message] = site.got(Open)
    assert (message.epoch, message.stage, message.answered, message.resume) == (2, 0, 3, True)
    assert site.payloads == [b""]


async def test_only_a_last_stage_with_penalties_gets_the_known_tokens(peers: Peers) -> None:
    site = AnswerSite(peers.start("a"), sampling=SamplingParams(presence_penalty=0.5))
    command = OpenStages(2, site.plan(10), 64, 2)
    for stage in (0, 1):
        await site.answer.stages.open(command, stage, [100, 101])
    assert [ids(payload) for payload in site.payloads] == [[], [1, 2, 3, 100, 101]]


async def test_only_the_last_stage_gets_the_sampling_parameters(peers: Peers) -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(200), 1.0))
    site = AnswerSite(peers.start("a"), sampling=params)
    for stage in (0, 1):
        await site.answer.stages.open(OpenStages(1, site.plan(10), 64, 0), stage, [])
    assert [message.sampling for message in site.got(Open)] == [None, params]


async def test_a_stage_that_cannot_use_the_parameters_refuses_the_request_and_not_the_plan(site: AnswerSite) -> None:
    site.reply = Error(request=0, code=InvalidSampling.code, message="a penalty", hint="use smaller ones")
    with pytest.raises(InvalidSampling, match="a penalty"):
        await site.answer.stages.open(OpenStages(1, site.plan(), 64, 0), 0, [])


async def test_any_reply_to_open_but_opened_is_the_peers_fault(site: AnswerSite) -> None:
    site.reply = Journaled(request=0, session=site.answer.session)
    with pytest.raises(PeerFault, match="OPEN was answered with Journaled"):
        await site.answer.stages.open(OpenStages(1, site.plan(), 64, 0), 0, [])


@pytest.mark.parametrize(("start", "known"), [(0, [1, 2, 3, 100, 101]), (3, [100, 101]), (4, [101])])
async def test_the_known_tokens_are_sent_as_one_step_from_the_start_of_the_first_stage(
    site: AnswerSite, start: int, known: list[int]
) -> None:
    site.answer.stages.send_prompt(1, site.plan(10, chunk=2), start, [100, 101])
    await until(lambda: bool(site.received))
    assert [ids(payload) for payload in site.payloads] == [known]
    step = Step(
        session=site.answer.session,
        epoch=1,
        stage=0,
        seq=0,
        start=start,
        tokens=len(known),
        kind=StepKind.PREFILL,
        sample=1,
        committed=5,
        size=4 * len(known),
    )
    assert site.got(Steps) == [Steps(steps=(step,))]


async def test_the_first_and_the_last_stage_are_told_which_tokens_have_arrived_and_how_many_it_may_send(site: AnswerSite) -> None:
    site.answer.stages.grant(3, site.plan(10), 4, 96)
    site.answer.stages.grant(3, site.plan(10), 4, 5)
    await until(lambda: len(site.received) == 2)
    assert site.got(Ack) == [Ack(session=site.answer.session, epoch=3, stage=2, next_seq=4, credit=credit) for credit in (96, 5)]


async def test_tokens_are_granted_at_the_peers_of_the_first_and_the_last_stage_only(peers: Peers) -> None:
    first, second, third = (AnswerSite(peers.start(name)) for name in "abc")
    for other in (second, third):
        first.peer.dial(other.peer)
        await first.peer.ups.get()
    whole = first.plan(10, 20)
    places = zip(whole.stages, (first, second, third), strict=True)
    plan = msgspec.structs.replace(whole, stages=tuple(msgspec.structs.replace(stage, peer=site.peer.id) for stage, site in places))
    first.answer.stages.grant(3, plan, 4, 96)
    await until(lambda: bool(first.received and third.received))
    assert [len(site.got(Ack)) for site in (first, second, third)] == [1, 0, 1]


async def test_every_stage_is_sent_its_resume_point(site: AnswerSite) -> None:
    points = (ResumePoint(4, 2), ResumePoint(2, 2))
    site.answer.stages.resume(ResumeStages(3, site.plan(10), (StageHeld(4), StageHeld(2)), points))
    await until(lambda: len(site.received) == 2)
    assert [(one.stage, one.start, one.send_from) for one in site.got(Resume)] == [(0, 4, 2), (1, 2, 2)]


async def test_leases_are_renewed_at_most_once_in_three_seconds(site: AnswerSite) -> None:
    client, me = site.answer.stages, site.peer.id
    begun = client.renewed_at
    client.renew((), 1, begun + 100)
    client.renew({me}, 1, begun + RENEW_S - 0.1)
    client.renew({me}, 2, begun + RENEW_S)
    client.renew({me}, 3, begun + RENEW_S + 0.1)
    client.close(CloseStages(4, (me,), "over"))
    await until(lambda: bool(site.got(Close)))
    assert [message.epoch for message in site.got(Renew)] == [2]


async def test_an_unreachable_peer_does_not_keep_others_from_getting_their_message(site: AnswerSite) -> None:
    site.answer.stages.close(CloseStages(1, (PeerId("gone"), site.peer.id), "over"))
    await until(lambda: [message.reason for message in site.got(Close)] == ["over"])
