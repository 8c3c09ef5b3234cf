"""The cluster: peers with what they are, hold and do, and the links between them."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Footer, Header, Label

from meshd.display import ABSENT, duration, flops, rate, size
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.widgets.rows_table import RowsTable

_STATES = {"alive": "green", "suspect": "yellow", "found": "cyan", "dead": "red", "refused": "red", "left": "grey50"}
_BAR = 10


class ClusterScreen(ListingScreen):
    """Peers above, links below."""

    LISTINGS = frozenset({"peers", "links", "models"})

    def compose(self) -> ComposeResult:
        yield Header()
        with Vertical():
            yield RowsTable("PEER", "STATE", "MEMORY", "DECODE", "PREFILL", "SESSIONS", "HOLDS", id="peers")
            yield Label(id="left-out")
            yield RowsTable("FROM", "TO", "ROUND TRIP", "BANDWIDTH", id="links")
        yield Footer()

    def draw(self) -> None:
        models = {row["id"]: row["name"] for row in self.rows["models"]}
        peers = self.rows["peers"]
        self.query_one("#peers", RowsTable).follow((row["id"] or str(row["addresses"]), _peer(row, models)) for row in peers)
        self.query_one("#links", RowsTable).follow((f"{row['source']} {row['target']}", _link(row)) for row in self.rows["links"])
        left_out = [f"{row['name']} is left out: {row['reason']}" for row in peers if row["state"] != "alive" and row["reason"]]
        self.query_one("#left-out", Label).update(Text("\n".join(left_out)))


def _peer(row: Mapping[str, Any], models: Mapping[str, str]) -> tuple[str | Text, ...]:
    state = Text(row["state"] + (", draining" if row.get("draining") else ""), style=_STATES.get(row["state"], ""))
    holds = ", ".join(_holding(held, models) for held in row["holdings"]) or ABSENT
    capability = row["capability"]
    if not capability:
        return row["name"], state, ABSENT, ABSENT, ABSENT, ABSENT, holds
    free, total = capability["memory_free_bytes"], capability["memory_total_bytes"]
    return (
        row["name"],
        state,
        memory_bar(free, total),
        rate(capability["rates"]["decode_bytes_s"]),
        flops(capability["rates"]["prefill_flops_s"]),
        str(row.get("sessions", 0)),
        holds,
    )


def memory_bar(free: int, total: int) -> Text:
    """Draw how much of the memory is in use, with what is free beside it."""
    used = 0.0 if total <= 0 else min(1.0, max(0.0, 1 - free / total))
    filled = round(used * _BAR)
    style = "red" if used > 0.9 else "yellow" if used > 0.7 else "green"
    return Text.assemble(("█" * filled, style), ("░" * (_BAR - filled), "grey37"), f" {size(free)} free")


def _holding(held: Mapping[str, Any], models: Mapping[str, str]) -> str:
    name = models.get(held["model"], held["model"][:8])
    state = f" (loading {100 * held['progress']:.0f} %)" if held["state"] == "loading" else ""
    return f"{name} {held['layers']}" + (" (standby)" if held.get("standby") else state)


def _link(row: Mapping[str, Any]) -> tuple[str, ...]:
    return row["source_name"], row["target_name"], duration(row["rtt_s"]), rate(row["bandwidth_bytes_s"])
