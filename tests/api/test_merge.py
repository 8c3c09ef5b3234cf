"""Merged iterators: order, limits, errors and closing."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from meshd.api.merge import beside, closing, merge_iterators


async def count(to: int, log: list[str], name: str) -> AsyncIterator[int]:
    try:
        for number in range(to):
            log.append(f"{name}{number}")
            yield number
    finally:
        log.append(f"{name} closed")


async def fail_after(to: int) -> AsyncIterator[int]:
    for number in range(to):
        yield number
    raise ValueError("after all")


async def test_all_items_arrive_and_each_source_keeps_its_order() -> None:
    async with merge_iterators([count(5, [], "a"), count(7, [], "b"), count(0, [], "c")]) as items:
        got = [item async for item in items]
    assert [number for index, number in got if index == 0] == list(range(5))
    assert [number for index, number in got if index == 1] == list(range(7))
    assert len(got) == 12


async def test_an_error_comes_after_the_items_of_its_source() -> None:
    async with merge_iterators([fail_after(3)]) as items:
        assert [await anext(items) for _ in range(3)] == [(0, 0), (0, 1), (0, 2)]
        with pytest.raises(ValueError, match="after all"):
            await anext(items)


async def test_a_fast_source_does_not_starve_the_others() -> None:
    async with merge_iterators([count(10**9, [], "a"), count(10**9, [], "b")], limit=4) as items:
        indices = [(await anext(items))[0] for _ in range(100)]
    assert indices.count(0) == pytest.approx(50, abs=8)


async def test_an_error_closes_the_other_sources() -> None:
    log: list[str] = []
    with pytest.raises(ValueError, match="after all"):  # noqa: PT012
        async with merge_iterators([count(10**9, log, "a"), fail_after(3)], limit=2) as items:
            async for _ in items:
                pass
    assert log[-1] == "a closed"


async def test_a_reader_that_stops_closes_the_sources_which_ran_only_to_the_limit() -> None:
    log: list[str] = []
    async with merge_iterators([count(10**9, log, "a")], limit=4) as items:
        await anext(items)
        await asyncio.sleep(0)
    assert log[-1] == "a closed"
    assert len(log) <= 1 + 4 + 2 + 1


async def test_an_error_of_the_block_is_raised_unchanged() -> None:
    log: list[str] = []
    with pytest.raises(KeyError):  # noqa: PT012
        async with merge_iterators([count(10**9, log, "a")]) as items:
            await anext(items)
            raise KeyError
    assert log[-1] == "a closed"


async def test_cancelling_the_reader_closes_the_sources() -> None:
    log: list[str] = []
    started = asyncio.Event()

    async def read() -> None:
        async with merge_iterators([count(10**9, log, "a")], limit=1) as items:
            async for _ in items:
                started.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log[-1] == "a closed"


async def test_a_task_beside_a_block_ends_with_it() -> None:
    ended = asyncio.Event()

    async def companion() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with beside(companion()):
        await asyncio.sleep(0)
        assert not ended.is_set()
    assert ended.is_set()


async def test_closing_accepts_iterators_without_aclose() -> None:
    class One:
        def __aiter__(self) -> "One":
            return self

        async def __anext__(self) -> int:
            raise StopAsyncIteration

    async with closing(One()) as items:
        assert [item async for item in items] == []
