"""A thread pool for large work items, in place of torch's own pool.

Torch is limited to one thread, because its pool waits by spinning. In measurements, torch's pool fell to between a third and a
fifteenth of its speed while onnxruntime's pool was in use; while two other processes were busy, a product took more than ten times
as long. The order of MKL's sums also depends on the number of MKL's threads, so the last bits of results would too.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


_limited = threading.local()
"""Whether the calling thread has set its limit: torch and MKL keep a thread count for each thread that calls them."""


def limit_torch_threads() -> None:
    """Limit torch to one thread in the calling thread. Every thread that computes must call this first."""
    if not hasattr(_limited, "done"):
        torch.set_num_threads(1)
        _limited.done = True


class Workers:
    """A pool of `threads` threads, one of which is the caller's own."""

    def __init__(self, threads: int) -> None:
        limit_torch_threads()
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "kernels", limit_torch_threads) if threads > 1 else None

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Call `work` for every item. A free thread takes the next item, so a thread that wakes up late delays no other thread.

        Returns: the results, in the order of the items.
        """
        if self._pool is None or len(items) == 1:
            return [work(item) for item in items]
        queue, results = deque(enumerate(items)), dict[int, Result]()

        def drain() -> None:
            while queue:
                try:
                    index, item = queue.popleft()
                except IndexError:
                    return
                results[index] = work(item)

        helpers = [self._pool.submit(drain) for _ in range(min(self.threads, len(items)) - 1)]
        drain()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
        return [results[index] for index in range(len(items))]
