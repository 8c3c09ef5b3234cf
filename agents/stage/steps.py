"""A running stage, and the conversion of messages to its steps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from meshd.agents.placement.resident import ResidentLayers
from meshd.agents.stage.flow.events import StageStep
from meshd.agents.stage.flow.session import StageSession, StageState
from meshd.agents.stage.kv import StageCache
from meshd.errors import MeshdError, ProtocolViolation
from meshd.kernels.attention.tree import Part
from meshd.kernels.backend import AttendRequest, RemoteRun, Stage
from meshd.kernels.sampling.sampler import Sampler
from meshd.kernels.wire import size_of
from meshd.protocol.messages import Open, Opened, Step
from meshd.types import LayerRange, PeerId, SessionId


@dataclass(slots=True)
class StepInput:
    """The input of a step as it arrived: token ids at the first stage, the payload of hidden states at the others."""

    start: int
    """Position of the first row."""
    ids: npt.NDArray[np.int32] | None
    payload: memoryview | None
    arrived_at: float
    """Monotonic time."""


class Drafter(Protocol):
    """Guesses the tokens after those that are known. The first stage sends its guesses along, and the last stage checks them."""

    def after(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Return guesses of the tokens after `tokens`, which the last stage has sampled; empty for none."""
        ...

    def ahead(self) -> tuple[int, ...]:
        """Return guesses of the tokens after the newest step, before the last stage has answered it; empty for none."""
        ...


class ShardClient(Protocol):
    """Asks the peers that hold a part of a session's KV for the attention over it. Used on the event loop."""

    @property
    def runs(self) -> tuple[RemoteRun, ...]:
        """What other peers hold for this stage of the session. It does not change in an epoch."""
        ...

    def holder_of(self, run: RemoteRun) -> PeerId: ...

    def ask(self, request: AttendRequest, answer: Callable[[Part | MeshdError], None]) -> None:
        """Send a request to the holder of its run. Has `answer` called on the event loop when a part or an error comes back.

        Only the first call of `answer` counts, and none after the session has ended or the wait is over.
        Raises: MeshdError if the request can't be sent.
        """
        ...


@dataclass(slots=True, eq=False)
class ActiveStage:
    """A session's stage that runs on this peer."""

    open: Open
    resident: ResidentLayers
    stage: Stage
    cache: StageCache
    sampler: Sampler | None
    """The last stage's sampler; None at any other stage."""
    machine: StageSession
    drafter: Drafter | None = None
    """At the first stage: what guesses tokens. None: nothing does."""
    shards: ShardClient | None = None
    """What asks other peers for a part of the attention. None: all KV is here."""
    ready_since: float = 0.0
    """Monotonic time since when a step may begin, while the machine is READY."""

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

    @property
    def output_peer(self) -> PeerId:
        """The peer that the stage sends its steps to; for the last stage, the coordinator."""
        return self.open.coordinator if self.last else self.peer_of(self.open.stage + 1)

    @property
    def remote_runs(self) -> tuple[RemoteRun, ...]:
        """What other peers hold of the session's KV."""
        return self.shards.runs if self.shards is not None else ()

    @property
    def holders(self) -> set[PeerId]:
        """The peers that hold a part of the session's KV for this stage."""
        return {self.shards.holder_of(run) for run in self.shards.runs} if self.shards is not None else set()

    @property
    def layers_key(self) -> tuple[int, LayerRange, bool, bool]:
        """Equal for stages that one pass can compute. A plan may end before the model's last layer.

        A session whose KV is all here shares no pass with one that waits for other peers: it would wait as well.
        """
        return id(self.resident), self.cache.layers, self.last, self.shards is not None

    @property
    def decodes(self) -> bool:
        """Whether decode steps follow: all known tokens were computed here, and no reader must take some of them first."""
        return self.machine.computed >= self.machine.known_tokens and self.machine.state is not StageState.WAITING

    def largest(self, step: StageStep) -> int:
        """How many tokens of a step may be computed at once: of a prompt at the first stage, a chunk."""
        if self.open.stage or not step.prefill:
            return step.tokens
        return min(step.tokens, self.open.plan.prefill_chunk_tokens)

    def source_of(self, step: StageStep) -> PeerId:
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
            blocks=self.cache.lease.kv.pages,
            held=machine.held,
            mirrored=self.cache.mirrored,
            kept_from=machine.kept_from,
            kept_to=machine.kept_to,
            held_from=machine.held_from,
        )


def received_step(active: ActiveStage, step: Step, payload: memoryview, now: float) -> StageStep:
    """Convert a step of STEPS, which arrived `now`, and its part of the payload.

    Raises: ProtocolViolation if the payload has another size, or an id is outside the vocabulary.
    """
    spec = active.resident.card.spec
    if active.open.stage:
        expected = size_of(active.open.plan.wire_dtype, step.tokens, spec.hidden)
        if len(payload) != expected:
            raise ProtocolViolation(f"a step is torn: {len(payload)} bytes for {step.tokens} tokens, not {expected}")
        data = StepInput(step.start, None, payload, now)
    else:
        data = StepInput(step.start, token_ids(payload, step.tokens, spec.vocab), None, now)
    if step.ids and max(step.ids) >= spec.vocab:
        raise ProtocolViolation("some token ids are outside the vocabulary")
    return StageStep(step.start, step.tokens, step.kind, step.sample, step.committed, step.seq, step.ids, data)


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
