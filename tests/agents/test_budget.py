"""A budget of actions per second."""

from meshd.agents.budget import TokenBucket


def test_a_bucket_allows_its_burst_at_once_and_then_its_rate() -> None:
    bucket = TokenBucket(2.0, 3)
    assert [bucket.take(10.0) for _ in range(5)] == [True, True, True, False, False]
    assert bucket.wait_s(10.0) == 0.5
    assert [bucket.take(10.5), bucket.take(10.5)] == [True, False]
    assert [bucket.take(99.0) for _ in range(5)] == [True, True, True, False, False]


def test_a_clock_that_stands_still_gives_no_tokens() -> None:
    bucket = TokenBucket(1.0, 1)
    assert [bucket.take(5.0), bucket.take(5.0), bucket.take(4.0)] == [True, False, False]
