"""The base of the monitor's screens."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ClassVar, cast

from textual.app import ComposeResult
from textual.screen import Screen
from textual.widgets import Footer

from meshd.tui.cluster import ClusterState
from meshd.tui.messages import ClusterChanged, ConnectionChanged
from meshd.tui.widgets.paint import Paint
from meshd.tui.widgets.top_bar import TopBar

if TYPE_CHECKING:
    from meshd.tui.app import Monitor


class ListingScreen(Screen[None]):
    """A screen that is drawn anew when one of `PARTS` of the cluster's state has changed, but only while it is shown."""

    NAME: ClassVar[str]
    PARTS: ClassVar[frozenset[str]] = frozenset()

    @property
    def monitor(self) -> "Monitor":
        return cast("Monitor", self.app)

    @property
    def cluster(self) -> ClusterState:
        return self.monitor.cluster

    @property
    def paint(self) -> Paint:
        return Paint.of(self.app.theme_variables)

    def compose(self) -> ComposeResult:
        yield TopBar(self.NAME, self.monitor.api)
        yield from self.body()
        yield Footer()

    def body(self) -> ComposeResult:
        """Yield what is between the top bar and the footer."""
        raise NotImplementedError

    def on_mount(self) -> None:
        self.app.theme_changed_signal.subscribe(self, lambda theme: self._redraw())

    def on_screen_resume(self) -> None:
        self._show_connection()
        self.draw()

    def on_cluster_changed(self, message: ClusterChanged) -> None:
        if self.is_current and message.parts & self.PARTS:
            self.follow()

    def on_connection_changed(self, message: ConnectionChanged) -> None:
        self._show_connection()
        self._redraw()

    def _show_connection(self) -> None:
        self.query_one(TopBar).show(self.monitor.connection)

    def _redraw(self) -> None:
        if self.is_current:
            self.draw()

    def draw(self) -> None:
        """Show the present state."""
        raise NotImplementedError

    def follow(self) -> None:
        """Show what has changed since the last drawing."""
        self.draw()

    def act(self, begun: str, command: Callable[[], Awaitable[str]]) -> None:
        """Carry a command out beside everything else: say that it has begun, and how it ended, which `command` returns."""
        self.monitor.act(begun, command)
