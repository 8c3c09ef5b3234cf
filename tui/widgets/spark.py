"""A bar chart of a series, one column for each value, that always begins at 0."""

from collections.abc import Sequence

from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

_BLOCKS = " ▁▂▃▄▅▆▇█"


class Spark(Widget):
    """Shows the newest values that have room, at the right."""

    values: reactive[tuple[float, ...]] = reactive((), layout=False)

    def __init__(self, top: float | None = None, id: str | None = None) -> None:  # noqa: A002 (the name that Textual uses)
        """`top`: value of a full column. None: the largest value that is shown."""
        super().__init__(id=id)
        self._top = top

    def render(self) -> Text:
        return bars(self.values, self.size.width, self.size.height, self._top)


def bars(values: Sequence[float], width: int, height: int, top: float | None) -> Text:
    """Draw the last `width` values in `height` rows. A value above 0 always shows."""
    shown = list(values)[-width:] if width else []
    most = top or max(shown, default=0.0)
    steps = 8 * height
    levels = [0 if value <= 0 or most <= 0 else max(1, min(steps, round(value / most * steps))) for value in shown]
    rows = []
    for row in range(height - 1, -1, -1):
        line = "".join(_BLOCKS[max(0, min(8, level - 8 * row))] for level in levels)
        rows.append(line.rjust(width))
    return Text("\n".join(rows), no_wrap=True)
