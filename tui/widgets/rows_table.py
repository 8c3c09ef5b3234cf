"""A table that follows rows as they change, and keeps its cursor and its scroll position."""

from collections.abc import Iterable, Sequence

from rich.text import Text
from textual.widgets import DataTable

from meshd.bounds import printable

Cells = Sequence[str | Text]


class RowsTable(DataTable[Text]):
    """A table of rows with keys. Cells come from other peers, so nothing in them is markup or commands the terminal."""

    def __init__(self, *headers: str, id: str | None = None) -> None:  # noqa: A002 (the name that Textual uses)
        super().__init__(id=id, cursor_type="row", zebra_stripes=True)
        self._headers = headers
        self._shown: dict[str, tuple[Text, ...]] = {}

    def on_mount(self) -> None:
        for header in self._headers:
            self.add_column(header, key=header, width=len(header))

    @property
    def selected(self) -> str | None:
        """The key of the row under the cursor. None: the table is empty."""
        if not self.row_count:
            return None
        return self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value

    def select(self, key: str) -> None:
        """Move the cursor to a row, if it is there."""
        if key in self._shown:
            self.move_cursor(row=self.get_row_index(key))

    def follow(self, rows: Iterable[tuple[str, Cells]]) -> None:
        """Show these rows, in the order of their first appearance. The cursor stays on its row while that row exists."""
        wanted = {key: tuple(map(_text, cells)) for key, cells in rows}
        selected = self.selected
        gone = self._shown.keys() - wanted.keys()
        for key in gone:
            self.remove_row(key)
            del self._shown[key]
        for key, cells in wanted.items():
            before = self._shown.get(key)
            if before is None:
                self.add_row(*cells, key=key)
            else:
                for header, old, new in zip(self._headers, before, cells, strict=True):
                    if old != new or old.style != new.style:  # texts are equal to rich whatever their base style
                        self.update_cell(key, header, new, update_width=True)
            self._shown[key] = cells
        self._fit()
        if gone and selected is not None:
            self.select(selected)

    def _fit(self) -> None:
        """Make each column as wide as its widest cell.

        Textual's own automatic widths leave rows that were drawn before a width changed as they were (8.2.8).
        """
        changed = False
        for number, column in enumerate(self.ordered_columns):
            cells = (row[number].cell_len for row in self._shown.values())
            width = max(cells, default=0)
            width = max(width, column.label.cell_len)
            changed = changed or width != column.width
            column.width = width
        if changed:
            self.notify_style_update()  # forgets what was drawn


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))
