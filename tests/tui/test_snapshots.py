"""Pictures of every screen at two sizes, from recorded events. `--snapshot-update` makes them anew."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input

from meshd.tui.app import Monitor
from meshd.tui.feed import Disconnected
from meshd.tui.screens.dialogs import Confirm
from monitor.recorded import RecordedFeed
from monitor.watching import RECORDED

SIZES = [(80, 24), (160, 48)]
Compare = Callable[..., bool]
Steps = Callable[[Monitor, Pilot[None]], Awaitable[None]]


@pytest.fixture
def picture(snap_compare: Compare) -> Callable[[tuple[int, int], Steps], bool]:
    """Compares a picture of the monitor after all recorded events and some steps."""

    def compare(size: tuple[int, int], steps: Steps) -> bool:
        feed = RecordedFeed(RECORDED)
        app = Monitor("http://127.0.0.1:6374", feed=feed, now=feed.now)

        async def prepare(pilot: Pilot[None]) -> None:
            await feed.played.wait()
            await steps(app, pilot)
            app.show_changes()
            await pilot.pause()

        return snap_compare(app, terminal_size=size, run_before=prepare)

    return compare


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", ["cluster", "plan", "sessions", "models", "peer", "logs"])
def test_screen(picture: Any, name: str, size: tuple[int, int]) -> None:
    async def show(app: Monitor, pilot: Pilot[None]) -> None:
        await app.switch_mode(name)
        if name == "peer":
            await app.show_peer(next(row["id"] for row in app.cluster.rows["peers"] if row["name"] == "attic"))

    assert picture(size, show)


def test_light(picture: Any) -> None:
    async def show(app: Monitor, pilot: Pilot[None]) -> None:
        await pilot.press("t")

    assert picture(SIZES[0], show)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_help(picture: Any, size: tuple[int, int]) -> None:
    async def show(app: Monitor, pilot: Pilot[None]) -> None:
        await pilot.press("question_mark")

    assert picture(size, show)


def test_question(picture: Any) -> None:
    async def show(app: Monitor, pilot: Pilot[None]) -> None:
        await app.push_screen(Confirm("Cancel session 5e5e5e5e? Its answer ends."))

    assert picture(SIZES[0], show)


def test_filter_and_lost_connection(picture: Any) -> None:
    async def show(app: Monitor, pilot: Pilot[None]) -> None:
        await app.show_logs("level:warning")
        app.screen.query_one(Input).cursor_blink = False
        app._on_connection(Disconnected("the daemon does not answer", 4.0))

    assert picture(SIZES[0], show)
