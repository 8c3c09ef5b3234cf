"""The gate: first come first served, bounded, no ticket lost."""

import asyncio

import pytest

from meshd.agents.session.admission import Admission
from meshd.errors import Overloaded


async def test_those_who_wait_enter_in_order() -> None:
    gate = Admission(running=1, waiting=3, wait_s=5)
    await gate.enter()
    order: list[int] = []

    async def one(number: int) -> None:
        await gate.enter()
        order.append(number)
        gate.leave(0.1)

    waiting = [asyncio.create_task(one(number)) for number in range(3)]
    await asyncio.sleep(0)
    gate.leave(0.1)
    await asyncio.gather(*waiting)
    assert order == [0, 1, 2]
    assert gate.running == 0


async def test_a_full_queue_says_when_to_come_back() -> None:
    gate = Admission(running=1, waiting=1, wait_s=5)
    await gate.enter()
    waiting = asyncio.create_task(gate.enter())
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await gate.enter()
    assert caught.value.retry_after_s >= 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    gate.leave(0.1)
    assert (gate.running, gate.waiting) == (0, 0)


async def test_waiting_too_long_is_overloaded_and_leaves_the_queue() -> None:
    gate = Admission(running=1, waiting=1, wait_s=0.01)
    await gate.enter()
    with pytest.raises(Overloaded):
        await gate.enter()
    assert gate.waiting == 0


async def test_a_ticket_given_to_one_who_left_in_that_moment_goes_to_the_next() -> None:
    gate = Admission(running=1, waiting=2, wait_s=5)
    await gate.enter()
    first, second = asyncio.create_task(gate.enter()), asyncio.create_task(gate.enter())
    await asyncio.sleep(0)
    gate.leave(0.1)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.wait_for(second, 1)
    assert gate.running == 1
    gate.leave(0.1)
    assert gate.running == 0
