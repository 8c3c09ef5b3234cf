"""A running stage, the conversion of messages to its steps, and the computation of a step."""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from meshd.agents.placement.resident import ResidentLayers
from meshd.agents.stage import session as fsm
from meshd.agents.stage.kv import StageCache
from meshd.errors import LocalFault, MeshdError, ProtocolViolation
from meshd.kernels.backend import Segment, Stage
from meshd.kernels.kv import BlockTable
from meshd.kernels.sampler import Sampler
from meshd.kernels.wire import decode
from meshd.protocol.messages import Activation, Open, Opened, Prompt, Token
from meshd.types import PeerId, SessionId, TokenLogprobs


@dataclass(slots=True)
class StepInput:
    """The input of a step: token ids at the first stage, an activation and its payload at the others."""

    ids: npt.NDArray[np.int32] | None
    activation: Activation | None = None
    payload: memoryview | None = None
    arrived_at: float = 0.0
    """Monotonic time at which this peer received the input."""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The output of a step."""

    hidden: npt.NDArray[np.float32] | None
    token: int | None
    logprobs: TokenLogprobs | None
    stage_s: float
    """Time to compute the whole step, with head and sampler."""


@dataclass(slots=True, eq=False)
class ActiveStage:
    """A session's stage that runs on this peer."""

    open: Open
    resident: ResidentLayers
    stage: Stage
    cache: StageCache
    table: BlockTable
    sampler: Sampler | None
    """The last stage's sampler; None at any other stage."""
    machine: fsm.StageSession

    @property
    def key(self) -> tuple[SessionId, int]:
        return self.open.session, self.open.stage

    def peer_of(self, stage: int) -> PeerId:
        return self.open.plan.stages[stage].peer

    @property
    def last(self) -> bool:
        return self.open.stage == len(self.open.plan.stages) - 1

    @property
    def input_peer(self) -> PeerId:
        """The peer that sends the stage's prefill steps."""
        return self.peer_of(self.open.stage - 1) if self.open.stage else self.open.coordinator

    def source_of(self, step: fsm.Step) -> PeerId:
        """Return the peer that sent the step's input."""
        if self.open.stage or step.prefill:
            return self.input_peer
        return self.peer_of(len(self.open.plan.stages) - 1)

    def opened(self, request: int) -> Opened:
        """Return the answer to OPEN."""
        machine = self.machine
        return Opened(
            request=request,
            session=self.open.session,
            epoch=self.open.epoch,
            blocks=len(self.table.blocks),
            held=machine.held,
            mirrored=self.cache.mirrored,
            kept_from=machine.kept_from,
            kept_to=machine.kept_to,
        )


def note_arrival(step: fsm.Step, now: float) -> None:
    """Record when the input of a step arrived."""
    if isinstance(step.data, StepInput):
        step.data.arrived_at = now


def arrival_of(step: fsm.Step) -> float:
    """Return when the input of a step arrived, in monotonic time."""
    assert isinstance(step.data, StepInput)
    return step.data.arrived_at


def prompt_step(active: ActiveStage, message: Prompt, payload: memoryview) -> fsm.Step:
    """Convert PROMPT to a step. Raises: ProtocolViolation as `token_ids` does."""
    ids = token_ids(payload, message.tokens, active.resident.card.spec.vocab)
    return fsm.Step(message.step, message.tokens, message.last, True, data=StepInput(ids))


def token_ids(payload: memoryview, tokens: int, vocab: int) -> npt.NDArray[np.int32]:
    """Decode `tokens` little-endian i32 token ids.

    Raises: ProtocolViolation if the payload has another length, or an id is outside the vocabulary.
    """
    if len(payload) != 4 * tokens:
        raise ProtocolViolation(f"{tokens} token ids need {4 * tokens} bytes, but the payload has {len(payload)}")
    ids = np.frombuffer(payload, dtype="<i4")
    if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < vocab):
        raise ProtocolViolation("some token ids are outside the vocabulary")
    return ids


def activation_step(active: ActiveStage, message: Activation, payload: memoryview) -> fsm.Step:
    """Convert ACTIVATION to a step."""
    return fsm.Step(
        message.step,
        message.tokens,
        message.sample,
        message.step < active.machine.known_tokens,
        index=max(0, message.step + message.tokens - active.open.prompt_tokens),
        data=StepInput(None, message, payload),
    )


def token_step(active: ActiveStage, message: Token) -> fsm.Step:
    """Convert the last stage's TOKEN to the first stage's next step."""
    ids = np.array([message.token], dtype=np.int32)
    return fsm.Step(active.open.prompt_tokens + message.index, 1, True, False, index=message.index + 1, data=StepInput(ids))


def compute_step(active: ActiveStage, step: fsm.Step) -> StepOutput:
    """Compute one step. Runs on the compute thread.

    Raises: ProtocolViolation if the input has the wrong size or is not finite; LocalFault if only the output is not finite.
    """
    started = time.perf_counter()
    data = step.data
    assert isinstance(data, StepInput)
    if data.activation is not None and data.payload is not None:
        hidden = decode(data.payload, data.activation.dtype, data.activation.tokens, active.resident.card.spec.hidden)
    else:
        assert data.ids is not None
        hidden = active.stage.embed(data.ids)
    try:
        out = _forward(active, step, hidden)
        token, logprobs = _sample(active, step, out) if active.last else (None, None)
    except MeshdError as error:
        if np.isfinite(hidden).all():
            raise
        raise ProtocolViolation("the hidden states received are not finite") from error
    stage_s = time.perf_counter() - started
    return StepOutput(None if active.last else out, token, logprobs, stage_s)


def _forward(active: ActiveStage, step: fsm.Step, hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    segment = Segment(table=active.table, start=step.position, tokens=step.tokens)
    out = active.stage.forward(hidden, [segment], active.cache.lease.pool)
    # No layer turns NaN or infinity into a finite value, so `compute_step` checks the input only if the step fails.
    if not active.last and not np.isfinite(out).all():
        raise LocalFault(f"layers {active.stage.layers} computed hidden states that are not finite", hint="check the model file")
    return out


def _sample(active: ActiveStage, step: fsm.Step, hidden: npt.NDArray[np.float32]) -> tuple[int | None, TokenLogprobs | None]:
    if not step.sample:
        return None, None
    assert active.sampler is not None
    logits = active.stage.logits(hidden[-1:])[0]
    token, logprobs = active.sampler.pick(logits, step.end)
    active.sampler.accept(token)
    return token, logprobs
