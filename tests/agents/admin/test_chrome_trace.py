"""A session's trace as a document of Chrome's format."""

from collections import defaultdict
from typing import Any

from meshd.agents.admin.chrome_trace import PeerTrace, chrome_trace
from meshd.agents.observe.spans import Span, SpanKind
from meshd.types import PeerId, SessionId

SESSION = SessionId("5e" * 16)
A, B = PeerId("a" * 52), PeerId("b" * 52)


def step(kind: SpanKind, stage: int, position: int, tokens: int, *times: float) -> Span:
    return Span(kind, 1, stage, position, tokens, *times)


def drawn() -> dict[str, Any]:
    first = [
        step(SpanKind.PREFILL, 0, 0, 4, 10.0, 10.1, 10.2, 10.2),
        step(SpanKind.DECODE, 0, 4, 1, 10.5, 10.5, 10.6, 10.6),
        step(SpanKind.TOKEN, 0, 0, 1, 10.5, 10.5, 10.5, 10.5),
    ]
    second = [
        step(SpanKind.PREFILL, 1, 0, 4, 10.25, 10.3, 10.45, 10.45),
        step(SpanKind.DECODE, 1, 4, 1, 10.65, 10.65, 10.7, 10.7),
    ]
    lines = [{"at": 9.5, "what": "planned", "plan": "a:0-2,b:2-4"}]
    traces = [PeerTrace(A, "ash", first, lines), PeerTrace(B, "birch", second, [], dropped=2, offset_s=-7.0, error_s=0.002)]
    return chrome_trace(SESSION, traces, {"cedar": "it is gone"})


def bars(document: dict[str, Any], category: str) -> list[tuple[int, str, float, float]]:
    return [
        (event["pid"], event["name"], event["ts"], event["dur"])
        for event in document["traceEvents"]
        if event.get("cat") == category
    ]


def test_each_step_has_its_lanes_at_its_peer_with_times_from_the_first_event() -> None:
    document = drawn()
    assert bars(document, "waits at stage 0")[0] == (1, "prefill 0-4", 500_000.0, 100_000.0)
    assert bars(document, "computes in stage 1") == [
        (2, "prefill 0-4", 800_000.0, 150_000.0),
        (2, "decode 4", 1_150_000.0, 50_000.0),
    ]
    assert bars(document, "on the way to stage 1") == [
        (2, "prefill 0-4", 700_000.0, 50_000.0),
        (2, "decode 4", 1_100_000.0, 50_000.0),
    ]
    assert bars(document, "on the way to stage 0") == [(1, "decode 4", 950_000.0, 50_000.0)]
    assert bars(document, "tokens") == [(1, "token 0", 1_000_000.0, 0.0)]


def test_the_document_says_how_exact_it_is_and_what_is_missing() -> None:
    about = drawn()["otherData"]
    assert about["clock_of"] == "ash"
    assert about["clocks"][1] == {"peer": B, "name": "birch", "offset_s": -7.0, "error_s": 0.002, "dropped": 2}
    assert about["no_trace_of"] == {"cedar": "it is gone"}


def test_every_process_and_lane_has_a_name_and_no_lane_has_overlapping_spans() -> None:
    document = drawn()
    named = {(event["pid"], event["tid"], event["name"]) for event in document["traceEvents"] if event["ph"] == "M"}
    lanes: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in document["traceEvents"]:
        assert event["ph"] in ("X", "M", "i")
        if event["ph"] == "X":
            assert (event["pid"], event["tid"], "thread_name") in named
            assert (event["pid"], 0, "process_name") in named
            lanes[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for spans in lanes.values():
        assert all(one[1] <= other[0] for one, other in zip(sorted(spans), sorted(spans)[1:], strict=False))


def test_steps_that_wait_at_once_are_in_rows_of_their_own() -> None:
    waiting = [step(SpanKind.PREFILL, 0, position, 1, 1.0, 2.0 + position, 3.0 + position, 3.0 + position) for position in range(3)]
    document = chrome_trace(SESSION, [PeerTrace(A, "ash", waiting, [])], {})
    events: list[dict[str, Any]] = document["traceEvents"]  # type: ignore[assignment]
    assert len({event["tid"] for event in events if event.get("cat") == "waits at stage 0"}) == 3
    assert len({event["tid"] for event in events if event.get("cat") == "computes in stage 0"}) == 1
