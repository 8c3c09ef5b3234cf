"""The sessions of the whole cluster: how fast each runs, over which peers, and what it has been through."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Static

from meshd.bounds import printable
from meshd.display import ABSENT, duration, recovered
from meshd.tui.cluster import Event
from meshd.tui.log_filter import time_of
from meshd.tui.rows import Row
from meshd.tui.screens.dialogs import Choose, Confirm
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.widgets.rows_table import Cells, RowsTable

_LINES = 6
_HEADERS = ("SESSION", "STATE", "TOKENS", "TOK/S", "TTFT", "TPOT", "PREDICTED", "PLAN", "RECOVERED", "MODEL")


class SessionScreen(ListingScreen):
    """One row for each session, whichever peer coordinates it. Below, the latest recoveries and moves."""

    NAME = "sessions"
    PARTS = frozenset({"sessions", "plans", "recoveries", "history"})
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "cancel", "Cancel"),
        Binding("m", "migrate", "Migrate"),
        Binding("l", "logs", "Its log"),
    ]

    def body(self) -> ComposeResult:
        yield RowsTable(*_HEADERS, id="sessions")
        yield Static(id="recoveries")

    def draw(self) -> None:
        plans = {row["session"]: row for row in self.cluster.rows["plans"]}
        rows = [(row["id"], self._cells(row, plans.get(row["id"], {}))) for row in self.cluster.sessions()]
        self.query_one("#sessions", RowsTable).follow(rows)
        latest = list(self.cluster.recoveries)[-_LINES:]
        shown = self.query_one("#recoveries", Static)
        shown.display = bool(latest)
        shown.update(Text("\n").join(self._recovery(event) for event in reversed(latest)))

    def _cells(self, row: Row, plan: Mapping[str, Any]) -> Cells:
        tokens_s = self.cluster.rates.tokens_s(row["id"], self.cluster.now)
        return (
            row["id"][:8],
            self.paint.state(row["state"]),
            str(row["tokens"]),
            ABSENT if tokens_s is None else f"{tokens_s:.1f}",
            duration(row["ttft_s"]),
            duration(plan.get("measured_tpot_s") or None),
            duration(plan.get("predicted_tpot_s") or None),
            row["plan"] or ABSENT,
            recovered(row.get("recoveries", ())),
            row["model"],
        )

    def _recovery(self, event: Event) -> Text:
        what = f"continued by {event['method']} after {duration(event['pause_s'])} on {event['plan']}"
        why = f"  ({event['cause']}: {event['reason']})" if event["reason"] else ""
        session = (f"session {event['session'][:8]} ", self.paint.calm)
        return Text.assemble((f"{time_of(event)} ", self.paint.dim), session, printable(what + why))

    def _selected(self) -> str | None:
        return self.query_one("#sessions", RowsTable).selected

    async def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        if event.row_key.value:
            await self.monitor.show_plan("session", event.row_key.value)

    @work
    async def action_cancel(self) -> None:
        session = self._selected()
        if session is None or not await self.app.push_screen_wait(Confirm(f"Cancel session {session[:8]}? Its answer ends.")):
            return

        async def cancel() -> str:
            await self.monitor.commands.cancel(session)
            return f"session {session[:8]} is cancelled"

        self.act("", cancel)

    @work
    async def action_migrate(self) -> None:
        session = self._selected()
        peers = [(row["id"], row["name"]) for row in self.cluster.rows["peers"] if row["state"] == "alive" and row["id"]]
        if session is None or not peers:
            return
        name = f"session {session[:8]}"
        target = await self.app.push_screen_wait(Choose(f"Move {name} to which peer?", peers))
        if target is None:
            return

        async def migrate() -> str:
            moved = await self.monitor.commands.migrate(session, target)
            return f"{name} runs on {moved['plan']}, after a pause of {duration(moved['pause_ms'] / 1e3)}"

        self.act(f"{name} moves ...", migrate)

    async def action_logs(self) -> None:
        session = self._selected()
        if session is not None:
            await self.monitor.show_logs(f"session:{session[:8]}")
