"""Sends odd requests to the HTTP API: of an app with invented answers, then of a real daemon. The first failure ends the run.

    python tests/fuzz/fuzz_http.py [--seconds 60] [--seed N]

Bodies are generated from the API's own schemas, so that a new field is fuzzed without being named here: values of wrong types,
extremes, unknown fields, damaged JSON, and headers that do not fit the body.

Required: every request is answered or, if it is no HTTP, its connection closed, in time; never with a status that means a fault
of the daemon, nor with an event that does; and the daemon still answers afterwards. The printed seed repeats the requests.
"""

import argparse
import asyncio
import gzip
import json
import logging
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))
sys.path.insert(0, str(Path(__file__).parents[1] / "api"))

from conftest import WordsMesh

from fake_api.words import WordsCoordinator
from meshd.api.http.app import create_app
from meshd.api.http.openapi import document
from meshd.api.http.routes import ROUTES, Route
from meshd.api.http.server import serve
from meshd.clock import SystemClock
from meshd.config import Settings
from meshd.telemetry import Telemetry
from real_daemons.cluster import MODEL, make_cluster

ANSWER_S = 30.0
"""Longest time for a response. A daemon on a busy machine takes some seconds to load the model."""
_PATIENCE_S = 0.2
"""Longest time to wait for the answer to a request whose end the server can't know."""
GOOD = frozenset({200, 400, 401, 403, 404, 405, 408, 411, 413, 414, 417, 429, 431, 503})
"""Statuses that a request may get. Others (500, 502) mean a fault of the daemon or of a peer, which no request may cause."""
_FIELDS = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2}
_LEFT_OUT = ("/mesh/v1/events", "/mesh/v1/drain")
"""Routes that never end, or after which a daemon takes no requests."""
_TEXTS = (
    "", "x", "\0", "\ud800", "🦊" * 50, "a" * 100_000, "{{ 1 // 0 }}", "<|im_end|>", "%s%n", "\r\nset-cookie: x",
    "../../etc/passwd", "-1", "true", "0-30", "a:0-30", "Ω" * 5000,
)  # fmt: skip
_INTEGERS = (0, 1, 2, 3, -1, 20, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**40)
_FLOATS = (0.0, -0.0, 0.5, 1.0, 2.0, 1e-300, 5e-324, 1e300, -1e300, float("nan"), float("inf"))
_HEADERS = (
    "Content-Encoding: gzip", "Content-Encoding: deflate", "Content-Encoding: br", "Content-Encoding: nosuch",
    "Expect: 100-continue",
    "Content-Type: application/json; charset=utf-16", "Content-Type: multipart/form-data; boundary=x", "Last-Event-ID: x",
    "Accept: text/html", "Authorization: Bearer x", "Origin: null", "Cookie: a=b", "X: " + "y" * 9000, "Upgrade: websocket",
    "Transfer-Encoding: chunked", "Host: evil.example", "Range: bytes=0-1", "Content-Length: 3", "No colon", "\x01: x",
)  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """A request, and whether it is HTTP that a server must answer."""

    data: bytes
    whole: bool
    """Whether the head is well-formed and the body is as long as it says."""


class Generator:
    """Makes requests from the API's schemas."""

    def __init__(self, dice: random.Random, models: tuple[str, ...]) -> None:
        self._dice = dice
        self._models = models
        self._schemas = document()["components"]["schemas"]
        self._paths = document()["paths"]
        self._routes = [route for route in ROUTES if route.path not in _LEFT_OUT]
        self._generating = [route for route in self._routes if route.path.startswith("/v1/") and route.takes]

    def request(self) -> Sent:
        """Make one request. Half of them go to the routes that generate answers."""
        dice = self._dice
        route = dice.choice(self._generating if dice.random() < 0.5 else self._routes)
        body = self._body(route) if route.takes else b""
        heads = [f"{route.method} {self._path(route)} HTTP/1.1"]
        heads += [] if dice.random() < 0.02 else ["Host: localhost"]
        extra = dice.sample(_HEADERS, dice.choice((0, 0, 0, 1, 2)))
        if any("gzip" in header for header in extra) and dice.random() < 0.5:
            body = gzip.compress(body)
        length = len(body) if dice.random() < 0.97 else dice.choice((*_INTEGERS, "x"))
        heads += [f"Content-Length: {length}", "Connection: close", *extra]
        data = "\r\n".join(heads).encode("utf-8", "surrogatepass") + b"\r\n\r\n" + body
        odd = any(header.startswith(("Transfer", "Content-L", "No colon", "\x01", "Upgrade")) for header in extra)
        if dice.random() < 0.03:
            data, odd = _damaged(dice, data), True
        return Sent(data, whole=not odd and length == len(body))

    def _path(self, route: Route) -> str:
        dice = self._dice
        ids = ("x", "resp_" + "0" * 32, "%ff%00", "..%2f..", "a" * 3000, dice.choice(self._models).replace(":", "%3A"))
        path = "/".join(dice.choice(ids) if part.startswith("{") else part for part in route.path.split("/"))
        if dice.random() < 0.3:
            names = ("stream", "starting_after", "include[]", "include", "nosuch", "%ff")
            path += "?" + "&".join(f"{dice.choice(names)}={dice.choice(('true', '-1', '1', '%ff', 'x' * 50))}" for _ in range(2))
        return path

    def _body(self, route: Route) -> bytes:
        dice = self._dice
        reference = self._paths[route.path][route.method.lower()]["requestBody"]["content"]["application/json"]["schema"]
        body = self._value(reference, wrong=0.0)
        schema = self._schemas[reference["$ref"].rpartition("/")[2]]["properties"]
        for name in dice.sample(sorted(schema), min(len(schema), dice.choice((0, 0, 1, 1, 2, 4)))):
            body[name] = self._value(schema[name], wrong=0.3)
        body |= {name: 2 for name in _FIELDS if name in schema and body.get(name) is None}
        body["model"] = dice.choice(self._models) if dice.random() < 0.95 else self._any(1)
        if dice.random() < 0.2:
            body[dice.choice(_TEXTS)[:200]] = self._any(3)
        if dice.random() < 0.03:
            body = self._any(3)
        data = json.dumps(body).encode()
        return _damaged(dice, data) if dice.random() < 0.05 else data

    def _value(self, schema: dict[str, Any], *, wrong: float) -> Any:
        """Make a value for a schema; with the probability `wrong`, at each depth, any other value."""
        dice = self._dice
        if dice.random() < wrong:
            return self._any(2)
        if "$ref" in schema:
            return self._value(self._schemas[schema["$ref"].rpartition("/")[2]], wrong=wrong)
        if "anyOf" in schema:
            return self._value(dice.choice(schema["anyOf"]), wrong=wrong)
        if "enum" in schema:
            return dice.choice(schema["enum"])
        match schema.get("type"):
            case "object":
                return self._object(schema, wrong)
            case "array":
                return [
                    self._value(schema.get("items") or {}, wrong=wrong)
                    for _ in range(max(schema.get("minItems", 0), dice.randint(0, 3)))
                ]
            case "integer":
                return dice.choice([schema.get("minimum", 0), min(schema.get("maximum", 3), 3), *_INTEGERS])
            case "number":
                return dice.choice([schema.get("minimum", 0.0), schema.get("maximum", 1.0), *_FLOATS[:5]])
            case "string":
                return dice.choice(_TEXTS) or "x"
            case "boolean":
                return dice.random() < 0.5
            case "null":
                return None
        return self._any(1)

    def _object(self, schema: dict[str, Any], wrong: float) -> dict[str, Any]:
        dice, fields = self._dice, schema.get("properties", {})
        share = 0.15 if len(fields) > 8 else 0.4
        names = [name for name in fields if name in schema.get("required", ()) or dice.random() < share]
        made = {name: self._value(fields[name], wrong=wrong) for name in names}
        if not fields:
            inside = schema.get("additionalProperties")
            keys = (str(dice.choice(_INTEGERS)) if dice.random() < 0.7 else dice.choice(_TEXTS) for _ in range(3))
            made = {key: self._value(inside if isinstance(inside, dict) else {}, wrong=wrong) for key in keys}
        if dice.random() < wrong:
            made[dice.choice(_TEXTS)[:100]] = self._any(1)
        return made

    def _any(self, depth: int) -> Any:
        dice = self._dice
        kind = dice.randrange(8 if depth else 5)
        if kind < 5:
            return (None, True, dice.choice(_INTEGERS), dice.choice(_FLOATS), dice.choice(_TEXTS))[kind]
        if kind == 5:
            return [self._any(depth - 1) for _ in range(dice.randint(0, 3))]
        if kind == 6:
            return {dice.choice(_TEXTS)[:50]: self._any(depth - 1) for _ in range(dice.randint(0, 3))}
        return _nested(dice.choice((10, 200, 900, 5000)))


def _nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(min(depth, sys.getrecursionlimit() // 3)):
        made = {"a": made} if depth % 3 else [made]
    return made


def _damaged(dice: random.Random, data: bytes) -> bytes:
    stream = bytearray(data)
    for _ in range(dice.choice((1, 1, 3))):
        at = dice.randrange(len(stream)) if stream else 0
        match dice.randrange(3):
            case 0:
                stream[at : at + 1] = dice.randbytes(1)
            case 1:
                del stream[at : at + dice.randint(1, 30)]
            case _:
                stream[at:at] = dice.choice((b"[" * 20_000, b"\xff\xfe", b"\0", b'"', b"}", b"\r\n", b"1e999"))
    return bytes(stream)


async def exchange(address: tuple[str, int], sent: Sent) -> bytes:
    """Send a request on a connection of its own. Returns: all that came back. Raises: TimeoutError, ConnectionError."""
    reader, writer = await asyncio.open_connection(*address, limit=1 << 22)
    try:
        async with asyncio.timeout(ANSWER_S):
            writer.write(sent.data)
            if sent.whole:
                return await reader.read(-1)
            with suppress(TimeoutError):
                async with asyncio.timeout(_PATIENCE_S):
                    return await reader.read(-1)
            writer.write_eof()  # a server that waits for more bytes must notice that none come
            return await reader.read(-1)
    finally:
        writer.transport.abort()


def check(sent: Sent, answer: bytes) -> int:
    """Check an answer. Returns: its status; 0 if there was none, as the request was no HTTP. Raises: AssertionError."""
    if not answer:
        assert not sent.whole, "the connection was closed without an answer"
        return 0
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(None, 2)[1])
    if status == 100:
        status = int(body.split(None, 2)[1]) if body.startswith(b"HTTP/") else 200
    assert status in GOOD, f"status {status}"
    assert b"internal_error" not in body, "an unexpected error"
    assert b"peer_fault" not in body and b"remote_failure" not in body, "a client's mistake blamed a peer"  # noqa: PT018
    if b"text/event-stream" in head.lower():
        assert b"[DONE]" in body or b'"error' in body or b"response." in body, "a stream without an end"
    return status


class Faults(logging.Handler):
    """Collects what the server logs about requests that it did not foresee, and silences the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        logger = logging.getLogger()
        logger.handlers = [self]

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "unexpected" in text or "Unhandled" in text or "never retrieved" in text:
            self.found.append(f"{text}: {record.exc_info and record.exc_info[1]!r}")


async def attack(generator: Generator, address: tuple[str, int], seconds: float, at_once: int) -> Counter[int]:
    """Send requests for `seconds`, `at_once` of them at a time, and check each answer. Returns: how many had which status."""
    until, statuses = time.monotonic() + seconds, Counter[int]()
    while time.monotonic() < until:
        requests = [generator.request() for _ in range(at_once)]
        answers = await asyncio.gather(*(exchange(address, sent) for sent in requests), return_exceptions=True)
        for sent, answer in zip(requests, answers, strict=True):
            try:
                if isinstance(answer, ConnectionError):
                    assert not sent.whole or len(sent.data) > 1 << 20, f"the connection broke: {answer!r}"
                elif isinstance(answer, BaseException):
                    raise AssertionError(f"no answer: {answer!r}")
                else:
                    statuses[check(sent, answer)] += 1
            except AssertionError as error:
                print(f"FAILED: {error}\nrequest: {sent.data[:3000]!r}\nanswer: {answer!r:.3000}")
                raise
        health = await exchange(address, Sent(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", whole=True))
        assert health.startswith(b"HTTP/1.1 200"), f"the daemon is not well: {health!r}"
    assert statuses[200] > 0, "no request was answered: the requests are all wrong"
    return statuses


async def fuzz_app(dice: random.Random, seconds: float) -> Counter[int]:
    """Fuzz the API over invented answers."""
    coordinator = WordsCoordinator()
    app = create_app(coordinator, WordsMesh(), Telemetry(), api_key=None, clock=SystemClock())  # type: ignore[arg-type]
    server, faults = await serve(app, "127.0.0.1", 0), Faults()
    try:
        statuses = await attack(Generator(dice, ("words", "words", "nosuch")), server.address, seconds, 8)
        assert not faults.found, f"the server logged {faults.found[:3]}"
        return statuses
    finally:
        await server.aclose()
        await coordinator.aclose()


@contextmanager
def daemon() -> Iterator[tuple[str, int]]:
    """Start a daemon with a small model. Yields: the address of its API."""
    with tempfile.TemporaryDirectory() as root:
        for cluster in make_cluster(Path(root), Settings()["cache"].value):
            cluster.start("a")
            cluster.place("a")
            host, _, port = cluster["a"].api.removeprefix("http://").partition(":")
            yield host, int(port)
            assert cluster["a"].process.poll() is None, f"the daemon has ended:\n{cluster['a'].log.read_text()[-4000:]}"
            lines = cluster["a"].log.read_text().splitlines()
            faults = [line for line in lines if "unexpected error" in line or "Unhandled" in line]
            assert not faults, f"the daemon logged {faults[:3]}"


def main() -> None:
    """Fuzz an app for half of `--seconds`, then a daemon for as long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    dice = random.Random(options.seed)
    report("app", asyncio.run(fuzz_app(dice, options.seconds / 2)))
    with daemon() as address:
        generator = Generator(dice, (MODEL, MODEL, "nosuch"))
        report("daemon", asyncio.run(attack(generator, address, options.seconds / 2, 4)))


def report(what: str, statuses: Counter[int]) -> None:
    """Print how many requests had which status."""
    shown = ", ".join(f"{count} x {status or 'closed'}" for status, count in statuses.most_common())
    print(f"{what}: {statuses.total()} requests: {shown}", flush=True)


if __name__ == "__main__":
    main()
