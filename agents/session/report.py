"""Reports an answer's measured and predicted times to telemetry and the log."""

from logging import getLogger

from meshd.agents.session.answer import Answer
from meshd.telemetry import Telemetry

log = getLogger(__name__)


def report_end(answer: Answer, telemetry: Telemetry) -> None:
    """Report an answer that has ended or is suspended."""
    new_tokens = answer.output.timed_tokens
    telemetry.tokens(prompt=answer.prompt_tokens, completion=new_tokens)
    if answer.ttft_s and answer.plan is not None and not answer.recoveries:
        telemetry.ttft(answer.ttft_s)
        telemetry.prediction("ttft", answer.plan.predicted_ttft_s, answer.ttft_s)
    if answer.measured_tpot_s and answer.plan is not None:
        telemetry.tpot(answer.measured_tpot_s)
        if not answer.recoveries:
            telemetry.prediction("tpot", answer.predicted_tpot_s, answer.measured_tpot_s)
    log.info(
        "session %s %s: %d tokens, ttft %.0f ms (predicted %.0f), tpot %.1f ms (predicted %.1f), %d recoveries",
        answer.session,
        answer.status,
        new_tokens,
        1000 * answer.ttft_s,
        1000 * answer.predicted_ttft_s,
        1000 * answer.measured_tpot_s,
        1000 * answer.predicted_tpot_s,
        len(answer.recoveries),
    )
