"""The thread pool of the kernels."""

import threading

import pytest

from meshd.kernels.threads import Workers


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_their_items(threads: int) -> None:
    workers = Workers(threads)
    for count in (0, 1, 2, 50):
        assert workers.map(lambda x: x * x, range(count)) == [x * x for x in range(count)]


def test_items_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=10)
    Workers(2).map(lambda _: both.wait(), range(2))


def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        Workers(3).map(lambda x: 1 // x, [1, 1, 0, 1])
