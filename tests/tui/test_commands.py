"""Commands are requests to the daemon, and its reasons reach the user."""

import pytest
from aiohttp import web

from fake_api.rows_server import Api
from meshd.tui.commands import CommandFailed, Commands

STEP = b'data: {"phase":"downloading"}\n\n'


@pytest.fixture
def commands(api: Api) -> Commands:
    return Commands(api.url, "secret")


async def test_each_command_is_one_request(api: Api, commands: Commands) -> None:
    api.answer("DELETE", "/mesh/v1/sessions/5e", {"session": "5e"})
    api.answer("POST", "/mesh/v1/migrate", {"session": "5e", "plan": "desk:0-30", "pause_ms": 3.0})
    api.answer("POST", "/mesh/v1/plan", {"plan": "desk:0-30"})
    api.answer("POST", "/mesh/v1/unplace", {"model": "m", "freed_bytes": 7})
    api.answer("DELETE", "/mesh/v1/models/hf:org/m:Q4", {"model": "m", "freed_bytes": 8})
    api.answer("GET", "/mesh/v1/catalogue", {"object": "list", "data": [{"name": "m"}]})
    api.answer("POST", "/mesh/v1/drain", {"peer": "p", "name": "desk", "sessions_left": 2})
    for path in ("/mesh/v1/place", "/mesh/v1/pull"):
        api.stream(path, [b": open\n\n", STEP, b"data: [DONE]\n\n"])
    await commands.cancel("5e")
    assert (await commands.migrate("5e", "desk"))["plan"] == "desk:0-30"
    assert (await commands.plan("m")) == {"plan": "desk:0-30"}
    await commands.place("m")
    assert await commands.unplace("m") == 7
    await commands.pull("m")
    assert await commands.remove("hf:org/m:Q4") == 8
    assert await commands.catalogue() == [{"name": "m"}]
    assert await commands.drain("desk", undo=True) == 2
    assert api.bodies == [
        {"session": "5e", "target": "desk"},
        {"model": "m"},
        {"model": "m"},
        {"model": "m"},
        {"model": "m"},
        {"peer": "desk", "undo": True, "timeout_s": 0},
    ]
    assert {headers["Authorization"] for headers in api.headers} == {"Bearer secret"}


async def test_the_daemons_reason_is_the_error(api: Api, commands: Commands) -> None:
    api.answer("POST", "/mesh/v1/unplace", {"error": {"message": "no model m"}}, status=404)
    api.stream("/mesh/v1/pull", [STEP, b'data: {"error":{"message":"the disk is full"}}\n\n'])
    api.stream("/mesh/v1/place", [STEP])
    with pytest.raises(CommandFailed, match="no model m"):
        await commands.unplace("m")
    with pytest.raises(CommandFailed, match="the disk is full"):
        await commands.pull("m")
    with pytest.raises(CommandFailed, match="broke off"):
        await commands.place("m")


async def test_what_is_no_daemon_is_an_error_too(api: Api, commands: Commands) -> None:
    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<html>", content_type="text/html")

    api.routes["POST", "/mesh/v1/unplace"] = page
    with pytest.raises(CommandFailed):
        await commands.unplace("m")
    with pytest.raises(CommandFailed, match=r"127\.0\.0\.1:1"):
        await Commands("http://127.0.0.1:1").unplace("m")
