"""An answer on a real peer that also stands in for its stages, which record the messages they receive and compute nothing."""

from itertools import pairwise
from typing import Any

import msgspec

from in_process.clusters import make_card
from in_process.journals import HandClock, record
from in_process.peers import Peer
from meshd.agents.observe.story import Story
from meshd.agents.observe.stream import EventStream
from meshd.agents.session.answer import Answer, AnswerContext
from meshd.agents.session.events import Replan
from meshd.protocol.messages import Ack, Close, Message, Mirror, Open, Opened, Renew, Reply, Resume, Steps, Tokens
from meshd.types import LayerRange, PeerId, Plan, PlanId, StagePlan, TokenLogprobs
from sim.toy.text import toy_text

CARD = make_card()


class AnswerSite:
    """A peer with one answer, and the messages that the answer sent to its stages."""

    def __init__(self, peer: Peer, **fields: Any) -> None:
        self.peer = peer
        self.clock = HandClock()
        self.received: list[Message] = []
        self.payloads: list[bytes] = []
        self.reply: Reply = Opened(request=0, session=record().session, epoch=1, blocks=1)
        """The reply to OPEN."""
        self.events: list[str] = []
        self.replans: list[Replan] = []
        self.story = Story(self.clock)
        self.published = EventStream(peer.id, "here", self.clock)
        peer.links.register(Open, self._on_open)
        for kind in (Steps, Resume, Ack, Renew, Close, Mirror):
            peer.links.register(kind, self._on_message)
        fresh = msgspec.structs.replace(record(), model=CARD.id, coordinator=peer.id, epoch=0)
        self.answer = Answer(msgspec.structs.replace(fresh, **fields), CARD, toy_text(CARD), self._context())

    def _context(self) -> AnswerContext:
        return AnswerContext(
            me=self.peer.id,
            links=self.peer.links,
            clock=self.clock,
            story=self.story,
            events=self.published,
            names=lambda peer: peer[:4],
            on_replan=lambda answer, command: self.replans.append(command),
            on_opened=lambda answer: self.events.append("opened"),
            on_token=lambda answer, index, token, logprobs: self.events.append(f"token {index}"),
            on_recovered=lambda answer, recovered: self.events.append(f"recovered by {recovered.method}"),
            on_superseded=lambda answer, coordinator: self.events.append(f"superseded by {coordinator}"),
            on_end=lambda answer: self.events.append(f"end {answer.status}"),
        )

    def _on_open(self, sender: PeerId, message: Open, payload: memoryview) -> Reply:
        self.received.append(message)
        self.payloads.append(bytes(payload))
        return msgspec.structs.replace(self.reply, request=message.request)

    def _on_message(self, sender: PeerId, message: Message, payload: memoryview) -> None:
        self.received.append(message)
        self.payloads.append(bytes(payload))

    def plan(self, *cuts: int, chunk: int = 2) -> Plan:
        """Plan all layers on this peer, split into stages at `cuts`."""
        borders = (0, *cuts, CARD.spec.layers)
        stages = tuple(StagePlan(peer=self.peer.id, layers=LayerRange(start, end)) for start, end in pairwise(borders))
        return Plan(id=PlanId("p"), model=CARD.id, stages=stages, prefill_chunk_tokens=chunk, context=64, predicted_tpot_s=0.5)

    async def open(self, *cuts: int) -> None:
        """Give the answer a plan and wait until its stages are open."""
        self.answer.planned(self.plan(*cuts))
        await self.answer.opened

    def tokens(self, index: int, *tokens: int, finish: str = "", logprobs: tuple[TokenLogprobs, ...] = ()) -> Tokens:
        """Make the message of tokens that the last stage sampled after one step."""
        return Tokens(
            session=self.answer.session,
            epoch=self.answer.machine.epoch,
            index=index,
            tokens=tokens,
            logprobs=logprobs,
            finish=finish,
        )

    def got(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.received if type(message) is kind]
