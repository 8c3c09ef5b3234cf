"""Thoughts are separated from answers, whole and streamed, however the text is cut into pieces."""

from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.api.openai.thoughts import Split, ThoughtSplitter, opens_thought, split

PIECES = ("<think>", "</think>", "<thi", "nk>", "</", "think>", " ", "\n", "a", "b <c", "<")


@pytest.mark.parametrize(
    ("text", "thinking", "thought", "answer"),
    [
        ("<think>a</think>b", False, "a", "b"),
        ("\n<think>\na b\n</think>\n\nc d\n", False, "a b", "c d\n"),
        ("a</think>b", True, "a", "b"),
        ("\n\na < b </thin k </think>  b </think>", True, "a < b </thin k", "b </think>"),
        ("<think>a</think><think>b</think>c", False, "ab", "c"),
        ("<think>a", False, "a", ""),
        ("<think>a </thi", False, "a </thi", ""),
        ("<think></think>b", False, "", "b"),
        (" b <think>c</think>", False, "", " b <think>c</think>"),
        ("<thi", False, "", "<thi"),
        ("  ", False, "", "  "),
        ("", True, "", ""),
    ],
)
def test_a_thought_is_what_stands_in_its_marks_before_the_answer(text: str, thinking: bool, thought: str, answer: str) -> None:
    assert split(text, thinking=thinking) == Split(thought, answer)


@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<thi", "nk>", "</", "think>", " ", "\n", "a", "b <c", "<"]), max_size=12
    ),
    cut=st.integers(min_value=1, max_value=5),
    thinking=st.booleans(),
)
def test_how_an_answer_is_cut_makes_no_difference(pieces: list[str], cut: int, thinking: bool) -> None:
    text, splitter = "".join(pieces), ThoughtSplitter(thinking=thinking)
    parts = [splitter.push(text[at : at + cut]) for at in range(0, len(text), cut)] + [splitter.flush()]
    joined = Split("".join(part.thought for part in parts), "".join(part.text for part in parts))
    assert joined == split(text, thinking=thinking)


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [("<|im_start|>assistant\n<think>\n", True), ("<think>", True), ("<think>\n\n</think>\n\n", False), ("assistant:", False)],
)
def test_a_template_may_begin_the_thought(prompt: str, opens: bool) -> None:
    assert opens_thought(prompt) == opens


CHAT = {"model": "words", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.mark.parametrize("n", [1, 2])
async def test_a_thought_is_a_field_of_the_message_whole_and_streamed(
    http: aiohttp.ClientSession, coordinator: Any, events_of: Any, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    monkeypatch.setattr("fake_api.words.VOCABULARY", ("a</think>b",))
    monkeypatch.setattr("fake_api.words.WordsGeneration.prompt_end", "assistant\n<think>\n")
    async with http.post("/v1/chat/completions", json=CHAT | {"n": n}) as response:
        messages = [choice["message"] for choice in (await response.json())["choices"]]
    assert [(one["reasoning_content"], one["content"]) for one in messages] == [("a", "ba</think>b" + "a</think>b" * 2)] * n
    async with http.post("/v1/chat/completions", json=CHAT | {"n": n, "stream": True}) as response:
        events = [event for event in await events_of(response) if event != "[DONE]"]
    for index in range(n):
        deltas = [event["choices"][0]["delta"] for event in events if event["choices"][0]["index"] == index]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "a"
        assert "".join(delta.get("content", "") for delta in deltas) == messages[0]["content"]


async def test_a_resumed_stream_has_the_same_events(
    http: aiohttp.ClientSession, events_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fake_api.words.VOCABULARY", ("<think>", " a ", "</think>", "b"))
    async with http.post("/v1/chat/completions", json=CHAT | {"stream": True, "max_tokens": 40, "seed": 3}) as response:
        first = await events_of(response)
    async with http.get(f"/v1/responses/{first[0]['id']}?stream=true&starting_after=5") as response:
        assert await events_of(response) == first[6:]


async def test_a_text_completion_is_not_split(http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fake_api.words.VOCABULARY", ("<think>a</think>b",))
    async with http.post("/v1/completions", json={"model": "words", "prompt": "x", "max_tokens": 1}) as response:
        assert (await response.json())["choices"][0]["text"] == "<think>a</think>b"
