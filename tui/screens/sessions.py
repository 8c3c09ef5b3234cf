"""The sessions of the whole cluster: how fast each runs, over which peers, and what it has been through."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Footer, Header

from meshd.display import ABSENT, duration
from meshd.tui.messages import RowsChanged
from meshd.tui.rates import TokenRates
from meshd.tui.screens.confirm import Ask, Confirm
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.widgets.rows_table import RowsTable

_RECOVERIES = 3
_STATES = {"decoding": "green", "prefilling": "cyan", "opening": "cyan", "recovering": "red"}


class SessionScreen(ListingScreen):
    """One row for each session, whichever peer coordinates it."""

    LISTINGS = frozenset({"sessions", "plans"})
    BINDINGS: ClassVar[list[BindingType]] = [Binding("c", "cancel", "Cancel"), Binding("m", "migrate", "Migrate")]

    def __init__(self) -> None:
        super().__init__()
        self._rates = TokenRates()

    def compose(self) -> ComposeResult:
        yield Header()
        yield RowsTable("SESSION", "MODEL", "STATE", "TOKENS", "TOK/S", "TPOT", "PREDICTED", "PLAN", "RECOVERED", id="sessions")
        yield Footer()

    def on_rows_changed(self, message: RowsChanged) -> None:
        self._observe()
        super().on_rows_changed(message)

    def _observe(self) -> None:
        now, sessions = time.monotonic(), self._coordinated()
        for row in sessions:
            self._rates.observe(row["id"], row["tokens"], now)
        self._rates.forget(frozenset(row["id"] for row in sessions))

    def _coordinated(self) -> list[Mapping[str, Any]]:
        return [row for row in self.rows["sessions"] if row["role"] == "coordinator"]

    def draw(self) -> None:
        plans = {row["session"]: row for row in self.rows["plans"]}
        now = time.monotonic()
        rows = [(row["id"], self._cells(row, plans.get(row["id"], {}), now)) for row in self._coordinated()]
        self.query_one("#sessions", RowsTable).follow(rows)

    def _cells(self, row: Mapping[str, Any], plan: Mapping[str, Any], now: float) -> Sequence[str | Text]:
        tokens_s = self._rates.tokens_s(row["id"], now)
        return (
            row["id"][:8],
            row["model"],
            Text(row["state"], style=_STATES.get(row["state"], "")),
            str(row["tokens"]),
            ABSENT if tokens_s is None else f"{tokens_s:.1f}",
            duration(plan.get("measured_tpot_s") or None),
            duration(plan.get("predicted_tpot_s") or None),
            row["plan"] or ABSENT,
            _recovered(row.get("recoveries", ())),
        )

    @work
    async def action_cancel(self) -> None:
        session = self.query_one("#sessions", RowsTable).selected
        if session is not None:
            self.app.push_screen(
                Confirm(f"Cancel session {session[:8]}? Its answer ends."),
                lambda yes: (
                    self.monitor.do(self.monitor.commands.cancel(session), f"session {session[:8]} is cancelled") if yes else None
                ),
            )

    @work
    async def action_migrate(self) -> None:
        session = self.query_one("#sessions", RowsTable).selected
        if session is not None:
            name = f"session {session[:8]}"
            peer = await self.app.push_screen_wait(Ask(f"Move {name} to which peer?", "a peer's name"))
            if peer:
                self.monitor.do(self.monitor.commands.migrate(session, peer), f"{name} runs on {peer}")


def _recovered(changes: Sequence[Mapping[str, Any]]) -> str:
    shown = [f"{change['method']} {duration(change['pause_ms'] / 1e3)}" for change in changes[-_RECOVERIES:]]
    more = len(changes) - len(shown)
    return ", ".join([f"{more} more", *shown] if more else shown) or ABSENT
