"""The monitor under a pilot, on recorded events."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from rich.text import Text
from textual.pilot import Pilot
from textual.widgets import Static

from meshd.tui.app import Monitor
from meshd.tui.widgets.rows_table import RowsTable
from monitor.recorded import RecordedFeed

RECORDED = Path(__file__).parents[2] / "tui" / "recorded" / "cluster.jsonl"
Watching = tuple[Monitor, Pilot[None]]
Watch = Callable[..., AbstractAsyncContextManager[Watching]]


@asynccontextmanager
async def watching(api: str, size: tuple[int, int] = (120, 36)) -> AsyncIterator[Watching]:
    """Run the monitor on the recorded events, with its commands going to `api`."""
    feed = RecordedFeed(RECORDED)
    app = Monitor(api, "secret", feed=feed, now=feed.now)
    async with app.run_test(size=size) as pilot:
        await feed.played.wait()
        app.show_changes()
        await pilot.pause()
        yield app, pilot


async def soon(pilot: Pilot[None], condition: Callable[[], object], within_s: float = 5.0) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < until, "gave up waiting"
        await pilot.pause(0.02)


def text_of(app: Monitor, selector: str) -> str:
    """Return the text that a widget of the present screen shows."""
    shown = app.screen.query_one(selector, Static).content
    return shown.plain if isinstance(shown, Text) else str(shown)


def cells_of(app: Monitor, selector: str) -> list[list[str]]:
    """Return the cells of a table of the present screen, row by row."""
    table = app.screen.query_one(selector, RowsTable)
    return [[cell.plain for cell in table.get_row_at(row)] for row in range(table.row_count)]


def told(app: Monitor) -> list[str]:
    """Return the notifications that are shown."""
    return [notification.message for notification in app._notifications]
