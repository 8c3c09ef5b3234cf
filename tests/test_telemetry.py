"""Metrics as Prometheus reads them."""

import pytest
from prometheus_client.parser import text_string_to_metric_families

from meshd.telemetry import MAX_SERIES, Telemetry


def samples(telemetry: Telemetry) -> dict[str, float]:
    return {
        f"{sample.name}{sorted(sample.labels.items())}": sample.value
        for family in text_string_to_metric_families(telemetry.render().decode())
        for sample in family.samples
    }


def test_every_recorded_value_is_rendered() -> None:
    telemetry = Telemetry()
    telemetry.ttft(0.2)
    telemetry.tpot(0.02)
    telemetry.hop("peer", 0.0001)
    telemetry.stage_step("tiny", "0-12", "decode", 0.01)
    telemetry.step_wait("decode", 0.002)
    telemetry.queue_wait(1.5)
    telemetry.tokens(prompt=10, completion=3)
    telemetry.request("/v1/models", "ok")
    telemetry.recovery("replay", "loss", 0.4)
    telemetry.session_ended("finished")
    telemetry.peer_changed("dead")
    telemetry.load_ended("active", 2.0)
    telemetry.load_ended("failed", 9.0)
    telemetry.log_line("warning")
    telemetry.prediction("tpot", 0.02, 0.03)
    seen = samples(telemetry)
    assert seen["meshd_ttft_seconds_sum[]"] == pytest.approx(0.2)
    assert seen["meshd_tpot_seconds_count[]"] == 1
    assert seen["meshd_hop_seconds_count[('peer', 'peer')]"] == 1
    assert seen["meshd_stage_seconds_count[('layers', '0-12'), ('model', 'tiny'), ('phase', 'decode')]"] == 1
    assert seen["meshd_step_wait_seconds_sum[('phase', 'decode')]"] == pytest.approx(0.002)
    assert seen["meshd_queue_wait_seconds_sum[]"] == pytest.approx(1.5)
    assert seen["meshd_tokens_total[('kind', 'prompt')]"] == 10
    assert seen["meshd_tokens_total[('kind', 'completion')]"] == 3
    assert seen["meshd_requests_total[('outcome', 'ok'), ('route', '/v1/models')]"] == 1
    assert seen["meshd_recovery_pause_seconds_sum[('cause', 'loss'), ('method', 'replay')]"] == pytest.approx(0.4)
    assert seen["meshd_sessions_ended_total[('state', 'finished')]"] == 1
    assert seen["meshd_peer_changes_total[('state', 'dead')]"] == 1
    assert seen["meshd_loads_total[('outcome', 'failed')]"] == 1
    assert seen["meshd_load_seconds_sum[]"] == pytest.approx(2.0)
    assert seen["meshd_log_lines_total[('level', 'warning')]"] == 1
    assert seen["meshd_prediction_ratio_sum[('what', 'tpot')]"] == pytest.approx(1.5)


def test_a_prediction_of_0_is_not_recorded() -> None:
    telemetry = Telemetry()
    telemetry.prediction("ttft", 0.0, 1.0)
    assert samples(telemetry)["meshd_prediction_ratio_count[('what', 'ttft')]"] == 0


def test_peers_in_one_process_have_separate_metrics() -> None:
    one, other = Telemetry(), Telemetry()
    one.tokens(prompt=1)
    assert samples(other)["meshd_tokens_total[('kind', 'prompt')]"] == 0


def test_series_of_peers_that_come_and_go_are_bounded_and_the_latest_stay() -> None:
    telemetry = Telemetry()
    telemetry.hop("steady", 0.001)
    for number in range(3 * MAX_SERIES):
        telemetry.hop(f"guest {number}", 0.001)
        telemetry.hop("steady", 0.001)
    counts = {name: value for name, value in samples(telemetry).items() if name.startswith("meshd_hop_seconds_count")}
    assert len(counts) == MAX_SERIES
    assert counts["meshd_hop_seconds_count[('peer', 'steady')]"] == 3 * MAX_SERIES + 1
    assert f"meshd_hop_seconds_count[('peer', 'guest {3 * MAX_SERIES - 1}')]" in counts


def test_there_is_one_line_for_each_series_and_bucket() -> None:
    assert b"_created" not in Telemetry().render()
