"""Streams of chunks: of chats, and of text completions where they differ."""

from typing import Any

import aiohttp
import pytest

from fake_api.answer_parts import END, HEAD, plain
from meshd.agents.service import Finished, TextDelta
from meshd.api.http.errors import problem
from meshd.api.openai.chat.renderer import ChatRenderer, ChatWriter
from meshd.errors import Cancelled, PeerLost
from meshd.types import FinishReason

CHAT = {"model": "words", "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 4}


def writer(**fields: Any) -> ChatWriter:
    return ChatRenderer(**HEAD | {"logprobs": False, "include_usage": False} | fields).writer("chatcmpl-1")


def test_an_empty_delta_makes_no_event() -> None:
    assert writer().take(0, TextDelta(text="")) == []


def test_an_answer_whose_session_was_ended_has_no_last_event() -> None:
    end = Finished(reason=FinishReason.CANCELLED, prompt_tokens=3, completion_tokens=2, ttft_s=0.1, tpot_s=0.01)
    with pytest.raises(Cancelled):
        writer().take(0, end)


def test_the_usage_comes_after_the_end_of_the_last_answer() -> None:
    chunks = writer(include_usage=True, answers=2, per_prompt=2)
    assert [plain(event.body)["usage"] for event in chunks.begin()] == [None, None]
    assert len(chunks.take(1, END)) == 1
    last, usage = chunks.take(0, END)
    assert plain(last.body)["choices"][0]["finish_reason"] == "stop"
    assert plain(usage.body)["choices"] == []
    assert plain(usage.body)["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_a_failure_becomes_an_error_event_without_a_number() -> None:
    chunks = writer()
    chunks.begin()
    for for_good in (False, True):
        event = chunks.fail(problem(PeerLost("peer there is lost")), 0, for_good=for_good)
        assert (event.number, event.name) == (None, "")
        assert plain(event.body)["error"]["code"] == "peer_lost"


async def test_only_the_last_chunk_has_the_usage(http: aiohttp.ClientSession, events_of: Any) -> None:
    for path, prompt in (("/v1/chat/completions", {}), ("/v1/completions", {"prompt": "hello"})):
        body = {name: value for name, value in CHAT.items() if path.endswith("chat/completions") or name != "messages"}
        async with http.post(path, json=body | prompt | {"stream_options": {"include_usage": True}}) as response:
            *chunks, last, done = await events_of(response)
        assert done == "[DONE]"
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert set(last["usage"]) == {"prompt_tokens", "completion_tokens", "total_tokens"}
    async with http.post("/v1/chat/completions", json=CHAT) as response:
        assert not any("usage" in chunk for chunk in await events_of(response))
