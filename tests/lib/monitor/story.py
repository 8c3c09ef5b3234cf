"""A real cluster of three peers, whose answers run while the monitor is watched: for pictures and for recordings."""

import json
import os
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meshd.models.store.store import Store
from real_daemons.cluster import MODEL, Cluster, Daemon, wait_for

NAMES = ("desk", "attic", "laptop")
SPLIT = "attic:0-16,laptop:16-30"
LAYERS = 30


def own_cache(cache: Path, folder: Path) -> Path:
    """Make a cache folder that has only the model, and the measurements of this device, whatever else the user's own has."""
    shutil.copytree(cache, folder, copy_function=_link)
    store = Store(folder / "models")
    for model in store.list():
        if model.name != MODEL:
            store.remove(model.name)
    return folder


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@contextmanager
def three_peers(root: Path, cache: Path) -> Iterator[Cluster]:
    """Run three daemons inside the block, with the model split over two of them and a standby copy of each layer."""
    cluster = Cluster(root, cache)
    try:
        cluster.start(*NAMES, flags=("--copies", "2"))
        cluster.see_each_other()
        cluster.place("desk", stages=SPLIT)
        desk = cluster["desk"]
        wait_for(lambda: _layers_held(desk) == 2 * LAYERS, "a standby copy of each layer", desk)
        yield cluster
    finally:
        cluster.close()


def _layers_held(daemon: Daemon) -> int:
    """Count the layers of the model in active copies, on all peers."""
    model = next(row for row in daemon.rows("models") if row["name"] == MODEL)
    ranges = [each["layers"].split("-") for each in model["holdings"] if each["state"] == "active"]
    return sum(int(end) - int(begin) for begin, end in ranges)


class Answering:
    """An answer that is asked for and read in a thread."""

    def __init__(self, daemon: Daemon, tokens: int, prompt: str = "Tell me a long story about a lighthouse.") -> None:
        self.text = ""
        self.error = ""
        self._body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "mesh": {"stages": SPLIT},
        }
        self._url = daemon.api + "/v1/chat/completions"
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self, within_s: float) -> None:
        self._thread.join(within_s)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _read(self) -> None:
        request = urllib.request.Request(self._url, json.dumps(self._body).encode(), {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                for line in response:
                    if line.startswith(b"data: {"):
                        self._take(json.loads(line[6:]))
        except OSError as error:
            self.error = str(error)

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = event["error"]["message"]
        for choice in event.get("choices", ()):
            self.text += choice["delta"].get("content") or ""
