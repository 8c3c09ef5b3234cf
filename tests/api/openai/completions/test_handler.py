"""`POST /v1/completions`, over real HTTP."""

from typing import Any

import aiohttp
import pytest

COMPLETION = {"model": "words", "prompt": "hello"}


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
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": [[1]] * 257}, "prompt"),
    ],
)
async def test_the_error_names_the_wrong_field(http: aiohttp.ClientSession, fields: dict[str, Any], param: str) -> None:
    async with http.post("/v1/completions", json=COMPLETION | fields) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == param


async def test_answers_begin_with_the_echo_of_their_own_prompt(http: aiohttp.ClientSession) -> None:
    fields = {"prompt": ["one", "two"], "n": 2, "echo": True, "max_tokens": 2}
    async with http.post("/v1/completions", json=COMPLETION | fields) as response:
        body = await response.json()
    assert body["object"] == "text_completion"
    assert [choice["text"][:4] for choice in body["choices"]] == ["one ", "one ", "two ", "two "]


@pytest.mark.parametrize(("logprobs", "shown"), [(None, None), (0, None), (2, 2)])
async def test_logprobs_are_those_of_the_request(http: aiohttp.ClientSession, logprobs: int | None, shown: int | None) -> None:
    async with http.post("/v1/completions", json=COMPLETION | {"logprobs": logprobs, "max_tokens": 2, "seed": 3}) as response:
        found = (await response.json())["choices"][0]["logprobs"]
    assert (found is None) == (logprobs is None)
    if found is not None:
        assert len(found["tokens"]) == 2
        assert (found["top_logprobs"] is None) == (shown is None)


async def test_without_a_limit_an_answer_has_16_tokens(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/completions", json=COMPLETION) as response:
        assert (await response.json())["usage"]["completion_tokens"] == 16
