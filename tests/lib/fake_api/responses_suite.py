"""Tests of responses with OpenAI's own, unmodified Python client, as in `openai_suite`."""

import asyncio
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response

from fake_api.openai_suite import MESSAGES

RESPONSE: dict[str, Any] = {"input": "Name three colours.", "max_output_tokens": 16, "extra_body": {"seed": 7, "ignore_eos": True}}
LONG: dict[str, Any] = {"input": "Count on.", "max_output_tokens": 1500, "extra_body": {"seed": 7, "ignore_eos": True}}


async def test_a_response_is_whole(openai_client: AsyncOpenAI, model: str) -> None:
    whole = await openai_client.responses.create(
        model=model, instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, **RESPONSE
    )
    assert whole.id.startswith("resp_")
    assert (whole.object, whole.model, whole.metadata, whole.instructions) == ("response", model, {"a": "b"}, "Be brief.")
    assert (whole.status, whole.incomplete_details.reason, whole.error) == ("incomplete", "max_output_tokens", None)
    assert (whole.temperature, whole.top_p, whole.max_output_tokens, whole.background) == (0.5, 1.0, 16, False)
    assert whole.output_text
    assert whole.usage.output_tokens == 16
    assert whole.usage.total_tokens == whole.usage.input_tokens + 16
    assert await openai_client.responses.retrieve(whole.id) == whole


async def test_a_response_has_the_same_text_as_a_chat(openai_client: AsyncOpenAI, model: str) -> None:
    chat = await openai_client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, seed=3)
    asked = {"model": model, "max_output_tokens": 12, "extra_body": {"seed": 3}}
    by_messages = await openai_client.responses.create(input=MESSAGES, **asked)
    by_instructions = await openai_client.responses.create(
        input=[{"role": "user", "content": [{"type": "input_text", "text": MESSAGES[1]["content"]}]}],
        instructions=MESSAGES[0]["content"],
        **asked,
    )
    assert chat.choices[0].message.content == by_messages.output_text == by_instructions.output_text
    assert by_messages.usage.input_tokens == chat.usage.prompt_tokens


async def test_a_response_can_be_part_of_the_next_request(openai_client: AsyncOpenAI, model: str) -> None:
    first = await openai_client.responses.create(model=model, **RESPONSE)
    again = [{"role": "user", "content": RESPONSE["input"]}, *first.output, {"role": "user", "content": "And more?"}]
    second = await openai_client.responses.create(model=model, input=again, max_output_tokens=4)
    assert second.usage.input_tokens > first.usage.total_tokens


async def test_a_response_streams_the_text_it_gives_whole(openai_client: AsyncOpenAI, model: str) -> None:
    whole = await openai_client.responses.create(model=model, **RESPONSE)
    events = [event async for event in await openai_client.responses.create(model=model, stream=True, **RESPONSE)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:4]] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert [event.type for event in events[-4:]] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"
    ]  # fmt: skip
    assert {event.type for event in events[4:-4]} == {"response.output_text.delta"}
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text == events[-1].response.output_text
    assert events[-1].response.usage == whole.usage


async def test_responses_stream_helper_accumulates_the_answer(openai_client: AsyncOpenAI, model: str) -> None:
    async with openai_client.responses.stream(model=model, **RESPONSE) as stream:
        events = [event async for event in stream]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert deltas[-1].snapshot == "".join(delta.delta for delta in deltas) == events[-1].response.output_text


async def test_response_logprobs(openai_client: AsyncOpenAI, model: str) -> None:
    asked = RESPONSE | {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = await openai_client.responses.create(model=model, **asked)
    tokens = whole.output[0].content[0].logprobs
    assert len(tokens) == 16
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    streamed = [
        token
        async for event in await openai_client.responses.create(model=model, stream=True, **asked)
        if event.type == "response.output_text.delta"
        for token in event.logprobs
    ]
    assert [token.token for token in streamed] == [token.token for token in tokens]


async def test_a_broken_response_can_be_resumed(openai_client: AsyncOpenAI, model: str) -> None:
    whole = await openai_client.responses.create(model=model, **RESPONSE)
    stream = await openai_client.responses.create(model=model, stream=True, **RESPONSE)
    begun = [await anext(stream) for _ in range(9)]
    await stream.close()
    answer_id, last = begun[0].response.id, begun[-1].sequence_number
    rest = [event async for event in await openai_client.responses.retrieve(answer_id, stream=True, starting_after=last)]
    events = begun + rest
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response == begun[0].response.model_copy(
        update={name: getattr(events[-1].response, name) for name in ("status", "incomplete_details", "output", "usage")}
    )
    again = [event async for event in await openai_client.responses.retrieve(answer_id, stream=True)]
    assert again == events


async def test_a_response_in_the_background_can_be_polled(openai_client: AsyncOpenAI, model: str) -> None:
    whole = await openai_client.responses.create(model=model, **RESPONSE)
    seen = await openai_client.responses.create(model=model, background=True, **RESPONSE)
    assert seen.background
    assert seen.status in ("queued", "in_progress")
    seen = await _ended(openai_client, seen.id)
    assert (seen.status, seen.output_text, seen.usage) == ("incomplete", whole.output_text, whole.usage)


async def test_a_response_in_the_background_continues_without_its_stream(openai_client: AsyncOpenAI, model: str) -> None:
    stream = await openai_client.responses.create(model=model, background=True, stream=True, **RESPONSE)
    begun = [await anext(stream) for _ in range(5)]
    await stream.close()
    answer_id = begun[0].response.id
    whole = await _ended(openai_client, answer_id)
    rest = [event async for event in await openai_client.responses.retrieve(answer_id, stream=True, starting_after=4)]
    assert [event.sequence_number for event in begun + rest] == list(range(5 + len(rest)))
    assert rest[-1].response == whole


async def _ended(client: AsyncOpenAI, answer_id: str) -> Response:
    """Wait until a response in the background has ended."""
    async with asyncio.timeout(60):
        while True:
            seen = await client.responses.retrieve(answer_id)
            if seen.status not in ("queued", "in_progress"):
                return seen
            await asyncio.sleep(0.02)


async def test_a_response_in_the_background_is_cancelled(openai_client: AsyncOpenAI, model: str) -> None:
    begun = await openai_client.responses.create(model=model, background=True, **LONG)
    cancelled = await openai_client.responses.cancel(begun.id)
    assert (cancelled.id, cancelled.status) == (begun.id, "cancelled")
    assert (await openai_client.responses.retrieve(begun.id)).status == "cancelled"
    assert (await openai_client.responses.cancel(begun.id)).status == "cancelled"


async def test_only_responses_in_the_background_can_be_cancelled(openai_client: AsyncOpenAI, model: str) -> None:
    whole = await openai_client.responses.create(model=model, **RESPONSE)
    with pytest.raises(openai.BadRequestError):
        await openai_client.responses.cancel(whole.id)


async def test_a_response_is_deleted(openai_client: AsyncOpenAI, model: str) -> None:
    whole = await openai_client.responses.create(model=model, **RESPONSE)
    await openai_client.responses.delete(whole.id)
    for ask in (openai_client.responses.retrieve, openai_client.responses.delete, openai_client.responses.cancel):
        with pytest.raises(openai.NotFoundError) as caught:
            await ask(whole.id)
        assert caught.value.code == "session_not_found"


async def test_a_response_that_is_not_stored_is_not_found(openai_client: AsyncOpenAI, model: str) -> None:
    whole = await openai_client.responses.create(model=model, store=False, **RESPONSE)
    with pytest.raises(openai.NotFoundError):
        await openai_client.responses.retrieve(whole.id)
    with pytest.raises(openai.BadRequestError) as caught:
        await openai_client.responses.create(model=model, store=False, background=True, **RESPONSE)
    assert caught.value.param == "background"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_x"}, "previous_response_id"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type"),
        ({"truncation": "auto"}, "truncation"),
    ],
)
async def test_the_error_names_the_wrong_field_of_a_response(
    openai_client: AsyncOpenAI, model: str, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await openai_client.responses.create(model=model, **RESPONSE | fields)
    assert caught.value.param == param
