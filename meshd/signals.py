"""Callbacks between agents that need one another: the caller is constructed first, the callee subscribes once it exists."""

from collections.abc import Callable
from typing import Generic, TypeVarTuple

Ts = TypeVarTuple("Ts")


class Signal(Generic[*Ts]):
    """Called like a function; calls every subscriber, in the order of their subscriptions."""

    __slots__ = ("_subscribers",)

    def __init__(self) -> None:
        self._subscribers: list[Callable[[*Ts], None]] = []

    def subscribe(self, *subscribers: Callable[[*Ts], None]) -> None:
        """Add subscribers; what one of them raises, the caller of the signal gets, and the later ones are not called."""
        self._subscribers += subscribers

    def __call__(self, *args: *Ts) -> None:
        for subscriber in self._subscribers:
            subscriber(*args)
