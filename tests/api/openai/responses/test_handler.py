"""`/v1/responses` in OpenAI's format: whole, streamed, in the background, cancelled and deleted."""

from typing import Any

import aiohttp
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from meshd.agents.session.journal.keys import session_of
from meshd.api.openai.stored_responses import secret_of

ASKED: dict[str, Any] = {"model": "words", "input": "hello", "max_output_tokens": 3, "temperature": 0}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
UNTYPED = {"store", "bytes"}
"""Fields that OpenAI's server sends too, although the types of its client don't have them."""


async def post(http: aiohttp.ClientSession, **fields: Any) -> dict[str, Any]:
    async with http.post("/v1/responses", json=ASKED | fields) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def get(http: aiohttp.ClientSession, answer_id: str) -> dict[str, Any]:
    async with http.get(f"/v1/responses/{answer_id}") as response:
        assert response.status == 200, await response.text()
        return await response.json()


def unknown_fields(value: object) -> set[str]:
    """Collect the fields that the types of OpenAI's client don't have."""
    if isinstance(value, pydantic.BaseModel):
        return set(value.model_extra or ()).union(*(unknown_fields(part) for _, part in value))
    parts = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return set().union(*(unknown_fields(part) for part in parts))


async def test_a_whole_response_field_for_field(http: aiohttp.ClientSession) -> None:
    whole = await post(http, instructions="be brief", metadata={"a": "b"}, user="me")
    session = whole["id"].removeprefix("resp_")
    [message] = whole["output"]
    [part] = message["content"]
    assert part["text"].startswith(" große")
    assert part == {"type": "output_text", "text": part["text"], "annotations": [], "logprobs": []}
    assert {**message, "content": []} == {
        "id": f"msg_{session}", "type": "message", "status": "incomplete", "role": "assistant", "content": [],
    }  # fmt: skip
    assert {**whole, "id": "", "created_at": 0, "output": []} == {
        "id": "", "object": "response", "created_at": 0, "status": "incomplete", "background": False, "error": None,
        "incomplete_details": {"reason": "max_output_tokens"}, "instructions": "be brief", "max_output_tokens": 3,
        "max_tool_calls": None, "metadata": {"a": "b"}, "model": "words", "output": [], "parallel_tool_calls": True,
        "previous_response_id": None, "prompt_cache_key": None, "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None, "service_tier": "default", "store": True, "temperature": 0.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"}, "tool_choice": "auto", "tools": [], "top_logprobs": 0,
        "top_p": 1.0, "truncation": "disabled", "user": "me",
        "usage": {
            "input_tokens": 7, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}, "output_tokens": 3,
            "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 10,
        },
    }  # fmt: skip
    assert await get(http, whole["id"]) == whole


@pytest.mark.parametrize("fields", [{}, LOGPROBS, {"background": True}, {"stop": " "}])
async def test_events_and_objects_match_the_types_of_openais_client(
    http: aiohttp.ClientSession, events_of: Any, fields: dict[str, Any]
) -> None:
    """Each event and object is valid, and has no fields beyond those of its type and `UNTYPED`."""
    adapter = pydantic.TypeAdapter(ResponseStreamEvent)
    async with http.post("/v1/responses", json=ASKED | fields | {"stream": True}) as response:
        text = await response.text()
    async with http.post("/v1/responses", json=ASKED | fields | {"stream": True}) as response:
        events = await events_of(response)
    for event in events:
        assert unknown_fields(adapter.validate_python(event)) <= UNTYPED
    names = [line.removeprefix("event: ") for line in text.split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert unknown_fields(pydantic.TypeAdapter(Response).validate_python(await post(http, **fields))) <= UNTYPED


async def test_the_events_of_a_stream(http: aiohttp.ClientSession, events_of: Any) -> None:
    async with http.post("/v1/responses", json=ASKED | LOGPROBS | {"stream": True}) as response:
        events = await events_of(response)
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * 3, "output_text.done",
        "content_part.done", "output_item.done", "incomplete",
    ]  # fmt: skip
    created, started, added, opened, *deltas, text_done, part_done, item_done, last = events
    whole = last["response"]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    assert started["response"] == created["response"]
    assert (added["item"]["status"], added["item"]["content"], opened["part"]["text"]) == ("in_progress", [], "")
    assert "".join(delta["delta"] for delta in deltas) == text_done["text"]
    assert [one for delta in deltas for one in delta["logprobs"]] == text_done["logprobs"]
    assert all(len(one["top_logprobs"]) == 2 for one in text_done["logprobs"])
    assert [part_done["part"]] == item_done["item"]["content"]
    assert [item_done["item"]] == whole["output"]
    assert {event["item_id"] for event in (opened, *deltas, text_done, part_done)} == {added["item"]["id"]}
    assert await get(http, whole["id"]) == whole


async def test_an_answer_that_stops_is_completed(http: aiohttp.ClientSession, events_of: Any) -> None:
    whole = await post(http, stop="große", max_output_tokens=100)
    assert (whole["status"], whole["incomplete_details"]) == ("completed", None)
    assert whole["output"][0]["status"] == "completed"
    async with http.post("/v1/responses", json=ASKED | {"stop": "große", "stream": True, "max_output_tokens": 100}) as response:
        assert (await events_of(response))[-1]["type"] == "response.completed"


async def test_a_response_runs_in_the_background(http: aiohttp.ClientSession, coordinator: Any) -> None:
    async with http.post("/v1/responses", json=ASKED | {"background": True, "max_output_tokens": 100}) as response:
        begun = await response.json()
        assert response.headers["x-meshd-answer"] == begun["id"]
    assert begun["status"] in ("queued", "in_progress")
    assert (begun["background"], begun["usage"]) == (True, None)
    await coordinator.until(lambda c: len(c.records[session_of(secret_of(begun["id"]))].made) > 3 or c.running == 0)
    seen = await get(http, begun["id"])
    await coordinator.until(lambda c: c.running == 0)
    whole = await get(http, begun["id"])
    assert (seen["status"], whole["status"]) == ("in_progress", "incomplete")
    assert whole["output"][0]["content"][0]["text"].startswith(seen["output"][0]["content"][0]["text"])
    assert whole["usage"]["output_tokens"] == 100


async def test_a_response_in_the_background_continues_without_its_reader(
    http: aiohttp.ClientSession, coordinator: Any, events_of: Any
) -> None:
    async with http.post("/v1/responses", json=ASKED | {"background": True, "stream": True, "max_output_tokens": 100}) as response:
        session, answer_id = response.headers["x-meshd-session"], response.headers["x-meshd-answer"]
        await response.content.readline()
    await coordinator.until(lambda c: c.running == 0)
    assert coordinator.records[session].status == "completed"
    async with http.get(f"/v1/responses/{answer_id}?stream=true") as response:
        events = await events_of(response)
    assert (events[0]["response"]["status"], events[1]["response"]["status"]) == ("queued", "in_progress")
    assert events[-1]["type"] == "response.incomplete"


async def test_cancel_ends_a_response_in_the_background(http: aiohttp.ClientSession, coordinator: Any, events_of: Any) -> None:
    begun = await post(http, background=True, max_output_tokens=4000)
    async with http.get(f"/v1/responses/{begun['id']}?stream=true") as stream:
        async with http.post(f"/v1/responses/{begun['id']}/cancel") as response:
            cancelled = await response.json()
            assert response.headers["x-meshd-answer"] == begun["id"]
        assert cancelled["status"] == "cancelled"
        assert coordinator.running == 0
        last = (await events_of(stream))[-1]
    assert (last["type"], last["code"]) == ("error", "cancelled")
    assert "resume the answer" not in last["message"]
    async with http.post(f"/v1/responses/{begun['id']}/cancel") as response:
        assert await response.json() == cancelled
    assert await get(http, begun["id"]) == cancelled


async def test_only_responses_in_the_background_can_be_cancelled(http: aiohttp.ClientSession, coordinator: Any) -> None:
    whole = await post(http)
    async with http.post(f"/v1/responses/{whole['id']}/cancel") as response:
        assert response.status == 400
        assert "`background`" in (await response.json())["error"]["message"]
    finished = await post(http, background=True)
    await coordinator.until(lambda c: c.running == 0)
    async with http.post(f"/v1/responses/{finished['id']}/cancel") as response:
        assert (await response.json())["status"] == "incomplete"


@pytest.mark.parametrize(
    ("path", "body", "prefix", "name"),
    [
        ("/v1/responses", ASKED, "resp_", "response"),
        ("/v1/completions", {"prompt": "x"}, "cmpl-", "text_completion.deleted"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "chatcmpl-", "chat.completion.deleted"),
    ],
)
async def test_delete_cancels_an_answer_and_removes_its_record(
    http: aiohttp.ClientSession, coordinator: Any, path: str, body: dict[str, Any], prefix: str, name: str
) -> None:
    async with http.post(path, json=body | {"model": "prefills", "stream": True}) as stream:
        answer_id = stream.headers["x-meshd-answer"]
        async with http.delete(f"/v1/responses/{answer_id}") as response:
            assert await response.json() == {"id": answer_id, "object": name, "deleted": True}
        assert "cancelled" in await stream.text()
    assert coordinator.running == 0
    for method in ("GET", "DELETE"):
        async with http.request(method, f"/v1/responses/{answer_id}") as response:
            assert response.status == 404


@pytest.mark.parametrize(
    ("model", "status"), [("breaks", "failed"), ("fails", "failed"), ("drained", "cancelled"), ("prefills", "in_progress")]
)
async def test_a_broken_answer_has_its_status_and_error(
    http: aiohttp.ClientSession, coordinator: Any, model: str, status: str
) -> None:
    async with http.post("/v1/responses", json=ASKED | {"model": model, "stream": True, "max_output_tokens": 9}) as stream:
        answer_id = stream.headers["x-meshd-answer"]
        if model != "prefills":
            await stream.read()
    await coordinator.until(lambda c: c.running == 0)
    seen = await get(http, answer_id)
    assert seen["status"] == status
    assert (seen["error"] is None) == (model in ("drained", "prefills"))
    assert [message["status"] for message in seen["output"]] == ["incomplete"] * (model != "prefills")
    if model == "breaks":
        assert seen["error"]["type"] == "peer_lost"
        assert seen["error"]["message"].endswith(f"resume the answer with GET /v1/responses/{answer_id}?stream=true at any peer")
    if model == "fails":
        assert seen["error"]["code"] == "server_error"
        assert "resume the answer" not in seen["error"]["message"]


async def test_the_stream_of_a_failed_answer_ends_with_its_object(http: aiohttp.ClientSession, events_of: Any) -> None:
    async with http.post("/v1/responses", json=ASKED | {"model": "fails", "stream": True, "max_output_tokens": 9}) as response:
        *_, before, last = await events_of(response)
    assert last["type"] == "response.failed"
    assert last["sequence_number"] == before["sequence_number"] + 1
    assert last["response"] == await get(http, last["response"]["id"])


async def test_an_error_in_mid_stream_has_the_number_to_resume_after(http: aiohttp.ClientSession, events_of: Any) -> None:
    async with http.post("/v1/responses", json=ASKED | {"model": "breaks", "stream": True, "max_output_tokens": 9}) as response:
        *_, before, last = await events_of(response)
    assert set(last) == {"type", "sequence_number", "code", "message", "param"}
    assert (last["type"], last["code"], last["sequence_number"]) == ("error", "peer_lost", before["sequence_number"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"instructions": 1}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"background": True, "store": False}, "background"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(index): "" for index in range(17)}}, "metadata"),
        ({"metadata": {"a" * 65: ""}}, "metadata"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"conversation": "conv_x"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "json_object"}}}, "text"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"mesh": {"min_peers": 9}}, "mesh.min_peers"),
    ],
)
async def test_the_error_names_the_wrong_field(http: aiohttp.ClientSession, fields: dict[str, Any], param: str) -> None:
    async with http.post("/v1/responses", json=ASKED | fields) as response:
        assert response.status == 400
        error = (await response.json())["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "max_tool_calls": None, "conversation": None},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "reasoning": {"effort": "none"}, "truncation": "disabled"},
        {"include": [], "top_logprobs": 0, "metadata": None, "user": "me", "safety_identifier": "me", "service_tier": "auto"},
        {"store": True, "background": False, "stream": False, "stream_options": None, "mesh": {}, "instructions": None},
    ],
)
async def test_neutral_values_are_accepted(http: aiohttp.ClientSession, fields: dict[str, Any]) -> None:
    assert (await post(http, **fields))["status"] == "incomplete"


@pytest.mark.parametrize(("model", "status", "param"), [("missing", 404, "model"), ("busy", 429, None), ("loading", 503, None)])
@pytest.mark.parametrize("how", [{}, {"stream": True}, {"background": True}])
async def test_errors_of_the_coordinator_have_their_status(
    http: aiohttp.ClientSession, how: dict[str, Any], model: str, status: int, param: str | None
) -> None:
    async with http.post("/v1/responses", json=ASKED | how | {"model": model}) as response:
        assert response.status == status
        assert (await response.json())["error"]["param"] == param
    async with http.post("/v1/responses", json=ASKED | how | {"input": "x " * 5000}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "input"


async def test_a_request_of_an_agent_runs_without_the_tools_that_it_offers(http: aiohttp.ClientSession, events_of: Any) -> None:
    asked = {
        "model": "words", "instructions": "You are a coder.", "stream": True, "store": False, "prompt_cache_key": "k",
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        ],
        "tools": [
            {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object", "properties": {}}},
            {"type": "web_search"}, {"type": "custom", "name": "apply_patch"},
        ],
        "tool_choice": "auto", "parallel_tool_calls": False, "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content"], "max_output_tokens": 4,
    }  # fmt: skip
    async with http.post("/v1/responses", json=asked) as response:
        assert response.status == 200, await response.text()
        ignored = response.headers["x-meshd-ignored"].split(", ")
        events = await events_of(response)
    assert events[-1]["type"] == "response.incomplete"
    assert {"tools", "reasoning", "prompt_cache_key", "include[0]", "input[1]"} <= set(ignored)


@pytest.mark.parametrize(
    "fields", [{"tool_choice": "required"}, {"input": [{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "x"}]}]
)
async def test_a_response_that_needs_a_tool_is_refused_as_such(http: aiohttp.ClientSession, fields: dict[str, Any]) -> None:
    async with http.post("/v1/responses", json=ASKED | fields) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "tools_unsupported")
