"""Answers start when they are admitted, and end when their client disconnects, even if nothing is being sent to it."""

import asyncio
import json
import socket
import struct
from typing import Any

import aiohttp
import pytest

from fake_api.words import NUMERICS, WordsGeneration
from meshd.api.http.server import Server

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


async def post(server: Server, path: str, body: dict[str, Any]) -> asyncio.StreamWriter:
    _, writer = await asyncio.open_connection(*server.address)
    data = json.dumps(body).encode()
    writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return writer


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("reset", [False, True], ids=["fin", "reset"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("model", ["prefills", "endless"])
async def test_an_answer_ends_when_its_client_closes(
    server: Server, coordinator: Any, telemetry: Any, model: str, stream: bool, reset: bool, count: int
) -> None:
    body = CHAT | {"model": model, "stream": stream, "n": count, "max_tokens": 4000}
    writer = await post(server, "/v1/chat/completions", body)
    await coordinator.until(lambda c: c.running == count)
    if reset:
        linger_none = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_none)
    writer.close()
    await coordinator.until(lambda c: c.running == 0, within_s=1)
    await server.aclose()
    labels = {"route": "/v1/chat/completions", "outcome": "client_gone"}
    assert telemetry.registry.get_sample_value("meshd_requests_total", labels) == 1


async def test_a_queued_request_leaves_the_queue_when_its_client_closes(server: Server, coordinator: Any) -> None:
    writer = await post(server, "/v1/completions", {"model": "queued", "prompt": "hello"})
    await coordinator.until(lambda c: c.waiting == 1)
    writer.close()
    await coordinator.until(lambda c: c.waiting == 0, within_s=1)


async def test_the_other_answers_end_when_one_is_refused(server: Server, coordinator: Any) -> None:
    body = {"model": "prefills", "prompt": ["short", "long " * 5000]}
    writer = await post(server, "/v1/completions", body)
    await coordinator.until(lambda c: len(c.requests) == 2)
    await coordinator.until(lambda c: c.running == 0, within_s=1)
    writer.close()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_closing_the_server_cancels_all_answers_within_a_second(server: Server, coordinator: Any, stream: bool) -> None:
    writer = await post(server, "/v1/chat/completions", CHAT | {"model": "prefills", "stream": stream})
    await coordinator.until(lambda c: c.running == 1)
    async with asyncio.timeout(1):
        await server.aclose()
    assert coordinator.running == 0
    writer.close()


async def test_closing_the_server_answers_a_whole_request_with_an_error(server: Server, coordinator: Any) -> None:
    reader, writer = await asyncio.open_connection(*server.address)
    data = json.dumps(CHAT | {"model": "prefills"}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    await coordinator.until(lambda c: c.running == 1)
    await server.aclose()
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b'"code":"cancelled"' in answer
    writer.close()


async def test_nothing_is_sent_before_admission(http: aiohttp.ClientSession, coordinator: Any) -> None:
    asking = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT | {"model": "queued", "stream": True}))
    await coordinator.until(lambda c: c.waiting == 1)
    assert not asking.done()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


@pytest.mark.parametrize("count", [1, 2])
async def test_the_predicted_time_of_the_first_token_includes_the_wait(
    http: aiohttp.ClientSession, coordinator: Any, count: int
) -> None:
    asking = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT | {"model": "queued", "n": count, "max_tokens": 4}))
    await coordinator.until(lambda c: c.waiting == count)
    await asyncio.sleep(0.3)
    coordinator.turn.set()
    async with await asking as response:
        assert float(response.headers["x-meshd-predicted-ttft-ms"]) >= 300 + 1000 * WordsGeneration.predicted_ttft_s


async def test_headers_come_with_admission(http: aiohttp.ClientSession) -> None:
    for path, prompt in (("/v1/chat/completions", {"messages": CHAT["messages"]}), ("/v1/completions", {"prompt": "hello"})):
        async with http.post(path, json={"model": "prefills", "stream": True} | prompt) as response:
            assert response.status == 200
            assert len(response.headers["x-meshd-session"]) == 32
            assert response.headers["x-meshd-numerics"] == NUMERICS


async def test_several_answers_start_before_all_are_admitted(http: aiohttp.ClientSession, coordinator: Any, events_of: Any) -> None:
    """There are more prompts than may run at a time. Those that wait are admitted as earlier answers end."""
    body = {"model": "words", "prompt": [f"p{i}" for i in range(20)], "stream": True, "max_tokens": 2}
    async with http.post("/v1/completions", json=body) as response:
        assert len(response.headers["x-meshd-session"].split(",")) <= 8
        events = await events_of(response)
    finished = sorted(event["choices"][0]["index"] for event in events[:-1] if event["choices"][0]["finish_reason"])
    assert finished == list(range(20))
    assert coordinator.running == 0
