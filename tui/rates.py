"""What is measured over time: how fast sessions make tokens, what steps take, and a minute or two of each peer."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshd.tui.rows import ClusterRows, Row

WINDOW_S = 3.0
SAMPLES = 120
"""Seconds of each peer that are kept: as many as a wide terminal has columns for a sparkline."""
_MAX_STAGES = 1024
_PERIODS = 5
"""Events of work over which the times of a stage's steps are averaged: about as many seconds."""


class TokenRates:
    """Tokens per second of each session over the last `WINDOW_S`. Pure: callers pass the time."""

    def __init__(self) -> None:
        self._counts: dict[str, deque[tuple[float, int]]] = {}

    def observe(self, session: str, tokens: int, now: float) -> None:
        """Add the number of tokens that a session has made so far."""
        counts = self._counts.setdefault(session, deque())
        if not counts or counts[-1][1] != tokens:
            counts.append((now, tokens))
        while len(counts) > 2 and now - counts[1][0] > WINDOW_S:
            counts.popleft()

    def forget(self, keep: frozenset[str]) -> None:
        """Forget all sessions but these."""
        for session in self._counts.keys() - keep:
            del self._counts[session]

    def tokens_s(self, session: str, now: float) -> float | None:
        """Return the rate. None: it is not known. 0 after `WINDOW_S` without a token."""
        counts = self._counts.get(session)
        if counts is None or len(counts) < 2:
            return None
        (began, first), (latest, last) = counts[0], counts[-1]
        if now - latest > WINDOW_S:
            return 0.0
        return (last - first) / max(1e-3, latest - began)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What the decode steps of one stage took lately."""

    step_s: float
    sent_bytes: float
    """For each token."""
    steps_s: float
    """Steps per second in the last period."""


class StageTimes:
    """The measured steps of each stage of each session, from the events of work."""

    def __init__(self) -> None:
        self._periods: dict[tuple[str, int, str], deque[tuple[int, int, float, int, float]]] = {}

    def observe(self, event: Mapping[str, Any]) -> None:
        """Add an event of work."""
        for stage in event["stages"]:
            if stage["phase"] != "decode":
                continue
            key = stage["session"], stage["stage"], event["peer"]
            periods = self._periods.pop(key, None) or deque(maxlen=_PERIODS)
            self._periods[key] = periods  # the last one in the order, so that the first is the one to forget
            periods.append((stage["steps"], stage["tokens"], stage["busy_s"], stage["sent_bytes"], event["period_s"]))
        while len(self._periods) > _MAX_STAGES:
            del self._periods[next(iter(self._periods))]

    def of(self, session: str, stage: int, peer: str) -> StepTimes | None:
        """Return the times of a stage on a peer. None: no steps of it were measured."""
        periods = self._periods.get((session, stage, peer))
        if not periods:
            return None
        steps, tokens, busy_s, sent, _ = map(sum, zip(*periods, strict=True))
        last = periods[-1]
        return StepTimes(busy_s / max(1, steps), sent / max(1, tokens), last[0] / max(1e-3, last[4]))


def _series() -> deque[float]:
    return deque(maxlen=SAMPLES)


@dataclass(slots=True)
class PeerHistory:
    """One value a second of one peer, oldest first."""

    tokens_s: deque[float] = field(default_factory=_series)
    memory: deque[float] = field(default_factory=_series)
    """Share that is in use."""
    hop_s: deque[float] = field(default_factory=_series)
    """Usual one-way time of a small message to another peer, over all its links."""
    busy: deque[float] = field(default_factory=_series)
    """Share of the time in which the compute thread computes steps."""


@dataclass(slots=True)
class Histories:
    """Samples all peers once a second."""

    _peers: dict[str, PeerHistory] = field(default_factory=dict)
    _work: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Decode tokens and busy seconds per second of each peer, since the last sample."""
    _sampled_at: float | None = None

    def observe(self, event: Mapping[str, Any]) -> None:
        """Add an event of work."""
        period_s = max(1e-3, event["period_s"])
        self._work[event["peer"]] = event["tokens"] / period_s, min(1.0, event["busy_s"] / period_s)

    def tick(self, now: float, rows: ClusterRows | Mapping[str, Sequence[Row]]) -> bool:
        """Take the samples that are due. `rows` is read only then: this is called for each event. Returns: whether any was."""
        if self._sampled_at is None:
            self._sampled_at = now
        due = min(SAMPLES, int(now - self._sampled_at))
        if due < 1:
            return False
        self._sampled_at = now if due == SAMPLES else self._sampled_at + due
        hops: dict[str, list[float]] = {}
        for link in rows["links"]:
            hops.setdefault(link["source"], []).append(link["hop_s"] or link["rtt_s"] / 2)
        present = {row["id"]: row for row in rows["peers"] if row["id"] and row["capability"]}
        for gone in self._peers.keys() - present.keys():
            del self._peers[gone]
        for peer, row in present.items():
            history = self._peers.setdefault(peer, PeerHistory())
            tokens_s, busy = self._work.get(peer, (0.0, 0.0))
            total = row["capability"]["memory_total_bytes"]
            used = 1 - row["capability"]["memory_free_bytes"] / total if total else 0.0
            known = hops.get(peer)
            for _ in range(due):
                history.tokens_s.append(tokens_s)
                history.busy.append(busy)
                history.memory.append(used)
                if known:
                    history.hop_s.append(sum(known) / len(known))
        self._work.clear()  # also that of peers that are gone
        return True

    def of(self, peer: str) -> PeerHistory:
        """Return a peer's samples; empty series for one that is not known."""
        return self._peers.get(peer) or PeerHistory()
