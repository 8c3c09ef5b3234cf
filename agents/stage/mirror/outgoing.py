"""Copies the KV of this peer's stages to other peers."""

from collections.abc import Awaitable
from dataclasses import dataclass, field
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.links.rpc import try_send
from meshd.agents.observe.story import Story
from meshd.agents.stage.mirror import copy as fsm
from meshd.agents.stage.steps import ActiveStage
from meshd.errors import MeshdError, ProtocolViolation
from meshd.kernels.kv.copies import HEADER_BYTES
from meshd.kernels.kv.memory import PAGE_TOKENS
from meshd.kernels.kv.share import STEP_TOKENS
from meshd.protocol.messages import KvAccepted, KvBlocks, KvOffer, KvStored, Mirror, Mirrored
from meshd.types import PeerId, SessionId

log = getLogger(__name__)

_CHUNK_BYTES = 256 << 10
"""Maximum bytes of a chunk. Reading a chunk blocks the event loop and so delays decode steps; sending it blocks the bulk lane."""
_MAX_COPIES = 4
"""Maximum number of copies of one stage at once: a mirror, and moves in preparation (SPEC.md, section 10)."""
_OFFER_S = 5.0
"""Time limit for the answer to KV_OFFER."""


@dataclass(slots=True, eq=False)
class _Copy:
    active: ActiveStage
    target: PeerId
    machine: fsm.MirrorCopy


@dataclass(slots=True)
class OutgoingMirrors:
    """The copies of this peer's stages on other peers. A copy ends with its stage."""

    me: PeerId
    links: Links
    story: Story
    _copies: dict[tuple[SessionId, int], dict[PeerId, _Copy]] = field(default_factory=dict)

    def mirror(self, active: ActiveStage, message: Mirror) -> Awaitable[None] | None:
        """Handle MIRROR: begin a copy, make a copy eager or not, or stop all copies of the stage.

        Returns: an awaitable that offers the copy to its target; None if no offer is needed.
        """
        if message.target is None:
            self.stop(active)
            return None
        copies = self._copies.get(active.key, {})
        existing = copies.get(message.target)
        if existing is not None:
            self._apply(existing, fsm.EagernessChanged(message.eager))
            return None
        copy = _Copy(active, message.target, _machine(active, eager=message.eager))
        if message.target == self.me or len(copies) >= _MAX_COPIES:
            reason = (
                "the target is the stage's own peer" if message.target == self.me else f"the stage has {_MAX_COPIES} copies already"
            )
            self._apply(copy, fsm.CopyFailed(reason))
            return None
        self._copies.setdefault(active.key, {})[message.target] = copy
        self._note(copy, "mirror begun", eager=message.eager)
        return self._offer(copy)

    def on_kv_grown(self, active: ActiveStage) -> None:
        """Continue the stage's copies after a step extended its KV."""
        if copies := self._copies.get(active.key):
            for copy in list(copies.values()):
                self._apply(copy, fsm.KvGrown(active.cache.filled))

    def stop(self, active: ActiveStage) -> None:
        """Stop all copies of this stage. The targets keep the KV that they hold."""
        for copy in self._copies.pop(active.key, {}).values():
            self._apply(copy, fsm.CopyStopped())

    def tick(self) -> None:
        """Advance the timeouts of the copies. Called every 0.5 s."""
        for copy in self._all():
            self._apply(copy, fsm.TimePassed())

    def on_peer_gone(self, peer: PeerId, reason: str) -> None:
        """Fail the copies on a peer whose link went down."""
        for copy in self._all():
            if copy.target == peer:
                self._apply(copy, fsm.CopyFailed(f"the link with the target is down: {reason}"))

    def on_stored(self, sender: PeerId, message: KvStored, payload: memoryview) -> None:
        """Handle a target's answer to a chunk."""
        for copy in self._all():
            opened = copy.active.open
            copied = opened.session, opened.epoch, copy.active.stage.layers, copy.target
            if copied == (message.session, message.epoch, message.layers, sender):
                self._apply(copy, fsm.CopyFailed(message.error) if message.error else fsm.BlocksStored(message.held))

    def _all(self) -> list[_Copy]:
        return [copy for copies in self._copies.values() for copy in copies.values()]

    async def _offer(self, copy: _Copy) -> None:
        opened, cache = copy.active.open, copy.active.cache

        def offer(request: int) -> KvOffer:
            return KvOffer(
                request=request,
                session=opened.session,
                epoch=opened.epoch,
                layers=cache.layers,
                valid=cache.epoch_start,
            )

        try:
            reply, _ = await self.links.request(copy.target, offer, timeout_s=_OFFER_S)
            if not isinstance(reply, KvAccepted):
                raise ProtocolViolation(f"KV_OFFER was answered with {type(reply).__name__}")
        except MeshdError as error:
            self._apply(copy, fsm.CopyFailed(str(error)))
        else:
            self._apply(copy, fsm.OfferAccepted(reply.held))

    def _apply(self, copy: _Copy, event: fsm.Event) -> None:
        before = copy.machine.state
        for command in copy.machine.handle(event):
            match command:
                case fsm.SendBlocks(position, tokens):
                    self._send_chunk(copy, position, tokens)
                case fsm.ReportProgress(held, filled, error):
                    self._report(copy, held, filled, error)
        if before is fsm.MirrorState.BEHIND and copy.machine.state is fsm.MirrorState.LEVEL:
            self._note(copy, "mirror caught up", held=copy.machine.held)

    def _send_chunk(self, copy: _Copy, position: int, tokens: int) -> None:
        if copy.machine.state is fsm.MirrorState.ENDED:
            return  # sending the previous chunk failed and ended the copy
        opened, cache = copy.active.open, copy.active.cache
        blocks = KvBlocks(session=opened.session, epoch=opened.epoch, layers=cache.layers, position=position, tokens=tokens)
        try:
            self.links.send(copy.target, blocks, cache.lease.kv.copy_out(cache.layers, position, position + tokens))
        except MeshdError as error:
            self._apply(copy, fsm.CopyFailed(str(error)))

    def _report(self, copy: _Copy, held: int, filled: int, error: str) -> None:
        opened = copy.active.open
        if error:
            log.warning("session %s stage %d: the copy on %.8s has ended: %s", opened.session, opened.stage, copy.target, error)
            self._note(copy, "mirror failed", reason=error)
            copies = self._copies.get(copy.active.key, {})
            if copies.get(copy.target) is copy:
                del copies[copy.target]
        mirrored = Mirrored(
            session=opened.session,
            epoch=opened.epoch,
            stage=opened.stage,
            target=copy.target,
            held=held,
            filled=filled,
            error=error,
        )
        try_send(self.links.send, opened.coordinator, mirrored)

    def _note(self, copy: _Copy, what: str, **facts: object) -> None:
        self.story.note(copy.active.open.session, what, stage=copy.active.open.stage, target=copy.target, **facts)


def _machine(active: ActiveStage, *, eager: bool) -> fsm.MirrorCopy:
    cache = active.cache
    rows_bytes = _CHUNK_BYTES - HEADER_BYTES * len(cache.layers)
    chunk_tokens = rows_bytes // max(1, cache.lease.kv.token_bytes(cache.layers))
    return fsm.MirrorCopy(cache.filled, min(max(1, chunk_tokens), STEP_TOKENS), PAGE_TOKENS, eager)
