"""A peer's metrics for `GET /metrics`, and the format of its log.

Times are in seconds and sizes in bytes, as Prometheus recommends. Each label has only a few values: the peers of the cluster,
the lanes of a link, the outcomes of a request.
"""

import contextlib
import json
import logging
import sys
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from meshd import __version__

LogFormat = Literal["text", "json"]

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_HOP_S = (5e-5, 1e-4, 1.5e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.5)
_RATIOS = (0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)


class Telemetry:
    """One peer's metrics. They are in a separate registry, so that several peers can share a process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        Info("meshd_build", "The running version", registry=registry).info({"version": __version__})
        self._ttft = Histogram("meshd_ttft_seconds", "Request to first token", buckets=_TTFT_S, registry=registry)
        self._tpot = Histogram("meshd_tpot_seconds", "Time per output token after the first", buckets=_TPOT_S, registry=registry)
        self._hop = Histogram(
            "meshd_hop_seconds",
            "A small message, send to receive: half the round trip of a heartbeat",
            ["peer"],
            buckets=_HOP_S,
            registry=registry,
        )
        self._stage = Histogram(
            "meshd_stage_seconds", "One step's compute in a stage", ["layers", "phase"], buckets=_TPOT_S, registry=registry
        )
        self._queue_wait = Histogram("meshd_queue_wait_seconds", "Wait for admission", buckets=_TTFT_S, registry=registry)
        self._tokens = Counter("meshd_tokens", "Tokens of finished and running answers", ["kind"], registry=registry)
        self._requests = Counter("meshd_requests", "HTTP requests by route and outcome", ["route", "outcome"], registry=registry)
        self._api_keys = Counter(
            "meshd_api_key_requests", "HTTP requests by the API key that they carried", ["key", "outcome"], registry=registry
        )
        self._sessions = Gauge("meshd_sessions_active", "Sessions that this peer coordinates", registry=registry)
        self._kv_free = Gauge("meshd_kv_blocks_free", "Free KV blocks of this peer", registry=registry)
        self._recovery = Histogram(
            "meshd_recovery_pause_seconds",
            "From the last token before a change of plan to the first after it",
            ["method"],
            buckets=_TTFT_S,
            registry=registry,
        )
        self._prediction = Histogram(
            "meshd_prediction_ratio", "Measured over predicted time", ["what"], buckets=_RATIOS, registry=registry
        )

    def recovery(self, method: str, pause_s: float) -> None:
        """Record the pause of an answer that continued after a change of plan. `method` says how it continued, such as `replay`."""
        self._recovery.labels(method).observe(pause_s)

    def ttft(self, seconds: float) -> None:
        """Record an answer's time to first token."""
        self._ttft.observe(seconds)

    def tpot(self, seconds: float) -> None:
        """Record an answer's mean time per output token after the first."""
        self._tpot.observe(seconds)

    def hop(self, peer: str, seconds: float) -> None:
        """Record the time from sending to receiving a small message on the link with `peer`."""
        self._hop.labels(peer).observe(seconds)

    def stage_step(self, layers: str, phase: Literal["prefill", "decode"], seconds: float) -> None:
        """Record the compute time of one step of a stage. `layers` is the stage's range, such as `0-12`."""
        self._stage.labels(layers, phase).observe(seconds)

    def queue_wait(self, seconds: float) -> None:
        """Record how long a request waited for admission."""
        self._queue_wait.observe(seconds)

    def tokens(self, *, prompt: int = 0, completion: int = 0) -> None:
        """Count prompt tokens that were read and answer tokens that were generated."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def request(self, route: str, outcome: str) -> None:
        """Count an HTTP request. `outcome` is `ok`, `client_gone` or an error's code."""
        self._requests.labels(route, outcome).inc()

    def api_key_request(self, key: str, outcome: Literal["ok", "limited", "client_gone", "error"]) -> None:
        """Count an HTTP request of an API key. `key` is the key's prefix."""
        self._api_keys.labels(key, outcome).inc()

    def forget_api_key(self, key: str) -> None:
        """Drop the counts of a key that was revoked, so that months of new keys do not fill the memory."""
        for outcome in ("ok", "limited", "client_gone", "error"):
            with contextlib.suppress(KeyError):
                self._api_keys.remove(key, outcome)

    def sessions_active(self, count: int) -> None:
        """Set the number of sessions that this peer coordinates."""
        self._sessions.set(count)

    def kv_blocks_free(self, count: int) -> None:
        """Set the number of this peer's free KV blocks."""
        self._kv_free.set(count)

    def prediction(self, what: Literal["ttft", "tpot"], predicted_s: float, measured_s: float) -> None:
        """Record the ratio of a measured to a predicted time. A prediction of 0 means that there is none."""
        if predicted_s > 0:
            self._prediction.labels(what).observe(measured_s / predicted_s)

    def render(self) -> bytes:
        """Format all metrics in Prometheus' text format, whose content type is `content_type`."""
        return generate_latest(self.registry)


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> Iterator[tuple[str, object]]:
    yield "time", datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    yield "level", record.levelname.lower()
    yield "logger", record.name
    yield "event", record.getMessage()
    for name, value in vars(record).items():
        if name not in _STANDARD:
            yield name, value
    if record.exc_info and record.exc_info[1]:
        yield "trace", "".join(traceback.format_exception(record.exc_info[1])).rstrip()


def _quoted(value: object) -> str:
    text = str(value)
    if text and text.isprintable() and not any(mark in text for mark in ' "='):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


class TextFormatter(logging.Formatter):
    """Formats an event as one line of key=value. A value with spaces or quotes is a JSON string."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{name}={_quoted(value)}" for name, value in _fields(record))


class JsonFormatter(logging.Formatter):
    """Formats an event as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(dict(_fields(record)), default=str, ensure_ascii=False)


_LINES = 20
_PERIOD_S = 10.0
_SOURCES = 1024


class LineLimit(logging.Filter):
    """Drops lines of a source that logs too much, so that nobody can fill the disk by causing errors.

    A source is a logger and a message before its arguments are filled in. Each may log `_LINES` lines in `_PERIOD_S`; the first
    line after that says in the field `dropped` how many there would have been. Debug lines are not limited: they are usually off.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sources: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()
        """When the period of each source began, and its lines since then; the least recently used source first."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        source = (record.name, record.msg if isinstance(record.msg, str) else type(record.msg).__name__)
        began, lines = self._sources.pop(source, (record.created, 0))
        if not 0 <= record.created - began < _PERIOD_S:
            if lines > _LINES:
                record.dropped = lines - _LINES
            began, lines = record.created, 0
        self._sources[source] = (began, lines + 1)
        if len(self._sources) > _SOURCES:
            self._sources.popitem(last=False)
        return lines < _LINES


_HANDLER = "meshd"


def configure_logging(level: str = "info", log_format: LogFormat = "text", *, stream: TextIO | None = None) -> None:
    """Log to `stream` (default: standard error), one line per event, with the fields of `extra`. The last call is valid.

    Events below `level` are dropped. If `level` is `info`, events of libraries below `warning` are dropped too.

    Raises: ValueError for an unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"{level!r} is not a log level")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.set_name(_HANDLER)
    handler.addFilter(LineLimit())
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in [old for old in root.handlers if old.get_name() == _HANDLER]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(number if number <= logging.DEBUG else max(number, logging.WARNING))
    logging.getLogger("meshd").setLevel(number)
