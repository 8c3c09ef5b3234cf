"""Merge asynchronous iterators, and run tasks for the duration of a block."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def beside(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run coroutines concurrently with the block, and cancel them at its end.

    The coroutines must not raise. Errors of the block are raised unchanged.
    """
    failure: Exception | None = None
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
        try:
            yield
        except Exception as error:
            failure = error  # the group would wrap it in an ExceptionGroup
        finally:
            for task in tasks:
                task.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close `items` at the end of the block if it is a generator, instead of at garbage collection."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


@dataclass(frozen=True, slots=True)
class _Ended:
    """Marks the end of a source, with the error that ended it. None: the source was exhausted."""

    error: Exception | None = None


@asynccontextmanager
async def merge_iterators(sources: Sequence[AsyncIterator[T]], *, limit: int = 16) -> AsyncIterator[AsyncIterator[tuple[int, T]]]:
    """Merge `sources` into one iterator of (index of the source, item), in order of arrival.

    A source pauses while `limit` of its items are unread. If a source fails, its error is raised after the items before it.
    Leaving the block closes all sources.
    """
    queue: asyncio.Queue[tuple[int, T | _Ended]] = asyncio.Queue()
    # One bounded queue would let a fast source starve the others: it would take each free slot before a waiting source wakes up.
    slots = [asyncio.Semaphore(limit) for _ in sources]
    async with beside(*(_pump(index, source, queue, slots[index]) for index, source in enumerate(sources))):
        yield _drain(queue, slots)


async def _pump(
    index: int, source: AsyncIterator[T], queue: asyncio.Queue[tuple[int, T | _Ended]], slots: asyncio.Semaphore
) -> None:
    end = _Ended()
    try:
        async with closing(source):
            async for item in source:
                await slots.acquire()
                queue.put_nowait((index, item))
    except Exception as error:
        end = _Ended(error)
    queue.put_nowait((index, end))


async def _drain(queue: asyncio.Queue[tuple[int, T | _Ended]], slots: Sequence[asyncio.Semaphore]) -> AsyncIterator[tuple[int, T]]:
    running = len(slots)
    while running:
        index, item = await queue.get()
        if not isinstance(item, _Ended):
            slots[index].release()
            yield index, item
        elif item.error is not None:
            raise item.error
        else:
            running -= 1
