"""Every refusal has OpenAI's body, its own status and a code that stays."""

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
async def test_what_the_coordinator_raises(
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
async def test_a_body_that_is_no_json_object(http: aiohttp.ClientSession, body: bytes) -> None:
    async with http.post("/v1/chat/completions", data=body) as response:
        assert response.status == 400
        assert (await error_of(response))["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"model": 1}, "model"),
        ({"temperature": "warm"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"logprobs": 1}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"mesh": {"min_peers": "2"}}, "mesh.min_peers"),
        ({"mesh": {"min_peers": 9}}, "mesh.min_peers"),
        ({"mesh": {"min_peers": 0}}, "mesh.min_peers"),
        ({"mesh": {"context": 0}}, "mesh.context"),
        ({"mesh": {"objective": "luck"}}, "mesh.objective"),
        ({"store": True}, "store"),
        ({"metadata": {"a": "b"}}, "metadata"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"best_of": 1}, "best_of"),
    ],
)
async def test_a_wrong_field_of_a_chat_is_named(http: aiohttp.ClientSession, fields: dict[str, Any], param: str) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | fields) as response:
        assert response.status == 400
        error = await error_of(response)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("missing", ["model", "messages"])
async def test_a_missing_field_is_named(http: aiohttp.ClientSession, missing: str) -> None:
    async with http.post("/v1/chat/completions", json={name: CHAT[name] for name in CHAT if name != missing}) as response:
        assert response.status == 400
        assert (await error_of(response))["param"] == missing


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], ["a"]]}, "prompt[1][0]"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": ["a"] * 40, "n": 8}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"echo": True, "prompt": [1, 2]}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "the end"}, "suffix"),
        ({"messages": []}, "messages"),
    ],
)
async def test_a_wrong_field_of_a_completion_is_named(http: aiohttp.ClientSession, fields: dict[str, Any], param: str) -> None:
    async with http.post("/v1/completions", json={"model": "words", "prompt": "hello"} | fields) as response:
        assert response.status == 400
        assert (await error_of(response))["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": None, "function_call": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto", "verbosity": "medium"},
        {"store": False, "metadata": None, "user": "me", "safety_identifier": "me", "stop": None, "logit_bias": {}},
        {"max_tokens": 4, "max_completion_tokens": 4, "stop": [], "stream": False, "stream_options": None, "mesh": {}},
    ],
)
async def test_values_that_ask_for_nothing_are_taken(http: aiohttp.ClientSession, fields: dict[str, Any]) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 4} | fields) as response:
        assert response.status == 200, await response.text()


async def test_unknown_route(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/nothing") as response:
        assert response.status == 404
        assert (await error_of(response))["code"] == "unknown_route"


async def test_wrong_method(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/chat/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert (await error_of(response))["code"] == "method_not_allowed"


class TestSmallLimits:
    @pytest.fixture
    def limits(self) -> ClientLimits:
        return ClientLimits(body_bytes=1000, body_s=0.05)

    async def test_a_body_too_large(self, http: aiohttp.ClientSession) -> None:
        async with http.post("/v1/chat/completions", data=b" " * 5000) as response:
            assert response.status == 413
            assert (await error_of(response))["code"] == "body_too_large"

    async def test_a_body_that_never_comes(self, http: aiohttp.ClientSession) -> None:
        async def nothing() -> Any:
            yield b"{"
            await asyncio.Event().wait()

        async with http.post("/v1/chat/completions", data=nothing()) as response:
            assert response.status == 408
            assert (await error_of(response))["code"] == "body_timeout"


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("x"), 400), (OutOfMemory("x"), 503), (StorageError("x"), 500), (MeshdError("x"), 500)]
)
def test_errors_of_no_route(error: MeshdError, status: int) -> None:
    described = problem(error)
    assert described.status == status
    assert described.detail.code == type(error).code


def test_the_hint_is_in_the_message() -> None:
    assert problem(OutOfMemory("a failed: b", hint="do c")).detail.message == "a failed: b; do c"
