"""The models that the cluster knows: where their files and their layers are, and what is being downloaded."""

from collections.abc import Mapping
from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Static

from meshd.bounds import printable
from meshd.display import ABSENT, size
from meshd.tui.cluster import Event
from meshd.tui.commands import CommandFailed
from meshd.tui.rows import Row
from meshd.tui.screens.cluster import holding_state
from meshd.tui.screens.dialogs import Choose, Confirm
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.widgets.rows_table import Cells, RowsTable

_BAR = 24
_PULLS = 5


class ModelScreen(ListingScreen):
    """One row for each model. Below, the running downloads."""

    NAME = "models"
    PARTS = frozenset({"models", "pulls"})
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l", "pull", "Pull"),
        Binding("s", "stop", "Stop pull"),
        Binding("p", "place", "Place"),
        Binding("u", "unplace", "Unplace"),
        Binding("x", "remove", "Remove"),
    ]

    def body(self) -> ComposeResult:
        yield RowsTable("MODEL", "SIZE", "LAYERS", "ANSWERS", "IN MEMORY", "ON DISK", "KIND", "CONTEXT", id="models")
        yield Static(id="pulls")

    def draw(self) -> None:
        self.query_one("#models", RowsTable).follow((row["id"], self._cells(row)) for row in self.cluster.rows["models"])
        pulls = list(self.cluster.pulls.values())[-_PULLS:]
        shown = self.query_one("#pulls", Static)
        shown.display = bool(pulls)
        shown.update(Text("\n").join(map(self._pull, pulls)))

    def _cells(self, row: Row) -> Cells:
        paint = self.paint
        answers = Text("loaded", paint.good) if row["loaded"] else Text("on demand" if row["answers"] else "no", paint.dim)
        held = [f"{held['name']} {held['layers']}{holding_state(held)}" for held in row["holdings"]]
        return (
            row["name"],
            size(row["bytes"]),
            str(row["layers"]),
            answers,
            ", ".join(held) or ABSENT,
            ", ".join(row["on_disk"]) or ABSENT,
            row["quantisation"],
            str(row["context_length"]),
        )

    def _pull(self, event: Event) -> Text:
        done, total = event["done_bytes"], event["total_bytes"]
        what = f"{event['name']} pulls {event['model']}: {event['phase']} "
        amount = f" {size(done)} of {size(total)}" if total else f" {size(done)}" if done else ""
        bar = self.paint.progress(done / total, _BAR) if total else Text()
        return Text.assemble(printable(what), bar, printable(f"{amount} {event['message']}"))

    def _selected(self) -> Row | None:
        key = self.query_one("#models", RowsTable).selected
        return next((row for row in self.cluster.rows["models"] if row["id"] == key), None)

    async def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        if event.row_key.value:
            await self.monitor.show_plan("model", event.row_key.value)

    @work
    async def action_pull(self) -> None:
        known = {row["name"] for row in self.cluster.rows["models"]}
        try:
            catalogue = await self.monitor.commands.catalogue()
        except CommandFailed:
            catalogue = []  # an older daemon; a reference can still be typed
        options = [(row["name"], _entry(row)) for row in catalogue if row["name"] not in known]
        question = "Pull which model to this daemon's disk?"
        model = await self.app.push_screen_wait(Choose(question, options, "a short name, or hf:ORG/NAME:QUANT"))
        if model is not None:
            self.monitor.pull(model)

    @work
    async def action_stop(self) -> None:
        running = [(name, name) for name in self.monitor.pulling]
        model = await self.app.push_screen_wait(Choose("Stop which pull? It can go on later.", running)) if running else None
        if model is not None:
            self.monitor.stop_pull(model)
        elif not running:
            self.notify("no pull was started here")

    def action_place(self) -> None:
        row = self._selected()
        if row is not None:
            name = row["name"]

            async def place() -> str:
                await self.monitor.commands.place(name)
                return f"{name} is placed"

            self.act(f"{name} is being placed ...", place)

    @work
    async def action_unplace(self) -> None:
        row = self._selected()
        if row is None or not await self.app.push_screen_wait(Confirm(f"Free the layers of {row['name']} on all peers?")):
            return
        name = row["name"]

        async def unplace() -> str:
            return f"{name} is unplaced: {size(await self.monitor.commands.unplace(name))} freed"

        self.act("", unplace)

    @work
    async def action_remove(self) -> None:
        row = self._selected()
        if row is None:
            return
        name = row["name"]
        question = f"Remove {name} ({size(row['bytes'])}) from the disk of the daemon at {self.monitor.api}?"
        if not await self.app.push_screen_wait(Confirm(question)):
            return

        async def remove() -> str:
            return f"{name} is removed: {size(await self.monitor.commands.remove(name))} freed"

        self.act("", remove)


def _entry(row: Mapping[str, Any]) -> str:
    return f"{row['name']:20} {size(row['bytes']):>9}  {row['licence']}"
