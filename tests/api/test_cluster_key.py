"""The routes under `/mesh/v1/key`, over real HTTP. `tests/cluster/test_exclusion.py` uses them against real daemons."""

import base64
from typing import Any

import aiohttp
import pytest

KEY = "ab" * 32
CHAIN = base64.b64encode(b"chain").decode()


async def test_the_key_is_described_and_rotated(http: aiohttp.ClientSession) -> None:
    async with http.get("/mesh/v1/key") as response:
        assert await response.json() == {"generation": 1, "peers": []}
    async with http.post("/mesh/v1/key", json={"rotation": CHAIN, "key": KEY}) as response:
        assert await response.json() == {"generation": 2, "peers": [], "key": KEY}


async def test_the_owner_key_is_given_to_a_peer(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/key/owner", json={"peer": "b", "key": KEY}) as response:
        assert await response.json() == {"peer": "b" * 52, "name": "b"}
    async with http.post("/mesh/v1/key/owner", json={"peer": "c", "key": KEY}) as response:
        assert response.status == 503


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("key", {"rotation": "!!", "key": KEY}, "rotation"),
        ("key", {"rotation": base64.b64encode(b"other").decode(), "key": KEY}, "rotation"),
        ("key", {"rotation": "A" * 300_000, "key": KEY}, "rotation"),
        ("key", {"rotation": CHAIN, "key": "ab"}, "key"),
        ("key", {"rotation": CHAIN}, "key"),
        ("key/owner", {"peer": "b", "key": "zz" * 32}, "key"),
        ("key/owner", {"peer": "b\n", "key": KEY}, "peer"),
    ],
)
async def test_what_is_malformed_is_refused_and_named(http: aiohttp.ClientSession, path: str, body: Any, param: str) -> None:
    async with http.post(f"/mesh/v1/{path}", json=body) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == param
