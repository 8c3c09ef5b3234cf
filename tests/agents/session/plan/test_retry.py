"""The plan retrier: how long it searches, who coordinates an answer after a takeover, and which reports about KV copies count."""

from contextlib import aclosing
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from in_process.answers import AnswerSite
from in_process.clusters import make_holding, make_peer
from in_process.peers import Peers
from in_process.placing import Cluster
from meshd.agents.service import AnswerSecret
from meshd.agents.session.journal.record import SessionRecord
from meshd.agents.session.plan.retry import TAKEOVER_EPOCHS, PlanRetrier, retry_after_s
from meshd.errors import InvalidSampling, Overloaded, RemoteFailure
from meshd.protocol.messages import Close, Error, Mirrored, Open
from meshd.types import PeerId, SessionId

COPY = PeerId("copy")
BUSY, FREE = (make_holding(0, 30, free=0),), (make_holding(0, 30),)
NOTHING = cast("Any", None)


def retrier_of(site: AnswerSite, cluster: Cluster | None = None, **fields: Any) -> PlanRetrier:
    """Make a retrier that plans over an invented cluster. Its peers can't be reached, so the stages of its plans never open."""
    router = NOTHING if cluster is None else cluster.router
    given: dict[str, Any] = {"mirror": False, "take": NOTHING, "other_coordinator": NOTHING}
    return PlanRetrier(site.peer.links, router, list, site.clock, **given | fields)


def mirrored(site: AnswerSite, target: PeerId, *, held: int, epoch: int = 1, error: str = "") -> Mirrored:
    return Mirrored(session=site.answer.session, epoch=epoch, stage=1, target=target, held=held, filled=held, error=error)


async def test_a_first_plan_is_searched_until_kv_is_free(peers: Peers) -> None:
    site, cluster = AnswerSite(peers.start("new")), Cluster(make_peer("x", holdings=BUSY))
    retrier_of(site, cluster).start(site.answer)
    await site.clock.move(29.0)
    assert site.answer.status == "queued"
    assert site.answer.plan is None
    cluster.change("x", holdings=FREE)
    await site.clock.move(0.3)
    assert site.answer.plan is not None
    assert site.answer.plan.peers == ("x-id",)


async def test_a_first_plan_is_given_up_after_half_a_minute(peers: Peers) -> None:
    site = AnswerSite(peers.start("new"))
    retrier_of(site, Cluster(make_peer("x", holdings=BUSY))).start(site.answer)
    await site.clock.move(30.5)
    with pytest.raises(Overloaded, match="KV free"):
        await site.answer.opened
    assert site.answer.status == "failed"


async def test_an_answer_whose_length_nobody_asked_for_ends_with_the_kv_of_its_plan(peers: Peers) -> None:
    few = (make_holding(0, 30, kv_tokens=2048, free=400),)
    site = AnswerSite(peers.start("new"), open_ended=True, max_tokens=8000)
    retrier_of(site, Cluster(make_peer("x", holdings=few))).start(site.answer)
    await site.clock.move(0.1)
    assert site.answer.plan is not None
    limit = site.answer.plan.context - site.answer.prompt_tokens
    assert site.answer.plan.context == 400
    assert site.answer.snapshot().max_tokens == site.answer.stages.record.max_tokens == limit
    assert site.answer.output.finish_at(limit - 1, 9) == "length"


async def test_an_answer_whose_length_nobody_asked_for_is_not_refused_after_half_a_minute(peers: Peers) -> None:
    few = (make_holding(0, 30, kv_tokens=2048, free=40),)
    site = AnswerSite(peers.start("new"), open_ended=True, max_tokens=8000)
    retrier_of(site, Cluster(make_peer("x", holdings=few))).start(site.answer)
    await site.clock.move(29.0)
    assert site.answer.plan is None
    await site.clock.move(1.5)
    assert site.answer.plan is not None
    assert site.answer.plan.context == 40


def test_sessions_that_refused_one_another_try_again_at_different_and_growing_times() -> None:
    def times(session: str) -> list[float]:
        return [retry_after_s(SessionId(session), attempt) for attempt in range(1, 12)]

    one, other = times("a" * 32), times("b" * 32)
    assert all(abs(mine - theirs) > 0.001 for mine, theirs in zip(one, other, strict=True))
    assert all(0.1 < wait <= 6.0 for wait in one)
    assert one[6] > 4 * one[0]


@pytest.mark.parametrize("code", ["internal_error", "out_of_memory"])
async def test_a_plan_that_fails_again_and_again_without_a_token_is_tried_after_growing_pauses(peers: Peers, code: str) -> None:
    site = AnswerSite(peers.start("new"))
    await site.open()

    class OnePlan:
        async def recover(self, *request: Any) -> Any:
            return SimpleNamespace(plan=site.plan())

    retrier, waits = retrier_of(site), []
    retrier.router = cast("Any", OnePlan())
    for _ in range(8):
        epoch, began = site.answer.machine.epoch, site.clock.now
        site.answer.stage_failed(epoch, 0, RemoteFailure("it failed", remote_code=code), None)
        retrier.replan(site.answer, site.replans[-1])
        while site.answer.machine.epoch == epoch:
            await site.clock.move(0.01)
        waits.append(site.clock.now - began)
    refused = code == "out_of_memory"
    assert (waits[0] < 0.02) is not refused, "another loss before the first token is no reason to wait"
    assert all(0.1 < wait <= 6.1 for wait in waits[1:])
    assert waits[4] > 3 * waits[1]


@pytest.mark.parametrize("begun", [False, True])
async def test_a_request_that_no_peer_could_meet_fails_at_once_and_blames_nobody(peers: Peers, begun: bool) -> None:
    site = AnswerSite(peers.start("new"))
    retrier = retrier_of(site, Cluster(make_peer("x", holdings=FREE)))
    if begun:
        await site.open()
        site.answer.stage_failed(1, 0, InvalidSampling("a penalty"), None)
    else:
        site.reply = Error(request=0, code=InvalidSampling.code, message="a penalty")
        site.answer.planned(site.plan())
        await site.answer.output.until(lambda: site.replans, 1.0)
    retrier.replan(site.answer, site.replans[-1])
    await site.clock.move(0)
    assert site.answer.status == "failed"
    assert isinstance(site.answer.error, InvalidSampling)
    assert not site.answer.recovery.distrusted(0.0)
    assert len(site.got(Open)) == 1


@pytest.mark.parametrize(("code", "retried"), [("out_of_memory", True), ("internal_error", False)])
async def test_another_first_plan_is_searched_only_after_a_transient_error(peers: Peers, code: str, retried: bool) -> None:
    site = AnswerSite(peers.start("new"))
    retrier = retrier_of(site, Cluster(make_peer("x", holdings=FREE)))
    site.answer.planned(site.plan())
    site.answer.stage_failed(1, 0, RemoteFailure("refused", remote_code=code), site.peer.id)
    retrier.replan(site.answer, site.replans[-1])
    await site.clock.move(0.3)
    if retried:
        assert site.answer.plan is not None
        assert site.answer.plan.peers == ("x-id",)
    else:
        with pytest.raises(RemoteFailure, match="refused"):
            await site.answer.opened


async def test_an_unexpected_error_in_a_search_fails_the_answer(peers: Peers, caplog: pytest.LogCaptureFixture) -> None:
    site = AnswerSite(peers.start("new"))
    retrier_of(site).start(site.answer)  # without a router, the search raises AttributeError
    await site.clock.move(0)
    assert site.answer.status == "failed"
    assert "the search for a plan failed" in caplog.text


async def superseded(site: AnswerSite, retrier: PlanRetrier) -> None:
    """Report a stage that follows another coordinator, and let the retrier handle it."""
    error = RemoteFailure("another coordinator", remote_code="superseded")
    site.answer.stage_failed(site.answer.machine.epoch, 1, error, None)
    retrier.replan(site.answer, site.replans[-1])
    await site.clock.move(1.0)


async def other(record: SessionRecord) -> PeerId | None:
    return PeerId("other")


async def test_an_answer_without_readers_is_handed_over_to_the_other_coordinator(site: AnswerSite) -> None:
    await superseded(site, retrier_of(site, other_coordinator=other))
    assert site.events[-1] == "superseded by other"
    assert site.got(Close) == []


async def test_an_answer_with_a_reader_is_taken_back_without_the_tokens_of_the_other_coordinator(site: AnswerSite) -> None:
    record = msgspec.structs.replace(site.answer.snapshot(), epoch=7, tokens=((7, None), (8, None), (9, None)))

    async def take(secret: AnswerSecret) -> SessionRecord:
        return record

    async with aclosing(site.answer.events()) as events:
        await anext(events)
        cluster = Cluster(make_peer("x", holdings=FREE))
        await superseded(site, retrier_of(site, cluster, take=take, other_coordinator=other))
        assert site.answer.machine.tokens == [7], "only the stages of its own plan give it tokens"
        assert record.coordinator in site.answer.snapshot().coordinators
        assert site.answer.machine.epoch == 7 + TAKEOVER_EPOCHS + 1
        assert site.answer.plan is not None
        assert site.answer.plan.peers == ("x-id",)


async def test_a_recovery_request_avoids_distrusted_peers_and_counts_the_known_tokens(site: AnswerSite) -> None:
    site.answer.recovery.distrust(COPY, site.clock.now)
    request = retrier_of(site).recovery_request(site.answer, avoid=frozenset({PeerId("b")}))
    assert request.old == site.answer.plan
    assert request.lost == frozenset()
    assert request.avoid == {COPY, "b"}
    assert (request.prompt_tokens, request.known) == (3, 4)
    site.clock.now += 31
    assert retrier_of(site).recovery_request(site.answer).avoid == frozenset()


async def test_reports_count_only_for_the_requested_copy_in_the_present_epoch(site: AnswerSite) -> None:
    retrier = retrier_of(site)
    retrier.on_mirrored(site.answer, mirrored(site, COPY, held=3))
    assert site.answer.mirrors == {}
    site.answer.mirrored(1, COPY, 0)
    retrier.on_mirrored(site.answer, mirrored(site, PeerId("b"), held=3))
    retrier.on_mirrored(site.answer, mirrored(site, COPY, held=3, epoch=2))
    assert site.answer.mirrors == {1: (COPY, 0)}
    retrier.on_mirrored(site.answer, mirrored(site, COPY, held=3))
    assert site.answer.mirrors == {1: (COPY, 3)}
    retrier.on_mirrored(site.answer, mirrored(site, COPY, held=3, error="no memory"))
    assert site.answer.mirrors == {}
