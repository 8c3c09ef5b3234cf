"""Signals: which subscribers are called, in which order, and what happens on an error."""

import pytest

from meshd.agents.signals import Signal


def test_every_subscriber_gets_the_arguments_in_the_order_of_subscription() -> None:
    calls: list[tuple[str, int]] = []
    signal = Signal[int]()
    signal.subscribe(lambda value: calls.append(("a", value)), lambda value: calls.append(("b", value)))
    signal.subscribe(lambda value: calls.append(("c", value)))
    signal(1)
    signal(2)
    assert calls == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("b", 2), ("c", 2)]


def test_without_subscribers_a_call_does_nothing() -> None:
    Signal[str, int]()("a", 1)


def test_the_caller_gets_an_error_and_later_subscribers_are_not_called() -> None:
    calls: list[str] = []

    def fail() -> None:
        raise ValueError("broken")

    signal = Signal[()]()
    signal.subscribe(lambda: calls.append("before"), fail, lambda: calls.append("after"))
    with pytest.raises(ValueError, match="broken"):
        signal()
    assert calls == ["before"]
