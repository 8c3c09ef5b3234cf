"""Runs `meshd top` as a process on a terminal of its own, and serves it events at a chosen rate."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from aiohttp import web

from fake_api.thread_server import served
from monitor.watching import RECORDED

_BURST_S = 0.02
_PAINTED = b"Cluster"
"""Text of the first picture."""


class TopProcess:
    """`meshd top` on a terminal whose output is read and dropped."""

    def __init__(self, api: str, state: Path, columns: int = 120, lines: int = 40) -> None:
        self._terminal, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        command = [sys.executable, "-P", "-m", "meshd", "top", "--api", api, "--state", str(state)]
        self.started = time.monotonic()
        self.painted_at: float | None = None
        self._process = subprocess.Popen(
            command, stdin=side, stdout=side, stderr=side, env=os.environ | {"TERM": "xterm-256color"}, start_new_session=True
        )
        os.close(side)
        self.pid = self._process.pid
        self.drawn_bytes = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        seen = b""
        with contextlib.suppress(OSError):  # the process has closed its side
            while select.select([self._terminal], [], [], 60)[0]:
                data = os.read(self._terminal, 1 << 16)
                self.drawn_bytes += len(data)
                if self.painted_at is None:
                    seen += data
                    if _PAINTED in seen:
                        self.painted_at = time.monotonic()

    def first_paint_s(self, within_s: float = 60.0) -> float:
        """Wait for the first picture. Returns: seconds from the start of the process to it."""
        until = time.monotonic() + within_s
        while self.painted_at is None:
            if time.monotonic() > until or self._process.poll() is not None:
                raise RuntimeError(f"no picture came (exit {self._process.poll()})")
            time.sleep(0.005)
        return self.painted_at - self.started

    def press(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.press("q")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        os.close(self._terminal)


@contextlib.contextmanager
def recorded_daemon(events_s: float) -> Iterator[str]:
    """Serve the recorded events over and over, `events_s` a second, at the address that is yielded."""
    events: list[dict[str, Any]] = [json.loads(line)[1] for line in RECORDED.read_text().splitlines()]

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        number, due = 0, time.monotonic()
        endless = cycle(events)
        with contextlib.suppress(ConnectionError):  # the monitor has ended
            while True:
                due += _BURST_S
                burst = []
                for _ in range(round(events_s * _BURST_S)):
                    number += 1
                    event = _changed(next(endless), number)
                    burst.append(f"id: {number}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n")
                await response.write("".join(burst).encode())
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        return response

    with served(lambda: web.ServerRunner(web.Server(handler), shutdown_timeout=0.1)) as url:
        yield url


def _changed(event: dict[str, Any], number: int) -> dict[str, Any]:
    """Change a figure of the event, so that there is something to draw."""
    if event["type"] == "row" and event["list"] == "sessions":
        return event | {"row": event["row"] | {"tokens": number}}
    if event["type"] == "gone":
        return {"type": "notice", "at": event["at"], "peer": event["peer"], "name": event["name"], "message": "gone", "hint": ""}
    return event
