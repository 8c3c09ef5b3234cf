"""A prompt is sent to the first stage in parts, as far as the stage has room."""

from typing import Any

import numpy as np
import pytest

from meshd.agents.session.stages import prompt
from meshd.agents.session.stages.prompt import PromptSender
from meshd.protocol.messages import STEP_WINDOW, Step, StepKind, Steps
from meshd.types import PeerId, SessionId

PART = 10
PEER = PeerId("p" * 52)


class Sent:
    """Takes the place of `Links`, and keeps what was sent."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.ids: list[int] = []

    def send(self, peer: PeerId, message: Steps, payload: Any) -> None:
        assert peer == PEER
        [step] = message.steps
        assert step.size == len(payload) == 4 * step.tokens
        self.steps.append(step)
        self.ids += np.frombuffer(payload, "<i4").tolist()


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def sender(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> PromptSender:
    monkeypatch.setattr(prompt, "PART_TOKENS", PART)
    return PromptSender(SessionId("5" * 32), sent)  # type: ignore[arg-type]


def known(tokens: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.arange(tokens, dtype="<i4")


def test_a_short_prompt_is_one_step_that_is_sampled_after(sender: PromptSender, sent: Sent) -> None:
    sender.send(1, PEER, known(PART), 3)
    [step] = sent.steps
    assert (step.seq, step.start, step.tokens, step.kind, step.sample) == (0, 3, PART - 3, StepKind.PREFILL, 1)
    assert sent.ids == list(range(3, PART))


def test_a_long_prompt_is_sent_as_the_stage_has_room(sender: PromptSender, sent: Sent) -> None:
    tokens = (STEP_WINDOW + 2) * PART + 1
    sender.send(2, PEER, known(tokens), 0)
    assert [step.seq for step in sent.steps] == list(range(STEP_WINDOW))
    sender.acknowledged(1, 100)  # of an epoch that is past
    assert len(sent.steps) == STEP_WINDOW
    for begun in (1, 2, 3):
        sender.acknowledged(2, begun + STEP_WINDOW)
    assert sent.ids == list(range(tokens))
    assert [step.sample for step in sent.steps] == [0] * (STEP_WINDOW + 2) + [1]
    assert [step.committed for step in sent.steps] == [min(tokens, PART * (seq + 1)) for seq in range(STEP_WINDOW + 3)]


def test_what_is_left_of_a_forgotten_prompt_is_not_sent(sender: PromptSender, sent: Sent) -> None:
    sender.acknowledged(0, 100)
    sender.send(2, PEER, known((STEP_WINDOW + 1) * PART), 0)
    sender.forget(2)
    for epoch in (0, 2):
        sender.acknowledged(epoch, 100)
    assert len(sent.steps) == STEP_WINDOW
