"""A log of events that formats only the lines that are on the screen, so that hundreds of events a second cost little."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.segment import Segment
from rich.text import Text
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from meshd.tui.log_filter import kind_of, text_of, time_of
from meshd.tui.widgets.paint import Paint

Event = Mapping[str, Any]
_WIDTH = 520
"""Columns that one can scroll over: the longest text of an event, and what is before it."""
_NAME, _KIND = 12, 10


class EventLog(ScrollView, can_focus=True):
    """Shows one line for each event, newest below. It follows the end while the end is shown."""

    def __init__(self, limit: int, id: str | None = None) -> None:  # noqa: A002 (the name that Textual uses)
        super().__init__(id=id)
        self._events: deque[Event] = deque(maxlen=limit)

    @property
    def texts(self) -> list[str]:
        """The lines, as text."""
        return [self._line(event).plain for event in self._events]

    def show(self, events: Iterable[Event], wanted: Callable[[Event], bool]) -> None:
        """Show these events instead of those before."""
        self._events.clear()
        self._events.extend(event for event in events if wanted(event))
        self._resize(at_end=True)

    def add(self, events: Iterable[Event], wanted: Callable[[Event], bool]) -> None:
        """Add newer events below."""
        at_end = self.is_vertical_scroll_end
        new = [event for event in events if wanted(event)]
        if not new:
            return
        limit = self._events.maxlen or 0
        dropped = max(0, len(self._events) + len(new) - limit)
        self._events.extend(new)
        self._resize(at_end=at_end)
        if dropped and not at_end:
            self.scroll_to(y=max(0, self.scroll_y - dropped), animate=False)  # the same lines stay on the screen

    def _resize(self, *, at_end: bool) -> None:
        self.virtual_size = Size(_WIDTH, len(self._events))
        if at_end:
            self.scroll_end(animate=False, x_axis=False)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        left, top = self.scroll_offset
        width, number = self.size.width, top + y
        if number >= len(self._events):
            return Strip.blank(width, self.rich_style)
        line = self._line(self._events[number])
        strip = Strip([Segment(segment.text, segment.style) for segment in line.render(self.app.console)])
        return strip.crop_extend(left, left + width, self.rich_style).apply_style(self.rich_style)

    def _line(self, event: Event) -> Text:
        kind = kind_of(event)
        paint = Paint.of(self.app.theme_variables)
        return Text.assemble(
            (f"{time_of(event)} ", paint.dim),
            f"{event['name']:{_NAME}.{_NAME}} ",
            (f"{kind:{_KIND}.{_KIND}} ", paint.kind(kind)),
            text_of(event),
            end="",
        )
