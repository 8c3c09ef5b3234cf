"""Admission: first in first out, bounded, and no slot is lost."""

import asyncio

import pytest

from meshd.agents.session.admission import Admission
from meshd.errors import Overloaded


async def test_waiting_requests_enter_in_order() -> None:
    admission = Admission(running=1, waiting=3, wait_s=5)
    await admission.enter()
    order: list[int] = []

    async def one(number: int) -> None:
        await admission.enter()
        order.append(number)
        admission.leave(0.1)

    waiting = [asyncio.create_task(one(number)) for number in range(3)]
    await asyncio.sleep(0)
    admission.leave(0.1)
    await asyncio.gather(*waiting)
    assert order == [0, 1, 2]
    assert admission.running == 0


async def test_with_a_full_queue_the_error_says_when_to_try_again() -> None:
    admission = Admission(running=1, waiting=1, wait_s=5)
    await admission.enter()
    waiting = asyncio.create_task(admission.enter())
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await admission.enter()
    assert caught.value.retry_after_s >= 1
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    admission.leave(0.1)
    assert (admission.running, admission.waiting) == (0, 0)


async def test_a_request_that_waits_too_long_fails_and_leaves_the_queue() -> None:
    admission = Admission(running=1, waiting=1, wait_s=0.01)
    await admission.enter()
    with pytest.raises(Overloaded):
        await admission.enter()
    assert admission.waiting == 0


async def test_a_slot_given_to_a_request_that_is_just_being_cancelled_goes_to_the_next() -> None:
    admission = Admission(running=1, waiting=2, wait_s=5)
    await admission.enter()
    first, second = asyncio.create_task(admission.enter()), asyncio.create_task(admission.enter())
    await asyncio.sleep(0)
    admission.leave(0.1)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.wait_for(second, 1)
    assert admission.running == 1
    admission.leave(0.1)
    assert admission.running == 0


async def test_a_session_that_runs_already_enters_ahead_of_waiting_requests_and_beyond_the_limit() -> None:
    admission = Admission(running=2, waiting=4, wait_s=5)
    for _ in range(2):
        await admission.enter()
    waiting = asyncio.create_task(admission.enter())
    await asyncio.sleep(0)
    for _ in range(2):
        admission.enter_ahead()
    with pytest.raises(Overloaded):
        admission.enter_ahead()
    assert admission.running == 4
    for _ in range(2):
        admission.leave(1.0)
        await asyncio.sleep(0)
        assert not waiting.done(), "the limit holds again before a request enters"
    admission.leave(1.0)
    await waiting
    assert admission.running == 2


async def test_the_time_to_try_again_grows_with_the_queue_and_with_the_age_of_the_running_requests() -> None:
    now = [100.0]
    admission = Admission(running=1, waiting=2, wait_s=5, now=lambda: now[0])
    await admission.enter()
    assert admission.retry_after_s == 5.0, "nothing is known yet"
    waiting = [asyncio.create_task(admission.enter()) for _ in range(2)]
    await asyncio.sleep(0)
    assert admission.retry_after_s == 15.0
    now[0] += 10.0
    assert admission.retry_after_s == 60.0, "a request that has run for ten seconds takes twenty"
    with pytest.raises(Overloaded) as caught:
        await admission.enter()
    assert caught.value.retry_after_s == 60.0
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_the_time_to_try_again_follows_how_long_requests_ran() -> None:
    now = [100.0]
    admission = Admission(running=2, waiting=1, wait_s=5, now=lambda: now[0])
    for _ in range(40):
        await admission.enter()
        await admission.enter()
        now[0] += 20.0
        admission.leave(20.0)
        admission.leave(20.0)
    assert 9.0 < admission.retry_after_s <= 10.0
    assert admission.running == 0
