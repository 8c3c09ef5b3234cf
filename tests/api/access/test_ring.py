"""What a real server does with the keys of a file: rights, limits, and changes while it runs."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fake_api.api_keys import LOCAL
from fake_api.api_keys import make_key as make
from fake_api.words import WordsCoordinator
from meshd.api.access import ring as rings
from meshd.api.access.key_file import KeyFile
from meshd.api.access.ring import KeyRing
from meshd.api.access.scopes import Scope
from meshd.clock import SystemClock
from meshd.config import API_KEYS_FILE
from meshd.errors import StorageError
from meshd.telemetry import Telemetry

Http = aiohttp.ClientSession
WAITING = {"model": "queued", "messages": [{"role": "user", "content": "go on"}], "stream": True}
BACKGROUND = {"model": "words", "input": "hello", "background": True, "max_output_tokens": 4000}


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str], None]:
    """Writes another text into the file of keys, as a torn or edited file would have it."""
    return lambda text: (path := tmp_path / "state" / API_KEYS_FILE).write_text(text) and path.chmod(0o600)


async def status_of(http: Http, path: str, headers: dict[str, str], method: str = "GET", body: Any = None) -> int:
    async with http.request(method, path, headers=headers, json=body) as response:
        return response.status


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(1000):
        if await condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not come to hold")


@asynccontextmanager
async def streaming(http: Http, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
    """An answer that waits for its turn: its stream has begun, and does not end by itself."""
    async with http.post("/v1/chat/completions", json=WAITING, headers=headers) as response:
        assert response.status == 200, await response.text()
        assert (await response.content.readline()).startswith(b":")
        yield response


async def test_without_a_file_the_api_is_open_and_the_first_key_closes_it(http: Http, file: KeyFile) -> None:
    assert await status_of(http, "/v1/models", {}) == 200
    headers = make(file)
    assert await status_of(http, "/v1/models", {}) == 401
    assert await status_of(http, "/v1/models", headers) == 200
    assert await status_of(http, "/health", {}) == 200


async def test_a_removed_key_is_refused_at_once_and_the_last_one_does_not_open_the_api(http: Http, file: KeyFile) -> None:
    headers = make(file)
    assert await status_of(http, "/v1/models", headers) == 200
    file.remove("phone")
    assert await status_of(http, "/v1/models", headers) == 401
    assert await status_of(http, "/v1/models", {}) == 401


@pytest.mark.parametrize("form", ["Bearer", "bearer", "x-api-key", "both"])
async def test_a_key_comes_in_either_header(http: Http, file: KeyFile, form: str) -> None:
    key = make(file)["Authorization"].removeprefix("Bearer ")
    headers = {"x-api-key": key} if form == "x-api-key" else {"Authorization": f"{form} {key}"}
    if form == "both":
        headers = {"Authorization": "Bearer something-else", "x-api-key": key}
    assert await status_of(http, "/v1/models", headers) == 200


@pytest.mark.parametrize("wrong", ["secret", "prefix", "case", "cut"])
async def test_a_key_with_one_wrong_letter_is_refused(http: Http, file: KeyFile, wrong: str) -> None:
    key = make(file)["Authorization"].removeprefix("Bearer ")
    changed = {
        "secret": key[:-1] + ("0" if key[-1] != "0" else "1"),
        "prefix": key[:6] + ("0" if key[6] != "0" else "1") + key[7:],
        "case": key.upper(),
        "cut": key[:-1],
    }[wrong]
    async with http.get("/v1/models", headers={"x-api-key": changed}) as response:
        assert response.status == 401
        error = (await response.json())["error"]
    assert error["code"] == "invalid_api_key"
    assert key[:12] not in error["message"]


@pytest.mark.parametrize(
    ("scope", "infer", "read", "change"), [(Scope.INFER, 200, 403, 403), (Scope.READ, 403, 200, 403), (Scope.ADMIN, 200, 200, 200)]
)
async def test_a_scope_gives_its_rights_and_no_others(
    http: Http, file: KeyFile, scope: Scope, infer: int, read: int, change: int
) -> None:
    headers = make(file, scope=scope)
    assert await status_of(http, "/v1/models/words", headers) == infer
    assert await status_of(http, "/metrics", headers) == read
    assert await status_of(http, "/mesh/v1/peers", headers) == read
    assert await status_of(http, "/mesh/v1/unplace", headers, "POST", {"model": "words"}) == change
    assert await status_of(http, "/ready", headers) == 200
    assert await status_of(http, "/openapi.json", headers) == 200


@pytest.mark.parametrize("path", ["/v1/../mesh/v1/unplace", "/v1/%2e%2e/mesh/v1/unplace", "//mesh/v1/unplace", "/mesh//v1/unplace"])
async def test_no_spelling_of_a_path_gives_an_infer_key_more_rights(http: Http, file: KeyFile, path: str) -> None:
    from yarl import URL

    url = URL(f"{http._base_url}".rstrip("/") + path, encoded=True)
    async with http.post(url, headers=make(file), json={"model": "words"}) as response:
        assert response.status in (403, 404, 405)


async def test_a_refusal_names_the_scope_that_is_needed(http: Http, file: KeyFile) -> None:
    async with http.post("/mesh/v1/drain", headers=make(file), json={"peer": "there"}) as response:
        error = (await response.json())["error"]
    assert error["code"] == "not_permitted"
    assert "--scope admin" in error["message"]


async def test_the_rate_is_enforced_in_openais_format(http: Http, file: KeyFile) -> None:
    headers, other = make(file, rate=2), make(file, "other")
    assert [await status_of(http, "/v1/models", headers) for _ in range(2)] == [200, 200]
    async with http.get("/v1/models", headers=headers) as response:
        assert response.status == 429
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        error = (await response.json())["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert await status_of(http, "/v1/models", other) == 200


async def test_a_stream_holds_its_place_until_its_client_leaves(http: Http, file: KeyFile) -> None:
    headers = make(file, concurrency=1)
    async with streaming(http, headers):
        assert await status_of(http, "/v1/models", headers) == 429

    async def free() -> bool:
        return await status_of(http, "/v1/models", headers) == 200

    await until(free)


async def test_an_answer_in_the_background_holds_its_place(http: Http, file: KeyFile) -> None:
    headers = make(file, concurrency=1)
    async with http.post("/v1/responses", json=BACKGROUND, headers=headers) as response:
        answer = await response.json()
    assert await status_of(http, "/v1/models", headers) == 429
    local = {"x-api-key": LOCAL}
    assert await status_of(http, f"/v1/responses/{answer['id']}/cancel", local, "POST") == 200
    assert await status_of(http, "/v1/models", headers) == 200


async def test_a_running_stream_of_a_removed_key_ends_with_an_error(http: Http, file: KeyFile) -> None:
    headers, other = make(file), make(file, "other", concurrency=1)
    async with streaming(http, headers) as response, streaming(http, other):
        file.remove("phone")
        lines = (await response.text()).splitlines()
        assert await status_of(http, "/v1/models", other) == 429  # the other key's stream goes on
    last = json.loads(next(line for line in reversed(lines) if line.startswith("data: "))[6:])
    assert last["error"]["code"] == "invalid_api_key"
    assert "was revoked" in last["error"]["message"]


async def test_an_answer_in_the_background_of_a_removed_key_is_cancelled(
    http: Http, file: KeyFile, coordinator: WordsCoordinator
) -> None:
    async with http.post("/v1/responses", json=BACKGROUND, headers=make(file)) as response:
        answer = await response.json()
    file.remove("phone")

    async def cancelled() -> bool:
        async with http.get(f"/v1/responses/{answer['id']}", headers={"x-api-key": LOCAL}) as response:
            return bool((await response.json())["status"] == "cancelled")

    await until(cancelled)


async def test_an_expired_key_is_refused_and_its_stream_ends(http: Http, file: KeyFile) -> None:
    expired = make(file, "old", expires=int(SystemClock().wall()) - 1)
    assert await status_of(http, "/v1/models", expired) == 401
    headers = make(file, expires=int(SystemClock().wall()) + 2)
    async with streaming(http, headers) as response:
        assert "has expired" in await response.text()
    assert await status_of(http, "/v1/models", headers) == 401


async def test_changed_limits_of_others_do_not_disturb_a_key(http: Http, file: KeyFile) -> None:
    headers = make(file, rate=1)
    assert await status_of(http, "/v1/models", headers) == 200
    make(file, "other")
    assert await status_of(http, "/v1/models", headers) == 429


async def test_a_torn_file_leaves_the_keys_of_before_and_is_said_once(
    http: Http, file: KeyFile, changed: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    headers = make(file)
    assert await status_of(http, "/v1/models", headers) == 200
    changed('{"version": 1, "ke')
    for _ in range(3):
        assert await status_of(http, "/v1/models", headers) == 200
        assert await status_of(http, "/v1/models", {}) == 401
    said = [record for record in caplog.records if "is broken" in record.getMessage()]
    assert len(said) == 1
    assert said[0].levelno == logging.ERROR


def test_a_daemon_does_not_start_with_a_torn_file(file: KeyFile, changed: Callable[[str], None]) -> None:
    make(file)
    changed("{")
    with pytest.raises(StorageError, match="is broken"):
        KeyRing(SystemClock(), Telemetry(), file=file)


async def test_the_log_and_the_metrics_name_a_key_by_its_prefix(
    http: Http, file: KeyFile, telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    headers = make(file, rate=1)
    key = headers["Authorization"].removeprefix("Bearer ")
    prefix, _, secret = key.rpartition("-")
    with caplog.at_level(logging.DEBUG):
        assert await status_of(http, "/v1/models", headers) == 200
        assert await status_of(http, "/v1/models", headers) == 429
        assert await status_of(http, "/v1/models", {"x-api-key": key[:-1] + "!"}) == 401
    assert prefix in {getattr(record, "api_key", "") for record in caplog.records}
    assert not any(secret[:-1] in repr(vars(record)) for record in caplog.records)
    text = telemetry.render().decode()
    assert f'meshd_api_key_requests_total{{key="{prefix}",outcome="ok"}} 1.0' in text
    assert f'meshd_api_key_requests_total{{key="{prefix}",outcome="limited"}} 1.0' in text
    assert secret not in text
    file.remove("phone")
    assert await status_of(http, "/v1/models", headers) == 401
    assert prefix not in telemetry.render().decode()


async def test_the_last_use_of_a_key_is_stored_when_the_server_stops(http: Http, file: KeyFile, server: Any) -> None:
    headers = make(file)
    assert await status_of(http, "/v1/models", headers) == 200
    await server.aclose()
    (at,) = file.last_used().values()
    assert abs(at - SystemClock().wall()) < 60


async def test_the_last_use_is_stored_beside_the_event_loop(file: KeyFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings, "WATCH_S", 0.01)
    monkeypatch.setattr(rings, "_USED_S", 0.0)
    threads: list[int] = []
    stored = asyncio.Event()
    loop = asyncio.get_running_loop()

    def store(times: dict[str, int]) -> None:
        threads.append(threading.get_ident())
        loop.call_soon_threadsafe(stored.set)

    monkeypatch.setattr(file, "store_last_used", store)
    headers = make(file)
    ring = KeyRing(SystemClock(), Telemetry(), file=file)
    assert ring.find([headers["Authorization"].removeprefix("Bearer ")]) is not None
    watching = asyncio.ensure_future(ring.watch())
    await stored.wait()
    watching.cancel()
    assert threads[0] != threading.get_ident()


async def test_an_address_beyond_this_machine_stays_closed_without_keys() -> None:
    ring = KeyRing(SystemClock(), Telemetry(), always_closed=True)
    assert ring.closed
    assert ring.find(["", "none"]) is None
