"""`meshd top`: the cluster on a terminal. It reads one daemon's events over HTTP, and asks nothing else of the cluster."""

from collections import deque
from collections.abc import Awaitable
from typing import ClassVar

from textual.app import App
from textual.binding import Binding, BindingType

from meshd.tui.commands import CommandFailed, Commands
from meshd.tui.feed import Connected, Disconnected, Feed
from meshd.tui.messages import ConnectionChanged, Happened, Happening, RowsChanged
from meshd.tui.rows import ClusterRows
from meshd.tui.screens.cluster import ClusterScreen
from meshd.tui.screens.logs import LogScreen
from meshd.tui.screens.models import ModelScreen
from meshd.tui.screens.sessions import SessionScreen

FRAME_S = 0.1
"""Events are collected for so long before they are shown."""
KEPT = 2000
"""Events that are kept for the screen of logs."""


class Monitor(App[None]):
    """The application. It owns the rows and the latest events, and tells its screens what has changed."""

    TITLE = "meshd"
    CSS_PATH = "meshd.tcss"
    MODES = {"cluster": ClusterScreen, "sessions": SessionScreen, "models": ModelScreen, "logs": LogScreen}  # noqa: RUF012 (as Textual declares it)
    DEFAULT_MODE = "cluster"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("1", "switch_mode('cluster')", "Cluster"),
        Binding("3", "switch_mode('sessions')", "Sessions"),
        Binding("4", "switch_mode('models')", "Models"),
        Binding("6", "switch_mode('logs')", "Logs"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(self, api: str, api_key: str = "") -> None:
        super().__init__()
        self.rows = ClusterRows()
        self.happenings: deque[Happening] = deque(maxlen=KEPT)
        self.commands = Commands(api, api_key)
        self._feed = Feed(api, api_key)
        self._changed: frozenset[str] = frozenset()
        self._new: list[Happening] = []
        self.sub_title = api

    def on_mount(self) -> None:
        self.run_worker(self._read(), name="feed", exclusive=True)
        self.set_interval(FRAME_S, self._show)

    async def _read(self) -> None:
        async for item in self._feed.events():
            if isinstance(item, Connected | Disconnected):
                self._on_connection(item)
                continue
            self._changed |= self.rows.apply(item)
            if item.get("type") not in ("row", "gone"):
                self.happenings.append(item)
                self._new.append(item)

    def _on_connection(self, state: Connected | Disconnected) -> None:
        if isinstance(state, Disconnected):
            self.sub_title = f"{self._feed.api}: {state.reason}; trying again"
        else:
            self.sub_title = self._feed.api
            if not state.resumed:
                self.rows.clear()
        self.screen.post_message(ConnectionChanged(state))

    def do(self, command: Awaitable[object], done: str) -> None:
        """Carry a command out beside everything else, and say how it ended."""

        async def run() -> None:
            try:
                await command
            except CommandFailed as error:
                self.notify(str(error), severity="error", markup=False)
            else:
                self.notify(done, markup=False)

        self.run_worker(run(), group="commands")

    def _show(self) -> None:
        """Tell the present screen what has changed since the last frame."""
        if self._changed:
            self.screen.post_message(RowsChanged(self._changed))
            self._changed = frozenset()
        if self._new:
            self.screen.post_message(Happened(self._new[-KEPT:]))
            self._new = []
