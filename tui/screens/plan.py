"""The DAG of a running session's plan, or of the plan that a model would get."""

from typing import Any, ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import DataTable, Static

from meshd.tui.commands import CommandFailed
from meshd.tui.plan_graph import draw, of_model, of_session
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.widgets.rows_table import RowsTable

_SESSION, _MODEL = "session ", "model "


class PlanScreen(ListingScreen):
    """Sessions and models to the left, the drawing to the right."""

    NAME = "plan"
    PARTS = frozenset({"plans", "sessions", "models", "links", "history"})
    BINDINGS: ClassVar[list[BindingType]] = [Binding("r", "replan", "Plan again")]

    def __init__(self) -> None:
        super().__init__()
        self._documents: dict[str, dict[str, Any] | str] = {}
        """Answers of the planner by model, or why there is none. An empty text: it is being asked."""

    def body(self) -> ComposeResult:
        with Horizontal():
            yield RowsTable("PLAN OF", id="plans")
            with VerticalScroll(id="drawing"):
                yield Static(id="graph")

    def show(self, kind: str, identifier: str) -> None:
        """Show the plan of a `session` or a `model`."""
        self.draw()
        self.query_one("#plans", RowsTable).select(f"{kind} {identifier}")
        self._draw_graph()

    def draw(self) -> None:
        models = {row["id"]: row["name"] for row in self.cluster.rows["models"]}
        rows = [
            (_SESSION + row["session"], [f"{row['session'][:8]} {models.get(row['model'], '')}"])
            for row in self.cluster.rows["plans"]
        ]
        rows += [(_MODEL + row["id"], [row["name"]]) for row in self.cluster.rows["models"]]
        self.query_one("#plans", RowsTable).follow(rows)
        self._draw_graph()

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        if self.is_current:
            self._draw_graph()

    def action_replan(self) -> None:
        self._documents.clear()
        self._draw_graph()

    def _draw_graph(self) -> None:
        self.query_one("#graph", Static).update(self._graph())

    def _graph(self) -> Text:
        key = self.query_one("#plans", RowsTable).selected or ""
        width = self.query_one("#drawing").size.width - 4
        styles = {"accent": self.paint.calm, "strong": "bold"}
        if key.startswith(_SESSION):
            plan = next((row for row in self.cluster.rows["plans"] if _SESSION + row["session"] == key), None)
            return Text("this session has ended") if plan is None else draw(of_session(self.cluster, plan), width, **styles)
        if key.startswith(_MODEL):
            model = self.cluster.model_name(key.removeprefix(_MODEL))
            document = self._documents.get(model)
            if document is None:
                self._documents[model] = ""
                self._ask(model)
            if isinstance(document, dict):
                return draw(of_model(document), width, **styles)
            return Text(document or "planning ...")
        return Text("no session runs, and no model is known")

    @work
    async def _ask(self, model: str) -> None:
        """Ask the planner once; `action_replan` asks again."""
        try:
            self._documents[model] = await self.monitor.commands.plan(model)
        except CommandFailed as error:
            self._documents[model] = f"no plan: {error}"
        if self.is_current:
            self._draw_graph()
