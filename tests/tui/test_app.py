"""The application: screens, themes, the palette, a lost connection, and a flood of events."""

import asyncio
from typing import Any

import pytest
from textual.command import CommandPalette

from meshd.tui.app import _SCREENS, Monitor
from meshd.tui.feed import Connected, Disconnected
from meshd.tui.screens.dialogs import Help
from meshd.tui.screens.listing import ListingScreen
from meshd.tui.widgets.event_log import EventLog
from monitor.recorded import ScriptedFeed
from monitor.watching import Watch, cells_of, soon, text_of

NAMES = ["cluster", "plan", "sessions", "models", "peer", "logs"]


def shown(app: Monitor) -> str:
    assert isinstance(app.screen, ListingScreen)
    return app.screen.NAME


async def test_each_screen_has_a_number_and_can_be_clicked(watch: Watch) -> None:
    async with watch((80, 24)) as (app, pilot):
        for number, name in enumerate(NAMES, 1):
            await pilot.press(str(number))
            await soon(pilot, lambda name=name: shown(app) == name)
        for name in NAMES:
            column = app.screen.query_one("#screens").render_line(0).text.index(name.capitalize())
            await pilot.click("#screens", offset=(column, 0))
            await soon(pilot, lambda name=name: shown(app) == name)


async def test_the_help_lists_every_key(watch: Watch) -> None:
    async with watch((120, 90)) as (app, pilot):
        await pilot.press("question_mark")
        assert isinstance(app.screen, Help)
        text = text_of(app, ".help Static")
        for screen in _SCREENS:
            for binding in screen.BINDINGS:
                assert binding.description in text  # type: ignore[union-attr]
        await pilot.press("escape")
        assert shown(app) == "cluster"


async def test_light_and_dark(watch: Watch) -> None:
    async with watch() as (app, pilot):
        before, dark = app.theme, app.screen.query_one("#peers").styles.background
        await pilot.press("t")
        await pilot.pause()
        assert app.theme == "textual-light" != before
        (state,) = {row[1].style for row in [app.screen.query_one("#peers").get_row_at(0)]}  # type: ignore[attr-defined]
        assert state == app.theme_variables["text-success"]
        await pilot.press("t")
        assert (app.theme, app.screen.query_one("#peers").styles.background) == (before, dark)


async def test_the_palette_has_the_screens_and_the_keys_of_this_one(watch: Watch) -> None:
    async with watch() as (app, pilot):
        await pilot.press("3")
        await soon(pilot, lambda: shown(app) == "sessions")
        titles = {command.title: command for command in app.get_system_commands(app.screen)}
        assert {"Show models", "Help", "Light or dark", "Cancel", "Migrate"} <= titles.keys()
        await pilot.press("ctrl+p")
        assert isinstance(app.screen, CommandPalette)
        await pilot.press(*"show models")
        await soon(pilot, lambda: app.screen.query("OptionList").first().option_count)  # type: ignore[attr-defined]
        await pilot.press("enter")
        await soon(pilot, lambda: not isinstance(app.screen, CommandPalette) and shown(app) == "models")


async def test_q_quits(watch: Watch) -> None:
    async with watch() as (app, pilot):
        await pilot.press("q")
        await soon(pilot, lambda: not app.is_running or app._exit)


def peer(name: str, state: str = "alive") -> dict[str, Any]:
    row = {
        "id": name * 52, "name": name, "state": state, "reason": "", "addresses": ["10.0.0.1:6375"], "holdings": [],
        "capability": None, "models": [], "sessions": 0, "version": "", "device": None,
    }  # fmt: skip
    return {"type": "row", "list": "peers", "key": name, "row": row}


def line(number: int) -> dict[str, Any]:
    text = f"[b]line[/b] {number} \x1b[31m"
    return {"type": "log", "at": 1.0, "peer": "a" * 52, "name": "a", "level": "info", "logger": "x", "text": text, "session": ""}


async def test_a_daemon_that_goes_away_is_shown_and_its_rows_stay_until_it_is_back() -> None:
    feed = ScriptedFeed()
    app = Monitor(feed.api, feed=feed, now=feed.now)
    async with app.run_test(size=(100, 30)) as pilot:
        assert "connecting" in text_of(app, "#connection")
        for item in (Connected(resumed=False), peer("a"), peer("b")):
            feed.items.put_nowait(item)
        await soon(pilot, lambda: len(cells_of(app, "#peers")) == 2)
        assert not app.screen.query_one("#connection").display
        feed.items.put_nowait(Disconnected("the daemon does [not] answer", 0.5))
        await soon(pilot, lambda: app.screen.query_one("#connection").display)
        assert text_of(app, "#connection") == "not connected: the daemon does [not] answer; trying again every 500 ms"
        assert len(cells_of(app, "#peers")) == 2
        await pilot.press("4")  # another screen says it too
        await soon(pilot, lambda: shown(app) == "models" and "not connected" in text_of(app, "#connection"))
        await pilot.press("1")
        for item in (Connected(resumed=True), peer("b", "dead")):
            feed.items.put_nowait(item)
        await soon(pilot, lambda: [row[:2] for row in cells_of(app, "#peers")] == [["a", "alive"], ["b", "dead"]])
        for item in (Connected(resumed=False), peer("c")):
            feed.items.put_nowait(item)
        await soon(pilot, lambda: [row[0] for row in cells_of(app, "#peers")] == ["c"])
        assert not app.screen.query_one("#connection").display


async def test_events_that_come_by_the_hundreds_are_shown_in_few_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = ScriptedFeed()
    app = Monitor(feed.api, feed=feed, now=feed.now)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.press("6")
        await soon(pilot, lambda: shown(app) == "logs")
        drawn: list[int] = []
        add = EventLog.add

        def counted(log: EventLog, events: Any, wanted: Any) -> None:
            drawn.append(len(events))
            add(log, events, wanted)

        monkeypatch.setattr(EventLog, "add", counted)
        feed.items.put_nowait(Connected(resumed=False))
        for number in range(3000):
            feed.items.put_nowait(line(number))
            if number % 500 == 0:
                await asyncio.sleep(0.1)
        log = app.screen.query_one(EventLog)
        await soon(pilot, lambda: log.texts and "line[/b] 2999" in log.texts[-1])
        assert len(log.texts) == 2000
        assert len(drawn) < 30
        assert "\x1b" not in log.render_line(0).text
        assert "[b]line[/b]" in log.render_line(0).text


async def test_events_of_another_version_do_no_harm() -> None:
    feed = ScriptedFeed()
    app = Monitor(feed.api, feed=feed, now=feed.now)
    async with app.run_test(size=(100, 30)) as pilot:
        for item in (
            {"type": "work", "peer": 5},
            {"type": "pull"},
            {"type": "row", "list": "sessions", "key": "s", "row": {"role": "coordinator"}},
        ):
            feed.items.put_nowait(item)
        feed.items.put_nowait(peer("a"))
        await soon(pilot, lambda: len(cells_of(app, "#peers")) == 1)
