import json
from pathlib import Path

import pytest
from aiohttp import web

from fake_api.rows_server import Api
from meshd.cli.support.client import Daemon, api_url, url_of
from meshd.config import Settings
from meshd.errors import ConfigError, NotReady, Overloaded, RemoteFailure, Unavailable, UnknownModel
from meshd.state import StateFolder, lock_state
from meshd.values import Address


def _error(code: str, message: str = "it is so") -> dict[str, object]:
    return {"error": {"message": message, "type": "t", "param": None, "code": code}}


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "model_not_found", UnknownModel),
        (429, "overloaded", Overloaded),
        (503, "model_loading", NotReady),
        (503, "does_not_fit", RemoteFailure),
        (500, "internal_error", RemoteFailure),
    ],
)
def test_a_daemons_error_keeps_its_class_and_message(api: Api, status: int, code: str, kind: type[Exception]) -> None:
    api.answer("GET", "/x", _error(code), status, {"Retry-After": "7"})
    with pytest.raises(kind, match="it is so") as caught:
        Daemon(api.url).get("/x")
    assert type(caught.value) is kind
    if isinstance(caught.value, Unavailable):
        assert caught.value.retry_after_s == 7.0


def test_an_error_without_a_document_shows_its_http_status(api: Api) -> None:
    api.answer("GET", "/x", "nonsense", 502)
    with pytest.raises(RemoteFailure, match="HTTP status 502"):
        Daemon(api.url).get("/x")


def test_the_api_key_is_sent_and_a_refusal_has_a_hint(api: Api) -> None:
    api.answer("GET", "/x", _error("invalid_api_key"), 401)
    with pytest.raises(RemoteFailure, match="MESHD_API_KEY"):
        Daemon(api.url, "secret").get("/x")
    assert api.headers[0]["Authorization"] == "Bearer secret"


def test_a_server_that_is_not_meshd_is_named(api: Api) -> None:
    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>")

    api.routes["GET", "/x"] = page
    with pytest.raises(RemoteFailure, match="no meshd"):
        Daemon(api.url).get("/x")


def test_a_path_below_a_host_is_kept(api: Api) -> None:
    api.answer("GET", "/below/x", {"ok": True})
    assert Daemon(api.url + "/below/").get("/x") == {"ok": True}


@pytest.mark.parametrize("url", ["127.0.0.1:6374", "ftp://host", "http://", "http://host:port", "http://host:70000"])
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="setting api"):
        Daemon(url)


def test_events_are_read_from_chunks_of_any_size(api: Api) -> None:
    events = (": keep-alive", 'data: {"n": 1}', 'data: {"n":\ndata: 2}', 'event: x\ndata: {"t": "ü"}', "data: [DONE]", "data: {}")
    sent = ("\n\n".join(events) + "\n\n").encode().replace(b"1}\n\n", b"1}\r\n\r\n")
    api.stream("/s", [sent[at : at + 3] for at in range(0, len(sent), 3)], {"X-Meshd-Plan": "a:0-1"})
    with Daemon(api.url).stream("/s", {"ask": 1}) as stream:
        assert list(stream.events()) == [{"n": 1}, {"n": 2}, {"t": "ü"}]
        assert stream.headers["x-meshd-plan"] == "a:0-1"
    assert api.bodies == [{"ask": 1}]


def test_a_stream_that_breaks_off_is_an_error_after_its_events(api: Api) -> None:
    api.stream("/s", [b'data: {"n": 1}\n\n', b'data: {"n"'])
    with Daemon(api.url).stream("/s", {}) as stream:
        events = stream.events()
        assert next(events) == {"n": 1}
        with pytest.raises(Unavailable, match="broke off"):
            next(events)


def test_an_error_event_ends_a_stream(api: Api) -> None:
    api.stream("/s", [f"data: {json.dumps(_error('peer_lost', 'cedar is gone'))}\n\n".encode()])
    with pytest.raises(RemoteFailure, match="cedar is gone"), Daemon(api.url).stream("/s", {}) as stream:
        list(stream.events())


def test_the_daemon_is_found_by_flag_then_state_folder_then_setting(tmp_path: Path) -> None:
    state = StateFolder.open(tmp_path / "state").path
    flags = {"state": str(state), "config": str(tmp_path / "config.toml")}
    (tmp_path / "config.toml").write_text('api = "127.0.0.1:7000"\n')
    assert api_url(Settings(flags, {})) == "http://127.0.0.1:7000"
    with lock_state(state, api="127.0.0.1:8000"):
        assert api_url(Settings(flags, {})) == "http://127.0.0.1:8000"
        assert api_url(Settings({**flags, "api": "http://attic:9000"}, {})) == "http://attic:9000"
        assert api_url(Settings(flags, {"MESHD_API": "https://mesh.example/x"})) == "https://mesh.example/x"


def test_an_api_on_all_addresses_is_reached_on_loopback() -> None:
    assert url_of(Address("0.0.0.0", 1)) == "http://127.0.0.1:1"
    assert url_of(Address("::", 1)) == "http://[::1]:1"
    assert url_of(Address("10.0.0.1", 1)) == "http://10.0.0.1:1"
