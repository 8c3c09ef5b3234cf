"""The first lines of every screen: the screens to choose from, the daemon, and what is wrong with the connection."""

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widget import Widget
from textual.widgets import Static

from meshd.bounds import printable
from meshd.display import duration
from meshd.tui.feed import Connected, Disconnected

SCREENS = ("cluster", "plan", "sessions", "models", "peer", "logs")


class TopBar(Widget):
    """Names of screens that can be clicked, and the address of the daemon. A lost connection has a line of its own."""

    def __init__(self, current: str, api: str) -> None:
        super().__init__()
        self._current, self._api = current, api

    def compose(self) -> ComposeResult:
        with Horizontal():
            yield Static(self._names(), id="screens")
            address = printable(self._api.removeprefix("http://"))
            yield Static(Text(address, overflow="ellipsis", no_wrap=True), id="api")
        yield Static(id="connection")

    def show(self, state: Connected | Disconnected | None) -> None:
        """Show the state of the connection. None: there was none yet."""
        line = self.query_one("#connection", Static)
        line.display = not isinstance(state, Connected)
        if isinstance(state, Disconnected):
            line.update(Text(printable(f"not connected: {state.reason}; trying again every {duration(state.retry_s)}")))
        elif state is None:
            line.update("connecting ...")

    def _names(self) -> str:
        shown = ["[b]meshd[/b]"]
        for number, name in enumerate(SCREENS, 1):
            label = f"{number} {name.capitalize()}"
            shown.append(f"[reverse] {label} [/]" if name == self._current else f"[@click=app.switch_mode('{name}')]{label}[/]")
        return " ".join(shown)
