"""Reports an answer's measured and predicted times to telemetry and the log."""

from logging import getLogger
from typing import Literal

from meshd.agents.observe.events import PredictionChecked
from meshd.agents.observe.stream import EventStream
from meshd.agents.session.answer import Answer
from meshd.telemetry import Telemetry

log = getLogger(__name__)


def report_end(answer: Answer, telemetry: Telemetry, events: EventStream) -> None:
    """Report an answer that has ended or is suspended."""
    new_tokens = answer.output.timed_tokens
    telemetry.tokens(prompt=answer.prompt_tokens, completion=new_tokens)
    if answer.plan is not None:
        if answer.ttft_s and not answer.recoveries:
            telemetry.ttft(answer.ttft_s)
        if answer.measured_tpot_s:
            telemetry.tpot(answer.measured_tpot_s)
        if not answer.recoveries:
            _check("ttft", answer.predicted_ttft_s, answer.ttft_s, answer, telemetry, events)
            _check("tpot", answer.predicted_tpot_s, answer.measured_tpot_s, answer, telemetry, events)
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


def _check(
    what: Literal["ttft", "tpot"],
    predicted_s: float,
    measured_s: float,
    answer: Answer,
    telemetry: Telemetry,
    events: EventStream,
) -> None:
    """Report a predicted time beside the measured one, unless there is none."""
    if predicted_s > 0 and measured_s > 0:
        telemetry.prediction(what, predicted_s, measured_s)
        events.publish(PredictionChecked(session=answer.session, what=what, predicted_s=predicted_s, measured_s=measured_s))
