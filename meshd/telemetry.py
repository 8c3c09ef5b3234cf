"""A peer's metrics for `GET /metrics`.

Times are in seconds and sizes in bytes, as Prometheus recommends. Each label has only a few values: the peers of the cluster, the
stages that this peer computes, the outcomes of a request. Where values come and go, the series of those used least recently end.

This file has what is recorded when it happens. `agents/admin/metrics.py` adds what is read from the agents at each scrape.
"""

import contextlib
from collections import OrderedDict
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from meshd import __version__

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_WAIT_S = (1e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 5.0)
_HOP_S = (5e-5, 1e-4, 1.5e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1, 0.5)
_LOAD_S = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_RATIOS = (0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)

MAX_SERIES = 128
"""Series of one metric with labels whose values come and go. A histogram has about 15 lines for each."""

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second line for each series: when it began, which Prometheus does not read from this format

Phase = Literal["prefill", "decode"]
Predicted = Literal["ttft", "tpot", "prefill_step", "decode_step", "batch"]


class _Recent:
    """Labels of a metric, of which the least recently used ones are removed beyond `MAX_SERIES`."""

    def __init__(self, metric: Histogram) -> None:
        self._metric = metric
        self._used: OrderedDict[tuple[str, ...], Histogram] = OrderedDict()

    def labels(self, *values: str) -> Histogram:
        child = self._used.pop(values, None)
        if child is None:
            child = self._metric.labels(*values)
            if len(self._used) >= MAX_SERIES:
                self._metric.remove(*self._used.popitem(last=False)[0])
        self._used[values] = child
        return child


class Telemetry:
    """One peer's metrics. They are in a separate registry, so that several peers can share a process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.completion_tokens = 0
        """Number of tokens of the answers that this peer has coordinated."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        Gauge("meshd_build_info", "The running version", ["version"], registry=registry).labels(__version__).set(1)
        self._ttft = histogram("meshd_ttft_seconds", "Request to first token", _TTFT_S)
        self._tpot = histogram("meshd_tpot_seconds", "Time per output token after the first", _TPOT_S)
        self._hop = _Recent(
            histogram("meshd_hop_seconds", "A small message, send to receive: half the round trip of a heartbeat", _HOP_S, "peer")
        )
        self._stage = _Recent(
            histogram("meshd_stage_seconds", "One step's compute in a stage", _TPOT_S, "model", "layers", "phase")
        )
        self._step_wait = histogram(
            "meshd_step_wait_seconds", "From a step's input to the begin of its computation", _WAIT_S, "phase"
        )
        self._cut_wait = histogram(
            "meshd_cut_wait_seconds", "From a pass that needs attention of other peers to their last answer", _WAIT_S
        )
        self._queue_wait = histogram("meshd_queue_wait_seconds", "Wait for admission", _TTFT_S)
        self._tokens = counter("meshd_tokens", "Tokens of answers that have ended here", "kind")
        self._requests = counter("meshd_requests", "HTTP requests by route and outcome", "route", "outcome")
        self._api_keys = counter("meshd_api_key_requests", "HTTP requests by the API key that they carried", "key", "outcome")
        self._recovery = histogram(
            "meshd_recovery_pause_seconds",
            "From the last token before a change of plan to the first after it, by how the answer went on and why it had to",
            _TTFT_S,
            "method",
            "cause",
        )
        self._prediction = histogram("meshd_prediction_ratio", "Measured over predicted time", _RATIOS, "what")
        self._sessions_ended = counter("meshd_sessions_ended", "Answers that this peer coordinated and that have ended", "state")
        self._peer_changes = counter("meshd_peer_changes", "Changes of another peer's state, by the new state", "state")
        self._loads = counter("meshd_loads", "Loads of layers that have ended", "outcome")
        self._load = histogram("meshd_load_seconds", "From the begin of a load to layers that serve", _LOAD_S)
        self._log_lines = counter("meshd_log_lines", "Lines of meshd in the log", "level")
        self._begin()

    def _begin(self) -> None:
        """Make the series whose labels are known from the beginning, so that a rate counts their first event too."""
        for phase in ("prefill", "decode"):
            self._step_wait.labels(phase)
        for kind in ("prompt", "completion"):
            self._tokens.labels(kind)
        for state in ("finished", "failed", "cancelled", "suspended"):
            self._sessions_ended.labels(state)
        for outcome in ("active", "failed"):
            self._loads.labels(outcome)
        for level in ("info", "warning", "error"):
            self._log_lines.labels(level)
        for what in get_args(Predicted):
            self._prediction.labels(what)

    def collect_from(self, collector: Collector) -> None:
        """Add the metrics of a collector, which is asked at each scrape."""
        self.registry.register(collector)

    def recovery(self, method: str, cause: str, pause_s: float) -> None:
        """Record the pause of an answer that continued after a change of plan.

        method: how it continued, such as `replay`. cause: `loss`, `move` or `resume`.
        """
        self._recovery.labels(method, cause).observe(pause_s)

    def ttft(self, seconds: float) -> None:
        """Record an answer's time to first token."""
        self._ttft.observe(seconds)

    def tpot(self, seconds: float) -> None:
        """Record an answer's mean time per output token after the first."""
        self._tpot.observe(seconds)

    def hop(self, peer: str, seconds: float) -> None:
        """Record the time from sending to receiving a small message on the link with `peer`."""
        self._hop.labels(peer).observe(seconds)

    def stage_step(self, model: str, layers: str, phase: Phase, seconds: float) -> None:
        """Record the compute time of one step of a stage. `layers` is the stage's range, such as `0-12`."""
        self._stage.labels(model, layers, phase).observe(seconds)

    def step_wait(self, phase: Phase, seconds: float) -> None:
        """Record how long a step waited between its arrival and the begin of its computation."""
        self._step_wait.labels(phase).observe(seconds)

    def cut_wait(self, seconds: float) -> None:
        """Record how long a pass waited at one cut for attention that other peers compute."""
        self._cut_wait.observe(seconds)

    def queue_wait(self, seconds: float) -> None:
        """Record how long a request waited for admission."""
        self._queue_wait.observe(seconds)

    def tokens(self, *, prompt: int = 0, completion: int = 0) -> None:
        """Count prompt tokens that were read and answer tokens that were generated."""
        self.completion_tokens += completion
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

    def prediction(self, what: Predicted, predicted_s: float, measured_s: float) -> None:
        """Record the ratio of a measured to a predicted time. A prediction of 0 means that there is none."""
        if predicted_s > 0:
            self._prediction.labels(what).observe(measured_s / predicted_s)

    def session_ended(self, state: str) -> None:
        """Count an answer that has ended or is suspended."""
        self._sessions_ended.labels(state).inc()

    def peer_changed(self, state: str) -> None:
        """Count a change of another peer's state."""
        self._peer_changes.labels(state).inc()

    def load_ended(self, outcome: Literal["active", "failed"], seconds: float) -> None:
        """Count a load of layers, and record how long it took if the layers serve now."""
        self._loads.labels(outcome).inc()
        if outcome == "active":
            self._load.observe(seconds)

    def log_line(self, level: str) -> None:
        """Count a line of the log. May be called on any thread."""
        self._log_lines.labels(level).inc()

    def render(self) -> bytes:
        """Format all metrics in Prometheus' text format, whose content type is `content_type`."""
        return generate_latest(self.registry)
