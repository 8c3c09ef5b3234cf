"""Moves of one answer: which answers cannot move, and when a move fails."""

import asyncio
from typing import Any, cast

import msgspec
import pytest

from in_process.answers import AnswerSite
from in_process.peers import until
from meshd.agents.session.plan.move import Mover
from meshd.errors import InvalidRequest, PeerFault
from meshd.protocol.messages import Mirror, Mirrored
from meshd.types import PeerId, Plan

TARGET = PeerId("target")


def mover_of(site: AnswerSite) -> Mover:
    """A mover without a router: the tests make the plans."""
    return Mover(cast("Any", None), cast("Any", None), list, site.clock)


def moved(plan: Plan) -> Plan:
    """The plan with its second stage at another peer."""
    first, second = plan.stages
    return msgspec.structs.replace(plan, stages=(first, msgspec.structs.replace(second, peer=TARGET)))


async def test_only_a_running_answer_can_move(site: AnswerSite) -> None:
    site.answer.suspend()
    with pytest.raises(InvalidRequest, match="is suspended: only a running one can move"):
        await mover_of(site).move(site.answer, TARGET, None)


async def test_a_move_copies_only_the_stage_that_changes_its_peer_and_excludes_a_second_move(site: AnswerSite) -> None:
    old = site.answer.plan
    assert old is not None
    mover, plan = mover_of(site), moved(site.plan(10))
    first = asyncio.create_task(mover.change(site.answer, old, plan, "moved"))
    await until(lambda: bool(site.got(Mirror)))
    assert [(copy.stage, copy.target) for copy in site.got(Mirror)] == [(1, TARGET)]
    with pytest.raises(InvalidRequest, match="is being moved already"):
        await mover.change(site.answer, old, plan, "moved")
    site.answer.end()
    report = Mirrored(session=site.answer.session, epoch=1, stage=1, target=TARGET, held=4, filled=4)
    mover.on_mirrored(site.answer, report)
    with pytest.raises(PeerFault, match="its plan changed for another reason"):
        await first


async def test_a_plan_that_has_changed_since_the_search_for_a_better_one_is_not_moved(site: AnswerSite) -> None:
    with pytest.raises(PeerFault, match="its plan changed for another reason"):
        await mover_of(site).change(site.answer, site.plan(10), moved(site.plan(10)), "a better plan")
    assert not site.got(Mirror)
