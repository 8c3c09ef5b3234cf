"""The routes of the monitor and the command line."""

from typing import Any

import aiohttp
import pytest


@pytest.mark.parametrize("name", ["peers", "links", "models", "plans", "sessions"])
async def test_listings(http: aiohttp.ClientSession, name: str) -> None:
    async with http.get(f"/mesh/v1/{name}") as response:
        body = await response.json()
    assert set(body) == {"object", "data"}
    assert body["object"] == "list"
    assert isinstance(body["data"], list)


async def test_self(http: aiohttp.ClientSession) -> None:
    async with http.get("/mesh/v1/self") as response:
        assert (await response.json())["name"] == "here"


async def test_events_open_at_once_and_come_as_they_happen(http: aiohttp.ClientSession) -> None:
    async with http.get("/mesh/v1/events") as response:
        lines = [await response.content.readline() for _ in range(3)]
    assert lines == [b": open\n", b"\n", b'data: {"type":"peer_joined","at":1.0}\n']


async def test_plan(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/plan", json={"model": "words", "objective": "memory", "what_if": ["+b ram=8GiB"]}) as response:
        assert await response.json() == {"model": "words", "objective": "memory", "stages": []}
    async with http.post("/mesh/v1/plan", json={"model": "other"}) as response:
        assert response.status == 404
    async with http.post("/mesh/v1/plan", json={"model": "words", "objective": "luck"}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "objective"


async def test_place_streams_its_progress(http: aiohttp.ClientSession, events_of: Any) -> None:
    async with http.post("/mesh/v1/place", json={"model": "words", "min_peers": 2}) as response:
        *steps, done = await events_of(response)
    assert done == "[DONE]"
    assert [(step["state"], step["progress"], step["layers"]) for step in steps] == [
        ("loading", 0.5, [0, 2]),
        ("active", 1.0, [0, 2]),
    ]


async def test_place_that_fails_under_way_ends_with_an_error_event(http: aiohttp.ClientSession, events_of: Any) -> None:
    async with http.post("/mesh/v1/place", json={"model": "breaks"}) as response:
        assert response.status == 200
        events = await events_of(response)
    assert events[-1]["error"]["code"] == "peer_lost"


async def test_place_that_can_not_begin_is_refused(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/place", json={"model": "missing"}) as response:
        assert response.status == 404
        assert (await response.json())["error"]["param"] == "model"


async def test_unplace(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/unplace", json={"model": "words"}) as response:
        assert await response.json() == {"model": "words", "freed_bytes": 1024}


async def test_probe_links(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/links/probe") as response:
        assert await response.json() == {"object": "list", "data": [{"peer": "q" * 52, "rtt_s": 0.001}]}
