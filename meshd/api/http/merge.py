"""Several asynchronous iterators as one, and tasks that live as long as a block."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


@asynccontextmanager
async def beside(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run these beside the block and end them with it; they must not raise. The block's own exception comes out as it is."""
    failure: Exception | None = None
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
        try:
            yield
        except Exception as error:
            failure = error  # left to itself, the group would wrap it in an ExceptionGroup
        finally:
            for task in tasks:
                task.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Close `items` with the block, if it is a generator, rather than when it is garbage."""
    try:
        yield items
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()


@dataclass(frozen=True, slots=True)
class _Ended:
    """A source's last word."""

    error: Exception | None = None


@asynccontextmanager
async def merge_iterators(sources: Sequence[AsyncIterator[T]], *, limit: int = 16) -> AsyncIterator[AsyncIterator[tuple[int, T]]]:
    """All sources' items as they come, each with its source's index; a source's error is raised in its turn.

    A source waits while `limit` of its items do. Leaving the block, whatever the reason, closes all sources.
    """
    queue: asyncio.Queue[tuple[int, T | _Ended]] = asyncio.Queue()
    # A bounded queue would let a quick source keep the others out: its put takes the place that their wake-up was for.
    room = [asyncio.Semaphore(limit) for _ in sources]
    async with beside(*(_pump(index, source, queue, room[index]) for index, source in enumerate(sources))):
        yield _drain(queue, room)


async def _pump(
    index: int, source: AsyncIterator[T], queue: asyncio.Queue[tuple[int, T | _Ended]], room: asyncio.Semaphore
) -> None:
    end = _Ended()
    try:
        async with closing(source):
            async for item in source:
                await room.acquire()
                queue.put_nowait((index, item))
    except Exception as error:
        end = _Ended(error)
    queue.put_nowait((index, end))


async def _drain(queue: asyncio.Queue[tuple[int, T | _Ended]], room: Sequence[asyncio.Semaphore]) -> AsyncIterator[tuple[int, T]]:
    running = len(room)
    while running:
        index, item = await queue.get()
        if not isinstance(item, _Ended):
            room[index].release()
            yield index, item
        elif item.error is not None:
            raise item.error
        else:
            running -= 1
