"""Fields without effect are named in a header, at every depth, on every route that generates, whole and streamed."""

import json
from typing import Any

import aiohttp
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.api.http.body import decode_body
from meshd.api.http.ignored import MAX_NAME_CHARACTERS, MAX_NAMES, IgnoredFields, strict_form, unknown_fields
from meshd.api.openai.chat.schemas import ChatRequest
from meshd.api.openai.completions.schemas import CompletionRequest
from meshd.api.openai.responses.request import ResponseRequest

ROUTES = {
    "/v1/chat/completions": {"model": "words", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/completions": {"model": "words", "prompt": "x", "max_tokens": 2},
    "/v1/responses": {"model": "words", "input": "x", "max_output_tokens": 2},
}
HINTS = {
    "prompt_cache_key": "x", "prompt_cache_retention": "24h", "verbosity": "low", "reasoning_effort": "low", "service_tier": "flex",
    "options": {"a": [1]}, "num_ctx": 4096, "keep_alive": -1, "cache_prompt": True, "id_slot": -1,
}  # fmt: skip


BODIES: dict[type[msgspec.Struct], dict[str, Any]] = {
    ChatRequest: {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "seed": 3},
    CompletionRequest: {"prompt": ["x", "y"], "logit_bias": {"5": 1.0}},
    ResponseRequest: {"input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}], "text": {"format": None}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ROUTES)
async def test_hints_for_other_servers_are_ignored_and_named(http: aiohttp.ClientSession, path: str, stream: bool) -> None:
    options = {"stream": True, "stream_options": {"no_such_option": 1}} if stream else {}
    async with http.post(path, json=ROUTES[path] | HINTS | options) as response:
        assert response.status == 200, await response.text()
        await response.read()
    expected = {*HINTS, "stream_options.no_such_option"} if stream else set(HINTS)
    assert set(response.headers["x-meshd-ignored"].split(", ")) == expected


@pytest.mark.parametrize("path", ROUTES)
async def test_without_ignored_fields_there_is_no_header(http: aiohttp.ClientSession, path: str) -> None:
    async with http.post(path, json=ROUTES[path] | {"no_such_field": None}) as response:
        assert response.status == 200
        assert "x-meshd-ignored" not in response.headers


async def test_fields_inside_messages_and_their_parts_are_named(http: aiohttp.ClientSession) -> None:
    part = {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [part], "id": 1}, {"role": "assistant", "content": "y", "opts": {"visible": False}}]
    async with http.post("/v1/chat/completions", json=ROUTES["/v1/chat/completions"] | {"messages": messages}) as response:
        assert response.status == 200, await response.text()
        assert set(response.headers["x-meshd-ignored"].split(", ")) == {
            "messages[0].content[0].cache_control", "messages[0].id", "messages[1].opts",
        }  # fmt: skip
    items = [{"role": "user", "content": [{"type": "input_text", "text": "x", "hint": 1}], "phase": "commentary"}]
    async with http.post(
        "/v1/responses", json=ROUTES["/v1/responses"] | {"input": items, "text": {"verbosity": "low"}}
    ) as response:
        assert response.status == 200, await response.text()
        assert set(response.headers["x-meshd-ignored"].split(", ")) == {
            "input[0].content[0].hint", "input[0].phase", "text.verbosity",
        }  # fmt: skip


async def test_a_parameter_of_a_query_is_ignored_and_named(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/responses", json=ROUTES["/v1/responses"]) as response:
        answer_id = (await response.json())["id"]
    async with http.get(f"/v1/responses/{answer_id}?include_obfuscation=true&limit=3") as response:
        assert (response.status, response.headers["x-meshd-ignored"]) == (200, "include_obfuscation, limit")


async def test_an_error_names_the_ignored_fields_too(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/completions", json=ROUTES["/v1/completions"] | {"model": "nosuch", "hint": 1}) as response:
        assert (response.status, response.headers["x-meshd-ignored"]) == (404, "hint")


async def test_a_large_body_is_decoded_in_the_same_way(http: aiohttp.ClientSession) -> None:
    body: dict[str, Any] = ROUTES["/v1/completions"] | {"hint": "x" * 200_000}
    async with http.post("/v1/completions", json=body) as response:
        assert (response.status, response.headers["x-meshd-ignored"]) == (200, "hint")


@given(st.lists(st.text(max_size=200), max_size=60))
def test_the_header_is_bounded_and_has_no_control_characters(names: list[str]) -> None:
    ignored = IgnoredFields([])
    for name in names:
        ignored.add(name)
    header = ignored.header()
    assert header.isascii()
    assert header.isprintable()
    assert len(header) <= MAX_NAMES * (MAX_NAME_CHARACTERS + 2) + 30
    assert header.endswith(f"and {len(names) - MAX_NAMES} more") == (len(names) > MAX_NAMES)


def test_a_name_cannot_forge_another_name_or_a_header() -> None:
    _, ignored = decode_body(
        msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": "x"}], "a, b\r\nset-cookie: x": 1}), ChatRequest
    )
    assert ignored.header() == "a%2C%20b%0D%0Aset-cookie:%20x"


@pytest.mark.parametrize("shape", [ChatRequest, CompletionRequest, ResponseRequest])
def test_the_strict_form_of_a_body_is_the_same_but_for_unknown_fields(shape: type[msgspec.Struct]) -> None:
    strict = strict_form(shape)
    assert issubclass(strict, shape)
    assert {field.name: field.required for field in msgspec.structs.fields(strict)} == {
        field.name: field.required for field in msgspec.structs.fields(shape)
    }
    body = msgspec.json.encode({"model": "m", "stream_options": {}} | BODIES[shape])
    decoded = msgspec.json.decode(body, type=strict)
    assert msgspec.to_builtins(decoded) == msgspec.to_builtins(msgspec.json.decode(body, type=shape))


@pytest.mark.parametrize("where", ["", "messages[0]", "messages[0].content[0]", "stream_options", "response_format"])
def test_the_strict_form_refuses_an_unknown_field_at_every_depth(where: str) -> None:
    body: dict[str, Any] = {"model": "m", "stream_options": {}, "response_format": {"type": "text"}} | BODIES[ChatRequest]
    body = json.loads(json.dumps(body))
    at: Any = body
    for key in filter(None, where.replace("]", "").replace("[", ".").split(".")):
        at = at[int(key)] if key.isdigit() else at[key]
    at["no_such_field"] = 1
    with pytest.raises(msgspec.ValidationError, match="unknown field `no_such_field`"):
        msgspec.json.decode(msgspec.json.encode(body), type=strict_form(ChatRequest))


def test_blanks_before_a_body_are_no_part_of_it() -> None:
    assert unknown_fields(b' \n{"hint": 1}', ChatRequest).names == ["hint"]
