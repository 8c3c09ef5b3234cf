"""A coordinator for one session on the stages of a `StageMesh`."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from meshd.agents.session.plan.resume import ResumePoint, StageHeld, resume_points
from meshd.agents.stage.flow.session import StageState
from meshd.kernels.sampling.sampler import needs_past_tokens
from meshd.protocol.messages import (
    Ack,
    Close,
    Closed,
    ExpectCopy,
    HandOver,
    Message,
    Mirror,
    Open,
    Opened,
    Renew,
    Resume,
    Step,
    StepKind,
    Steps,
    Tokens,
)
from meshd.types import LayerRange, PeerId, Plan, PlanId, SamplingParams, SessionId, StagePlan
from stage_mesh.mesh import MODEL, StageMesh, StagePeer

SESSION = SessionId("5" * 32)
WAIT_S = 10.0


class Driver:
    """Coordinates one session from a peer of the mesh, as `Answer` does in the daemon."""

    def __init__(self, mesh: StageMesh, at: StagePeer, prompt: list[int], max_tokens: int, **sampling: Any) -> None:
        self.mesh, self.at = mesh, at
        self.session = SESSION
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.sampling = SamplingParams(**{"temperature": 0.0, **sampling})
        self.tokens: list[int] = []
        self.epoch = 0
        self.credit = max_tokens
        self.chunk = 7
        self.lease_ms = 10_000
        self.deadline_ms = 10_000
        self.plan: Plan | None = None
        self.opened: list[Opened] = []
        """The stages' replies to OPEN in the current epoch."""
        self.resume_points: tuple[ResumePoint, ...] = ()
        """Where each stage resumed in the current epoch."""
        self._changed = asyncio.Event()
        at.listeners.append(self._on_message)

    @property
    def known(self) -> int:
        """Number of known tokens, of prompt and answer."""
        return len(self.prompt) + len(self.tokens)

    def _on_message(self, sender: PeerId, message: Message) -> None:
        if isinstance(message, Tokens) and (message.session, message.epoch) == (self.session, self.epoch):
            assert message.index <= len(self.tokens), "a token was lost"
            self.tokens += message.tokens[len(self.tokens) - message.index :]
        self._changed.set()

    async def until(self, condition: Callable[[], Any]) -> None:
        """Wait until the condition holds; look again after each message, and every 10 ms."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                try:
                    async with asyncio.timeout(0.01):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    async def wait_tokens(self, tokens: int) -> None:
        """Wait until the answer has this many tokens."""
        await self.until(lambda: len(self.tokens) >= tokens)

    async def held_back(self) -> None:
        """Wait until the next step waits at the first stage, because the coordinator has no room for its token."""
        assert self.plan is not None
        machine = self.mesh.peers[self.plan.peers[0]].host._active[self.session, 0].machine
        await self.until(lambda: machine.state is StageState.WAITING and machine.known_to == self.known)

    def plan_of(self, *stages: tuple[StagePeer, str]) -> Plan:
        planned = tuple(StagePlan(peer=peer.id, layers=LayerRange.parse(layers)) for peer, layers in stages)
        return Plan(id=PlanId("p"), model=MODEL, stages=planned, prefill_chunk_tokens=self.chunk, context=512)

    def open_message(self, stage: int, *, resume: bool, **changes: Any) -> Callable[[int], Open]:
        assert self.plan is not None
        message = Open(
            request=0,
            session=self.session,
            epoch=self.epoch,
            plan=self.plan,
            stage=stage,
            coordinator=self.at.id,
            prompt_tokens=len(self.prompt),
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            lease_ms=self.lease_ms,
            deadline_ms=self.deadline_ms,
            credit=self.credit,
            answered=len(self.tokens),
            resume=resume,
        )
        return lambda request: msgspec.structs.replace(message, request=request, **changes)

    async def open(self, *stages: tuple[StagePeer, str], resume: bool = False, **changes: Any) -> None:
        """Open these stages in a new epoch."""
        self.plan = self.plan_of(*stages)
        self.epoch += 1
        self.opened = [await self.open_stage(stage, resume=resume, **changes) for stage in range(len(stages))]

    async def open_stage(self, stage: int, *, resume: bool, **changes: Any) -> Opened:
        assert self.plan is not None
        last = stage == len(self.plan.stages) - 1
        payload = self.ids() if last and needs_past_tokens(self.sampling, len(self.tokens)) else None
        peer = self.plan.stages[stage].peer
        open_message = self.open_message(stage, resume=resume, **changes)
        reply, _ = await self.at.links.request(peer, open_message, payload, timeout_s=WAIT_S)
        return reply

    def ids(self, start: int = 0) -> memoryview:
        return np.asarray([*self.prompt, *self.tokens][start:], "<i4").data.cast("B")

    def resume(self) -> None:
        """Resume the opened stages from the KV that they hold, and send the known tokens."""
        held = [
            StageHeld(opened.held, opened.mirrored, opened.kept_from, opened.kept_to, opened.held_from) for opened in self.opened
        ]
        self.resume_points = resume_points(held, self.known)
        for stage, point in enumerate(self.resume_points):
            self.send(stage, Resume, stage=stage, start=point.start, send_from=point.send_from)
        self.send_prompt(self.resume_points[0].start)

    def send_prompt(self, start: int = 0) -> None:
        tokens = self.known - start
        self.send_step(0, self.ids(start), start=start, tokens=tokens, kind=StepKind.PREFILL, sample=1, committed=self.known)

    def send_step(self, to: int, payload: memoryview | bytes, **fields: Any) -> None:
        """Send one step to a stage."""
        assert self.plan is not None
        fields = {"session": self.session, "epoch": self.epoch, "stage": to, "seq": 0, "size": len(payload), **fields}
        self.at.links.send(self.plan.stages[to].peer, Steps(steps=(Step(**fields),)), payload)

    async def begin(self, *stages: tuple[StagePeer, str]) -> None:
        """Run a first epoch: open the stages and send the prompt."""
        await self.open(*stages)
        self.send_prompt()

    async def next_epoch(self, *stages: tuple[StagePeer, str], **changes: Any) -> None:
        """Run a later epoch: open the stages, resume them and send the known tokens."""
        await self.open(*stages, resume=True, **changes)
        self.resume()

    def grant(self, credit: int) -> None:
        self.credit = credit
        assert self.plan is not None
        count = len(self.plan.stages)
        ends = {self.plan.stages[stage].peer: stage for stage in (0, count - 1)}
        for stage in ends.values():
            self.send(stage, Ack, stage=count, next_seq=len(self.tokens), credit=credit)

    async def mirror(self, stage: int, target: StagePeer | None, *, eager: bool = False) -> None:
        """Have a stage's KV copied to `target`. Raises: RemoteFailure if the target refuses the copy."""
        if target is not None:
            await self.expect_copy(stage, target)
        self.send(stage, Mirror, stage=stage, target=target.id if target else None, eager=eager)

    async def expect_copy(self, stage: int, target: StagePeer, **changes: Any) -> None:
        """Announce a copy to its target."""
        assert self.plan is not None
        planned = self.plan.stages[stage]
        expect = ExpectCopy(
            request=self.at.links.next_request(),
            session=self.session,
            epoch=self.epoch,
            source=planned.peer,
            model=self.plan.model,
            layers=planned.layers,
            tokens=len(self.prompt) + self.max_tokens,
            lease_ms=self.lease_ms,
        )
        await self.at.links.request(target.id, msgspec.structs.replace(expect, **changes), timeout_s=WAIT_S)

    async def hand_over(self, to: StagePeer, *peers: StagePeer) -> list[bool]:
        """Give the session to another coordinator. Returns: whether each of `peers` obeyed this one until now."""
        message = HandOver(request=0, session=self.session, to=to.id)
        replies = [
            await self.at.links.request(
                peer.id, lambda request: msgspec.structs.replace(message, request=request), timeout_s=WAIT_S
            )
            for peer in peers
        ]
        return [reply.known for reply, _ in replies]

    def renew(self, *peers: StagePeer) -> None:
        for peer in peers:
            self.at.links.send(peer.id, Renew(session=self.session, epoch=self.epoch, lease_ms=self.lease_ms))

    async def close(self, *peers: StagePeer) -> None:
        """Send CLOSE to these peers and wait for the CLOSED of each."""
        before = len(self.at.received(Closed))
        for peer in peers:
            self.at.links.send(peer.id, Close(session=self.session, epoch=self.epoch, reason="done"))
        await self.until(lambda: len(self.at.received(Closed)) == before + len(peers))

    def send(self, to: int, kind: type[Any], payload: memoryview | bytes | None = None, /, **fields: Any) -> None:
        assert self.plan is not None
        message = kind(session=self.session, epoch=self.epoch, **fields)
        self.at.links.send(self.plan.stages[to].peer, message, payload)
