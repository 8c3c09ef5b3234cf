"""Callbacks between agents that need each other: the caller is constructed first, and the callee subscribes later."""

from collections.abc import Callable
from typing import Generic, TypeVarTuple

Ts = TypeVarTuple("Ts")


class Signal(Generic[*Ts]):
    """A function that calls all its subscribers, in the order in which they subscribed."""

    __slots__ = ("_subscribers",)

    def __init__(self) -> None:
        self._subscribers: list[Callable[[*Ts], None]] = []

    def subscribe(self, *subscribers: Callable[[*Ts], None]) -> None:
        """Add subscribers. An error of a subscriber reaches the caller of the signal, and later subscribers are not called."""
        self._subscribers += subscribers

    def __call__(self, *args: *Ts) -> None:
        for subscriber in self._subscribers:
            subscriber(*args)
