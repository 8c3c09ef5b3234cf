"""What the application tells its screens. Events come by the hundreds; screens hear of them ten times a second."""

from collections.abc import Mapping, Sequence
from typing import Any

from textual.message import Message

from meshd.tui.feed import Connected, Disconnected

Happening = Mapping[str, Any]


class RowsChanged(Message):
    """Rows of some listings have changed."""

    def __init__(self, listings: frozenset[str]) -> None:
        super().__init__()
        self.listings = listings


class Happened(Message):
    """Events other than changes of rows, oldest first."""

    def __init__(self, events: Sequence[Happening]) -> None:
        super().__init__()
        self.events = events


class ConnectionChanged(Message):
    """The daemon has gone, or is back."""

    def __init__(self, state: Connected | Disconnected) -> None:
        super().__init__()
        self.state = state
