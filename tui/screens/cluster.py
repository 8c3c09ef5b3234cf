"""The cluster: peers with what they are, hold and do, and the links between them."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Static

from meshd.bounds import printable
from meshd.display import ABSENT, LINK_HEADERS, flops, link_cells, rate, size
from meshd.tui.rows import Row, peer_key
from meshd.tui.screens.dialogs import Confirm
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.widgets.rows_table import Cells, RowsTable

_BAR = 8
_LIVE = frozenset({"alive", "suspect"})
"""States in which the figures that a peer told of itself are recent."""


class ClusterScreen(ListingScreen):
    """Peers above, then why some are left out, and the links."""

    NAME = "cluster"
    PARTS = frozenset({"peers", "links", "models", "history"})
    BINDINGS: ClassVar[list[BindingType]] = [Binding("d", "drain", "Drain or undo")]

    def body(self) -> ComposeResult:
        yield RowsTable(
            "PEER", "STATE", "MEMORY", "LOAD", "TOK/S", "SESSIONS", "HOLDS", "DECODE", "PREFILL", "TEMP", "BATTERY", id="peers"
        )
        yield Static(id="left-out")
        yield RowsTable(*LINK_HEADERS, id="links")

    def draw(self) -> None:
        peers = self.cluster.rows["peers"]
        self.query_one("#peers", RowsTable).follow((peer_key(row), self._peer(row)) for row in peers)
        links = self.cluster.rows["links"]
        self.query_one("#links", RowsTable).follow((f"{row['source']} {row['target']}", link_cells(row)) for row in links)
        troubles = [_trouble(row) for row in peers if row["reason"]]
        shown = self.query_one("#left-out", Static)
        shown.display = bool(troubles)
        shown.update(Text("\n".join(troubles), self.paint.warn))

    def _peer(self, row: Row) -> Cells:
        paint, capability = self.paint, row["capability"]
        state = paint.state(row["state"], row["state"] + (", draining" if row.get("draining") else ""))
        holds = ", ".join(self._holding(held) for held in row["holdings"]) or ABSENT
        if not capability or row["state"] not in _LIVE:
            return (row["name"], state, *[ABSENT] * 4, holds, *[ABSENT] * 4)
        free, total = capability["memory_free_bytes"], capability["memory_total_bytes"]
        tokens = self.cluster.histories.of(row["id"]).tokens_s
        device = row.get("device") or {}
        return (
            row["name"],
            state,
            Text.assemble(paint.bar(1 - free / total if total else 0.0, _BAR), f" {size(free)} free"),
            percent(device.get("load")),
            f"{tokens[-1]:.1f}" if tokens else ABSENT,
            str(row.get("sessions", 0)),
            holds,
            rate(capability["rates"]["decode_bytes_s"]),
            flops(capability["rates"]["prefill_flops_s"]),
            celsius(device.get("temperature_c")),
            battery(device),
        )

    def _holding(self, held: Mapping[str, Any]) -> str:
        return f"{self.cluster.model_name(held['model'])} {held['layers']}{holding_state(held)}"

    async def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        if event.data_table.id == "peers" and event.row_key.value:
            await self.monitor.show_peer(event.row_key.value)

    @work
    async def action_drain(self) -> None:
        row = self.cluster.peer(self.query_one("#peers", RowsTable).selected)
        if row is None:
            return
        peer, name, undo = row["id"], row["name"], bool(row.get("draining"))
        if not peer:
            self.notify(f"{name} is not a peer of this cluster", severity="error", markup=False)
            return
        question = f"Drain {name}? Its sessions move to other peers, and it takes no new work."
        if not undo and not await self.app.push_screen_wait(Confirm(question)):
            return

        async def drain() -> str:
            left = await self.monitor.commands.drain(peer, undo=undo)
            return f"{name} takes work again" if undo else f"{name} drains, {left} sessions still run there"

        self.act("", drain)


def percent(share: float | None) -> str:
    """Format a share from 0 to 1."""
    return ABSENT if share is None else f"{100 * share:.0f} %"


def celsius(degrees: float | None) -> str:
    """Format a temperature."""
    return ABSENT if degrees is None else f"{degrees:.0f} C"


def battery(device: Mapping[str, Any]) -> str:
    """Format the charge of a battery, and whether it is being charged."""
    charge = device.get("battery")
    if charge is None:
        return "mains" if device.get("on_mains") else ABSENT
    return percent(charge) + (" mains" if device.get("on_mains") else "")


def holding_state(held: Mapping[str, Any]) -> str:
    """Say in brackets what is special about layers that a peer holds; empty if they simply serve."""
    if held["state"] == "loading":
        return f" (loading {100 * held['progress']:.0f} %)"
    if held["state"] not in ("active", "warm"):
        return f" ({held['state']})"
    return " (standby)" if held.get("standby") else ""


def _trouble(row: Row) -> str:
    left_out = "" if row["state"] in ("alive", "other cluster") else " is left out"
    hint = f"; {row['hint']}" if row.get("hint") else ""
    return printable(f"{row['name']}{left_out}: {row['reason']}{hint}")
