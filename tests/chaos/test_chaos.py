"""The schedule, the requests and the verdict of the chaos run. `make chaos-short` is the run itself."""

from collections import Counter
from typing import Any

import pytest

from chaos.blame import FaultTimes, wrong_blame
from chaos.clients import ClientRequest, make_specs
from chaos.repairs import InjectedFault
from chaos.schedule import DOUBLE, NETWORK, Kind, make_schedule
from chaos.verdict import Reading, leaks, pause_s
from real_daemons.streams import Answer, Interrupted, Spec

SPEC = Spec("one", "/v1/completions", {})


def test_a_schedule_follows_from_its_seed_and_has_all_kinds_equally_often() -> None:
    schedule = make_schedule(7, 200, network=True)
    assert schedule == make_schedule(7, 200, network=True)
    assert schedule != make_schedule(8, 200, network=True)
    counts = Counter(fault.kind for fault in schedule if fault.kind is not Kind.MIGRATE)
    assert counts.total() == 200
    assert set(counts) == set(Kind) - {Kind.MIGRATE}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert not {fault.kind for fault in make_schedule(7, 50, network=False)} & NETWORK
    assert not any(fault.coordinator for fault in schedule if fault.kind in DOUBLE)


def test_requests_cover_every_route_and_kind_of_sampling() -> None:
    specs = make_specs(3, 18, (64, 200))
    assert specs == make_specs(3, 18, (64, 200))
    assert {spec.path for spec in specs} == {"/v1/completions", "/v1/chat/completions", "/v1/responses"}
    assert {bool(spec.body.get("seed")) for spec in specs} == {True, False}
    assert any("repetition_penalty" in spec.body for spec in specs)
    assert {"logprobs" in spec.body or "include" in spec.body for spec in specs} == {True, False}


def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    logprobs = {"tokens": [text], "token_logprobs": [-0.5], "top_logprobs": None}
    return {"id": "cmpl-1", "choices": [{"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}]}


def answer_of(*events: tuple[int, str]) -> Answer:
    answer = Answer(SPEC)
    for at, (number, text) in enumerate(events):
        answer.take(number, chunk(text), float(at))
    answer.ended = True
    return answer


UNDISTURBED = answer_of((1, "a"), (2, "b"), (3, "c"))


def test_an_answer_with_the_same_events_has_no_differences() -> None:
    assert answer_of((1, "a"), (2, "b"), (3, "c")).differences_from(UNDISTURBED) == []


@pytest.mark.parametrize(
    ("events", "difference"),
    [
        (((1, "a"), (2, "x"), (3, "c")), "wrong at 1"),
        (((1, "a"), (2, "c")), "lost at 1"),
        (((1, "a"), (2, "a"), (3, "b"), (4, "c")), "repeated at 1"),
        (((1, "a"), (2, "b")), "2 for 3"),
        (((1, "a"), (2, "b"), (2, "b"), (3, "c")), "1 events repeated"),
        (((1, "a"), (2, "b"), (4, "c")), "1 events left out"),
    ],
)
def test_each_difference_is_described(events: tuple[tuple[int, str], ...], difference: str) -> None:
    assert difference in "; ".join(answer_of(*events).differences_from(UNDISTURBED))


def test_an_error_event_raises_interrupted() -> None:
    with pytest.raises(Interrupted, match="peer_lost: gone"):
        Answer(SPEC).take(None, {"error": {"code": "peer_lost", "message": "gone"}}, 0.0)


def test_a_pause_counts_from_the_fault_to_the_next_token() -> None:
    (fault,) = [fault for fault in make_schedule(1, 12, network=False) if fault.kind is Kind.KILL][:1]
    answer = answer_of(*((number, "a") for number in range(4)))
    answer.times = [10.0, 11.0, 14.0, 30.0]
    assert pause_s(ClientRequest(answer), InjectedFault(fault, 11.5, {}, over_at=12.0)) == 16.0
    assert pause_s(ClientRequest(answer), InjectedFault(fault, 11.5, {}, over_at=8.0)) == 2.5
    assert pause_s(ClientRequest(answer), InjectedFault(fault, 31.0, {}, over_at=32.0)) is None


def test_leaks_of_sessions_kv_sockets_and_memory_are_reported() -> None:
    empty = Reading(sessions=0, kv_tokens_held=0, blocks_free=9, sockets=14, resident_bytes=300 << 20, resident=(), layers=0)
    loaded = Reading(
        sessions=0, kv_tokens_held=0, blocks_free=9, sockets=14, resident_bytes=600 << 20, resident=("0-30",), layers=30
    )
    assert leaks({"h1": empty, "h2": loaded}, {"h1": loaded, "h2": empty}) == []
    left = Reading(
        sessions=1, kv_tokens_held=32, blocks_free=8, sockets=20, resident_bytes=900 << 20, resident=("0-30",), layers=30
    )
    found = "; ".join(leaks({"h1": empty, "h2": loaded}, {"h1": left}))
    assert all(part in found for part in ("1 sessions", "32 KV tokens", "20 sockets", "900 MiB"))


def story(*rows: tuple[float, str, str, str | list[str] | None]) -> list[dict[str, Any]]:
    """Make a story that began at 100 of (seconds since then, name of the peer that tells it, what, ids of those that it blames)."""
    return [
        {"at_s": at_s, "unix_s": 100 + at_s, "name": name, "what": what, "reason": "no answer", "blame": blame}
        for at_s, name, what, blame in rows
    ]


def test_only_peers_with_a_fault_may_be_blamed() -> None:
    faults = FaultTimes()
    faults.begins("h2", 110.0)
    faults.ends("h2", 120.0)
    names = {"id1": "h1", "id2": "h2", "id3": "h3"}

    def wrong(*rows: tuple[float, str, str, str | list[str] | None]) -> list[str]:
        return wrong_blame(story(*rows, (60.0, "h1", "length", None)), names, faults)

    assert wrong((0.0, "h1", "planned", None), (12.0, "h1", "lost", ["id2"]), (23.0, "h3", "failed", "id2")) == []
    assert wrong((15.0, "h2", "lost", ["id1", "id3"])) == [], "a peer that was cut off finds all others silent"
    assert wrong((5.0, "h1", "lost", ["id2"])) == ["h1 blames h2, which had no fault: lost, no answer"], "before its fault"
    assert wrong((40.0, "h1", "lost", ["id2"])) == ["h1 blames h2, which had no fault: lost, no answer"], "long after it"
    assert wrong((12.0, "h1", "lost", ["id2", "id3"]), (13.0, "h3", "failed", "id1")) == [
        "h1 blames h3, which had no fault: lost, no answer",
        "h3 blames h1, which had no fault: failed, no answer",
    ]
    faults.begins("h2", 130.0)
    assert wrong((59.0, "h1", "lost", ["id2"])) == [], "a fault that has not ended"
    assert wrong_blame(story((20.0, "h1", "lost", ["id3"])), names, faults) == ["h1 blames h3, which had no fault: lost, no answer"]
