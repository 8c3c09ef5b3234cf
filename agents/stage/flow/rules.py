"""The rules that steps and RESUME must keep."""

from typing import TYPE_CHECKING

from meshd.agents.stage.flow.events import StageResumed, StageStep
from meshd.protocol.messages import StepKind

if TYPE_CHECKING:
    from meshd.agents.stage.flow.session import StageSession


def step_refusal(session: "StageSession", step: StageStep) -> str:
    """Check the next step in order. Returns: why the stage can't take it; empty if it can."""
    if step.tokens < 1 or step.end > session.max_tokens:
        return f"{step.tokens} tokens at {step.start} are past the {session.max_tokens} reserved"
    if step.kind is StepKind.REFILL:
        held = step.end <= session.due and not step.sample
        return "" if held else f"a refill of {step.start} to {step.end - 1} is not of positions that were computed"
    if not session.committed <= step.start <= session.due:
        return f"a step at {step.start} came where one from {session.committed} to {session.due} was due"
    guessed = step.kind is StepKind.VERIFY  # of its tokens, at most the first one is final
    if step.committed > step.start + 1 if guessed else step.committed != step.end:
        return f"a {step.kind} step of {step.start} to {step.end - 1} commits {step.committed}"
    if step.kind is StepKind.PREFILL:
        if step.end > session.known_tokens:
            return f"{step.tokens} tokens at {step.start} are past the {session.known_tokens} known"
        if step.sample != (step.end == session.known_tokens):
            return f"a prefill step to {step.end} of {session.known_tokens} known tokens samples {step.sample}"
        return ""
    if session.first:
        return f"a {step.kind} step came to the first stage, which makes them itself"
    if step.start < session.known_tokens or step.sample != step.tokens:
        return f"a {step.kind} step of {step.tokens} tokens at {step.start} samples {step.sample}"
    if len(step.ids) != (step.tokens if guessed else 0):
        return f"a {step.kind} step of {step.tokens} tokens has {len(step.ids)} ids"
    if step.kind is StepKind.DECODE and (step.tokens != 1 or (session.last and step.start != session.sampled_to - 1)):
        return f"a decode step of {step.tokens} tokens at {step.start} came where {session.sampled_to - 1} is the newest token"
    return ""


def resume_refusal(session: "StageSession", event: StageResumed) -> str:
    """Check RESUME. Returns: why the stage can't start as requested; empty if it can."""
    if not 0 <= event.start <= session.held or 0 < event.start < session.held_from:
        return f"it has KV to start at {session.held_from} to {session.held}, or at 0: it can't start at {event.start}"
    if event.start >= session.known_tokens or not 0 <= event.send_from < session.known_tokens:
        return f"{session.known_tokens} tokens are known: it can't start at {event.start} and send from {event.send_from}"
    available = session.kept_from <= event.send_from and event.start <= session.kept_to
    if not session.last and not available and event.send_from < event.start:
        return f"outputs {session.kept_from} to {session.kept_to} are kept, not those from {event.send_from} to {event.start}"
    return ""
