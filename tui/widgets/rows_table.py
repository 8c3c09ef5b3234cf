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
            self.add_column(header, key=header)

    @property
    def selected(self) -> str | None:
        """The key of the row under the cursor. None: the table is empty."""
        if not self.row_count:
            return None
        return self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value

    def follow(self, rows: Iterable[tuple[str, Cells]]) -> None:
        """Show these rows, in this order of their first appearance."""
        wanted = {key: tuple(map(_text, cells)) for key, cells in rows}
        for key in self._shown.keys() - wanted.keys():
            self.remove_row(key)
            del self._shown[key]
        for key, cells in wanted.items():
            before = self._shown.get(key)
            if before is None:
                self.add_row(*cells, key=key)
            elif before != cells:
                for header, old, new in zip(self._headers, before, cells, strict=True):
                    if old != new:
                        self.update_cell(key, header, new, update_width=True)
            self._shown[key] = cells


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(printable(cell))
