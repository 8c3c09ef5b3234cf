"""Every error has a body in OpenAI's format, its status and a stable code."""

import asyncio
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from meshd.api.http.errors import problem
from meshd.api.http.services import ClientLimits
from meshd.errors import ConfigError, MeshdError, OutOfMemory, StorageError

CHAT = {"model": "words", "messages": [{"role": "user", "content": "hello"}]}


async def error_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    body = await response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(
    ("model", "status", "kind", "code", "retry_after"),
    [
        ("busy", 429, "rate_limit_error", "overloaded", "3"),
        ("loading", 503, "server_error", "model_loading", "3"),
        ("huge", 503, "server_error", "does_not_fit", "10"),
        ("missing", 404, "invalid_request_error", "model_not_found", None),
        ("breaks", 502, "server_error", "peer_lost", None),
        ("drained", 503, "server_error", "cancelled", None),
        ("unforeseen", 500, "server_error", "internal_error", None),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_each_error_of_the_coordinator_has_its_status_and_code(
    http: aiohttp.ClientSession, path: str, model: str, status: int, kind: str, code: str, retry_after: str | None
) -> None:
    prompt = {"prompt": "hello"} if path == "/v1/completions" else {"messages": CHAT["messages"]}
    async with http.post(path, json={"model": model, **prompt}) as response:
        assert response.status == status
        assert response.headers.get("Retry-After") == retry_after
        error = await error_of(response)
    assert (error["type"], error["code"]) == (kind, code)
    assert "secret" not in error["message"]


@pytest.mark.parametrize("model", ["busy", "missing", "unforeseen"])
async def test_a_stream_refused_before_its_first_event_has_the_status(http: aiohttp.ClientSession, model: str) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"model": model, "stream": True}) as response:
        assert response.status in (404, 429, 500)
        await error_of(response)


async def test_an_error_in_mid_stream_is_raised_by_the_client(openai_client: AsyncOpenAI) -> None:
    stream = await openai_client.chat.completions.create(model="breaks", messages=CHAT["messages"], stream=True)
    text = ""
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text
    assert caught.value.code == "peer_lost"
    assert "send the request again" in caught.value.message


async def test_an_error_in_mid_stream_is_its_last_event(http: aiohttp.ClientSession, events_of: Any) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"model": "drained", "stream": True}) as response:
        events = await events_of(response)
    assert events[-1]["error"]["code"] == "cancelled"
    assert [event for event in events if event == "[DONE]"] == []
    assert len([event for event in events if "choices" in event]) == 1 + 3


async def test_a_failed_answer_still_names_its_session(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"model": "breaks"}) as response:
        assert len(response.headers["x-meshd-session"]) == 32


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"model": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000, b"null"])
async def test_a_body_that_is_not_a_json_object_is_refused(http: aiohttp.ClientSession, body: bytes) -> None:
    async with http.post("/v1/chat/completions", data=body) as response:
        assert response.status == 400
        assert (await error_of(response))["type"] == "invalid_request_error"


async def test_an_unknown_route_is_not_found(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/nothing") as response:
        assert response.status == 404
        assert (await error_of(response))["code"] == "unknown_route"


async def test_a_wrong_method_is_refused_with_the_allowed_ones(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/chat/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert (await error_of(response))["code"] == "method_not_allowed"


class TestSmallLimits:
    @pytest.fixture
    def limits(self) -> ClientLimits:
        return ClientLimits(body_bytes=1000, body_s=0.05)

    async def test_a_body_that_is_too_large_is_refused(self, http: aiohttp.ClientSession) -> None:
        async with http.post("/v1/chat/completions", data=b" " * 5000) as response:
            assert response.status == 413
            assert (await error_of(response))["code"] == "body_too_large"

    async def test_a_body_that_never_arrives_is_a_timeout(self, http: aiohttp.ClientSession) -> None:
        async def nothing() -> Any:
            yield b"{"
            await asyncio.Event().wait()

        async with http.post("/v1/chat/completions", data=nothing()) as response:
            assert response.status == 408
            assert (await error_of(response))["code"] == "body_timeout"


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("x"), 400), (OutOfMemory("x"), 503), (StorageError("x"), 500), (MeshdError("x"), 500)]
)
def test_errors_that_no_route_raises_have_a_status_too(error: MeshdError, status: int) -> None:
    described = problem(error)
    assert described.status == status
    assert described.detail.code == type(error).code


def test_the_message_includes_the_hint() -> None:
    assert problem(OutOfMemory("a failed: b", hint="do c")).detail.message == "a failed: b; do c"
