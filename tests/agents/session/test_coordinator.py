"""The coordinator: moves of answers that it coordinates, or that another peer does."""

from typing import Any, cast

import pytest

from in_process.answers import AnswerSite
from in_process.journals import Keeper, Keepers, S
from in_process.peers import Peers
from meshd.agents.observe.story import Story
from meshd.agents.session.admission import Admission
from meshd.agents.session.coordinator import Coordinator
from meshd.agents.session.plan.move import Mover
from meshd.agents.session.plan.retry import PlanRetrier
from meshd.errors import PeerFault, RemoteFailure
from meshd.protocol.messages import Journaled, Move, Moved, Reply
from meshd.telemetry import Telemetry
from meshd.types import PeerId


def coordinator_of(keeper: Keeper) -> Coordinator:
    """A coordinator without a model library and a router: no test here makes a plan."""
    nothing = cast("Any", None)
    links, clock = keeper.peer.links, keeper.clock
    retrier = PlanRetrier(links, nothing, list, clock, mirror=False, take=nothing, coordinated_elsewhere=nothing)
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


async def test_a_move_of_a_session_that_is_not_coordinated_here_is_refused(peers: Peers) -> None:
    async with Keepers(peers).linked("a", "b") as (a, b):
        b.answer()
        coordinator_of(b).register()
        with pytest.raises(RemoteFailure, match="is not coordinated here"):
            await coordinator_of(a).move(S, a.id, None)
