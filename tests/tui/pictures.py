"""Takes the pictures of the documentation, and records the events that the snapshot tests play.

A real cluster of three peers answers while the monitor is watched; one peer is killed in mid-answer.
"""

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from textual.pilot import Pilot

from meshd.config import Settings
from meshd.tui.app import Monitor
from meshd.tui.feed import Feed
from monitor.recorded import Item, Recording
from monitor.story import Answering, own_cache, three_peers
from real_daemons.cluster import Cluster

ROOT = Path(__file__).parents[2]
SIZE = (116, 32)
SCREENS = ("cluster", "plan", "sessions", "models", "peer", "logs")
TOKENS = 500
_WAIT_S = 180.0


class RecordingFeed(Feed):
    """Reads a daemon's events and records them."""

    def __init__(self, api: str) -> None:
        super().__init__(api)
        self.recording = Recording()

    async def events(self) -> AsyncIterator[Item]:
        async for item in super().events():
            if isinstance(item, dict):
                self.recording.add(time.monotonic(), item)
            yield item


async def watch(cluster: Cluster, pictures: Path | None, record: Path | None) -> None:
    """Act the story out, and write what was asked for."""
    desk = cluster["desk"]
    feed = RecordingFeed(desk.api)
    app = Monitor("http://127.0.0.1:6374", feed=feed)  # the daemon's own port is free, so the usual one is shown
    async with app.run_test(size=SIZE) as pilot:
        first = Answering(desk, TOKENS)
        await until(lambda: _tokens(app) > 30, "the answer to run")
        second = Answering(desk, TOKENS, "What does the sea look like in winter?")
        await asyncio.sleep(8)
        if pictures:
            await take_all(app, pilot, pictures)
        cluster["laptop"].kill()
        await until(lambda: bool(app.cluster.recoveries), "the answer to go on without the laptop")
        await asyncio.sleep(2)
        if pictures:
            await take(app, pilot, "sessions", pictures / "recovery.svg")
        if record:
            await asyncio.to_thread(feed.recording.write, record)
        for answer in (first, second):
            await asyncio.to_thread(answer.wait, _WAIT_S)
            if answer.running or answer.error:
                raise RuntimeError(f"an answer did not end well: {answer.error or 'it still runs'}")


async def take_all(app: Monitor, pilot: Pilot[None], folder: Path) -> None:
    """Take a picture of each screen while answers run."""
    await app.show_peer(next(row["id"] for row in app.cluster.rows["peers"] if row["name"] == "attic"))
    for name in SCREENS:
        await take(app, pilot, name, folder / f"{name}.svg")


async def take(app: Monitor, pilot: Pilot[None], screen: str, path: Path) -> None:
    """Take a picture of one screen."""
    await app.switch_mode(screen)
    await asyncio.sleep(0.5)
    app.show_changes()
    await pilot.pause()
    await asyncio.to_thread(path.write_text, app.export_screenshot(title=f"meshd top: {screen}") + "\n")


async def until(condition: Callable[[], bool], what: str) -> None:
    """Poll a condition. Raises: RuntimeError if it does not hold in time."""
    end = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"gave up waiting for {what}")
        await asyncio.sleep(0.05)


def _tokens(app: Monitor) -> int:
    return max((int(row["tokens"]) for row in app.cluster.sessions()), default=0)


def main(argv: list[str] | None = None) -> None:
    """Run the story once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="folder for the pictures")
    parser.add_argument("--record", type=Path, help="file for the recorded events")
    args = parser.parse_args(argv)
    os.environ["TZ"] = "UTC"
    time.tzset()
    cache: Any = Settings()["cache"].value
    with tempfile.TemporaryDirectory(prefix="meshd-pictures-") as folder:
        own = own_cache(cache, Path(folder) / "cache")
        with three_peers(Path(folder), own) as cluster:
            asyncio.run(watch(cluster, args.pictures, args.record))


if __name__ == "__main__":
    main()
