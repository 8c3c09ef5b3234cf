"""Draws a session's steps on all peers as a document of Chrome's trace format, which Perfetto shows (ui.perfetto.dev).

A process of the document is a peer. Its threads are lanes: for each stage the waiting, the computing and the sending of steps and
what is on the way to it; for the coordinator the tokens. Spans of one lane don't overlap, as the format wants; where several steps
wait at once, the lane has several rows. Times are in microseconds from the first span, in the clock of the peer that collected.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshd.agents.observe.spans import Span, SpanKind
from meshd.types import PeerId, SessionId

_LANES = ("on the way to", "waits at", "computes in", "hands over from")
_TOKENS_TID, _STORY_TID = 1, 2
_FIRST_TID, _LANE_TIDS = 100, 64
"""The rows of each lane have ids of their own. More than 64 steps of one stage do not wait at once: PREFILL_WINDOW is 4."""

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PeerTrace:
    """What one peer recorded of a session, in the collecting peer's clock."""

    peer: PeerId
    name: str
    spans: list[Span]
    lines: list[dict[str, Any]]
    """Notes of its story, with `at` and `what`."""
    dropped: int = 0
    offset_s: float = 0.0
    """Its clock minus that of the collecting peer."""
    error_s: float = 0.0
    """Largest possible error of the conversion to the collecting peer's clock."""


@dataclass(frozen=True, slots=True)
class _Bar:
    """One span of the drawing."""

    lane: str
    order: int
    """Order of the lane among those of its process."""
    name: str
    begin: float
    end: float
    args: dict[str, Any] = field(default_factory=dict)


def chrome_trace(session: SessionId, traces: list[PeerTrace], missing: Mapping[str, str]) -> dict[str, object]:
    """Draw the traces. `missing`: why peers gave none, by name."""
    times = [span.arrived for trace in traces for span in trace.spans] + [line["at"] for trace in traces for line in trace.lines]
    zero = min(times)
    on_the_way = _on_the_way(traces)
    events: list[Event] = []
    for pid, trace in enumerate(traces, 1):
        events += _process(pid, trace, [*_bars(trace), *on_the_way[trace.peer]], zero)
    clocks = [
        {"peer": trace.peer, "name": trace.name, "offset_s": trace.offset_s, "error_s": trace.error_s, "dropped": trace.dropped}
        for trace in traces
    ]
    about = {"session": session, "clock_of": traces[0].name, "clocks": clocks, "no_trace_of": dict(missing)}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _process(pid: int, trace: PeerTrace, bars: list[_Bar], zero: float) -> Iterator[Event]:
    """Yield the events of one peer."""
    yield _metadata(pid, 0, "process_name", name=f"{trace.name} ({trace.peer[:8]}), clock within {1e3 * trace.error_s:.3f} ms")
    yield _metadata(pid, 0, "process_sort_index", sort_index=pid)
    lanes: defaultdict[tuple[int, str], list[_Bar]] = defaultdict(list)
    for bar in bars:
        lanes[bar.order, bar.lane].append(bar)
    for (order, lane), members in sorted(lanes.items()):
        for row, placed in enumerate(_rows(members)):
            tid = order + row
            yield _metadata(pid, tid, "thread_name", name=lane)
            yield _metadata(pid, tid, "thread_sort_index", sort_index=tid)
            for bar in placed:
                yield {
                    "ph": "X",
                    "pid": pid,
                    "tid": tid,
                    "name": bar.name,
                    "cat": lane,
                    "ts": _us(bar.begin - zero),
                    "dur": _us(bar.end - bar.begin),
                    "args": bar.args,
                }
    if trace.lines:
        yield _metadata(pid, _STORY_TID, "thread_name", name="story")
    for line in trace.lines:
        facts = {key: value for key, value in line.items() if key not in ("at", "what")}
        yield {
            "ph": "i",
            "s": "t",
            "pid": pid,
            "tid": _STORY_TID,
            "name": line["what"],
            "cat": "story",
            "ts": _us(line["at"] - zero),
            "args": facts,
        }


def _bars(trace: PeerTrace) -> Iterator[_Bar]:
    """Yield what a peer did: for each step its waiting, computing and handing over; for the coordinator each token."""
    before: float | None = None
    for span in trace.spans:
        args = {"epoch": span.epoch, "position": span.position, "tokens": span.tokens}
        if span.kind is SpanKind.TOKEN:
            begin = span.arrived if before is None else min(before, span.arrived)
            yield _Bar("tokens", _TOKENS_TID, f"token {span.position}", begin, span.arrived, {"epoch": span.epoch})
            before = span.arrived
            continue
        name = _name(span)
        for lane, begin, end in ((1, span.arrived, span.started), (2, span.started, span.ended), (3, span.ended, span.sent)):
            yield _Bar(f"{_LANES[lane]} stage {span.stage}", _order(span.stage, lane), name, begin, end, args)


def _on_the_way(traces: list[PeerTrace]) -> defaultdict[PeerId, list[_Bar]]:
    """Draw what is between two stages, at the peer that receives it: from the begin of sending to the arrival.

    A decode step of the first stage begins with the token that the last stage sampled for the position before it.
    """
    sent: dict[tuple[int, int, int], tuple[str, float]] = {}
    last = max((span.stage for trace in traces for span in trace.spans), default=0)
    for trace in traces:
        for span in trace.spans:
            if span.kind is not SpanKind.TOKEN:
                sent[span.epoch, span.stage, span.position + (span.tokens if span.stage == last else 0)] = trace.name, span.sent
    drawn: defaultdict[PeerId, list[_Bar]] = defaultdict(list)
    for trace in traces:
        for span in trace.spans:
            token = span.kind is SpanKind.DECODE and span.stage == 0
            source = sent.get((span.epoch, last if token else span.stage - 1, span.position))
            if span.kind is SpanKind.TOKEN or source is None:
                continue
            name, begin = source
            args = {"epoch": span.epoch, "position": span.position, "from": name, "what": "token" if token else "activation"}
            lane = f"{_LANES[0]} stage {span.stage}"
            end = max(begin, span.arrived)  # the clocks' error can turn them around
            drawn[trace.peer].append(_Bar(lane, _order(span.stage, 0), _name(span), begin, end, args))
    return drawn


def _rows(bars: Iterable[_Bar]) -> list[list[_Bar]]:
    """Divide spans into rows in which none overlaps another."""
    rows: list[list[_Bar]] = []
    for bar in sorted(bars, key=lambda bar: (bar.begin, bar.end)):
        free = next((row for row in rows if row[-1].end <= bar.begin), None)
        if free is None and len(rows) < _LANE_TIDS:
            rows.append([bar])
        else:
            (free or rows[-1]).append(bar)
    return rows


def _order(stage: int, lane: int) -> int:
    return _FIRST_TID + (stage * len(_LANES) + lane) * _LANE_TIDS


def _name(span: Span) -> str:
    positions = f"{span.position}" if span.tokens == 1 else f"{span.position}-{span.position + span.tokens}"
    return f"{span.kind.name.lower()} {positions}"


def _metadata(pid: int, tid: int, what: str, **args: object) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": args}


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)
