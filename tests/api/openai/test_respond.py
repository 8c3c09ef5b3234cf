import asyncio
import re
from typing import Any

import aiohttp

CHAT = {"model": "words", "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 4}


async def test_a_long_replay_yields_to_the_event_loop(http: aiohttp.ClientSession, coordinator: Any) -> None:
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
