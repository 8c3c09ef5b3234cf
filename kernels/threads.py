"""A few threads of our own, for work in large pieces.

Torch itself keeps to one thread. Its pool waits by spinning: beside onnxruntime's pool that was measured at a third to a fifteenth
of the speed, and beside two other busy processes a product took more than ten times as long. The order of MKL's sums, too, depends
on the number of its threads, and so would the last bits.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


_told = threading.local()
"""Torch and MKL keep the number of their threads apart for each of ours."""


def one_thread() -> None:
    """Have torch keep to one thread in the calling thread, which is about to compute."""
    if not hasattr(_told, "once"):
        torch.set_num_threads(1)
        _told.once = True


class Workers:
    """`threads` threads, the caller's included."""

    def __init__(self, threads: int) -> None:
        one_thread()
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "kernels", one_thread) if threads > 1 else None

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work` of every item, in their order. Whoever is free takes the next, so a thread that wakes late holds nobody up."""
        if self._pool is None or len(items) == 1:
            return [work(item) for item in items]
        waiting, results = deque(enumerate(items)), dict[int, Result]()

        def drain() -> None:
            while waiting:
                try:
                    index, item = waiting.popleft()
                except IndexError:
                    return
                results[index] = work(item)

        helpers = [self._pool.submit(drain) for _ in range(min(self.threads, len(items)) - 1)]
        drain()
        for helper in helpers:
            if not helper.cancel():
                helper.result()
        return [results[index] for index in range(len(items))]
