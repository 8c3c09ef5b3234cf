"""Counters that follow from a peer's events. The values of a real peer are checked in `tests/cluster/test_metrics.py`."""

from in_process.clocks import SetClock
from meshd.agents.admin.metrics import EventMetrics
from meshd.agents.observe.events import HoldingChanged, PeerChanged, SessionChanged
from meshd.telemetry import Telemetry


def holding(state: str, was: str) -> HoldingChanged:
    return HoldingChanged(model="tiny", layers="0-4", state=state, was=was)


def test_ends_of_sessions_and_changes_of_peers_are_counted() -> None:
    telemetry = Telemetry()
    metrics, value = EventMetrics(telemetry, SetClock(0.0)), telemetry.registry.get_sample_value
    for state in ("opening", "prefilling", "decoding", "finished"):
        metrics.count(SessionChanged(session="s", model="tiny", state=state, was="", tokens=0, reason=""))
    metrics.count(PeerChanged(of="p", of_name="p", state="dead", was="alive", reason="silent"))
    metrics.count(PeerChanged(of="p", of_name="p", state="dead", was="dead", reason="another reason"))
    assert value("meshd_sessions_ended_total", {"state": "finished"}) == 1
    assert value("meshd_peer_changes_total", {"state": "dead"}) == 1


def test_a_load_is_timed_from_its_begin_until_its_layers_serve() -> None:
    telemetry, clock = Telemetry(), SetClock(0.0)
    metrics, value = EventMetrics(telemetry, clock), telemetry.registry.get_sample_value
    metrics.count(holding("loading", ""))
    clock.now += 2
    metrics.count(holding("warm", "loading"))
    clock.now += 1
    metrics.count(holding("active", "warm"))
    metrics.count(holding("released", "active"))
    assert value("meshd_load_seconds_sum") == 3
    assert value("meshd_loads_total", {"outcome": "active"}) == 1
    assert value("meshd_loads_total", {"outcome": "failed"}) == 0


def test_a_load_that_ends_without_layers_has_failed() -> None:
    telemetry = Telemetry()
    metrics = EventMetrics(telemetry, SetClock(0.0))
    metrics.count(holding("loading", ""))
    metrics.count(holding("released", "loading"))
    assert telemetry.registry.get_sample_value("meshd_loads_total", {"outcome": "failed"}) == 1
    assert not metrics._loading
