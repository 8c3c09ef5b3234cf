"""The screen of sessions: rates, recoveries, cancel, migrate, and the ways to the plan and the log."""

import pytest
from textual.widgets import DataTable, Input

from fake_api.rows_server import Api
from meshd.tui.screens.dialogs import Choose, Confirm
from meshd.tui.screens.logs import LogScreen
from meshd.tui.screens.plan import PlanScreen
from monitor.watching import Watch, Watching, cells_of, soon, text_of, told


async def shown(watching: Watching) -> str:
    """Show the screen. Returns: the id of the first session."""
    app, pilot = watching
    await pilot.press("3")
    await soon(pilot, lambda: len(cells_of(app, "#sessions")) == 2)
    return str(app.cluster.sessions()[0]["id"])


async def test_sessions_are_shown_with_rates_and_recoveries(watch: Watch) -> None:
    async with watch((160, 30)) as (app, pilot):
        session = await shown((app, pilot))
        identifier, state, tokens, rate, ttft, tpot, predicted, plan, recovered, model = cells_of(app, "#sessions")[0]
        assert (identifier, state, model) == (session[:8], "decoding", "smollm2:135m")
        assert int(tokens) > 30
        assert float(rate) > 0
        assert all(time.split()[1] in {"ms", "s"} for time in (ttft, tpot, predicted))
        assert plan == "attic:0-16,desk:16-30"
        assert recovered.split()[0] in {"replay", "prefill"}
        assert f"session {session[:8]} continued by" in text_of(app, "#recoveries")


async def test_a_session_is_cancelled_after_a_question(watch: Watch, api: Api) -> None:
    async with watch() as (app, pilot):
        session = await shown((app, pilot))
        api.answer("DELETE", f"/mesh/v1/sessions/{session}", {"session": session})
        for key in ("escape", "enter", "n"):  # enter presses the button that is chosen at first: no
            await pilot.press("c")
            await soon(pilot, lambda: isinstance(app.screen, Confirm))
            await pilot.press(key)
            await soon(pilot, lambda: not isinstance(app.screen, Confirm))
        assert api.requests == []
        await pilot.press("c")
        await soon(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.click("#yes")
        await soon(pilot, lambda: told(app) == [f"session {session[:8]} is cancelled"])
        assert api.requests == [("DELETE", f"/mesh/v1/sessions/{session}")]


async def test_a_session_is_moved_to_a_chosen_peer(watch: Watch, api: Api) -> None:
    api.answer("POST", "/mesh/v1/migrate", {"session": "s", "plan": "attic:0-30", "pause_ms": 12.5})
    async with watch() as (app, pilot):
        session = await shown((app, pilot))
        await pilot.press("m")
        await soon(pilot, lambda: isinstance(app.screen, Choose))
        await pilot.press("escape")
        await pilot.press("m")
        await soon(pilot, lambda: isinstance(app.screen, Choose))
        await pilot.press("down", "enter")  # the second of the peers that are alive
        await soon(pilot, lambda: len(told(app)) == 2)
        attic = next(row["id"] for row in app.cluster.rows["peers"] if row["name"] == "attic")
        assert api.bodies == [{"session": session, "target": attic}]
        assert told(app)[1] == f"session {session[:8]} runs on attic:0-30, after a pause of 12.5 ms"


async def test_what_the_daemon_refuses_is_told(watch: Watch, api: Api) -> None:
    api.answer("POST", "/mesh/v1/migrate", {"error": {"message": "[red]it is there already"}}, status=400)
    async with watch() as (app, pilot):
        await shown((app, pilot))
        await pilot.press("m")
        await soon(pilot, lambda: isinstance(app.screen, Choose))
        await pilot.press("enter")
        await soon(pilot, lambda: "[red]it is there already" in told(app))


@pytest.mark.parametrize("key", ["enter", "l"])
async def test_the_way_to_the_plan_and_to_the_log(watch: Watch, key: str) -> None:
    async with watch() as (app, pilot):
        await shown((app, pilot))
        app.screen.query_one("#sessions", DataTable).focus()
        session = str(app.cluster.sessions()[1]["id"])
        await pilot.press("down", key)
        if key == "enter":
            await soon(pilot, lambda: isinstance(app.screen, PlanScreen))
            await soon(pilot, lambda: text_of(app, "#graph").startswith(f"session {session[:8]}"))
        else:
            await soon(pilot, lambda: isinstance(app.screen, LogScreen))
            await soon(pilot, lambda: app.screen.query_one(Input).value == f"session:{session[:8]}")
