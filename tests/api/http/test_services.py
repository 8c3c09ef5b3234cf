import asyncio

import pytest

from meshd.api.http.services import InFlightRequests
from meshd.errors import Cancelled


async def test_an_interrupt_ends_running_blocks_and_later_ones() -> None:
    work = InFlightRequests()
    running = asyncio.Event()

    async def block() -> None:
        async with work.interruptible():
            running.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(block())
    await running.wait()
    assert not work.closing
    work.interrupt()
    work.interrupt()
    assert work.closing
    with pytest.raises(Cancelled):
        await task
    with pytest.raises(Cancelled):
        await block()


async def test_a_block_that_ends_in_time_is_not_interrupted() -> None:
    work = InFlightRequests()
    async with work.interruptible():
        await asyncio.sleep(0)
    work.interrupt()


async def test_a_timeout_inside_the_block_is_not_taken_for_an_interrupt() -> None:
    with pytest.raises(TimeoutError):
        async with InFlightRequests().interruptible():
            raise TimeoutError
