"""The simulator's event loop: virtual time, stopped owners, and errors that it detects."""

import asyncio
import random
import time

import pytest

from sim.loop import Owner, SimLoop, Stuck


def loop_of(seed: int = 0) -> SimLoop:
    return SimLoop(random.Random(seed))


def test_the_clock_jumps_and_nothing_waits() -> None:
    loop = loop_of()
    began = time.monotonic()
    before = loop.time()
    loop.run_until_complete(asyncio.sleep(3600))
    assert loop.time() == before + 3600
    assert time.monotonic() - began < 5
    loop.close()


def test_timers_fire_in_order_of_time_and_creation() -> None:
    loop = loop_of()
    seen: list[int] = []
    for number, delay in enumerate((0.3, 0.1, 0.2, 0.1)):
        loop.call_later(delay, seen.append, number)
    cancelled = loop.call_later(0.15, seen.append, 99)
    cancelled.cancel()
    loop.run_until_complete(asyncio.sleep(1))
    assert seen == [1, 3, 2, 0]
    loop.close()


def test_timeouts_and_threads_work_in_virtual_time() -> None:
    async def main() -> int:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        return await asyncio.to_thread(lambda: 42)

    loop = loop_of()
    assert loop.run_until_complete(main()) == 42
    loop.close()


def test_a_stopped_owner_continues_where_it_was_stopped() -> None:
    loop = loop_of()
    owner = Owner("p")
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            await asyncio.sleep(1)
            ticks.append(loop.time())

    async def main() -> None:
        task = loop.create_task(tick(), context=owner.context())
        await asyncio.sleep(2.5)
        owner.stopped = True
        await asyncio.sleep(10)
        assert len(ticks) == 2
        loop.resume(owner)
        await asyncio.sleep(2.5)
        assert len(ticks) == 5  # one tick was due while the owner was stopped, and two came after it
        task.cancel()
        await asyncio.wait([task])

    loop.run_until_complete(main())
    assert not owner.tasks
    loop.close()


def test_a_task_belongs_to_the_owner_of_its_context() -> None:
    loop = loop_of()
    owner, checked = Owner("p"), []
    owner.after = lambda: checked.append(loop.time())

    async def inner() -> None:
        await asyncio.sleep(1)

    async def main() -> None:
        await loop.create_task(outer(), context=owner.context())

    async def outer() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(inner())
            assert len(owner.tasks) == 2

    loop.run_until_complete(main())
    assert len(checked) >= 3
    loop.close()


def test_a_deadlock_raises_stuck() -> None:
    loop = loop_of()
    with pytest.raises(Stuck, match="nothing is left"):
        loop.run_until_complete(loop.create_future())
    loop.close()


def test_callbacks_without_end_raise_stuck() -> None:
    async def spin() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    loop = loop_of()
    task = loop.create_task(spin())
    with pytest.raises(Stuck, match="does not advance"):
        loop.run_until_complete(task)
    task.cancel()
    loop.run_until_complete(asyncio.wait([task]))
    loop.close()


def test_an_error_that_no_code_catches_is_kept_as_a_fault() -> None:
    def fail() -> None:
        raise ValueError("lost")

    loop = loop_of()
    loop.call_soon(fail)
    loop.run_until_complete(asyncio.sleep(1))
    assert "lost" in loop.faults[0]
    loop.close()
