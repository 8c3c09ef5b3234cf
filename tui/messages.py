"""What the application tells its screens. Events come by the hundreds; screens hear of them five times a second."""

from collections.abc import Sequence

from textual.message import Message

from meshd.tui.cluster import Event


class ClusterChanged(Message):
    """Parts of the cluster's state have changed, as `ClusterState.apply` names them."""

    def __init__(self, parts: frozenset[str]) -> None:
        super().__init__()
        self.parts = parts


class Happened(Message):
    """Events other than changes of rows, oldest first."""

    def __init__(self, events: Sequence[Event]) -> None:
        super().__init__()
        self.events = events


class ConnectionChanged(Message):
    """The daemon has gone, or is back: `Monitor.connection` says which."""
