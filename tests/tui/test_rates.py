"""What is measured over time."""

from typing import Any

import pytest

from meshd.tui.rates import SAMPLES, WINDOW_S, Histories, StageTimes, TokenRates


def test_a_sessions_rate_is_that_of_the_last_seconds() -> None:
    rates = TokenRates()
    assert rates.tokens_s("s", 0.0) is None
    rates.observe("s", 0, 0.0)
    assert rates.tokens_s("s", 0.0) is None
    for second in range(1, 11):
        rates.observe("s", 10 * min(second, 5) + 40 * max(0, second - 5), float(second))
    assert rates.tokens_s("s", 10.0) == pytest.approx(40.0)
    rates.observe("s", 250, 10.5)  # the same number of tokens again
    assert rates.tokens_s("s", 10.0 + WINDOW_S + 0.1) == 0.0
    rates.forget(frozenset({"other"}))
    assert rates.tokens_s("s", 10.0) is None


def work(peer: str = "p", tokens: int = 10, **stage: Any) -> dict[str, Any]:
    one = {"session": "s", "stage": 0, "phase": "decode", "steps": 10, "tokens": 10, "busy_s": 0.5, "sent_bytes": 640} | stage
    return {"type": "work", "peer": peer, "period_s": 2.0, "tokens": tokens, "busy_s": 1.0, "stages": [one]}


def test_a_stages_steps_are_averaged_over_the_last_periods() -> None:
    times = StageTimes()
    assert times.of("s", 0, "p") is None
    times.observe(work(busy_s=99.0))
    for _ in range(5):
        times.observe(work())
    times.observe(work(phase="prefill", busy_s=50.0))
    known = times.of("s", 0, "p")
    assert known is not None
    assert (known.step_s, known.sent_bytes, known.steps_s) == (pytest.approx(0.05), 64.0, 5.0)
    assert times.of("s", 0, "other") is None
    for number in range(1100):
        times.observe(work(session=str(number)))
    assert times.of("s", 0, "p") is None  # the oldest is forgotten


def peer(name: str, free: int) -> dict[str, Any]:
    return {"id": name, "capability": {"memory_total_bytes": 100, "memory_free_bytes": free}}


def link(source: str, hop_s: float) -> dict[str, Any]:
    return {"source": source, "target": "x", "hop_s": hop_s, "rtt_s": 0.5}


def test_peers_are_sampled_once_a_second_whenever_events_come() -> None:
    histories = Histories()
    peers = [peer("a", 25), peer("b", 100), {"id": "c", "capability": None}]
    links = [link("a", 0.2), link("a", 0.4), link("b", 0.0)]
    rows = {"peers": peers, "links": links}
    assert not histories.tick(100.0, rows)
    histories.observe(work("a", tokens=30))
    assert histories.tick(101.2, rows)
    assert not histories.tick(101.9, rows)
    assert histories.tick(104.0, rows)
    known = histories.of("a")
    assert list(known.tokens_s) == [15.0, 0.0, 0.0, 0.0]
    assert list(known.memory) == [0.75] * 4
    assert list(known.hop_s) == pytest.approx([0.3] * 4)
    assert list(known.busy) == [0.5, 0.0, 0.0, 0.0]
    assert histories.of("b").hop_s[-1] == 0.25  # half of the round trip, where the hop was not measured
    assert not histories.of("c").memory


def test_a_long_silence_fills_at_most_one_screen_and_a_peer_that_left_is_forgotten() -> None:
    histories = Histories()
    rows = {"peers": [peer("a", 1)], "links": []}
    histories.tick(0.0, rows)
    histories.tick(1e6, rows)
    assert len(histories.of("a").memory) == SAMPLES
    histories.observe(work("gone", tokens=1))
    histories.tick(1e6 + 1, {"peers": [], "links": []})
    assert not histories.of("a").memory
    histories.tick(1e6 + 2, {"peers": [peer("gone", 1)], "links": []})
    assert list(histories.of("gone").tokens_s) == [0.0], "work of a peer that is gone is forgotten too"
