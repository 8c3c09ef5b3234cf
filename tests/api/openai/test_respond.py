import asyncio
import re
from typing import Any

import aiohttp

CHAT = {"model": "words", "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 4}


async def test_a_long_replay_leaves_the_loop_to_others(http: aiohttp.ClientSession, coordinator: Any) -> None:
    async with http.post("/v1/completions", json={"model": "words", "prompt": "x", "max_tokens": 4000, "stream": True}) as response:
        text = await response.text()
    answer_id = re.search(r'"id":"(cmpl-[0-9a-f]{32})"', text)[1]
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    counting = asyncio.create_task(count())
    async with http.get(f"/v1/responses/{answer_id}?stream=true&starting_after=3990") as response:
        assert (await response.text()).count("data: ") == 4000 + 2 - 3991
    counting.cancel()
    assert turns > 4000 / 64


async def test_usage_is_null_but_in_the_last_chunk(http: aiohttp.ClientSession, events_of: Any) -> None:
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
