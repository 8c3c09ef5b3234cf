"""Moves of one answer: which answers cannot move, and when a move fails."""

import asyncio
from typing import Any, cast

import msgspec
import pytest

from in_process.answers import AnswerSite
from in_process.peers import Peers, until
from meshd.agents.session.plan.move import Mover
from meshd.errors import InvalidRequest, PeerFault
from meshd.protocol.messages import CopyExpected, ExpectCopy, Mirror, Mirrored
from meshd.types import PeerId, Plan

TARGET = PeerId("target")


def mover_of(site: AnswerSite) -> Mover:
    """A mover without a router: the tests make the plans."""
    return Mover(cast("Any", None), cast("Any", None), list, site.clock)


def moved(plan: Plan, target: PeerId = TARGET) -> Plan:
    """The plan with its second stage at another peer."""
    first, second = plan.stages
    return msgspec.structs.replace(plan, stages=(first, msgspec.structs.replace(second, peer=target)))


async def test_only_a_running_answer_can_move(site: AnswerSite) -> None:
    site.answer.suspend()
    with pytest.raises(InvalidRequest, match="is suspended: only a running one can move"):
        await mover_of(site).move(site.answer, TARGET, None)


async def test_a_move_copies_only_the_stage_that_changes_its_peer_and_excludes_a_second_move(
    site: AnswerSite, peers: Peers
) -> None:
    old = site.answer.plan
    assert old is not None
    mover, target, expected = mover_of(site), peers.start("b"), []

    def expect(sender: PeerId, message: ExpectCopy, payload: memoryview) -> CopyExpected:
        expected.append((sender, message.source, message.layers, message.tokens))
        return CopyExpected(request=message.request, session=message.session, epoch=message.epoch)

    target.links.register(ExpectCopy, expect)
    site.peer.dial(target)
    await until(lambda: target.id in site.peer.links.peers())
    plan = moved(site.plan(10), target.id)
    first = asyncio.create_task(mover.change(site.answer, old, plan, "moved"))
    await until(lambda: bool(site.got(Mirror)))
    assert [(copy.stage, copy.target) for copy in site.got(Mirror)] == [(1, target.id)]
    assert expected == [(site.peer.id, site.peer.id, plan.stages[1].layers, 3 + 64)], "the target hears first who will send the KV"
    with pytest.raises(InvalidRequest, match="is being moved already"):
        await mover.change(site.answer, old, plan, "moved")
    site.answer.end()
    report = Mirrored(session=site.answer.session, epoch=1, stage=1, target=target.id, held=4, filled=4)
    mover.on_mirrored(site.answer, report)
    with pytest.raises(PeerFault, match="its plan changed for another reason"):
        await first


async def test_a_plan_that_has_changed_since_the_search_for_a_better_one_is_not_moved(site: AnswerSite) -> None:
    with pytest.raises(PeerFault, match="its plan changed for another reason"):
        await mover_of(site).change(site.answer, site.plan(10), moved(site.plan(10)), "a better plan")
    assert not site.got(Mirror)
