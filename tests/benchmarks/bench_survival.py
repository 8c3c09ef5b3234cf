"""Measure how a daemon with 256 descriptors answers while it is abused: by connections, malformed requests, prompts, models.

    python tests/benchmarks/bench_survival.py [--seconds 15] [--connections 5000]

Two daemons share a cluster; the model is on the one that is abused. For each kind of abuse the benchmark prints the times of
`GET /health` over a new connection each time and over one that stays open, the longest pause of a stream of another client, and how
often the link between the two daemons went down. The abuse runs in a process of its own at nice 19, the daemon at nice 0.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import resource
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))

from meshd.state import read_holder
from tiny.bad_files import small_gguf
from tiny.hostile_templates import ENDLESS, FREEZES, FREEZES_AT

MODEL = "smollm2:135m"
DESCRIPTORS = 256
EVERY_S = 0.02
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
ABUSES = ("nothing", "connections", "malformed", "prompts", "models")
TURN_S, OPENED, ASKED = 0.01, 10, 10
"""Pace of the flood of connections: in each turn so many are opened and send a request, which makes 1,000 a second of each."""
HOSTILE = {"freezes": FREEZES, "endless": ENDLESS}


@dataclass
class Figures:
    """What other clients saw during one kind of abuse."""

    fresh_s: list[float] = field(default_factory=list)
    kept_s: list[float] = field(default_factory=list)
    token_gaps_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="duration of each kind of abuse")
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--abuse", nargs=2, metavar=("KIND", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.abuse:
        kind, port = options.abuse
        os.nice(19)
        _ABUSE[kind](int(port), options)
        return
    with tempfile.TemporaryDirectory() as folder, two_daemons(Path(folder)) as (api, log):
        print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {DESCRIPTORS} descriptors", flush=True)
        times = f"{'p99':>7} {'worst':>7}"
        print(f"{'ms':<12} {'new: p50':>9} {times} {'kept: p50':>10} {times} {'gap':>7} downs  failed")
        for abuse in ABUSES:
            downs = log.read_text().count("is down")
            figures = measure(api, abuse, options)
            row(abuse, figures, log.read_text().count("is down") - downs)


def row(abuse: str, figures: Figures, downs: int) -> None:
    cells = [
        f"{value * 1e3:.1f}"
        for times in (figures.fresh_s, figures.kept_s)
        for value in (statistics.median(times), quantile(times, 0.99), max(times))
    ]
    gap = max(figures.token_gaps_s, default=float("nan"))
    print(
        f"{abuse:<12} {cells[0]:>9} {cells[1]:>7} {cells[2]:>7} {cells[3]:>10} {cells[4]:>7} {cells[5]:>7} {gap:>6.2f}s {downs:>5}"
        f"  {len(figures.failures)} {figures.failures[:2]}",
        flush=True,
    )


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@contextmanager
def two_daemons(folder: Path) -> Iterator[tuple[str, Path]]:
    """Start two daemons of one cluster and place the model on the first. Yields: host and port of its API, and the second's log."""
    with contextlib.ExitStack() as stack:
        models = [word for path in hostile_models(folder) for word in ("--model", f"file:{path}")]
        first = stack.enter_context(daemon(folder, "first", *models, limited=True))
        key = [sys.executable, "-P", "-m", "meshd", "key", "show", "--state", str(folder / "first")]
        code = subprocess.run(key, capture_output=True, text=True, check=True).stdout.strip()
        link = json.load(urllib.request.urlopen(f"http://{first}/mesh/v1/self"))["link"]
        stack.enter_context(daemon(folder, "second", "--key", code, "--peer", link))
        place = [sys.executable, "-P", "-m", "meshd", "place", MODEL, "--api", f"http://{first}", "--stages", "first:0-30"]
        subprocess.run(place, check=True, capture_output=True)
        yield first, folder / "second.log"


def hostile_models(folder: Path) -> list[Path]:
    """Write the files of models whose chat templates are hostile."""
    paths = [folder / f"{name}.gguf" for name in HOSTILE]
    for path in paths:
        path.write_bytes(small_gguf(more={"general.name": path.stem, "tokenizer.chat_template": HOSTILE[path.stem]}))
    return paths


@contextmanager
def daemon(folder: Path, name: str, *flags: str, limited: bool = False) -> Iterator[str]:
    def limit() -> None:
        if limited:
            resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))

    command = [sys.executable, "-P", "-m", "meshd", "up", "--name", name, "--state", str(folder / name), "--threads", "1"]
    command += ["--api", "127.0.0.1:0", "--link", "127.0.0.1:0", "--discovery", "static", "--copies", "1", *flags]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, preexec_fn=limit)
    try:
        while not ((holder := read_holder(folder / name)) and holder.api):
            if process.poll() is not None:
                raise SystemExit((folder / f"{name}.log").read_text())
            time.sleep(0.1)
        yield holder.api
        if process.poll() is not None:
            raise SystemExit(f"{name} ended: {(folder / f'{name}.log').read_text()[-2000:]}")
    finally:
        process.terminate()
        process.wait(20)


def measure(api: str, abuse: str, options: argparse.Namespace) -> Figures:
    host, _, port = api.rpartition(":")
    figures, stop = Figures(), threading.Event()
    watchers = [
        threading.Thread(target=watch_health, args=(host, int(port), figures.fresh_s, figures, stop, True)),
        threading.Thread(target=watch_health, args=(host, int(port), figures.kept_s, figures, stop, False)),
        threading.Thread(target=watch_stream, args=(host, int(port), figures, stop)),
    ]
    for watcher in watchers:
        watcher.start()
    abuser = None
    if abuse != "nothing":
        command = [sys.executable, __file__, "--abuse", abuse, port, "--connections", str(options.connections)]
        abuser = subprocess.Popen(command, stdin=subprocess.PIPE)
    time.sleep(options.seconds)
    stop.set()
    if abuser is not None:
        abuser.terminate()
        abuser.wait()
    for watcher in watchers:
        watcher.join()
    return figures


def watch_health(host: str, port: int, times: list[float], figures: Figures, stop: threading.Event, fresh: bool) -> None:
    client: socket.socket | None = None
    while not stop.is_set():
        began = time.perf_counter()
        try:
            if client is None:
                client = socket.create_connection((host, port), 10.0)
            client.sendall(HEALTH)
            answer = client.recv(4096)
            if not answer.startswith(b"HTTP/1.1 200"):
                figures.failures.append(f"{'new' if fresh else 'kept'}: {answer[:40]!r}")
                raise OSError
        except OSError as error:
            if str(error):
                figures.failures.append(f"{'new' if fresh else 'kept'}: {error}")
            client = None
        times.append(time.perf_counter() - began)
        if fresh and client is not None:
            client.close()
            client = None
        time.sleep(EVERY_S)


def watch_stream(host: str, port: int, figures: Figures, stop: threading.Event) -> None:
    while not stop.is_set():
        connection = http.client.HTTPConnection(host, port, timeout=60.0)
        body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 200, "stream": True, "ignore_eos": True}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
            answer = connection.getresponse()
            before: float | None = None
            for line in answer:
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    if before is not None:
                        figures.token_gaps_s.append(now - before)
                    before = now
                if stop.is_set():
                    break
            if answer.status != 200:
                figures.failures.append(f"stream: {answer.status}")
        except OSError as error:
            figures.failures.append(f"stream: {error}")
        finally:
            connection.close()


def flood(port: int, options: argparse.Namespace) -> None:
    """Keep thousands of connections open; half are silent, the others send requests. A closed one is opened again."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    selector, rng = selectors.DefaultSelector(), random.Random(1)
    clients: dict[socket.socket, bool] = {}
    for _ in turns(TURN_S):
        for _ in range(min(OPENED, options.connections - len(clients))):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
            selector.register(client, selectors.EVENT_READ)
            clients[client] = rng.random() < 0.5
        talking = [client for client, silent in clients.items() if not silent]
        for client in rng.sample(talking, min(ASKED, len(talking))):
            with contextlib.suppress(OSError):
                client.send(HEALTH)
        for key, _ in selector.select(0):
            client = key.fileobj  # type: ignore[assignment]
            try:
                gone = not client.recv(4096)
            except OSError as error:
                gone = not isinstance(error, BlockingIOError)
            if gone:
                selector.unregister(client)
                client.close()
                del clients[client]


def turns(seconds: float) -> Iterator[None]:
    """Yield once every so many seconds, forever; at once if the time has passed already."""
    began = time.monotonic()
    for count in itertools.count(1):
        yield
        time.sleep(max(0.0, began + count * seconds - time.monotonic()))


def malformed(port: int, options: argparse.Namespace) -> None:
    """Send a thousand requests a second that are not HTTP."""
    sent = b"GET /health HTTP/1.1\r\nHost: h\r\n" + b"x" * 7500 + b"\r\n\r\n"
    for _ in turns(0.001):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 10.0) as client:
            client.sendall(sent)
            client.recv(4096)


def prompts(port: int, options: argparse.Namespace) -> None:
    """Send prompts of nearly 8 MB, one after the other."""
    texts = [" " * 7_900_000, "a" * 7_900_000, "word " * 1_580_000]
    for text in itertools.cycle(texts):
        chat(port, MODEL, text)


def models(port: int, options: argparse.Namespace) -> None:
    """Ask models whose chat template takes all time or memory, one after the other."""
    rows = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models"))["data"]
    hostile = [row["id"] for row in rows if row["id"].startswith("file:")]
    for model in itertools.cycle(hostile):
        chat(port, model, FREEZES_AT)


def chat(port: int, model: str, content: str) -> None:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with contextlib.suppress(OSError):
        urllib.request.urlopen(request, timeout=60.0)


_ABUSE: dict[str, Callable[[int, argparse.Namespace], None]] = {
    "connections": flood,
    "malformed": malformed,
    "prompts": prompts,
    "models": models,
}

if __name__ == "__main__":
    main()
