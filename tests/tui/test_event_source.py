"""The thread that reads a daemon's events, over real sockets."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager

import pytest

from meshd.tui import event_source
from meshd.tui.event_source import EventSource, Numbered

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@contextmanager
def listening() -> Iterator[tuple[str, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/events", server


def accepted(server: socket.socket) -> socket.socket:
    connection, _ = server.accept()
    connection.settimeout(10)
    connection.recv(1 << 16)
    return connection


def numbered(number: int) -> bytes:
    return b"id: %d\ndata: %s\n\n" % (number, json.dumps({"type": "log", "text": "x" * 500}).encode())


async def no_thread() -> None:
    for thread in threading.enumerate():
        if thread.name == "events":
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()


async def read_all(source: EventSource) -> None:
    async with aclosing(source.batches()) as batches:
        async for _ in batches:
            pass


async def test_events_that_came_before_anybody_asked_are_the_first_batch() -> None:
    with listening() as (url, server):
        source = EventSource(url, {})
        with accepted(server) as connection:
            connection.sendall(HEAD + numbered(1) + numbered(2)[:-20])
            async with aclosing(source.batches()) as batches:
                assert await anext(batches) == []
                got: list[Numbered] = await anext(batches)
                connection.sendall(numbered(2)[-20:])
                got += await anext(batches)
    assert [number for number, _ in got] == ["1", "2"]
    await no_thread()


async def test_a_silent_stream_is_left_at_once() -> None:
    with listening() as (url, server):
        source = EventSource(url, {})
        with accepted(server) as connection:
            connection.sendall(HEAD)
            async with aclosing(source.batches()) as batches:
                await anext(batches)
            await no_thread()
            assert connection.recv(1) == b""


async def test_nothing_is_read_while_many_events_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_source, "_WAITING_BYTES", 100_000)
    with listening() as (url, server):
        source = EventSource(url, {})
        with accepted(server) as connection:
            connection.sendall(HEAD)
            connection.setblocking(False)
            sent, data, until = 0, b"".join(map(numbered, range(1, 100))), time.monotonic() + 1
            while time.monotonic() < until:
                try:
                    sent += connection.send(data[sent % len(data) :])
                except BlockingIOError:
                    await asyncio.sleep(0.01)
            assert source._waiting < 100_000 + 2 * (1 << 16)  # while the sockets hold much more
            assert sent > 2 * 100_000
            source.close()
    await no_thread()


async def test_a_line_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_source, "_LINE_BYTES", 1000)
    with listening() as (url, server):
        source = EventSource(url, {})
        with accepted(server) as connection:
            connection.sendall(HEAD + b"data: {" + b"x" * 2000)
            with pytest.raises(ConnectionError, match="too long"):
                await read_all(source)


@pytest.mark.parametrize("line", [b'{"error": "no"}', b"{" + b'"a":[' * 100_000, b"{]"])
async def test_whatever_a_server_sends_the_reader_hears_of_the_end(line: bytes) -> None:
    with listening() as (url, server):
        source = EventSource(url, {})
        with accepted(server) as connection:
            connection.sendall(HEAD + b"data: " + line + b"\n\n")
            with pytest.raises(ConnectionError):
                await asyncio.wait_for(read_all(source), 10)
    await no_thread()
