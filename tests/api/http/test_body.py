"""Decoding bodies: any input is either a request or an error that names the wrong field."""

import asyncio
import gzip
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.api.http.body import decode_body
from meshd.api.http.server import Server
from meshd.api.openai.chat.schemas import ChatRequest
from meshd.api.openai.completions.schemas import CompletionRequest
from meshd.api.openai.responses.request import ResponseRequest
from meshd.clock import SystemClock
from meshd.errors import InvalidRequest
from meshd.types import SamplingDefaults

CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "m", "prompt": "x"}
RESPONSE = {"model": "m", "input": "x"}
json_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.integers() | st.text(max_size=4), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3),
)


def wrong_field(body: dict[str, Any], shape: type[ChatRequest] | type[CompletionRequest] | type[ResponseRequest]) -> str | None:
    """Decode a body. Returns: the field that the error names; "" if there is no error."""
    try:
        decode_body(msgspec.json.encode(body), shape)[0].generation_requests(SystemClock(), SamplingDefaults())
    except InvalidRequest as error:
        return error.param
    return ""


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_body(data, ChatRequest)


@given(field=st.sampled_from(ChatRequest.__struct_fields__), value=json_values)
def test_the_error_for_any_value_names_the_field_of_a_chat(field: str, value: object) -> None:
    named = wrong_field(CHAT | {field: value}, ChatRequest)
    assert named is not None
    assert named == "" or named.startswith(field)


@given(field=st.sampled_from(CompletionRequest.__struct_fields__), value=json_values)
def test_the_error_for_any_value_names_the_field_of_a_completion(field: str, value: object) -> None:
    named = wrong_field(COMPLETION | {field: value}, CompletionRequest)
    assert named is not None
    assert named == "" or named.startswith(field)


@given(field=st.sampled_from(ResponseRequest.__struct_fields__), value=json_values)
def test_the_error_for_any_value_names_the_field_of_a_response(field: str, value: object) -> None:
    named = wrong_field(RESPONSE | {field: value}, ResponseRequest)
    assert named is not None
    assert named == "" or named.startswith(field)


@given(field=st.text(min_size=1, max_size=12).filter(lambda name: name not in ChatRequest.__struct_fields__))
def test_any_unknown_field_is_ignored_and_named(field: str) -> None:
    _, ignored = decode_body(msgspec.json.encode(CHAT | {field: 1}), ChatRequest)
    assert ignored.names == [field]


BODY = b'{"model":"words","prompt":"x","max_tokens":1}'


async def exchange(server: Server, headers: tuple[str, ...], body: bytes) -> tuple[int, dict[str, Any]]:
    """Send raw bytes as the body of a completion. Returns: the status and the body of the response."""
    reader, writer = await asyncio.open_connection(*server.address)
    lines = ("POST /v1/completions HTTP/1.1", "Host: localhost", "Connection: close", *headers)
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = head.partition("content-length: ")[2].partition("\r\n")[0]
        rest = await reader.readexactly(int(length))
    writer.close()
    return int(head.split()[1]), msgspec.json.decode(rest)


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", gzip.compress(BODY), 200),
        ("gzip", BODY, 400),
        ("gzip", gzip.compress(BODY)[:-12], 400),
        ("gzip", gzip.compress(BODY)[:14] + b"x" * 30, 400),
        ("deflate", BODY, 400),
        ("gzip", gzip.compress(b" " * (64 << 20)), 413),
    ],
    ids=["right", "plain", "truncated", "damaged", "deflate", "bomb"],
)
async def test_a_body_that_is_not_encoded_as_its_headers_say_is_the_clients_mistake(
    server: Server, caplog: pytest.LogCaptureFixture, encoding: str, body: bytes, status: int
) -> None:
    found, answer = await exchange(server, (f"Content-Length: {len(body)}", f"Content-Encoding: {encoding}"), body)
    assert found == status, answer
    assert status == 200 or answer["error"]["type"] == "invalid_request_error"
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_broken_body_that_no_route_reads_is_not_read_either(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 9\r\n\r\nnot gzip!")
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_body_that_announces_too_many_bytes_is_refused_before_they_arrive(server: Server) -> None:
    status, answer = await exchange(server, (f"Content-Length: {9 << 20}",), b"")
    assert (status, answer["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    "many",
    [
        {"prompt": ["a"] * 1_000_000},
        {"prompt": "a"} | {f"{number:x}\\": 1 for number in range(300_000)},
        {"messages": [{"role": "user", "content": ""}] * 200_000},
    ],
    ids=["prompts", "names", "messages"],
)
def test_a_body_of_very_many_strings_is_refused_before_it_is_decoded(many: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="more than 100000 strings"):
        decode_body(msgspec.json.encode({"model": "m"} | many), CompletionRequest)


def test_a_body_of_very_many_lists_is_refused_before_it_is_decoded() -> None:
    message = {"role": "user", "content": "x", "annotations": [[]] * 2_000_000}
    with pytest.raises(InvalidRequest, match="more than 1000000 brackets"):
        decode_body(msgspec.json.encode({"model": "m", "messages": [message]}), ChatRequest)


def test_quotes_in_a_text_are_no_strings() -> None:
    body, _ = decode_body(msgspec.json.encode({"model": "m", "prompt": '"' * 1_000_000}), CompletionRequest)
    assert body.prompt == '"' * 1_000_000
