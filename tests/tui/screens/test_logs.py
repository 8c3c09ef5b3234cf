"""The screen of logs and its filter."""

from typing import Any

import pytest
from textual.widgets import Input

from meshd.tui.app import Monitor
from meshd.tui.feed import Connected
from meshd.tui.widgets.event_log import EventLog
from monitor.recorded import ScriptedFeed
from monitor.watching import Watch, Watching, soon


def lines(app: Monitor) -> list[str]:
    return app.screen.query_one(EventLog).texts


def notice(message: str) -> dict[str, Any]:
    return {"type": "notice", "at": 1.0, "peer": "p", "name": "desk", "message": message, "hint": ""}


async def shown(watching: Watching) -> None:
    app, pilot = watching
    await pilot.press("6")
    await soon(pilot, lambda: app.screen.query(EventLog) and lines(app))


async def test_keys_go_through_the_parts_of_the_filter(watch: Watch) -> None:
    async with watch() as (app, pilot):
        await shown((app, pilot))
        everything = lines(app)
        filters = []
        for key in "vvvvppps":
            await pilot.press(key)
            filters.append(app.screen.query_one(Input).value)
        session = filters.pop().removeprefix("peer:laptop session:")
        assert filters == ["level:info", "level:warning", "level:error", "", "peer:desk", "peer:attic", "peer:laptop"]
        assert any(session == row["id"][:8] for row in app.cluster.sessions())
        await pilot.press("c")
        await soon(pilot, lambda: lines(app) == everything)
        await pilot.press("v", "v")
        await soon(pilot, lambda: 0 < len(lines(app)) < len(everything))
        assert any("continued by" in line for line in lines(app))


async def test_words_are_typed_into_the_filter(watch: Watch) -> None:
    async with watch() as (app, pilot):
        await shown((app, pilot))
        await pilot.press("slash")
        assert isinstance(app.focused, Input)
        await pilot.press(*"continued 1q", "backspace", "backspace", "enter")
        assert isinstance(app.focused, EventLog)
        await soon(pilot, lambda: lines(app) and all("continue" in line for line in lines(app)))
        await pilot.press("q")
        await soon(pilot, lambda: app._exit)


async def test_a_drawing_between_two_frames_shows_no_event_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshd.tui.app.FRAME_S", 3600.0)
    feed = ScriptedFeed()
    app = Monitor(feed.api, feed=feed, now=feed.now)
    async with app.run_test() as pilot:
        await pilot.press("6")
        await soon(pilot, lambda: app.screen.query(EventLog))
        for number in range(3):
            feed.items.put_nowait(Connected(resumed=False) if number == 0 else notice(str(number)))
        await soon(pilot, lambda: len(app.cluster.happenings) == 2)
        await pilot.press("v", "c")  # draws the lines
        app.show_changes()
        await pilot.pause()
        assert [line.split()[-1] for line in lines(app)] == ["1", "2"]


async def test_the_log_follows_the_end_only_while_the_end_is_shown(watch: Watch) -> None:
    async with watch((80, 14)) as (app, pilot):
        await shown((app, pilot))
        log = app.screen.query_one(EventLog)
        event = notice("new")
        log.add([event], lambda _: True)
        await pilot.pause()
        assert log.is_vertical_scroll_end
        await pilot.press("home")
        await soon(pilot, lambda: log.scroll_y == 0)
        top = log.render_line(0).text
        log.add([event] * 5, lambda _: True)
        await pilot.pause()
        assert (log.scroll_y, log.render_line(0).text) == (0, top)
        await pilot.press("end")
        await soon(pilot, lambda: log.is_vertical_scroll_end)
        assert "new" in log.render_line(log.scrollable_content_region.height - 1).text
        await pilot.press("right")
        await soon(pilot, lambda: log.scroll_x > 0)
