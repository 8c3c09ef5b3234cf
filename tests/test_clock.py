import time

from meshd.clock import SystemClock


async def test_a_sleep_takes_its_time_on_the_monotonic_clock() -> None:
    clock = SystemClock()
    before = clock.monotonic()
    await clock.sleep(0.02)
    assert clock.monotonic() - before >= 0.019


def test_wall_time_counts_from_the_epoch() -> None:
    assert abs(SystemClock().wall() - time.time()) < 5


def test_random_bytes_are_as_many_as_asked_for_and_differ() -> None:
    clock = SystemClock()
    assert [len(clock.random_bytes(count)) for count in (0, 1, 16)] == [0, 1, 16]
    assert clock.random_bytes(16) != clock.random_bytes(16)
