"""Sends what the stages of this peer put out: steps to the next stage, tokens to the first stage and to the coordinator."""

from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.links.backlog import Backlog
from meshd.agents.links.links import Links
from meshd.agents.stage.batch.compute import StepOutput
from meshd.agents.stage.flow.events import Acknowledge, SampledTokens, SentStep, StageStep
from meshd.agents.stage.flow.session import StageState
from meshd.agents.stage.steps import ActiveStage
from meshd.bounds import MAX_BATCH
from meshd.errors import MeshdError, PeerLost
from meshd.protocol.framing import MAX_PAYLOAD
from meshd.protocol.messages import Ack, Lane, Message, Step, StepKind, Steps, Tokens
from meshd.types import PeerId

log = getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A step that waits for the others of its batch, to share a frame with them."""

    active: ActiveStage
    step: Step
    payload: memoryview


@dataclass(slots=True)
class StageSender:
    """Sends the outputs of this peer's stages. An output waits while its lane is full; a stage whose link is lost fails."""

    me: PeerId
    links: Links
    backlog: Backlog
    fail: Callable[[ActiveStage, MeshdError, PeerId], None]
    """Ends a stage whose output could not be sent: (stage, error, peer to blame)."""
    _collected: dict[tuple[PeerId, Lane], list[_Outgoing]] | None = None

    def collect(self) -> None:
        """Keep steps back until `flush`, so that those of one batch to one peer share a frame."""
        self._collected = {}

    def flush(self) -> None:
        """Send the steps that were kept back."""
        collected, self._collected = self._collected or {}, None
        for (peer, _), outgoing in collected.items():
            for part in _frames(outgoing):
                self._send_steps(peer, part)

    def deliver(self, active: ActiveStage, sent: SentStep) -> None:
        """Send a step to the next stage: its output, or for a step of an earlier epoch the rows that are kept of it."""
        step = sent.step
        try:
            payload = self._rows(active, sent)
        except MeshdError as error:
            self.fail(active, error, self.me)
            return
        message = Step(
            session=active.open.session,
            epoch=active.open.epoch,
            stage=active.open.stage + 1,
            seq=sent.seq,
            start=step.start + sent.skip,
            tokens=step.tokens - sent.skip,
            kind=step.kind,
            sample=step.sample,
            committed=step.committed,
            size=payload.nbytes,
            ids=step.ids if step.kind is StepKind.VERIFY else (),
        )
        outgoing = _Outgoing(active, message, payload)
        if self._collected is None:
            self._send_steps(active.output_peer, [outgoing])
        else:
            self._collected.setdefault((active.output_peer, message.kind.lane), []).append(outgoing)

    def deliver_tokens(self, active: ActiveStage, sampled: SampledTokens) -> None:
        """Send sampled tokens to the first stage and to the coordinator; once, if they are one peer."""
        output = sampled.output
        assert isinstance(output, StepOutput)
        message = Tokens(
            session=active.open.session,
            epoch=active.open.epoch,
            index=sampled.index,
            tokens=sampled.tokens,
            logprobs=output.logprobs,
            finish=output.finish,
        )
        for peer in dict.fromkeys((active.peer_of(0), active.open.coordinator)):
            self._send_or_fail([active], peer, message)

    def acknowledge(self, active: ActiveStage, acknowledge: Acknowledge) -> None:
        """Report to the sender of the stage's steps how many it may send."""
        message = Ack(
            session=active.open.session,
            epoch=active.open.epoch,
            stage=active.open.stage,
            next_seq=acknowledge.next_seq,
            credit=acknowledge.credit,
        )
        self.backlog.send(
            active.input_peer,
            message,
            None,
            wanted=lambda: active.machine.state is not StageState.ENDED,
            failed=lambda error: log.debug("ACK to %.8s not sent: %s", active.input_peer, error),
        )

    def must_wait(self, active: ActiveStage, step: StageStep) -> bool:
        """Whether a prefill step has no room for its output: earlier outputs still wait to be sent to the next stage's peer."""
        if not step.prefill or active.last:
            return False
        return self.backlog.waits(active.output_peer, Lane.BULK)

    def _rows(self, active: ActiveStage, sent: SentStep) -> memoryview:
        """Return the rows of a step that the next stage needs, encoded. Raises: LocalFault if they are not kept any more."""
        output, step = sent.output, sent.step
        if output is None:
            assert active.cache.log is not None
            return active.cache.log.rows(step.start, step.end)
        assert isinstance(output, StepOutput)
        assert output.payload is not None
        return output.payload[sent.skip * output.payload.nbytes // step.tokens :]

    def _send_steps(self, peer: PeerId, outgoing: list[_Outgoing]) -> None:
        payload = outgoing[0].payload if len(outgoing) == 1 else memoryview(b"".join(out.payload for out in outgoing))
        self._send_or_fail([out.active for out in outgoing], peer, Steps(steps=tuple(out.step for out in outgoing)), payload)

    def _send_or_fail(self, stages: list[ActiveStage], peer: PeerId, message: Message, payload: memoryview | None = None) -> None:
        """Send a message without which sessions can't continue; fail their stages if it can't be sent."""

        def failed(error: MeshdError) -> None:
            blame = peer if isinstance(error, PeerLost) else self.me  # a message that can't be encoded was made here
            for active in stages:
                self.fail(active, error, blame)

        self.backlog.send(
            peer,
            message,
            payload,
            wanted=lambda: any(active.machine.state is not StageState.ENDED for active in stages),
            failed=failed,
        )


def _frames(outgoing: list[_Outgoing]) -> list[list[_Outgoing]]:
    """Divide steps into frames of at most `MAX_BATCH` steps and `MAX_PAYLOAD` bytes."""
    frames: list[list[_Outgoing]] = []
    size = 0
    for out in outgoing:
        if not frames or len(frames[-1]) == MAX_BATCH or size + out.step.size > MAX_PAYLOAD:
            frames.append([])
            size = 0
        frames[-1].append(out)
        size += out.step.size
    return frames
