"""The bytes of event streams: opening, keep-alive, back-pressure and end."""

import asyncio
import re
from typing import Any

import aiohttp
import pytest

from meshd.api.http.server import Server
from meshd.api.http.services import ClientLimits

CHAT = {"model": "words", "messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 4}


async def test_a_chat_stream_byte_for_byte(http: aiohttp.ClientSession) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"max_tokens": 1, "temperature": 0}) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert response.headers["Cache-Control"] == "no-cache"
        text = await response.text()
    events = text.split("\n\n")
    assert re.fullmatch(
        r'id: 0\ndata: {"id":"chatcmpl-[0-9a-f]{32}","created":\d{10},"model":"words","system_fingerprint":"fp_[0-9a-f]{10}",'
        r'"object":"chat.completion.chunk","choices":\[{"index":0,"delta":{"role":"assistant","content":"","refusal":null},'
        r'"logprobs":null,"finish_reason":null}\],"service_tier":"default"}',
        events[0],
    )
    assert '"delta":{"content":" große"},"logprobs":null,"finish_reason":null' in events[1]
    assert '"delta":{},"logprobs":null,"finish_reason":"length"' in events[2]
    assert [event.split("\n")[0] for event in events[:3]] == ["id: 0", "id: 1", "id: 2"]
    assert events[3:] == ["data: [DONE]", ""]


class TestKeepAlive:
    @pytest.fixture
    def limits(self) -> ClientLimits:
        return ClientLimits(keep_alive_s=0.01)

    async def test_comments_are_sent_during_the_prefill(self, http: aiohttp.ClientSession) -> None:
        async with http.post("/v1/chat/completions", json=CHAT | {"model": "prefills"}) as response:
            lines = [await response.content.readline() for _ in range(7)]
        assert lines[1].startswith(b"data: ")
        assert lines[3:7] == [b": keep-alive\n", b"\n"] * 2


async def test_a_request_that_waits_for_its_turn_gets_its_headers_at_once(http: aiohttp.ClientSession, coordinator: Any) -> None:
    async with http.post("/v1/chat/completions", json=CHAT | {"model": "queued", "hint": 1}) as response:
        assert response.status == 200
        assert response.headers["x-meshd-ignored"] == "hint"
        assert await response.content.readline() == b": waiting\n"
        assert coordinator.waiting == 1
        coordinator.turn.set()
        rest = await response.text()
    assert re.search(r"^: x-meshd-plan: here:0-1,there:1-2$", rest, re.MULTILINE)
    assert rest.endswith("data: [DONE]\n\n")


async def test_an_error_after_the_wait_is_the_last_event(http: aiohttp.ClientSession, coordinator: Any, events_of: Any) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/responses", {"input": "x", "stream": True})):
        coordinator.full = True
        coordinator.turn.clear()
        async with http.post(path, json=body | {"model": "queued"}) as response:
            await response.content.readline()
            coordinator.turn.set()
            [event] = await events_of(response)
        assert (response.status, event["error"]["code"], event["error"]["type"]) == (200, "overloaded", "rate_limit_error")


async def test_a_whole_answer_that_waited_in_vain_has_its_own_status(http: aiohttp.ClientSession, coordinator: Any) -> None:
    coordinator.full = True
    coordinator.turn.set()
    async with http.post("/v1/chat/completions", json=CHAT | {"model": "queued", "stream": False}) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "3")


class TestHeaders:
    @pytest.fixture
    def limits(self) -> ClientLimits:
        return ClientLimits(headers_s=0.05, keep_alive_s=0.01)

    async def test_any_stream_has_its_headers_after_some_time(self, http: aiohttp.ClientSession) -> None:
        async with http.post("/mesh/v1/place", json={"model": "stalls"}) as response:
            assert response.status == 200
            lines = [await response.content.readline() for _ in range(4)]
        assert lines == [b": waiting\n", b"\n", b": keep-alive\n", b"\n"]


class TestSlowReader:
    @pytest.fixture
    def limits(self) -> ClientLimits:
        return ClientLimits(write_s=0.2)

    async def test_a_client_that_reads_nothing_is_disconnected_and_its_answers_end(
        self, server: Server, coordinator: Any, telemetry: Any
    ) -> None:
        _, writer = await asyncio.open_connection(*server.address, limit=1024)
        body = b'{"model": "words", "prompt": "x", "stream": true, "max_tokens": 4000, "n": 8, "logprobs": 20}'
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await coordinator.until(lambda c: c.running == 8)
        await coordinator.until(lambda c: c.running == 0, within_s=30.0)  # 4,000 words of 8 answers fill the sockets first
        await server.aclose()
        assert telemetry.registry.get_sample_value("meshd_requests_total", {"route": "/v1/completions", "outcome": "client_gone"})
        writer.close()


async def test_closing_ends_streams_with_an_error_event_within_a_second(http: aiohttp.ClientSession, server: Server) -> None:
    chat = http.post("/v1/chat/completions", json=CHAT | {"model": "prefills"})
    async with chat as answer, http.get("/mesh/v1/events") as events:
        await answer.content.readline()
        await events.content.readline()
        async with asyncio.timeout(1):
            await server.aclose()
        for stream in (answer, events):
            rest = await stream.text()
            assert '"code":"cancelled"' in rest
            assert "[DONE]" not in rest
