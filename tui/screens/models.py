"""The models that the cluster knows: where their files and their layers are."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Footer, Header

from meshd.display import ABSENT, size
from meshd.tui.screens.confirm import Confirm
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.widgets.rows_table import RowsTable


class ModelScreen(ListingScreen):
    """One row for each model."""

    LISTINGS = frozenset({"models"})
    BINDINGS: ClassVar[list[BindingType]] = [Binding("p", "place", "Place"), Binding("u", "unplace", "Unplace")]

    def compose(self) -> ComposeResult:
        yield Header()
        yield RowsTable("MODEL", "KIND", "SIZE", "LAYERS", "CONTEXT", "ANSWERS", "ON DISK", "IN MEMORY", id="models")
        yield Footer()

    def draw(self) -> None:
        self.query_one("#models", RowsTable).follow((row["id"], _cells(row)) for row in self.rows["models"])

    def _selected(self) -> str | None:
        """The name of the model under the cursor."""
        key = self.query_one("#models", RowsTable).selected
        return next((row["name"] for row in self.rows["models"] if row["id"] == key), None)

    def action_place(self) -> None:
        if (model := self._selected()) is not None:
            self.notify(f"{model} is being placed", markup=False)
            self.monitor.do(self.monitor.commands.place(model), f"{model} is placed")

    @work
    async def action_unplace(self) -> None:
        model = self._selected()
        if model is not None and await self.app.push_screen_wait(Confirm(f"Free the layers of {model} on all peers?")):
            self.monitor.do(self.monitor.commands.unplace(model), f"{model} is unplaced")


def _cells(row: Mapping[str, Any]) -> Sequence[str | Text]:
    answers = Text("loaded", style="green") if row["loaded"] else Text("on demand" if row["answers"] else "no", style="grey50")
    held = [f"{held['name']} {held['layers']}{_state(held)}" for held in row["holdings"]]
    return (
        row["name"],
        row["quantisation"],
        size(row["bytes"]),
        str(row["layers"]),
        str(row["context_length"]),
        answers,
        ", ".join(row["on_disk"]) or ABSENT,
        ", ".join(held) or ABSENT,
    )


def _state(held: Mapping[str, Any]) -> str:
    if held["state"] == "loading":
        return f" ({100 * held['progress']:.0f} %)"
    return " (standby)" if held.get("standby") else ""
