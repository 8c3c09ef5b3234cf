"""Receives the messages that stages send to the coordinator of their session: TOKENS, ACK, FAILED, MIRRORED and ERROR."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from meshd.agents.links.links import Links
from meshd.agents.session.answer import Answer
from meshd.agents.session.plan.move import Mover
from meshd.agents.session.plan.retry import PlanRetrier
from meshd.errors import InvalidSampling, MeshdError, PeerFault, PeerLost, RemoteFailure
from meshd.protocol.messages import Ack, Closed, Error, Failed, Mirrored, Tokens
from meshd.types import PeerId, Plan, SessionId


@dataclass(slots=True)
class StageReceiver:
    """Passes each message to its answer. Ignores senders that have no stage of the answer's present plan."""

    answers: Mapping[SessionId, Answer]
    retrier: PlanRetrier
    mover: Mover
    names: Callable[[PeerId], str]

    def register(self, links: Links) -> None:
        """Register the handlers of FAILED, CLOSED and MIRRORED. The coordinator passes TOKENS, ACK and ERROR on."""
        links.register(Failed, self._on_failed)
        links.register(Closed, lambda sender, message, payload: None)
        links.register(Mirrored, self._on_mirrored)

    def on_tokens(self, sender: PeerId, message: Tokens) -> None:
        """Pass tokens to their answer. Ignore them unless they come from the peer of the last stage."""
        answer = self._answer_of(sender, message.session)
        if answer is None or answer.plan is None or answer.plan.peers[-1] != sender:
            return
        vocabulary = answer.card.spec.vocab
        largest = max(message.tokens)
        if largest < vocabulary and len(message.logprobs) in (0, len(message.tokens)):
            answer.tokens_arrived(message)
            return
        error = PeerFault(f"{self.names(sender)} sent token {largest}, but the vocabulary has only {vocabulary} tokens")
        if largest < vocabulary:
            error = PeerFault(f"{self.names(sender)} sent {len(message.logprobs)} logprobs for {len(message.tokens)} tokens")
        answer.stage_failed(message.epoch, len(answer.plan.stages) - 1, error, sender)

    def on_ack(self, sender: PeerId, message: Ack) -> None:
        """Let an answer send more of its prompt to the first stage."""
        answer = self._answer_of(sender, message.session)
        if answer is not None and answer.plan is not None and answer.plan.peers[0] == sender:
            answer.stages.prompt.acknowledged(message.epoch, message.credit)

    def on_error(self, sender: PeerId, message: Error) -> None:
        """Recover the answer, because a stage's peer refused a message of its session."""
        answer = self._answer_of(sender, message.session)
        if answer is not None:
            answer.stage_failed(answer.machine.epoch, 0, RemoteFailure(message.message, remote_code=message.code), sender)

    def _on_failed(self, sender: PeerId, message: Failed, payload: memoryview) -> None:
        answer = self._answer_of(sender, message.session)
        if answer is None or answer.plan is None:
            return
        text = f"{self.names(sender)} could not continue: {message.message}"
        error: MeshdError = RemoteFailure(text, remote_code=message.code)
        if message.code == PeerLost.code:
            error = PeerLost(text)
        elif message.code == InvalidSampling.code:
            error = InvalidSampling(message.message)
        answer.stage_failed(message.epoch, message.stage, error, blamed_peer(answer.plan, answer.context.me, sender, message.blame))

    def _on_mirrored(self, sender: PeerId, message: Mirrored, payload: memoryview) -> None:
        answer = self._answer_of(sender, message.session)
        if answer is not None and answer.plan is not None and sender in answer.plan.peers[message.stage : message.stage + 1]:
            self.retrier.on_mirrored(answer, message)
            self.mover.on_mirrored(answer, message)

    def _answer_of(self, sender: PeerId, session: SessionId | None) -> Answer | None:
        """Returns: the running answer, if `sender` has a stage of its plan; else None."""
        answer = self.answers.get(session) if session is not None else None
        return answer if answer is not None and answer.plan is not None and sender in answer.plan.peers else None


def blamed_peer(plan: Plan, coordinator: PeerId, sender: PeerId, blame: PeerId | None) -> PeerId | None:
    """Decide which peer a failed stage may blame: itself, a peer that it exchanges steps with, or the coordinator.

    Returns: `blame` if it is one of these, otherwise the sender, which blamed a peer that it knows nothing of; None for no blame.
    """
    if blame is None:
        return None
    peers, last = plan.peers, len(plan.peers) - 1
    at = [number for number, peer in enumerate(peers) if peer == sender]
    neighbours = {peers[other] for number in at for other in (number - 1, 0 if number == last else number + 1)}
    return blame if blame in {sender, coordinator, *neighbours} else sender
