"""The budget of asynchronous handlers, for each peer."""

import pytest

from meshd.agents.links.task_budget import LASTING_PER_PEER, PAYLOAD_BYTES, PER_KIND, PER_PEER, TaskBudget
from meshd.errors import Overloaded
from meshd.protocol.messages import Drain, FetchManifest, FetchWeights, Message, Unplace
from meshd.types import PeerId

ANN, BOB = PeerId("a" * 52), PeerId("b" * 52)
WEIGHTS = FetchWeights(request=1, model="m", offset=0, length=1)
MANIFEST = FetchManifest(request=1, model="m")


def entered(budget: TaskBudget, peer: PeerId, *messages: Message, payload: int = 0) -> int:
    count = 0
    try:
        while True:
            budget.enter(peer, messages[count % len(messages)], payload)
            count += 1
    except Overloaded:
        return count


def test_a_peer_has_a_budget_for_each_kind_and_in_all() -> None:
    budget = TaskBudget()
    assert entered(budget, ANN, WEIGHTS) == PER_KIND
    assert entered(budget, ANN, MANIFEST) == PER_PEER - PER_KIND
    assert entered(budget, BOB, WEIGHTS, MANIFEST) == PER_PEER
    assert entered(budget, ANN, Drain(request=1, deadline_ms=1), Unplace(request=1, model="m")) == LASTING_PER_PEER


def test_the_payloads_that_handlers_hold_are_bounded() -> None:
    budget = TaskBudget()
    assert entered(budget, ANN, WEIGHTS, payload=PAYLOAD_BYTES // 4) == 4
    budget.leave(ANN, WEIGHTS, PAYLOAD_BYTES // 4)
    assert entered(budget, ANN, WEIGHTS, payload=PAYLOAD_BYTES // 4) == 1


def test_nothing_is_remembered_of_a_peer_whose_handlers_have_ended() -> None:
    budget = TaskBudget()
    budget.enter(ANN, WEIGHTS, 7)
    budget.leave(ANN, WEIGHTS, 7)
    assert (len(budget), budget._kinds, budget._bytes) == (0, {}, {})
    with pytest.raises(Overloaded):
        budget.enter(ANN, WEIGHTS, PAYLOAD_BYTES + 1)
    assert len(budget) == 0
