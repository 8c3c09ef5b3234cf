"""Sends the outputs of stages: activations to the next stage, tokens to the first stage and to the coordinator."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshd.agents.links.backlog import Backlog
from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.stage.session import StageState, Step
from meshd.agents.stage.steps import ActiveStage, StepOutput
from meshd.errors import MeshdError
from meshd.kernels.wire import encode
from meshd.protocol.messages import Activation, Lane, Message, Taken, Token
from meshd.types import FinishReason, PeerId


@dataclass(slots=True)
class StageSender:
    """Sends the outputs of this peer's stages. An output waits while its lane is full; a stage whose link is lost fails."""

    me: PeerId
    links: Links
    backlog: Backlog
    fail: Callable[[ActiveStage, int, MeshdError, PeerId], None]
    """Ends a stage whose output could not be sent: (stage, position, error, peer to blame)."""

    def deliver(self, active: ActiveStage, step: Step, output: StepOutput, skip: int) -> None:
        """Send the activation of a step, without its first `skip` tokens, or the token that the step sampled."""
        if output.hidden is not None:
            hidden = output.hidden[skip:] if skip else output.hidden
            self._send_activation(active, step.position + skip, hidden, sample=step.sample, prefill=step.prefill)
        elif output.token is not None:
            message = _token(active, step, output, output.token)
            for peer in dict.fromkeys((active.peer_of(0), active.open.coordinator)):
                self._send_or_fail(active, step.position, peer, message)

    def must_wait(self, active: ActiveStage, step: Step) -> bool:
        """Whether a prefill step has no room for its output: earlier outputs still wait to be sent to the next stage's peer."""
        if not step.prefill or active.last or active.machine.state is StageState.ENDED:
            return False
        return self.backlog.waits(active.peer_of(active.open.stage + 1), Lane.BULK)

    def replay(self, active: ActiveStage, position: int, tokens: int) -> None:
        """Send the kept outputs of `[position, position + tokens)` again."""
        assert active.cache.log is not None
        try:
            hidden = active.cache.log.rows(position, position + tokens)
        except MeshdError as error:
            self.fail(active, position, error, self.me)
        else:
            self._send_activation(active, position, hidden, sample=False, prefill=True)

    def send_taken(self, active: ActiveStage, step: Step) -> None:
        """Report to the previous stage that this prefill step begins, so that the previous stage may send one more."""
        message = Taken(session=active.open.session, epoch=active.open.epoch, step=step.position, stage=active.open.stage)
        try_send(self.links.send, active.peer_of(active.open.stage - 1), message)

    def _send_activation(
        self, active: ActiveStage, position: int, hidden: npt.NDArray[np.float32], *, sample: bool, prefill: bool
    ) -> None:
        tokens, width = hidden.shape
        message = Activation(
            session=active.open.session,
            epoch=active.open.epoch,
            step=position,
            stage=active.open.stage + 1,
            tokens=tokens,
            hidden=width,
            dtype=active.open.plan.wire_dtype,
            sample=sample,
            prefill=prefill,
        )
        self._send_or_fail(active, position, active.peer_of(message.stage), message, encode(hidden, message.dtype))

    def _send_or_fail(
        self, active: ActiveStage, position: int, peer: PeerId, message: Message, payload: memoryview | None = None
    ) -> None:
        """Send a message without which the session can't continue; fail the stage if it can't be sent."""
        self.backlog.send(
            peer,
            message,
            payload,
            wanted=lambda: active.machine.state is not StageState.ENDED,
            failed=lambda error: self.fail(active, position, error, peer),
        )


def _token(active: ActiveStage, step: Step, output: StepOutput, token: int) -> Token:
    index = step.end - active.open.prompt_tokens
    finish = ""
    if token in active.resident.card.end_of_sequence and not active.open.ignore_eos:
        finish = FinishReason.STOP.value
    elif index + 1 == active.open.max_tokens:
        finish = FinishReason.LENGTH.value
    return Token(
        session=active.open.session,
        epoch=active.open.epoch,
        step=step.position,
        index=index,
        token=token,
        logprobs=output.logprobs,
        final=bool(finish),
        finish=finish,
    )
