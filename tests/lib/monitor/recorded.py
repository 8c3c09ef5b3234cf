"""Events of a real cluster, recorded once and played back at once, with the times at which they came."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from meshd.tui.feed import Connected, Disconnected, Feed

Item = dict[str, Any] | Connected | Disconnected
_THIN_S = 4.0
"""Rows change several times a second. A recording has one change of each row in so many seconds."""


class Recording:
    """Collects events with their times, and writes them."""

    def __init__(self) -> None:
        self._lines: list[tuple[float, dict[str, Any]]] = []
        self._kept_at: dict[tuple[str, str], tuple[float, bool]] = {}

    def add(self, at_s: float, event: Mapping[str, Any]) -> None:
        self._lines.append((at_s, dict(event)))

    def write(self, path: Path) -> None:
        """Write one JSON array per line: the seconds since the first event, and the event."""
        began = self._lines[0][0]
        lines = [json.dumps([round(at - began, 3), event], separators=(",", ":")) for at, event in self._thinned()]
        path.write_text("\n".join(lines) + "\n")

    def _thinned(self) -> list[tuple[float, dict[str, Any]]]:
        """Leave out changes of rows that were changed again soon after."""
        kept: list[tuple[float, dict[str, Any]]] = []
        next_at: dict[tuple[str, str], float] = {}
        for at, event in reversed(self._lines):
            if event["type"] == "row":
                key = event["list"], event["key"]
                if next_at.get(key, float("inf")) - at < _THIN_S:
                    continue
                next_at[key] = at
            elif event["type"] == "gone":
                next_at.pop((event["list"], event["key"]), None)
            kept.append((at, event))
        return kept[::-1]


class RecordedFeed(Feed):
    """Plays a recording. `now` follows the recorded times."""

    def __init__(self, path: Path) -> None:
        super().__init__("http://127.0.0.1:6374")
        self._recorded = [json.loads(line) for line in path.read_text().splitlines()]
        self.at_s = 0.0
        self.played = asyncio.Event()

    def now(self) -> float:
        return self.at_s

    async def events(self) -> AsyncIterator[Item]:
        yield Connected(resumed=False)
        for at_s, event in self._recorded:
            self.at_s = at_s
            yield event
        self.played.set()
        await asyncio.Event().wait()


class ScriptedFeed(Feed):
    """A feed whose items come from a queue that a test fills."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:6374")
        self.items: asyncio.Queue[Item] = asyncio.Queue()
        self.at_s = 0.0

    def now(self) -> float:
        return self.at_s

    async def events(self) -> AsyncIterator[Item]:
        while True:
            yield await self.items.get()
