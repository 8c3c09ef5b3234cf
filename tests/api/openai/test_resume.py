"""A broken stream can be resumed at any peer with the same events, and a client that disconnects frees what its answer held."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from fake_api.words import WordsCoordinator
from meshd.agents.service import GenerationRequest
from meshd.api.http.app import create_app
from meshd.api.http.server import Server, serve
from meshd.clock import SystemClock

MESSAGES = [{"role": "user", "content": "hello"}]
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 12, "logprobs": True, "top_logprobs": 2},
    "/v1/completions": {"prompt": "hello", "echo": True, "max_tokens": 12},
    "/v1/responses": {"input": "hello", "max_output_tokens": 12, "instructions": "be brief", "metadata": {"a": "b"}},
}
each_route = pytest.mark.parametrize("path", list(ASKED))


def body(path: str, **fields: Any) -> dict[str, Any]:
    """Make the body of a request for a stream."""
    usage = {} if path == "/v1/responses" else {"stream_options": {"include_usage": True}}
    return {"model": "words", "seed": 5, "stream": True} | ASKED[path] | usage | fields


def whole(path: str, **fields: Any) -> dict[str, Any]:
    """Make the body of a request for a whole answer."""
    return {name: value for name, value in body(path, **fields).items() if name not in ("stream", "stream_options")}


def id_of(text: str) -> str:
    return re.search(r'"id":"((?:resp_|chatcmpl-|cmpl-)[0-9a-f]{32})"', text)[1]


def frames(text: str) -> list[str]:
    """Split the text of a stream into its events, and drop the comments."""
    return [frame for frame in text.split("\n\n") if frame and not frame.startswith(":")]


async def read_events(response: aiohttp.ClientResponse, count: int) -> str:
    """Read `count` events of a stream, which must have that many."""
    text = ""
    while len(frames(text)) < count or not text.endswith("\n\n"):
        text += (await response.content.readline()).decode()
    return text


@pytest.fixture
async def other(coordinator: WordsCoordinator) -> AsyncIterator[WordsCoordinator]:
    """The coordinator of another peer of the same mesh."""
    other = WordsCoordinator("elsewhere", coordinator.records)
    yield other
    await other.aclose()


@pytest.fixture
async def elsewhere(other: WordsCoordinator, telemetry: Any) -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client of the other peer's API."""
    app = create_app(other, other, telemetry, api_key=None, clock=SystemClock())  # the second argument, the mesh, is unused
    server = await serve(app, "127.0.0.1", 0)
    async with aiohttp.ClientSession(server.url, timeout=aiohttp.ClientTimeout(10)) as session:
        yield session
    await server.aclose()


@each_route
async def test_each_event_has_the_next_number(http: aiohttp.ClientSession, path: str) -> None:
    async with http.post(path, json=body(path)) as response:
        events = frames(await response.text())
    numbered = [int(re.search("^id: ([0-9]+)$", event, re.MULTILINE)[1]) for event in events if event != "data: [DONE]"]
    assert numbered == list(range(len(numbered)))
    assert (events[-1] == "data: [DONE]") == (path != "/v1/responses")


@each_route
async def test_a_stream_can_be_resumed_at_another_peer_after_every_event(
    http: aiohttp.ClientSession, elsewhere: aiohttp.ClientSession, path: str
) -> None:
    async with http.post(path, json=body(path)) as response:
        text = await response.text()
        headers = response.headers
    events = frames(text)
    numbered = [event for event in events if event != "data: [DONE]"]
    for after in range(-1, len(numbered) + 2):
        query = f"&starting_after={after}" if after >= 0 else ""
        async with elsewhere.get(f"/v1/responses/{id_of(text)}?stream=true{query}") as response:
            assert response.status == 200
            assert response.headers["x-meshd-session"] == headers["x-meshd-session"]
            assert response.headers["x-meshd-plan"] == "elsewhere:0-1,there:1-2"
            assert frames(await response.text()) == numbered[after + 1 :] + events[len(numbered) :]


@each_route
@pytest.mark.parametrize("count", [1, 2, 5, 9])
async def test_a_broken_stream_is_resumed_at_another_peer(
    http: aiohttp.ClientSession, elsewhere: aiohttp.ClientSession, coordinator: Any, other: Any, path: str, count: int
) -> None:
    async with http.post(path, json=body(path, model="endless")) as response:
        text = await read_events(response, count)
    await coordinator.until(lambda c: c.running == 0)
    async with elsewhere.get(f"/v1/responses/{id_of(text)}?stream=true&starting_after={len(frames(text)) - 1}") as response:
        rest = await response.text()
    assert other.running == 0
    async with http.get(f"/v1/responses/{id_of(text)}?stream=true") as response:
        assert frames(text) + frames(rest) == frames(await response.text())


@each_route
async def test_a_client_that_disconnects_suspends_its_answer(http: aiohttp.ClientSession, coordinator: Any, path: str) -> None:
    async with http.post(path, json=body(path, model="prefills")) as response:
        session = response.headers["x-meshd-session"]
    await coordinator.until(lambda c: c.running == 0)
    assert coordinator.records[session].status == "suspended"


@each_route
async def test_a_client_that_disconnects_without_the_id_cancels_its_answer(
    http: aiohttp.ClientSession, coordinator: Any, path: str
) -> None:
    asking = asyncio.create_task(http.post(path, json=whole(path, model="prefills")))
    await coordinator.until(lambda c: c.running == 1)
    asking.cancel()
    await coordinator.until(lambda c: c.running == 0)
    assert [record.status for record in coordinator.records.values()] == ["cancelled"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
async def test_a_client_that_disconnects_cancels_an_answer_that_is_not_stored(
    http: aiohttp.ClientSession, coordinator: Any, path: str
) -> None:
    async with http.post(path, json=body(path, model="endless", store=False)) as response:
        text = await read_events(response, 2)
    await coordinator.until(lambda c: c.running == 0)
    assert [record.status for record in coordinator.records.values()] == ["cancelled"]
    async with http.get(f"/v1/responses/{id_of(text)}") as response:
        assert response.status == 404


@pytest.mark.parametrize(("path", "fields"), [("/v1/chat/completions", {"n": 2}), ("/v1/completions", {"prompt": ["a", "b"]})])
async def test_several_answers_have_no_event_numbers_and_are_not_stored(
    http: aiohttp.ClientSession, coordinator: Any, path: str, fields: dict[str, Any]
) -> None:
    async with http.post(path, json=body(path, **fields)) as response:
        text = await response.text()
        sessions = response.headers["x-meshd-session"].split(",")
    assert "id: " not in text
    assert [coordinator.records[session].request.store for session in sessions] == [False, False]
    for answer_id in (id_of(text), *(f"chatcmpl-{session}" for session in sessions)):
        async with http.get(f"/v1/responses/{answer_id}") as response:
            assert response.status == 404


async def test_an_id_with_the_prefix_of_another_route_is_not_found(http: aiohttp.ClientSession, coordinator: Any) -> None:
    async with http.post("/v1/chat/completions", json=body("/v1/chat/completions", model="endless", max_tokens=4000)) as response:
        session, secret = response.headers["x-meshd-session"], response.headers["x-meshd-answer"].removeprefix("chatcmpl-")
        wrong = (f"resp_{secret}", f"cmpl-{secret}", secret, f"chatcmpl-{secret}0", "chatcmpl-", "resp_x", f"chatcmpl-{session}")
        for answer_id in wrong:
            for method, suffix in (("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel")):
                async with http.request(method, f"/v1/responses/{answer_id}{suffix}") as refused:
                    assert refused.status == 404
                    assert (await refused.json())["error"]["code"] == "session_not_found"
        assert coordinator.running == 1


async def test_last_event_id_resumes_the_stream_after_that_event(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/chat/completions", json=body("/v1/chat/completions")) as response:
        text = await response.text()
    path = f"/v1/responses/{id_of(text)}?stream=true"
    async with http.get(path, headers={"Last-Event-ID": "4"}) as response:
        assert frames(await response.text()) == frames(text)[5:]
    async with http.get(f"{path}&starting_after=1", headers={"Last-Event-ID": "7"}) as response:
        assert frames(await response.text()) == frames(text)[8:]
    async with http.get(path, headers={"Last-Event-ID": "x"}) as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == "Last-Event-ID"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_the_whole_object_of_a_streamed_answer_can_be_read(
    http: aiohttp.ClientSession, elsewhere: aiohttp.ClientSession, path: str
) -> None:
    async with http.post(path, json=body(path, model="endless")) as response:
        text = await read_events(response, 3)
    async with elsewhere.get(f"/v1/responses/{id_of(text)}") as response:
        found = await response.json()
    async with http.post(path, json=whole(path, model="endless")) as response:
        again = await response.json()
    assert found["id"] == id_of(text)
    assert {**found, "id": "", "created": 0} == {**again, "id": "", "created": 0}


async def test_a_reader_at_another_peer_takes_over_the_answer(
    http: aiohttp.ClientSession, elsewhere: aiohttp.ClientSession, coordinator: Any, other: Any
) -> None:
    path = "/v1/chat/completions"
    async with http.post(path, json=body(path, model="endless", max_tokens=4000)) as first:
        text = await read_events(first, 2)
        async with elsewhere.get(f"/v1/responses/{id_of(text)}?stream=true&starting_after=1") as second:
            rest = await read_events(second, 2)
            assert (coordinator.running, other.running) == (0, 1)
            last = frames(await first.text())[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"
    assert "starting_after=" in last
    assert frames(rest)[0].startswith("id: 2\n")


@each_route
async def test_an_error_in_mid_stream_says_how_to_resume(http: aiohttp.ClientSession, elsewhere: Any, path: str) -> None:
    async with http.post(path, json=body(path, model="breaks")) as response:
        *events, last = frames(await response.text())
    assert "id: " not in last
    data = json.loads(last.partition("data: ")[2])
    message = data.get("error", data)["message"]
    assert "peer there is lost; send the request again" in message
    resume_path = re.search(r"resume the answer with GET (\S+) at any peer", message)[1]
    assert resume_path.endswith(f"?stream=true&starting_after={len(events) - 1}")
    async with elsewhere.get(resume_path) as response:
        rest = frames(await response.text())
    async with elsewhere.get(resume_path.partition("&")[0]) as response:
        assert frames(await response.text()) == events + rest
    assert "length" in "".join(rest) or "max_output_tokens" in "".join(rest)


@each_route
async def test_an_error_of_a_whole_answer_says_how_to_resume(http: aiohttp.ClientSession, path: str) -> None:
    async with http.post(path, json=whole(path, model="breaks")) as response:
        assert response.status == 502
        message = (await response.json())["error"]["message"]
    async with http.get(re.search(r"GET (\S+)", message)[1]) as response:
        assert response.status == 200
        assert len(frames(await response.text())) > 12


@each_route
async def test_an_answer_that_failed_for_good_has_no_hint_to_resume(http: aiohttp.ClientSession, path: str) -> None:
    async with http.post(path, json=body(path, model="fails")) as response:
        text = await response.text()
    assert "could not go on" in text
    assert "resume the answer" not in text
    async with http.get(f"/v1/responses/{id_of(text)}?stream=true") as response:
        assert await response.text() == text


async def test_the_error_of_a_shutdown_says_how_to_resume(
    http: aiohttp.ClientSession, server: Server, coordinator: Any, elsewhere: Any
) -> None:
    path = "/v1/chat/completions"
    asking = asyncio.create_task(http.post(path, json=whole(path, model="prefills")))
    await coordinator.until(lambda c: c.running == 1)
    async with http.post(path, json=body(path, model="endless", max_tokens=4000)) as response:
        begun = await read_events(response, 3)
        closing = asyncio.create_task(server.aclose())
        text = begun + await response.text()
        await closing
    assert '"code":"cancelled"' in frames(text)[-1]
    resume_path = re.search(r"GET (\S+)", frames(text)[-1])[1]
    async with elsewhere.get(resume_path) as response:
        assert frames(await read_events(response, 1))[0].startswith(f"id: {len(frames(text)) - 1}\n")
    error = (await (await asking).json())["error"]
    assert error["message"].endswith("?stream=true at any peer")
    assert next(iter(coordinator.records.values())).status == "suspended"


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("starting_after=3", "starting_after"),
        ("stream=true&starting_after=-1", "starting_after"),
        ("stream=true&starting_after=x", "starting_after"),
        ("stream=true&starting_after=1&starting_after=2", "starting_after"),
        ("stream=perhaps", "stream"),
        ("include[]=message.output_text.logprobs", "include"),
    ],
)
async def test_the_error_names_the_wrong_parameter(http: aiohttp.ClientSession, query: str, param: str) -> None:
    async with http.post("/v1/responses", json=whole("/v1/responses")) as response:
        answer_id = (await response.json())["id"]
    async with http.get(f"/v1/responses/{answer_id}?{query}") as response:
        assert response.status == 400
        assert (await response.json())["error"]["param"] == param


@pytest.mark.parametrize("query", ["stream=false", "include_obfuscation=false", "include[]=message.output_text.logprobs"])
async def test_neutral_parameters_are_accepted(http: aiohttp.ClientSession, query: str) -> None:
    asked = whole("/v1/responses", include=["message.output_text.logprobs"])
    async with http.post("/v1/responses", json=asked) as response:
        created = await response.json()
    async with http.get(f"/v1/responses/{created['id']}?{query}") as response:
        assert await response.json() == created


async def test_a_request_for_one_answer_is_stored_with_its_renderer(http: aiohttp.ClientSession, coordinator: Any) -> None:
    for path in ASKED:
        async with http.post(path, json=whole(path)):
            pass
    asked: list[GenerationRequest] = coordinator.requests
    assert all(one.store and not one.background and one.renderer for one in asked)
    async with http.post("/v1/responses", json={"model": "words", "input": "x", "background": True}):
        pass
    assert asked[-1].background
