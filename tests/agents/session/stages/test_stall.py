"""Stalls: where a session is stuck, from two reports of its stages."""

from dataclasses import replace

import pytest

from in_process.answers import AnswerSite
from in_process.peers import Peers
from meshd.agents.session.stages.stall import StageReport, StallWatch, stuck_at
from meshd.protocol.messages import RunningStep, StageProgress
from meshd.types import SessionId

KNOWN = 20
"""Number of tokens of prompt and answer that the coordinator has: position 19 is being computed."""
OWN, OTHER = SessionId("a" * 32), SessionId("b" * 32)

Reports = list[StageReport]


def stages(*pairs: tuple[int, int], idle_s: float = 60.0) -> Reports:
    return [StageReport(StageProgress(number, due, sent, idle_s), None) for number, (due, sent) in enumerate(pairs)]


def computing(session: SessionId | None, running_s: float, predicted_s: float) -> RunningStep:
    return RunningStep(session=session, epoch=1, stage=1, step=19, tokens=1, running_s=running_s, predicted_s=predicted_s)


def found(after: Reports, before: Reports | None = None, *, prefilling: bool = False) -> tuple[str, int | None] | None:
    return stuck_at(before or after, after, KNOWN, OWN, prefilling=prefilling)


def busy(*running: RunningStep | None) -> Reports:
    """Two stages. The second has taken a step and not sent its output; its peer does `running`."""
    first, second = stages((20, 20), (20, 19))
    return [first, replace(second, running=running[0])]


@pytest.mark.parametrize("prefilling", [False, True])
@pytest.mark.parametrize(
    ("after", "at_fault"),
    [
        (stages((20, 20), (19, 19), (19, 19)), 1),
        (stages((20, 20), (20, 20), (19, 19)), 2),
        (stages((20, 20), (20, 20), (20, 20)), 2),
        (stages((19, 19), (19, 19), (19, 19)), None),
    ],
    ids=["first to second", "second to third", "the token", "nothing to do"],
)
def test_the_stage_that_lacks_its_input_or_whose_output_is_lost_is_at_fault(
    after: Reports, at_fault: int | None, prefilling: bool
) -> None:
    result = found(after, prefilling=prefilling)
    assert result is not None
    assert result[1] == at_fault


def test_nothing_is_stuck_while_any_stage_moves() -> None:
    assert found(stages((20, 20), (19, 19)), stages((19, 19), (19, 19))) is None


def test_a_stage_is_stuck_when_its_own_step_is_overdue_by_its_own_prediction() -> None:
    assert found(busy(computing(OWN, 2.9, 0.01))) is None
    assert found(busy(computing(OWN, 9.0, 0.5))) is None
    for running_s, predicted_s in ((3.1, 0.01), (10.1, 0.5)):
        stuck = found(busy(computing(OWN, running_s, predicted_s)))
        assert stuck is not None
        assert stuck[1] == 1


def test_a_step_that_waits_behind_another_sessions_long_step_is_not_stuck() -> None:
    assert found(busy(computing(OTHER, 9.4, 4.0))) is None
    assert found(busy(computing(OTHER, 59.0, 4.0))) is None


def test_a_peer_that_never_ends_another_sessions_step_is_at_fault_for_all_its_sessions() -> None:
    stuck = found(busy(computing(OTHER, 81.0, 4.0)))
    assert stuck is not None
    assert stuck[1] == 1
    assert "another session" in stuck[0]


def test_a_step_that_waits_for_work_of_no_session_has_longer_time() -> None:
    assert found(busy(computing(None, 119.0, 0.0))) is None
    assert found(busy(computing(None, 121.0, 0.0))) is not None


def test_a_stage_that_waits_for_the_next_one_does_not_hide_where_the_fault_is() -> None:
    first, second = stages((128, 64), (64, 32))
    stuck = found([first, replace(second, running=computing(OWN, 4.0, 0.1))], prefilling=True)
    assert stuck is not None
    assert stuck[1] == 1


@pytest.mark.parametrize("pairs", [((0, 0), (0, 0)), ((20, 20), (10, 10))], ids=["prompt", "activation"])
def test_a_prefill_step_behind_other_messages_of_its_lane_is_on_its_way(pairs: tuple[tuple[int, int], ...]) -> None:
    assert found(stages(*pairs, idle_s=0.4), prefilling=True) is None
    assert found(stages(*pairs, idle_s=3.5), prefilling=True) is not None


async def test_an_answer_that_waits_for_room_has_a_reader_its_request(peers: Peers) -> None:
    site = AnswerSite(peers.start("a"))
    watch = StallWatch(site.peer.links, site.clock, site.peer.id)
    watch.check(site.answer, site.clock.now + 31.0)
    assert site.answer.running, "its request still waits for the first plan"
    await site.open()
    watch.check(site.answer, site.answer.unread_since + 29.0)
    assert site.answer.running
    watch.check(site.answer, site.answer.unread_since + 31.0)
    assert site.answer.status == "suspended"


def test_a_decode_step_does_not_use_the_lane_of_large_messages() -> None:
    assert found(stages((20, 20), (19, 19), idle_s=0.1)) is not None
