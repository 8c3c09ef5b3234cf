"""What happens, and the logs of all peers, with a filter."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Input

from meshd.tui.cluster import KEPT
from meshd.tui.log_filter import LEVELS, LogFilter
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.widgets.event_log import EventLog


class LogScreen(ListingScreen):
    """Newest lines below. The filter is text, so that it shows what it does; keys change its parts."""

    NAME = "logs"
    PARTS = frozenset({"happenings"})
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "edit", "Filter"),
        Binding("v", "level", "Level"),
        Binding("p", "peer", "Peer"),
        Binding("s", "session", "Session"),
        Binding("c", "clear", "No filter"),
        Binding("end", "to_end", "Newest", show=False),
        Binding("escape", "leave", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 0
        """How many events had happened when the lines were drawn."""

    def body(self) -> ComposeResult:
        yield Input(placeholder="show only: peer:NAME level:warning session:ID words", id="filter", compact=True)
        yield EventLog(KEPT, id="lines")

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one("#lines", EventLog).focus()

    def show(self, text: str) -> None:
        """Show only what matches this filter."""
        self.query_one("#filter", Input).value = text

    @property
    def filter(self) -> LogFilter:
        return LogFilter.parse(self.query_one("#filter", Input).value)

    def on_input_changed(self) -> None:
        self.draw()

    def on_input_submitted(self) -> None:
        self.action_leave()

    def draw(self) -> None:
        self._drawn = self.cluster.happened
        self.query_one("#lines", EventLog).show(self.cluster.happenings, self.filter)

    def follow(self) -> None:
        new, self._drawn = self.cluster.since(self._drawn), self.cluster.happened
        self.query_one("#lines", EventLog).add(new, self.filter)

    def action_edit(self) -> None:
        self.query_one("#filter", Input).focus()

    def action_leave(self) -> None:
        self.query_one("#lines", EventLog).focus()

    def action_clear(self) -> None:
        self.show("")

    def action_to_end(self) -> None:
        self.query_one("#lines", EventLog).scroll_end(animate=False, x_axis=False)

    def action_level(self) -> None:
        self._change(level=_next(self.filter.level, LEVELS[1:]))

    def action_peer(self) -> None:
        names = dict.fromkeys(str(row["name"]).lower() for row in self.cluster.rows["peers"] if row["id"])
        self._change(peer=_next(self.filter.peer, tuple(names)))

    def action_session(self) -> None:
        seen = [event["session"][:8] for event in self.cluster.happenings if event.get("session")]
        self._change(session=_next(self.filter.session, tuple(dict.fromkeys(reversed(seen)))))

    def _change(self, *, peer: str | None = None, level: str | None = None, session: str | None = None) -> None:
        now = self.filter
        changed = LogFilter(
            peer=now.peer if peer is None else peer,
            level=now.level if level is None else level,
            session=now.session if session is None else session,
            words=now.words,
        )
        self.show(str(changed))


def _next(present: str, choices: tuple[str, ...]) -> str:
    """Return the choice after the present one; after the last one, none."""
    place = choices.index(present) + 1 if present in choices else 0
    return choices[place] if place < len(choices) else ""
