"""`POST /v1/chat/completions`, over real HTTP."""

from typing import Any

import aiohttp
import pytest

CHAT = {"model": "words", "messages": [{"role": "user", "content": "hello"}]}


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
        ({"mesh": {"min_peers": "2"}}, "mesh.min_peers"),
        ({"mesh": {"min_peers": 9}}, "mesh.min_peers"),
        ({"mesh": {"min_peers": 0}}, "mesh.min_peers"),
        ({"mesh": {"context": 0}}, "mesh.context"),
        ({"mesh": {"objective": "luck"}}, "mesh.objective"),
        ({"functions": [{}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"tool_choice": 7}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "system", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages[0].role"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"repeat_penalty": 1.1, "repetition_penalty": 1.2}, "repeat_penalty"),
    ],
)
async def test_the_error_names_the_wrong_field(http: aiohttp.ClientSession, fields: dict[str, Any], param: str) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | fields) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("missing", ["model", "messages"])
async def test_the_error_names_the_missing_field(http: aiohttp.ClientSession, missing: str) -> None:
    async with http.post("/v1/chat/completions", json={name: CHAT[name] for name in CHAT if name != missing}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == missing


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": None, "function_call": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto", "verbosity": "medium"},
        {"store": False, "metadata": None, "user": "me", "safety_identifier": "me", "stop": None, "logit_bias": {}},
        {"max_tokens": 4, "max_completion_tokens": 4, "stop": [], "stream": False, "stream_options": None, "mesh": {}},
    ],
)
async def test_neutral_values_are_accepted(http: aiohttp.ClientSession, fields: dict[str, Any]) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 4} | fields) as response:
        assert response.status == 200, await response.text()


async def test_options_of_the_rendering_come_from_the_request(http: aiohttp.ClientSession) -> None:
    fields = {"n": 2, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    async with http.post("/v1/chat/completions", json=CHAT | fields) as response:
        body = await response.json()
    assert body["object"] == "chat.completion"
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for choice in body["choices"]:
        assert [len(token["top_logprobs"]) for token in choice["logprobs"]["content"]] == [2, 2, 2]
    assert body["usage"]["completion_tokens"] == 2 * 3


async def test_an_answer_with_store_false_cannot_be_read_again(http: aiohttp.ClientSession) -> None:
    for fields, status in (({}, 200), ({"store": False}, 404)):
        async with http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2} | fields) as response:
            answer_id = (await response.json())["id"]
        async with http.get(f"/v1/responses/{answer_id}") as response:
            assert response.status == status


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages[0].role"),
    ],
)
async def test_a_request_for_tools_is_refused_as_such(http: aiohttp.ClientSession, fields: dict[str, Any], param: str) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | fields) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["param"]) == (400, "tools_unsupported", param)


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"tools": TOOLS, "tool_choice": "none"}, "tools"),
        ({"functions": [{"name": "f"}], "function_call": "none"}, "functions"),
        ({"tools": [], "functions": [], "tool_choice": "auto"}, None),
    ],
)
async def test_tools_that_the_request_rules_out_are_ignored(
    http: aiohttp.ClientSession, fields: dict[str, Any], ignored: str | None
) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2} | fields) as response:
        assert response.status == 200, await response.text()
        assert response.headers.get("x-meshd-ignored") == ignored


@pytest.mark.parametrize("content", [None, [], "", [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]])
async def test_a_turn_of_the_assistant_may_be_empty(http: aiohttp.ClientSession, content: object) -> None:
    user = {"role": "user", "content": "hi"}
    for turn in ({"role": "assistant", "content": content}, {"role": "assistant"}):
        async with http.post("/v1/chat/completions", json=CHAT | {"messages": [user, turn, user], "max_tokens": 2}) as response:
            assert response.status == 200, await response.text()


async def test_earlier_thoughts_reach_the_coordinator(http: aiohttp.ClientSession, coordinator: Any) -> None:
    for name in ("reasoning", "reasoning_content"):
        messages = [{"role": "assistant", "content": "x", name: "y"}, {"role": "user", "content": "hi"}]
        async with http.post("/v1/chat/completions", json=CHAT | {"messages": messages, "max_tokens": 2}) as response:
            assert response.status == 200, await response.text()
        assert coordinator.requests[-1].prompt[0].reasoning == "y"


async def test_repeat_penalty_is_another_name_of_repetition_penalty(http: aiohttp.ClientSession, coordinator: Any) -> None:
    for name in ("repeat_penalty", "repetition_penalty"):
        async with http.post("/v1/chat/completions", json=CHAT | {name: 1.25, "max_tokens": 2}) as response:
            assert "x-meshd-ignored" not in response.headers
        assert coordinator.requests[-1].sampling.repetition_penalty == 1.25


async def test_a_name_that_the_template_does_not_use_is_named(http: aiohttp.ClientSession) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": "x", "name": "bob"}]
    for n in (1, 2):
        async with http.post("/v1/chat/completions", json=CHAT | {"messages": messages, "max_tokens": 2, "n": n}) as response:
            assert response.headers["x-meshd-ignored"] == "messages[1].name"
