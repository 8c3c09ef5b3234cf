"""What happens, and the logs of all peers, with a filter."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import Footer, Header, Input, RichLog

from meshd.bounds import printable
from meshd.tui.messages import Happened
from meshd.tui.screens.listing import ListingScreen

_STYLES = {"error": "red", "warning": "yellow", "debug": "grey50"}
_HIDDEN = frozenset({"type", "at", "peer", "name", "level", "logger"})


class LogScreen(ListingScreen):
    """Newest lines below. The filter keeps the lines that contain all of its words."""

    def compose(self) -> ComposeResult:
        yield Header()
        yield Input(placeholder="show only lines with these words: a peer, a level, a session ...", id="filter")
        yield RichLog(max_lines=2000, id="lines", wrap=True)
        yield Footer()

    def on_input_changed(self) -> None:
        self.draw()

    def on_happened(self, message: Happened) -> None:
        if self.is_current:
            self._write(message.events)

    def draw(self) -> None:
        self.query_one("#lines", RichLog).clear()
        self._write(self.monitor.happenings)

    def _write(self, events: Any) -> None:
        words = self.query_one("#filter", Input).value.lower().split()
        lines = self.query_one("#lines", RichLog)
        for event in events:
            line = line_of(event)
            if all(word in line.plain.lower() for word in words):
                lines.write(line)


def line_of(event: Mapping[str, Any]) -> Text:
    """Format an event as one line."""
    at = datetime.fromtimestamp(event["at"]).strftime("%H:%M:%S")
    if event["type"] == "log":
        kind, text = event["level"], event["text"]
    else:
        kind = event["type"]
        text = ", ".join(f"{name} {value}" for name, value in event.items() if name not in _HIDDEN and value not in ("", None))
    return Text.assemble((f"{at} ", "grey50"), f"{event['name']:12.12} ", (f"{kind:10} ", _STYLES.get(kind, "")), printable(text))
