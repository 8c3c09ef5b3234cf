"""The plan retrier: what an answer's next plan must offer, and reports of the copies of its KV."""

from typing import Any, cast

from in_process.answers import AnswerSite
from meshd.agents.session.plan.retry import PlanRetrier
from meshd.protocol.messages import Mirrored
from meshd.types import PeerId

COPY = PeerId("copy")


def retrier_of(site: AnswerSite) -> PlanRetrier:
    """A retrier without a router: no test here searches for a plan."""
    nothing = cast("Any", None)
    return PlanRetrier(site.peer.links, nothing, list, site.clock, mirror=False, take=nothing, coordinated_elsewhere=nothing)


def mirrored(site: AnswerSite, target: PeerId, *, held: int, epoch: int = 1, error: str = "") -> Mirrored:
    return Mirrored(session=site.answer.session, epoch=epoch, stage=1, target=target, held=held, filled=held, error=error)


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
