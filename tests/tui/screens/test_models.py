"""The screen of models: pull with progress, place, unplace and remove."""

import asyncio
from typing import Any

from aiohttp import web
from textual.widgets import OptionList

from fake_api.rows_server import Api
from meshd.tui.screens.dialogs import Choose, Confirm
from monitor.watching import Watch, Watching, cells_of, soon, text_of, told

ENTRY = {"name": "tiny:1m", "ref": "hf:org/tiny", "bytes": 1 << 20, "licence": "Apache-2.0"}


def catalogue(api: Api) -> None:
    api.answer("GET", "/mesh/v1/catalogue", {"object": "list", "data": [ENTRY, ENTRY | {"name": "smollm2:135m"}]})


async def shown(watching: Watching) -> None:
    app, pilot = watching
    await pilot.press("4")
    await soon(pilot, lambda: len(cells_of(app, "#models")) == 1)


def progress(done: int, phase: str = "downloading", name: str = "desk") -> dict[str, Any]:
    return {
        "type": "pull", "at": 1.0, "peer": name * 13, "name": name, "model": "tiny:1m", "source": "hf:org/tiny", "phase": phase,
        "done_bytes": done, "total_bytes": 1 << 20, "message": "",
    }  # fmt: skip


async def test_models_are_shown_with_where_they_are(watch: Watch) -> None:
    async with watch((140, 30)) as (app, pilot):
        await shown((app, pilot))
        name, size, layers, answers, held, on_disk, kind, context = cells_of(app, "#models")[0]
        assert (name, layers, answers, kind, context) == ("smollm2:135m", "30", "loaded", "Q4_1", "8192")
        assert size.endswith("MiB")
        assert held.startswith("desk 16-30") or "attic 0-16" in held
        assert "attic" in on_disk


async def test_a_model_of_the_catalogue_is_pulled_with_progress(watch: Watch, api: Api) -> None:
    catalogue(api)
    api.stream("/mesh/v1/pull", [b"data: {}\n\n", b"data: [DONE]\n\n"])
    async with watch() as (app, pilot):
        await shown((app, pilot))
        await pilot.press("l")
        await soon(pilot, lambda: isinstance(app.screen, Choose))
        choices = app.screen.query_one(OptionList)
        assert choices.option_count == 1  # what is here already can't be pulled
        choices.focus()
        await pilot.press("enter")
        await soon(pilot, lambda: told(app) == ["tiny:1m is here"])
        assert api.bodies == [{"model": "tiny:1m"}]
        assert app.pulling == {}
        for event in (progress(1 << 19), progress(1 << 18, name="attic")):
            app._changed |= app.cluster.apply(event, app.cluster.now)
        app.show_changes()
        await soon(pilot, lambda: "512 KiB of 1.0 MiB" in text_of(app, "#pulls"))
        assert text_of(app, "#pulls").splitlines()[1].startswith("attic pulls tiny:1m: downloading ██████░")


async def test_a_reference_is_typed_and_its_pull_is_stopped(watch: Watch, api: Api) -> None:
    gone = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(b": working\n\n")
                await asyncio.sleep(0.05)
        except ConnectionError:
            gone.set()
            raise

    catalogue(api)
    api.routes["POST", "/mesh/v1/pull"] = endless
    async with watch() as (app, pilot):
        await shown((app, pilot))
        await pilot.press("s")
        await soon(pilot, lambda: told(app) == ["no pull was started here"])
        await pilot.press("l")
        await soon(pilot, lambda: isinstance(app.screen, Choose))
        await pilot.press(*"hf:org/x", "enter")
        await soon(pilot, lambda: api.bodies == [{"model": "hf:org/x"}])
        app.pull("hf:org/x")
        await soon(pilot, lambda: "hf:org/x is being pulled already" in told(app))
        await pilot.press("s")
        await soon(pilot, lambda: isinstance(app.screen, Choose))
        await pilot.press("enter")
        await soon(pilot, lambda: "the pull of hf:org/x is stopped" in told(app))
        await soon(pilot, gone.is_set)
        assert app.pulling == {}


async def test_a_model_is_placed_without_a_question(watch: Watch, api: Api) -> None:
    api.stream("/mesh/v1/place", [b"data: {}\n\n", b"data: [DONE]\n\n"])
    async with watch() as (app, pilot):
        await shown((app, pilot))
        await pilot.press("p")
        await soon(pilot, lambda: told(app) == ["smollm2:135m is being placed ...", "smollm2:135m is placed"])


async def test_unplace_and_remove_ask_first(watch: Watch, api: Api) -> None:
    api.answer("POST", "/mesh/v1/unplace", {"model": "smollm2:135m", "freed_bytes": 1 << 20})
    api.answer("DELETE", "/mesh/v1/models/smollm2:135m", {"model": "smollm2:135m", "freed_bytes": 1 << 30})
    async with watch() as (app, pilot):
        await shown((app, pilot))
        for key in ("u", "x"):
            await pilot.press(key)
            await soon(pilot, lambda: isinstance(app.screen, Confirm))
            await pilot.press("enter")
            await soon(pilot, lambda: not isinstance(app.screen, Confirm))
        assert api.requests == []
        for key in ("u", "x"):
            await pilot.press(key)
            await soon(pilot, lambda: isinstance(app.screen, Confirm))
            await pilot.press("y")
            await soon(pilot, lambda: not isinstance(app.screen, Confirm))
        await soon(pilot, lambda: len(told(app)) == 2)
        assert sorted(told(app)) == ["smollm2:135m is removed: 1.0 GiB freed", "smollm2:135m is unplaced: 1.0 MiB freed"]
