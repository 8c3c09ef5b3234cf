"""The routes under `/mesh/v1/`, over real HTTP."""

from typing import Any

import aiohttp
import pytest

from fake_api.api_keys import LOCAL

SESSION = "5e" * 16
"""The session that the fixtures' `WordsMesh` runs."""


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


async def test_the_event_stream_opens_at_once_and_sends_events_as_they_happen(http: aiohttp.ClientSession) -> None:
    async with http.get("/mesh/v1/events") as response:
        lines = [await response.content.readline() for _ in range(3)]
    assert lines == [b": open\n", b"\n", b'data: {"type":"row","list":"models","key":"words","row":{"name":"words"}}\n']


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


async def test_a_place_that_fails_midway_ends_with_an_error_event(http: aiohttp.ClientSession, events_of: Any) -> None:
    async with http.post("/mesh/v1/place", json={"model": "breaks"}) as response:
        assert response.status == 200
        events = await events_of(response)
    assert events[-1]["error"]["code"] == "peer_lost"


async def test_a_place_of_an_unknown_model_is_refused(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/place", json={"model": "missing"}) as response:
        assert response.status == 404
        assert (await response.json())["error"]["param"] == "model"


async def test_unplace(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/unplace", json={"model": "words"}) as response:
        assert await response.json() == {"model": "words", "freed_bytes": 1024}


async def test_probe_links(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/links/probe") as response:
        assert await response.json() == {"object": "list", "data": [{"peer": "q" * 52, "rtt_s": 0.001}]}


async def test_drain(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/drain", json={"peer": "there"}) as response:
        assert await response.json() == {"peer": "q" * 52, "name": "there", "sessions_left": 0}
    async with http.post("/mesh/v1/drain", json={"peer": "there", "timeout_s": 0.5}) as response:
        assert (await response.json())["sessions_left"] == 2
    async with http.post("/mesh/v1/drain", json={"peer": "there", "timeout_s": 0.5, "undo": True}) as response:
        assert (await response.json())["sessions_left"] == 0


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [({"peer": "nobody"}, 503, None), ({}, 400, "peer"), ({"peer": "there", "timeout_s": -1}, 400, "timeout_s")],
)
async def test_drain_is_refused(http: aiohttp.ClientSession, body: dict[str, Any], status: int, param: str | None) -> None:
    async with http.post("/mesh/v1/drain", json=body) as response:
        assert response.status == status
        assert (await response.json())["error"]["param"] == param


async def test_migrate(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/migrate", json={"session": SESSION, "target": "there", "source": "attic"}) as response:
        assert await response.json() == {"session": SESSION, "plan": "attic:0-1,there:1-2", "pause_ms": 1.5}
    async with http.post("/mesh/v1/migrate", json={"session": "0" * 32, "target": "there"}) as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "session_not_found"
    async with http.post("/mesh/v1/migrate", json={"session": SESSION, "target": "there", "source": "there"}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "source"


async def test_story(http: aiohttp.ClientSession) -> None:
    async with http.get(f"/mesh/v1/sessions/{SESSION}/story") as response:
        body = await response.json()
    assert body["data"] == [{"at_s": 0.0, "peer": "p" * 52, "name": "here", "what": "planned", "epoch": 1}]
    async with http.get(f"/mesh/v1/sessions/{'0' * 32}/story") as response:
        assert response.status == 404


async def test_an_invite_is_streamed_listed_without_its_code_and_closed_when_its_client_leaves(http: aiohttp.ClientSession) -> None:
    owner = {"x-api-key": LOCAL}
    async with http.post("/mesh/v1/invites", json={}) as response:
        assert response.status == 401  # although the API is open to this machine
    async with http.post("/mesh/v1/invites", json={"minutes": 61}, headers=owner) as response:
        assert response.status == 400
    async with http.post("/mesh/v1/invites", json={}, headers=owner) as response:
        assert b'"code":"7-amber-lion"' in await response.content.readline()
        async with http.get("/mesh/v1/invites") as listed:
            (row,) = (await listed.json())["data"]
        assert (row["state"], row["code"]) == ("waiting", "")
        async with http.delete("/mesh/v1/invites", headers=owner) as closed:
            assert await closed.json() == {"closed": 1}
    for _ in range(1000):
        async with http.get("/mesh/v1/invites") as listed:
            if not (await listed.json())["data"]:
                break
    else:
        pytest.fail("the invite stays open without its client")


async def test_trace(http: aiohttp.ClientSession) -> None:
    async with http.get(f"/mesh/v1/sessions/{SESSION}/trace") as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        assert (await response.json())["traceEvents"] == []
    async with http.get(f"/mesh/v1/sessions/{'0' * 32}/trace") as response:
        assert response.status == 404


async def test_doctor_streams_what_each_check_finds(http: aiohttp.ClientSession, events_of: Any) -> None:
    async with http.post("/mesh/v1/doctor", json={}) as response:
        *steps, end = await events_of(response)
    assert end == "[DONE]"
    assert [(step["check"], step["done"], step["total"]) for step in steps] == [("firewall", 1, 2), ("swap", 2, 2)]
    assert steps[0]["results"][0]["status"] == "wrong"
    assert steps[0]["results"][0]["mend"] == "sudo ufw allow 6375/tcp"


async def test_only_one_doctor_runs_at_a_time(http: aiohttp.ClientSession) -> None:
    async with http.post("/mesh/v1/doctor", json={"model": "busy"}) as response:
        assert response.status == 429


async def test_pull_streams_its_progress(http: aiohttp.ClientSession, events_of: Any) -> None:
    async with http.post("/mesh/v1/pull", json={"model": "words"}) as response:
        *steps, done = await events_of(response)
    assert done == "[DONE]"
    assert [(step["phase"], step["done_bytes"], step["total_bytes"]) for step in steps] == [
        ("downloading", 512, 1024),
        ("done", 1024, 1024),
    ]
    async with http.post("/mesh/v1/pull", json={"model": "breaks"}) as response:
        assert (await events_of(response))[-1]["error"]["code"] == "download_failed"


@pytest.mark.parametrize(
    ("body", "status"), [({"model": "missing"}, 404), ({"model": ""}, 400), ({"model": "x" * 5000}, 400), ({}, 400)]
)
async def test_a_wrong_pull_is_refused(http: aiohttp.ClientSession, body: dict[str, Any], status: int) -> None:
    async with http.post("/mesh/v1/pull", json=body) as response:
        assert response.status == status


async def test_a_model_is_removed_by_a_name_with_slashes(http: aiohttp.ClientSession) -> None:
    async with http.delete("/mesh/v1/models/hf:org/words") as response:
        assert await response.json() == {"model": "hf:org/words", "freed_bytes": 1024}
    async with http.delete("/mesh/v1/models/other") as response:
        assert response.status == 404


async def test_cancel(http: aiohttp.ClientSession) -> None:
    async with http.delete(f"/mesh/v1/sessions/{'0' * 32}") as response:
        assert await response.json() == {"session": "0" * 32}
    async with http.delete(f"/mesh/v1/sessions/{'1' * 32}") as response:
        assert response.status == 404


async def test_the_catalogue_lists_short_names(http: aiohttp.ClientSession) -> None:
    async with http.get("/mesh/v1/catalogue") as response:
        rows = (await response.json())["data"]
    (row,) = (row for row in rows if row["name"] == "smollm2:135m")
    assert set(row) == {"name", "ref", "bytes", "licence"}
