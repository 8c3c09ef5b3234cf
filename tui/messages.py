"""What the application tells its screens. Events come by the hundreds; screens hear of them five times a second."""

from textual.message import Message


class ClusterChanged(Message):
    """Parts of the cluster's state have changed, as `ClusterState.apply` names them."""

    def __init__(self, parts: frozenset[str]) -> None:
        super().__init__()
        self.parts = parts


class ConnectionChanged(Message):
    """The daemon has gone, or is back: `Monitor.connection` says which."""
