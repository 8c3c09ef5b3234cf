"""The two ends of an edge: order by number, repeats, credit, and what a decode step acknowledges."""

import itertools

import pytest

from meshd.agents.stage.flow.edges import InputEdge, OutputEdge
from meshd.agents.stage.flow.events import StageStep
from meshd.protocol.messages import STEP_WINDOW, StepKind


def step(seq: int, start: int = 0) -> StageStep:
    return StageStep(start, 1, StepKind.DECODE, 1, start + 1, seq)


@pytest.mark.parametrize("arrival", list(itertools.permutations(range(STEP_WINDOW))))
def test_steps_are_taken_in_the_order_of_their_numbers(arrival: tuple[int, ...]) -> None:
    edge = InputEdge()
    taken = []
    for seq in arrival:
        assert edge.put(step(seq))
        while (next_step := edge.take()) is not None:
            taken.append(next_step.seq)
    assert taken == list(range(STEP_WINDOW))


def test_a_step_is_a_repeat_from_its_arrival_on() -> None:
    edge = InputEdge()
    assert not edge.is_repeat(step(2))
    edge.put(step(2))
    assert edge.is_repeat(step(2)), "it waits for the steps before it"
    for seq in (0, 1):
        edge.put(step(seq))
    while edge.take() is not None:
        pass
    assert all(edge.is_repeat(step(seq)) for seq in range(3))
    assert not edge.is_repeat(step(3))


def test_the_receiver_has_room_for_one_window_of_steps_that_have_not_begun() -> None:
    edge = InputEdge()
    assert not edge.put(step(STEP_WINDOW))
    assert all(edge.put(step(seq)) for seq in range(STEP_WINDOW))
    while edge.take() is not None:
        pass
    assert not edge.put(step(STEP_WINDOW)), "steps that were taken still need room, until they begin"
    edge.begun += 1
    assert edge.put(step(STEP_WINDOW))
    assert not edge.put(step(STEP_WINDOW + 1))


def test_the_sender_numbers_its_steps_and_stops_without_credit() -> None:
    edge = OutputEdge()
    sent = [edge.add(step(99, start), "rows", skip=start) for start in range(STEP_WINDOW)]
    assert [(each.seq, each.skip) for each in sent] == [(seq, seq) for seq in range(STEP_WINDOW)]
    assert not edge.open
    edge.acknowledge(1, STEP_WINDOW + 1)
    assert edge.open
    assert edge.credit == STEP_WINDOW + 1


def test_an_old_ack_takes_no_credit_back() -> None:
    edge = OutputEdge()
    for start in range(3):
        edge.add(step(0, start), "rows")
    edge.acknowledge(3, 7)
    edge.acknowledge(2, 6)
    assert edge.credit == 7


def test_no_ack_allows_more_than_a_window_beyond_what_arrived() -> None:
    edge = OutputEdge()
    for start in range(STEP_WINDOW):
        edge.add(step(0, start), "rows")
    edge.acknowledge(2, 1000)
    assert edge.credit == 2 + STEP_WINDOW


def test_a_token_acknowledges_the_steps_before_its_position() -> None:
    edge = OutputEdge()
    for start in range(STEP_WINDOW):
        edge.add(step(0, start), "rows")
    edge.sampled_at(2)
    assert edge.credit == 2 + STEP_WINDOW
    edge.sampled_at(99)
    assert edge.credit == 4 + STEP_WINDOW


def test_a_token_acknowledges_the_wrong_guess_that_was_sent_before_its_step() -> None:
    edge = OutputEdge()
    for start in (10, 13, 11):  # a verify step of three tokens, guesses behind it, and the step that takes both back
        edge.add(step(0, start), "rows")
    edge.add(step(0, 12), "rows")  # a guess of the token at 12
    edge.sampled_at(12)
    assert edge.credit == 3 + STEP_WINDOW


def test_steps_that_have_arrived_but_not_begun_still_take_room() -> None:
    edge = OutputEdge()
    for start in (10, 12, 14):
        edge.add(step(0, start), "rows")
    edge.acknowledge(3, 1 + STEP_WINDOW)  # all three have arrived, and the first one has begun
    edge.sampled_at(12)
    assert edge.credit == 1 + STEP_WINDOW


def test_a_token_does_not_acknowledge_a_refill_that_was_sent_after_its_step() -> None:
    edge = OutputEdge()
    edge.add(step(0, 10), "rows")
    edge.add(StageStep(2, 4, StepKind.REFILL), "rows")
    edge.sampled_at(11)
    assert edge.credit == 1 + STEP_WINDOW
