"""A table follows rows and keeps its cursor."""

from rich.text import Text
from textual.app import App, ComposeResult

from meshd.tui.widgets.rows_table import RowsTable


class Tables(App[None]):
    def compose(self) -> ComposeResult:
        yield RowsTable("NAME", "STATE", id="table")


def shown(table: RowsTable) -> list[list[str]]:
    return [[cell.plain for cell in table.get_row_at(row)] for row in range(table.row_count)]


async def test_rows_come_change_and_go_and_the_cursor_stays_on_its_row() -> None:
    app = Tables()
    async with app.run_test() as pilot:
        table = app.query_one(RowsTable)
        assert table.selected is None
        table.follow([(key, (key, "new")) for key in "abcd"])
        table.select("c")
        assert table.selected == "c"
        table.follow([("b", ("b", Text("old"))), ("c", ("c", "new")), ("e", ("e", "new"))])
        await pilot.pause()
        assert shown(table) == [["b", "old"], ["c", "new"], ["e", "new"]]
        assert table.selected == "c"
        table.select("not there")
        table.follow([("b", ("b", "x"))])
        assert table.selected == "b"
        table.follow([])
        assert (table.selected, shown(table)) == (None, [])


async def test_rows_are_drawn_anew_when_a_column_becomes_wider_or_narrower() -> None:
    app = Tables()
    async with app.run_test() as pilot:
        table = app.query_one(RowsTable)
        table.follow([("a", ("attic", "alive")), ("b", ("b", "x"))])
        await pilot.pause()
        assert table.render_line(1).text.rstrip() == " attic  alive"
        for name in ("a name that is long", "no"):
            table.follow([("a", ("attic", "alive")), ("b", (name, "x"))])
            await pilot.pause()
            lines = [table.render_line(number).text.rstrip() for number in range(3)]
            columns = {line.index(word) for line, word in zip(lines, ("STATE", "alive", "x"), strict=True)}
            assert columns == {max(len(name), 5) + 3}


async def test_cells_are_no_markup_and_no_commands() -> None:
    app = Tables()
    async with app.run_test():
        table = app.query_one(RowsTable)
        table.follow([("a", ("[b]name[/b]", "\x1b[2J"))])
        assert shown(table) == [["[b]name[/b]", "\\x1b[2J"]]
