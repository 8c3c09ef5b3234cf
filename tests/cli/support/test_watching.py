"""Following a daemon's events from the command line."""

import json
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest
from aiohttp import web

from fake_api.rows_server import Api
from meshd.cli.support import watching
from meshd.cli.support.client import Daemon
from meshd.cli.support.watching import follow, print_events, redraw
from meshd.errors import MeshdError, RemoteFailure, Unavailable


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_RETRY_S", 0.01)
    monkeypatch.setattr(watching, "_REDRAW_S", 0.01)


def events(api: Api, *streams: list[dict[str, object]]) -> None:
    """Answer requests for events with these streams, one after the other, and then with an error."""
    waiting = list(streams)

    async def handler(request: web.Request) -> web.StreamResponse:
        if not waiting:
            return web.json_response({"error": {"message": "the API key is wrong"}}, status=401)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in waiting.pop(0):
            await response.write(f": comment\n\nid: 3\ndata: {json.dumps(event)}\n\n".encode())
        return response

    api.routes["GET", "/mesh/v1/events"] = handler


def notice(text: str) -> dict[str, object]:
    return {"type": "notice", "at": 1.0, "peer": "p", "name": "attic", "message": text, "hint": ""}


ROW = {"type": "row", "at": 1.0, "peer": "p", "name": "attic", "list": "peers", "key": "p", "row": {}}


def test_a_daemon_that_goes_away_is_asked_again(api: Api) -> None:
    events(api, [notice("one")], [notice("two"), {"error": {"message": "shutting down"}}])
    items = follow(Daemon(api.url))
    assert next(items) == notice("one")
    assert isinstance(next(items), Unavailable)
    assert next(items) == notice("two")
    assert isinstance(next(items), RemoteFailure)
    assert isinstance(next(items), RemoteFailure)


def test_a_daemon_that_never_answered_is_an_error() -> None:
    with pytest.raises(Unavailable):
        next(follow(Daemon("http://127.0.0.1:1")))


def interrupted_after(api: Api, run: Callable[[Daemon], None], requests: int) -> None:
    """Run until the daemon was asked for events so many times, then interrupt as Ctrl-C does."""
    asked = api.routes["GET", "/mesh/v1/events"]
    count = 0

    async def counting(request: web.Request) -> web.StreamResponse:
        nonlocal count
        count += 1
        return await asked(request)

    api.routes["GET", "/mesh/v1/events"] = counting

    def stop(seconds: float) -> None:
        if count >= requests:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(watching.time, "sleep", stop)
        run(Daemon(api.url))


def test_lines_say_what_happens_and_the_status_comes_again_with_the_daemon(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    events(api, [ROW, notice("one\x1b[2J")], [ROW, notice("two")])
    interrupted_after(api, lambda daemon: print_events(daemon, lambda: "THE STATUS", as_json=False), 3)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split(" ", 1)[1] if "attic" in line else line for line in lines] == [
        "THE STATUS",
        "attic notice one\\x1b[2J",
        "THE STATUS",
        "attic notice two",
    ]
    assert err.count("the daemon is gone: ") == 2


def test_json_has_every_event(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    events(api, [ROW, notice("one")])
    interrupted_after(api, lambda daemon: print_events(daemon, lambda: "THE STATUS", as_json=True), 2)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [ROW, notice("one")]


def test_a_terminal_is_drawn_again_when_something_changes(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    events(api, [ROW])
    drawings: list[str] = []

    def status() -> str:
        drawings.append("")
        if len(drawings) == 3:
            raise Unavailable("no daemon answers")
        if len(drawings) == 4:
            raise KeyboardInterrupt
        return "\n".join(f"line {number} of drawing {len(drawings)} {'x' * 200}" for number in range(100))

    more = threading.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        with suppress(ConnectionError):
            while not more.wait(0.02):
                await response.write(f"data: {json.dumps(ROW)}\n\n".encode())
        return response

    api.routes["GET", "/mesh/v1/events"] = handler
    with pytest.raises(KeyboardInterrupt):
        redraw(Daemon(api.url), status)
    more.set()
    screens = capsys.readouterr().out.split("\x1b[H")[1:]
    assert [screen.split("\x1b[K")[0][:19] for screen in screens] == [
        "line 0 of drawing 1",
        "line 0 of drawing 2",
        "no daemon answers; ",
    ]
    for screen in screens:
        lines = screen.split("\x1b[K\n")
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80


def test_a_terminal_is_told_that_the_daemon_refuses(api: Api) -> None:
    events(api)
    with pytest.raises(MeshdError, match="API key"):
        redraw(Daemon(api.url), lambda: "THE STATUS")
