import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from meshd.agents.device.compute import ComputeThread


@pytest.fixture
async def compute() -> AsyncIterator[ComputeThread]:
    thread = ComputeThread()
    yield thread
    thread.close()


async def test_jobs_run_in_order_on_one_thread_and_their_results_come_back_on_the_loop(compute: ComputeThread) -> None:
    ran: list[int] = []
    results: list[tuple[int, int]] = []
    all_done = asyncio.Event()

    def done(thread: int) -> None:
        results.append((thread, threading.get_ident()))
        if len(results) == 50:
            all_done.set()

    def work(number: int) -> int:
        ran.append(number)
        return threading.get_ident()

    for number in range(50):
        compute.submit(lambda number=number: work(number), done, results_fail)
    async with asyncio.timeout(5.0):
        await all_done.wait()
    assert ran == list(range(50))
    assert len({thread for thread, _ in results}) == 1
    assert {loop for _, loop in results} == {threading.get_ident()}
    assert results[0][0] != threading.get_ident()


def results_fail(error: Exception) -> None:
    raise error


async def test_a_background_job_starts_only_when_no_other_job_waits(compute: ComputeThread) -> None:
    ran: list[str] = []
    begun, go = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        go.wait(5.0)

    blocked = asyncio.create_task(compute.call(first, background=True))
    await asyncio.to_thread(begun.wait, 5.0)
    for name, background in (("b1", True), ("s1", False), ("b2", True), ("s2", False)):
        compute.submit(lambda name=name: ran.append(name), lambda _: None, results_fail, background=background)
    go.set()
    async with asyncio.timeout(5.0):
        await blocked
        await compute.call(lambda: None, background=True)
    assert ran == ["s1", "s2", "b1", "b2"]


async def test_a_job_that_fails_gives_its_error_and_the_thread_lives(compute: ComputeThread) -> None:
    async with asyncio.timeout(5.0):
        with pytest.raises(ZeroDivisionError):
            await compute.call(lambda: 1 // 0)
        assert await compute.call(lambda: "next") == "next"


async def test_a_cancelled_call_runs_to_its_end_and_its_result_is_dropped(compute: ComputeThread) -> None:
    begun, go = threading.Event(), threading.Event()
    ended: list[bool] = []

    def work() -> None:
        begun.set()
        go.wait(5.0)
        ended.append(True)

    call = asyncio.create_task(compute.call(work))
    await asyncio.to_thread(begun.wait, 5.0)
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    go.set()
    async with asyncio.timeout(5.0):
        assert await compute.call(lambda: list(ended)) == [True]


async def test_close_waits_for_the_running_job_and_drops_the_others() -> None:
    thread = ComputeThread()
    ran: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        go.wait(5.0)
        ran.append(0)

    thread.submit(first, lambda _: None, results_fail)
    for number in (1, 2):
        thread.submit(lambda number=number: ran.append(number), lambda _: None, results_fail)
    await asyncio.to_thread(begun.wait, 5.0)
    threading.Timer(0.05, go.set).start()
    thread.close()
    assert ran == [0]


def test_a_result_for_a_loop_that_is_closed_is_dropped() -> None:
    go = threading.Event()

    async def start() -> ComputeThread:
        thread = ComputeThread()
        thread.submit(lambda: go.wait(5.0), lambda _: None, results_fail)
        return thread

    thread = asyncio.run(start())
    go.set()
    thread.close()
    assert not thread._thread.is_alive()
