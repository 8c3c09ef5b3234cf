"""The base of screens that show listings."""

from typing import TYPE_CHECKING, cast

from textual.screen import Screen

from meshd.tui.messages import Happened, RowsChanged
from meshd.tui.rows import ClusterRows

if TYPE_CHECKING:
    from meshd.tui.app import Monitor


class ListingScreen(Screen[None]):
    """A screen that is drawn anew when rows of `LISTINGS` have changed, but only while it is shown."""

    LISTINGS: frozenset[str] = frozenset()

    @property
    def rows(self) -> ClusterRows:
        return self.monitor.rows

    @property
    def monitor(self) -> "Monitor":
        return cast("Monitor", self.app)

    def on_screen_resume(self) -> None:
        self.draw()

    def on_rows_changed(self, message: RowsChanged) -> None:
        if self.is_current and message.listings & self.LISTINGS:
            self.draw()

    def on_happened(self, message: Happened) -> None:
        """Show events other than changes of rows."""

    def draw(self) -> None:
        """Show the present rows."""
        raise NotImplementedError
