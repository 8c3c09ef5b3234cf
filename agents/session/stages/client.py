"""Sends one answer's messages to the peers that run its stages: OPEN, RESUME, the prompt, credit, lease renewals, CLOSE."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import Any

import numpy as np

from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.session.events import CloseStages, OpenStages, ResumeStages
from meshd.agents.session.journal.record import SessionRecord
from meshd.agents.session.plan.resume import StageHeld
from meshd.agents.session.stages.prompt import PromptSender
from meshd.errors import (
    InvalidSampling,
    MeshdError,
    NoPeer,
    NotReady,
    OutOfMemory,
    Overloaded,
    PeerFault,
    RemoteFailure,
    Superseded,
    UsageError,
)
from meshd.kernels.sampling.sampler import needs_past_tokens
from meshd.protocol.messages import (
    Ack,
    Close,
    ExpectCopy,
    Message,
    Mirror,
    Open,
    Opened,
    Renew,
    Resume,
)
from meshd.types import PeerId, Plan, SessionId

log = getLogger(__name__)

LEASE_S = 10.0
RENEW_S = 3.0
REPLY_TIMEOUT_S = 5.0
"""A peer that takes longer to answer, or so much longer than `PREPARE_S` to answer OPEN, has a fault."""
PREPARE_S = 30.0
"""A stage whose layers were not loaded as they are cut now reads weights first: about a layer, in 0.1 to 1 s, and on small devices
in several seconds."""

REFUSALS = frozenset({OutOfMemory.code, NoPeer.code, Overloaded.code, NotReady.code})
"""Errors with which a stage refuses to open when its peer has changed since the plan was made, for example because another session
took the memory, or when it was not prepared in time. That is load and no fault of the peer, and a new plan may succeed."""


def at_fault(error: MeshdError, peer: PeerId) -> PeerId | None:
    """Return the peer that is to be avoided because it did not open a stage.

    Returns: None if it has no fault: the request is wrong, or the peer obeys another coordinator.
    """
    if isinstance(error, UsageError) or (isinstance(error, RemoteFailure) and error.remote_code == Superseded.code):
        return None
    return peer


def is_refusal(error: MeshdError | None) -> bool:
    """Whether a peer refused to open a stage for lack of room."""
    return isinstance(error, RemoteFailure) and error.remote_code in REFUSALS


@dataclass(slots=True)
class StageClient:
    """Sends one answer's messages to its stages. Only `open` and `mirror` wait for a reply."""

    record: SessionRecord
    me: PeerId
    links: Links
    renewed_at: float
    predecessors: tuple[PeerId, ...] = ()
    """The session's earlier coordinators."""
    prompt: PromptSender = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = PromptSender(self.record.session, self.links)

    @property
    def session(self) -> SessionId:
        return self.record.session

    async def open(self, command: OpenStages, stage: int, tokens: Sequence[int]) -> StageHeld:
        """Open one stage of a plan.

        tokens: the answer so far.
        Returns: what the stage still has of the session.
        Raises: MeshdError; UsageError if the request itself is wrong, so that no other peer could open the stage.
        Cancel: the stage may be open already; CLOSE or the end of its lease frees it.
        """
        peer = command.plan.stages[stage].peer
        payload = self._ids_for(command.plan, stage, tokens)
        message = self._open_message(command, stage)
        try:
            reply, _ = await self.links.request(peer, message, payload, timeout_s=PREPARE_S + REPLY_TIMEOUT_S)
        except RemoteFailure as error:
            if error.remote_code == InvalidSampling.code:
                raise InvalidSampling(error.message, hint=error.hint) from error
            raise
        if not isinstance(reply, Opened):
            raise PeerFault(f"OPEN was answered with {type(reply).__name__}")
        return StageHeld(reply.held, reply.mirrored, reply.kept_from, reply.kept_to, reply.held_from)

    def _open_message(self, command: OpenStages, stage: int) -> Open:
        return Open(
            request=self.links.next_request(),
            session=self.session,
            epoch=command.epoch,
            plan=command.plan,
            stage=stage,
            coordinator=self.me,
            prompt_tokens=len(self.record.prompt),
            max_tokens=self.record.max_tokens,
            sampling=self.record.sampling if stage == len(command.plan.stages) - 1 else None,
            ignore_eos=self.record.ignore_eos,
            lease_ms=int(LEASE_S * 1000),
            deadline_ms=int(PREPARE_S * 1000),
            credit=command.credit,
            answered=command.answered,
            resume=command.epoch > 1,
            predecessors=self.predecessors,
        )

    def _ids_for(self, plan: Plan, stage: int, tokens: Sequence[int]) -> memoryview | None:
        """Returns: all known token ids, if this is the last stage and its sampling needs past tokens; else None."""
        looks_back = needs_past_tokens(self.record.sampling, len(tokens))
        return self._known_ids(tokens).data.cast("B") if looks_back and stage == len(plan.stages) - 1 else None

    def _known_ids(self, tokens: Sequence[int]) -> "np.ndarray[Any, np.dtype[np.int32]]":
        """Returns: ids of prompt and answer, i32[prompt + tokens]."""
        return np.asarray([*self.record.prompt, *tokens], dtype="<i4")

    async def mirror(self, epoch: int, plan: Plan, stage: int, target: PeerId, *, eager: bool = False) -> None:
        """Have a stage's KV copied to another peer. `eager`: each token's at once, not in whole blocks.

        The target first gets the id of the peer that will send the KV, because it takes KV from no other peer.

        Raises: MeshdError if the target has no room for the copy.
        Cancel: the target frees the memory when the session is closed there or its lease ends.
        """
        source, layers = plan.stages[stage].peer, plan.stages[stage].layers
        expect = ExpectCopy(
            request=self.links.next_request(),
            session=self.session,
            epoch=epoch,
            source=source,
            model=plan.model,
            layers=layers,
            tokens=len(self.record.prompt) + self.record.max_tokens,
            lease_ms=int(LEASE_S * 1000),
            predecessors=self.predecessors,
        )
        await self.links.request(target, expect, timeout_s=REPLY_TIMEOUT_S)
        self.send(source, Mirror(session=self.session, epoch=epoch, stage=stage, target=target, eager=eager))

    def resume(self, command: ResumeStages) -> None:
        """Send every stage its resume point."""
        for stage, point in enumerate(command.points):
            message = Resume(session=self.session, epoch=command.epoch, stage=stage, start=point.start, send_from=point.send_from)
            self.send(command.plan.stages[stage].peer, message)

    def send_prompt(self, epoch: int, plan: Plan, start: int, tokens: Sequence[int]) -> None:
        """Send the first stage the known ids from position `start` on. It cuts them into chunks as its device allows."""
        self.prompt.send(epoch, plan.stages[0].peer, self._known_ids(tokens), start)

    def grant(self, epoch: int, plan: Plan, arrived: int, credit: int) -> None:
        """Tell the first and the last stage that answer tokens before `arrived` are here and those before `credit` may come."""
        message = Ack(session=self.session, epoch=epoch, stage=len(plan.stages), next_seq=arrived, credit=credit)
        for peer in dict.fromkeys((plan.stages[0].peer, plan.stages[-1].peer)):
            self.send(peer, message)

    def renew(self, peers: Collection[PeerId], epoch: int, now: float) -> None:
        """Renew the leases at these peers, at most once per `RENEW_S` seconds."""
        if peers and now - self.renewed_at >= RENEW_S:
            self.renewed_at = now
            for peer in sorted(peers):
                self.send(peer, Renew(session=self.session, epoch=epoch, lease_ms=int(LEASE_S * 1000)))

    def close(self, command: CloseStages) -> None:
        """Have the command's peers free their memory of the session."""
        self.prompt.forget(command.epoch)
        for peer in command.peers:
            self.send(peer, Close(session=self.session, epoch=command.epoch, reason=command.reason, undo=command.undo))

    def send(self, peer: PeerId, message: Message, payload: memoryview | None = None) -> None:
        """Send without waiting. A failure is only logged, because the link reports the loss of the peer."""
        try_send(self.links.send, peer, message, payload)
