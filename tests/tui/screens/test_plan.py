"""The screen of plans: of running sessions, and of models."""

from typing import Any

from textual.widgets import DataTable

from fake_api.rows_server import Api
from monitor.watching import Watch, cells_of, soon, text_of

DOCUMENT: dict[str, Any] = {
    "model": "smollm2:135m",
    "context": 4096,
    "memory": [],
    "stages": [{"peer": "a", "name": "attic", "layers": "0-30", "decode_s": 0.01}],
    "hops": [{"source": "a", "target": "a", "target_name": "attic", "bytes_per_token": 64, "decode_s": 0.0}],
    "predicted": {"ttft_s": 0.2, "tpot_s": 0.01},
    "text": ["smollm2:135m: attic:0-30", "binding: nothing"],
}


async def test_a_running_sessions_plan_is_drawn(watch: Watch) -> None:
    async with watch() as (app, pilot):
        await pilot.press("2")
        await soon(pilot, lambda: len(cells_of(app, "#plans")) == 3)
        await soon(pilot, lambda: "attic  embed + layers 0-16" in text_of(app, "#graph"))
        text = text_of(app, "#graph")
        assert "desk  layers 16-30 + head" in text
        assert "2304 B/token, sent 2304 B" in text
        assert "time per token" in text
        app.screen.query_one("#plans", DataTable).focus()
        await pilot.press("down")
        await soon(pilot, lambda: text_of(app, "#graph").splitlines()[0] != text.splitlines()[0])


async def test_a_models_plan_is_asked_for_once_and_again_with_r(watch: Watch, api: Api) -> None:
    api.answer("POST", "/mesh/v1/plan", DOCUMENT)
    async with watch() as (app, pilot):
        await pilot.press("4", "enter")
        await soon(pilot, lambda: "binding: nothing" in text_of(app, "#graph"))
        app.show_changes()
        await pilot.pause(0.3)
        assert api.bodies == [{"model": "smollm2:135m"}]
        await pilot.press("r")
        await soon(pilot, lambda: len(api.bodies) == 2)


async def test_why_there_is_no_plan_is_said(watch: Watch, api: Api) -> None:
    api.answer("POST", "/mesh/v1/plan", {"error": {"message": "it does not fit: 3 GiB are missing"}}, status=503)
    async with watch() as (app, pilot):
        await pilot.press("4", "enter")
        await soon(pilot, lambda: text_of(app, "#graph") == "no plan: it does not fit: 3 GiB are missing")
