"""The report of an ended answer: measured times and their predictions."""

import logging

import pytest

from in_process.answers import AnswerSite
from in_process.peers import Peers
from meshd.agents.session.recovery_history import Recovered
from meshd.agents.session.report import report_end
from meshd.telemetry import Telemetry


async def made(peers: Peers, **fields: object) -> AnswerSite:
    """Make an answer with two tokens: the first after 2 s, the second 1 s later. The plan predicts 0.5 s per token."""
    site = AnswerSite(peers.start("a"), **fields)
    await site.open()
    site.clock.now += 2
    site.answer.tokens_arrived(site.tokens(0, 7))
    site.clock.now += 1
    site.answer.tokens_arrived(site.tokens(1, 8, finish="stop"))
    return site


async def test_an_answer_without_recoveries_is_measured_and_compared_with_its_prediction(
    peers: Peers, caplog: pytest.LogCaptureFixture
) -> None:
    site, telemetry = await made(peers), Telemetry()
    with caplog.at_level(logging.INFO):
        report_end(site.answer, telemetry, site.published)
    value = telemetry.registry.get_sample_value
    assert value("meshd_tokens_total", {"kind": "prompt"}) == 3
    assert value("meshd_tokens_total", {"kind": "completion"}) == 2
    assert value("meshd_ttft_seconds_sum") == 2
    assert value("meshd_tpot_seconds_sum") == 1
    assert value("meshd_prediction_ratio_sum", {"what": "tpot"}) == 2
    assert "completed: 2 tokens, ttft 2000 ms (predicted 0), tpot 1000.0 ms (predicted 500.0), 0 recoveries" in caplog.text


async def test_an_answer_with_a_recovery_is_not_compared_with_its_prediction(peers: Peers) -> None:
    site, telemetry = await made(peers), Telemetry()
    site.answer.recoveries.append(Recovered(2, "replay", "loss", "lost", 0.5))
    report_end(site.answer, telemetry, site.published)
    value = telemetry.registry.get_sample_value
    assert value("meshd_ttft_seconds_count") == 0
    assert value("meshd_tpot_seconds_count") == 1
    assert value("meshd_prediction_ratio_count", {"what": "tpot"}) == 0
