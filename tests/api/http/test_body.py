"""Decoding bodies: any input is either a request or an error that names the wrong field."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.api.http.body import decode_body
from meshd.api.openai.chat.schemas import ChatRequest
from meshd.api.openai.completions.schemas import CompletionRequest
from meshd.api.openai.responses.request import ResponseRequest
from meshd.clock import SystemClock
from meshd.errors import InvalidRequest

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
        decode_body(msgspec.json.encode(body), shape)[0].generation_requests(SystemClock())
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
