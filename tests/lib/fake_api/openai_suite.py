"""Tests of chats and text completions with OpenAI's own, unmodified Python client.

They use only the fixtures `base_url`, `model`, `api_key` and `openai_client`, so that they run against a server of test fixtures
and against real daemons.
"""

import asyncio
import json
import math
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three colours."}]


async def test_chat_answers_whole(openai_client: AsyncOpenAI, model: str) -> None:
    answer = await openai_client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == model
    assert answer.system_fingerprint
    [choice] = answer.choices
    assert choice.index == 0
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.logprobs is None
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert 0 < answer.usage.completion_tokens <= 12


async def test_chat_streams_the_text_it_gives_whole(openai_client: AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 16, "seed": 7}
    whole = await openai_client.chat.completions.create(**asked)
    chunks = [chunk async for chunk in await openai_client.chat.completions.create(**asked, stream=True)]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks)


async def test_chat_stream_helper_accumulates_the_answer(openai_client: AsyncOpenAI, model: str) -> None:
    async with openai_client.chat.completions.stream(model=model, messages=MESSAGES, max_tokens=8, seed=1) as stream:
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
    assert "".join(deltas)
    assert stream.current_completion_snapshot.choices[0].message.content == "".join(deltas)


async def test_stream_ends_with_usage_when_asked(openai_client: AsyncOpenAI, model: str) -> None:
    stream = await openai_client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[-1].usage.prompt_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_only_the_same_seed_gives_the_same_answer(openai_client: AsyncOpenAI, model: str) -> None:
    async def ask(seed: int) -> str:
        answer = await openai_client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=24, seed=seed)
        return answer.choices[0].message.content

    first, again, other = await ask(1), await ask(1), await ask(2)
    assert first == again
    assert first != other


async def test_without_a_seed_answers_differ(openai_client: AsyncOpenAI, model: str) -> None:
    async def ask() -> str:
        answer = await openai_client.completions.create(
            model=model, prompt="Once upon", max_tokens=32, temperature=2, extra_body={"ignore_eos": True}
        )
        return answer.choices[0].text

    assert len({await ask() for _ in range(3)}) > 1


async def test_n_answers_have_consecutive_seeds(openai_client: AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 10}
    three = await openai_client.chat.completions.create(**asked, n=3, seed=40)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    for offset, choice in enumerate(three.choices):
        alone = await openai_client.chat.completions.create(**asked, seed=40 + offset)
        assert alone.choices[0].message.content == choice.message.content
    assert three.usage.prompt_tokens == alone.usage.prompt_tokens


async def test_n_answers_are_streamed_at_the_same_time(openai_client: AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 10, "n": 2, "seed": 3}
    whole = await openai_client.chat.completions.create(**asked)
    texts, finishes = ["", ""], []
    async for chunk in await openai_client.chat.completions.create(**asked, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            finishes.append(choice.index)
    assert texts == [choice.message.content for choice in whole.choices]
    assert sorted(finishes) == [0, 1]


async def test_max_completion_tokens_ends_the_answer(openai_client: AsyncOpenAI, model: str) -> None:
    answer = await openai_client.chat.completions.create(
        model=model, messages=MESSAGES, max_completion_tokens=3, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


async def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(openai_client: AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 24, "seed": 5}
    free = (await openai_client.chat.completions.create(**asked)).choices[0].message.content
    stop = free[len(free) // 2 : len(free) // 2 + 3]
    stopped = await openai_client.chat.completions.create(**asked, stop=[stop])
    assert stopped.choices[0].finish_reason == "stop"
    assert stop not in stopped.choices[0].message.content
    assert free.startswith(stopped.choices[0].message.content)


async def test_chat_logprobs(openai_client: AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 6, "seed": 1, "logprobs": True, "top_logprobs": 3}
    answer = await openai_client.chat.completions.create(**asked)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert [top.logprob for top in token.top_logprobs] == sorted((top.logprob for top in token.top_logprobs), reverse=True)
        assert bytes(token.bytes).decode(errors="replace") == token.token
    chunks = [chunk async for chunk in await openai_client.chat.completions.create(**asked, stream=True)]
    streamed = [token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    assert all(math.isclose(one.logprob, other.logprob, abs_tol=1e-3) for one, other in zip(streamed, tokens, strict=True))


async def test_chat_logprobs_without_top_logprobs(openai_client: AsyncOpenAI, model: str) -> None:
    answer = await openai_client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=3, logprobs=True)
    assert answer.choices[0].logprobs.content
    assert all(token.top_logprobs == [] for token in answer.choices[0].logprobs.content)


async def test_an_answer_can_be_part_of_the_next_request(openai_client: AsyncOpenAI, model: str) -> None:
    first = await openai_client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4)
    again = [*MESSAGES, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "And more?"}]}]
    second = await openai_client.chat.completions.create(model=model, messages=again, max_tokens=4)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


async def test_completion_answers_whole(openai_client: AsyncOpenAI, model: str) -> None:
    answer = await openai_client.completions.create(model=model, prompt="One day the", extra_body={"ignore_eos": True})
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    assert answer.usage.completion_tokens == 16


async def test_completion_streams_the_text_it_gives_whole(openai_client: AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "prompt": "One day the", "max_tokens": 12, "seed": 9, "echo": True}
    whole = await openai_client.completions.create(**asked)
    assert whole.choices[0].text.startswith("One day the")
    chunks = [chunk async for chunk in await openai_client.completions.create(**asked, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


async def test_completion_logprobs(openai_client: AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "prompt": "One day the", "max_tokens": 8, "seed": 4, "logprobs": 2}
    answer = await openai_client.completions.create(**asked)
    shown = answer.choices[0].logprobs
    assert len(shown.tokens) == answer.usage.completion_tokens
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == len(shown.text_offset)
    assert shown.text_offset == [sum(map(len, shown.tokens[:count])) for count in range(len(shown.tokens))]
    for token, logprob, top in zip(shown.tokens, shown.token_logprobs, shown.top_logprobs, strict=True):
        assert top[token] == pytest.approx(logprob)
    chunks = [chunk async for chunk in await openai_client.completions.create(**asked, stream=True)]
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for part in parts for offset in part.text_offset] == shown.text_offset


async def test_completions_of_several_prompts(openai_client: AsyncOpenAI, model: str) -> None:
    answer = await openai_client.completions.create(model=model, prompt=["One", "Two of"], n=2, max_tokens=4, seed=1, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["One", "One", "Two", "Two"]
    one = await openai_client.completions.create(model=model, prompt="One", max_tokens=4, seed=1)
    two = await openai_client.completions.create(model=model, prompt="Two of", max_tokens=4, seed=1)
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens + two.usage.prompt_tokens


async def test_completions_of_token_ids(openai_client: AsyncOpenAI, model: str) -> None:
    one = await openai_client.completions.create(model=model, prompt=[5, 6, 7], max_tokens=4, seed=1)
    several = await openai_client.completions.create(model=model, prompt=[[5, 6, 7], [8]], max_tokens=4, seed=1)
    assert one.usage.prompt_tokens == 3
    assert several.usage.prompt_tokens == 4
    assert several.choices[0].text == one.choices[0].text


async def test_models_are_listed_and_found(openai_client: AsyncOpenAI, model: str) -> None:
    listed = {one.id: one async for one in openai_client.models.list()}
    found = await openai_client.models.retrieve(model)
    assert listed[model] == found
    assert found.object == "model"


async def test_headers_name_session_and_plan(openai_client: AsyncOpenAI, model: str) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 2}
    whole = await openai_client.chat.completions.with_raw_response.create(**asked)
    async with openai_client.chat.completions.with_streaming_response.create(**asked, stream=True) as streamed:
        for headers in (whole.headers, streamed.headers):
            assert len(headers["x-meshd-session"]) == 32
            assert ":0-" in headers["x-meshd-plan"]
            assert float(headers["x-meshd-predicted-tpot-ms"]) >= 0
            assert float(headers["x-meshd-predicted-ttft-ms"]) >= 0
        await streamed.read()
    assert whole.parse()._request_id


async def test_unknown_model_is_not_found(openai_client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await openai_client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        await openai_client.models.retrieve("no-such-model")


async def test_a_prompt_longer_than_the_context_is_refused(openai_client: AsyncOpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await openai_client.completions.create(model=model, prompt="word " * 200_000)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"extra_body": {"mesh": {"no_such_field": 1}}}, "mesh.no_such_field"),
    ],
)
async def test_the_error_names_the_wrong_field(
    openai_client: AsyncOpenAI, model: str, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await openai_client.chat.completions.create(model=model, messages=MESSAGES, **fields)
    assert caught.value.param == param
    assert f"`{param}`" in caught.value.message


async def test_hints_of_clients_are_ignored_and_named(openai_client: AsyncOpenAI, model: str) -> None:
    hints: dict[str, Any] = {"prompt_cache_key": "x", "reasoning_effort": "low", "verbosity": "low", "metadata": {"a": "b"}}
    for stream in (False, True):
        answer = await openai_client.chat.completions.with_raw_response.create(
            model=model, messages=MESSAGES, max_tokens=2, stream=stream, user="me", extra_body={"num_ctx": 4096}, **hints
        )
        await answer.http_response.aread()
        assert set(answer.headers["x-meshd-ignored"].split(", ")) == {*hints, "user", "num_ctx"}


async def test_many_requests_at_once_are_each_answered(openai_client: AsyncOpenAI, model: str) -> None:
    async def ask(seed: int) -> str:
        answer = await openai_client.completions.create(model=model, prompt="Go", max_tokens=4, seed=seed)
        return answer.choices[0].text

    together = await asyncio.gather(*(ask(seed) for seed in range(4)))
    assert together == [await ask(seed) for seed in range(4)]


async def test_synchronous_client(base_url: str, model: str, api_key: str | None) -> None:
    def ask() -> str:
        with OpenAI(base_url=f"{base_url}/v1", api_key=api_key or "none", max_retries=0) as client:
            stream = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert await asyncio.to_thread(ask)


async def test_a_broken_chat_can_be_resumed(openai_client: AsyncOpenAI, base_url: str, model: str, api_key: str | None) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 24, "seed": 11}
    whole = await openai_client.chat.completions.create(**asked, extra_body={"ignore_eos": True})
    headers = {"Authorization": f"Bearer {api_key or 'none'}"}
    body = asked | {"stream": True, "ignore_eos": True}
    async with aiohttp.ClientSession(base_url, headers=headers) as http:
        async with http.post("/v1/chat/completions", json=body) as response:
            begun = await _numbered(response, 6)
        path = f"/v1/responses/{begun[0][1]['id']}"
        async with http.get(path, params={"stream": "true", "starting_after": begun[-1][0]}) as response:
            rest = await _numbered(response)
            assert response.headers["x-meshd-answer"] == begun[0][1]["id"]
        async with http.get(path) as response:
            found = await response.json()
    chunks = [chunk for _, chunk in begun + rest]
    assert [number for number, _ in begun + rest] == list(range(len(chunks)))
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole.choices[0].message.content == found["choices"][0]["message"]["content"]
    assert found["id"] == chunks[0]["id"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def _numbered(response: aiohttp.ClientResponse, count: int | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Read `count` events, or all up to `[DONE]`. Returns: for each event, the number in its `id:` line and its data."""
    assert response.status == 200, await response.text()
    events: list[tuple[int, dict[str, Any]]] = []
    number = -1
    while count is None or len(events) < count:
        line = (await response.content.readline()).decode()
        assert line, "the stream broke off"
        if line.startswith("id: "):
            number = int(line.removeprefix("id: "))
        elif line == "data: [DONE]\n":
            return events
        elif line.startswith("data: "):
            events.append((number, json.loads(line.removeprefix("data: "))))
    return events
