"""The feed of a daemon's events, over real HTTP: it resumes, and says what is wrong."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from aiohttp import web

from fake_api.rows_server import Api
from meshd.tui import feed
from meshd.tui.feed import Connected, Disconnected, Feed
from monitor.recorded import Item


def serve(api: Api, *streams: list[bytes], then: tuple[int, str] = (503, "")) -> None:
    """Answer requests for events with these streams, one after the other, and then with the status and the text `then`."""
    waiting = list(streams)

    async def handler(request: web.Request) -> web.StreamResponse:
        if not waiting:
            return web.Response(status=then[0], text=then[1])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in waiting.pop(0):
            await response.write(chunk)
        return response

    api.routes["GET", "/mesh/v1/events"] = handler


async def first(feed: Feed, count: int) -> list[Item]:
    items: list[Item] = []

    async def read() -> AsyncIterator[Item]:
        async with aclosing(feed.events()) as events:  # type: ignore[type-var]
            async for item in events:
                yield item

    async with asyncio.timeout(10):
        async for item in read():
            items.append(item)
            if len(items) == count:
                break
    return items


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "_RETRY_S", 0.01)


async def test_events_come_with_comments_between_and_a_lost_connection_is_resumed(api: Api) -> None:
    serve(
        api,
        [b": open\n\n", b'data: {"type":"row"}\n\n', b'id: 7\ndata: {"type":"peer"}\n', b"\n: keep-alive\n\n"],
        [b'id: 8\ndata: {"type":"log"}\n\n'],
    )
    items = await first(Feed(api.url, "secret", _retry_s=0.01), 6)
    assert items == [
        Connected(resumed=False),
        {"type": "row"},
        {"type": "peer"},
        Disconnected("the daemon has ended the stream", 0.01),
        Connected(resumed=True),
        {"type": "log"},
    ]
    assert [headers.get("Last-Event-ID") for headers in api.headers] == [None, "7"]
    assert {headers["Authorization"] for headers in api.headers} == {"Bearer secret"}


async def test_a_daemon_that_refuses_is_asked_less_and_less_often_with_its_reason(api: Api) -> None:
    serve(api, then=(401, '{"error": {"message": "the API key is wrong"}}'))
    items = await first(Feed(api.url, _retry_s=0.01), 3)
    assert items == [Disconnected("the API key is wrong", retry_s) for retry_s in (0.01, 0.02, 0.04)]


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ((502, "<html>"), "the daemon answers 502"),
        ((404, '{"detail": "?"}'), "the daemon answers 404"),
    ],
)
async def test_a_server_that_is_no_daemon(api: Api, then: tuple[int, str], reason: str) -> None:
    serve(api, then=then)
    (item,) = await first(Feed(api.url), 1)
    assert isinstance(item, Disconnected)
    assert item.reason == reason


async def test_an_error_in_the_stream_ends_it(api: Api) -> None:
    serve(api, [b'data: {"error":{"message":"this peer is shutting down"}}\n\n'])
    assert (await first(Feed(api.url, _retry_s=0.01), 2))[1] == Disconnected("this peer is shutting down", 0.01)


async def test_nothing_listens() -> None:
    (item,) = await first(Feed("http://127.0.0.1:1"), 1)
    assert isinstance(item, Disconnected)
    assert "127.0.0.1:1" in item.reason
