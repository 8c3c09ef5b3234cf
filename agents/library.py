"""Which models this peer can speak for: cards by name, and the text side (tokenizer, template) of each."""

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from logging import getLogger

from meshd.agents.links import Links
from meshd.agents.service import ChatMessage
from meshd.errors import InvalidRequest, MeshdError, NoPeer, ProtocolViolation, UnknownModel
from meshd.models.cards import card_from_gguf
from meshd.models.gguf import GgufFile
from meshd.models.progress import PullPhase, PullProgress
from meshd.models.store import Store, StoredModel
from meshd.models.template import ChatTemplate, template_from_gguf
from meshd.models.tokenizer import Tokenizer
from meshd.models.tokenizer_files import tokenizer_from_gguf
from meshd.protocol.messages import FetchHeader, HeaderData
from meshd.types import Advert, ModelCard, ModelId, PeerId

log = getLogger(__name__)

_HEADER_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class ModelText:
    """A model's text side."""

    card: ModelCard
    tokenizer: Tokenizer
    template: ChatTemplate | None

    def tokens_of(self, prompt: tuple[ChatMessage, ...] | str | tuple[int, ...]) -> tuple[int, ...]:
        """Token ids of any kind of prompt. Raises: InvalidRequest."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt, add_special=True, parse_special=True))
        if all(isinstance(part, int) for part in prompt):
            return tuple(part for part in prompt if isinstance(part, int))
        return self._chat(tuple(part for part in prompt if isinstance(part, ChatMessage)))

    def _chat(self, messages: tuple[ChatMessage, ...]) -> tuple[int, ...]:
        if self.template is None:
            raise InvalidRequest(
                f"{self.card.name} has no chat template", param="messages", hint="use /v1/completions with a text prompt"
            )
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return tuple(self.tokenizer.encode_chat(self.template, turns))


@dataclass(slots=True)
class Library:
    """Models known to this peer: on its disk, or told by others."""

    links: Links
    store: Store
    adverts: Callable[[], Iterable[Advert]]
    """Of the live peers, this one's not needed."""
    on_change: Callable[[], None]
    local: dict[ModelId, ModelCard] = field(default_factory=dict)
    _texts: dict[ModelId, asyncio.Task[ModelText]] = field(default_factory=dict)

    def register(self) -> None:
        """Answer other coordinators' questions."""
        self.links.register(FetchHeader, self._on_fetch_header)

    async def refresh(self) -> None:
        """Read the cards of what lies on this disk. A broken file is told in the log and left out."""
        cards = await asyncio.to_thread(self._read_local)
        if cards != self.local:
            self.local = cards
            self.on_change()

    def _read_local(self) -> dict[ModelId, ModelCard]:
        cards: dict[ModelId, ModelCard] = {}
        for stored in self.store.list():
            try:
                cards.setdefault(stored.id, self.local.get(stored.id) or self._card_of(stored))
            except MeshdError as error:
                log.warning("model %s is left out: %s", stored.name, error)
        return cards

    def _card_of(self, stored: StoredModel) -> ModelCard:
        with self.store.open(stored) as file:
            return card_from_gguf(file, name=stored.name, ref=stored.ref, model_id=stored.id, created=stored.created)

    def cards(self) -> dict[ModelId, ModelCard]:
        """All known models, this disk's first."""
        known = dict(self.local)
        for advert in self.adverts():
            for card in advert.models:
                known.setdefault(card.id, card)
        return known

    def find(self, name: str) -> ModelCard:
        """By name, reference or id. Raises: UnknownModel with the nearest names."""
        cards = self.cards()
        for card in cards.values():
            if name in (card.name, card.ref, card.id):
                return card
        names = [card.name for card in cards.values()]
        near = get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)[:5]
        hint = f"nearest: {', '.join(near)}" if near else "fetch one with `meshd pull` or place one with `meshd place`"
        raise UnknownModel(f"the model {name!r} does not exist in this mesh", hint=hint)

    async def pull(self, ref: str, progress: Callable[[float], None]) -> ModelCard:
        """The card of a model that is now on this disk. Raises: UnknownModel, DownloadError, StorageError."""
        stored = self.store.get(ref) or await self.store.pull(ref, lambda step: progress(_fraction(step)))
        card = self.local.get(stored.id)
        if card is None:
            card = await asyncio.to_thread(self._card_of, stored)
            self.local[card.id] = card
            self.on_change()
        return card

    async def text(self, card: ModelCard) -> ModelText:
        """Tokenizer and template, from this disk or from a peer that has the file; made once. Raises: NoPeer, PeerFault."""
        task = self._texts.get(card.id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = asyncio.get_running_loop().create_task(self._load_text(card), name=f"text of {card.name}")
            self._texts[card.id] = task
        return await asyncio.shield(task)

    async def _load_text(self, card: ModelCard) -> ModelText:
        stored = self.store.get(card.id)
        if stored is not None:
            return await asyncio.to_thread(self._text_of_file, card, stored)
        header = await self._fetch_header(card)
        return await asyncio.to_thread(_text_of, card, GgufFile.from_header(header))

    def _text_of_file(self, card: ModelCard, stored: StoredModel) -> ModelText:
        with self.store.open(stored) as file:
            return _text_of(card, file)

    async def _fetch_header(self, card: ModelCard) -> bytes:
        holders = [advert.peer for advert in self.adverts() if any(known.id == card.id for known in advert.models)]
        for peer in holders:
            reply, payload = await self.links.request(
                peer, FetchHeader(request=self.links.next_request(), model=card.id), timeout_s=_HEADER_TIMEOUT_S
            )
            data = bytes(payload)
            if not isinstance(reply, HeaderData) or hashlib.sha256(data).hexdigest() != reply.sha256:
                raise ProtocolViolation(f"the header of {card.name} arrived torn")
            return data
        raise NoPeer(f"no live peer has the file of {card.name}", hint=f"fetch it with `meshd pull {card.ref}`")

    async def _on_fetch_header(self, sender: PeerId, message: FetchHeader, payload: memoryview) -> tuple[HeaderData, bytes]:
        card, stored = self.local.get(message.model), self.store.get(message.model)
        if card is None or stored is None:
            raise UnknownModel("this peer does not have that model's file")
        data = await asyncio.to_thread(self._header_of, stored)
        return HeaderData(request=message.request, card=card, sha256=hashlib.sha256(data).hexdigest()), data

    def _header_of(self, stored: StoredModel) -> bytes:
        with self.store.open(stored) as file:
            return bytes(file.header_bytes())


def _text_of(card: ModelCard, file: GgufFile) -> ModelText:
    template = template_from_gguf(file.metadata) if "tokenizer.chat_template" in file.metadata else None
    return ModelText(card, tokenizer_from_gguf(file.metadata), template)


def _fraction(step: PullProgress) -> float:
    """Of a pull; what its size is not known of counts as not begun."""
    if step.phase is PullPhase.DONE:
        return 1.0
    return step.done_bytes / step.total_bytes if step.phase is PullPhase.DOWNLOADING and step.total_bytes else 0.0
