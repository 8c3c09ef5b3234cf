"""Keeps the models that this peer knows: their cards, and what their text is read from."""

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from logging import getLogger
from pathlib import Path

import msgspec

from meshd.agents.links.links import Links
from meshd.agents.placement.weights.headers import HeaderFetcher
from meshd.agents.text.model_texts import ModelText, ModelTexts
from meshd.clock import Clock, SystemClock
from meshd.errors import InvalidRequest, MeshdError, ModelFileError, UnknownModel
from meshd.models.cards import card_from_gguf, shown_to_peers
from meshd.models.files.disk import FileStamp
from meshd.models.files.gguf import GgufFile
from meshd.models.store.catalogue import claims_other_model
from meshd.models.store.partial_copy import HEADER_INDEX, PartialCopy
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.models.store.store import ModelPreview, Store, StoredModel
from meshd.protocol.messages import FetchHeader, HeaderData
from meshd.types import Advert, ModelCard, ModelId, PeerId

log = getLogger(__name__)

_WATCH_S = 2.0
"""Interval at which the store's index is looked at, since `meshd pull` and `meshd rm` change it in a process of their own."""
_MAX_HEARD = 64
"""Maximum number of cards that are remembered from other peers; the oldest is dropped first."""


@dataclass(frozen=True, slots=True)
class _PeerHeader:
    """A header that a peer sent."""

    sha256: bytes
    holders: frozenset[PeerId]
    """The peers that had the model when they agreed on this header."""


@dataclass(slots=True)
class ModelLibrary:
    """Knows the models on this peer's disk and the models that other peers advertise."""

    links: Links
    store: Store
    adverts: Callable[[], Iterable[Advert]]
    """Returns the adverts of the live peers, with or without this peer's own."""
    on_change: Callable[[], None]
    headers: HeaderFetcher
    clock: Clock = field(default_factory=SystemClock)
    on_pull: Callable[[PullProgress], None] = lambda step: None
    """Called with each step of a pull, on the event loop."""
    local: dict[ModelId, ModelCard] = field(default_factory=dict)
    """Models whose whole file is on this disk."""
    partial: dict[ModelId, ModelCard] = field(default_factory=dict)
    """Models of which this disk has some tensors."""
    _names: dict[str, ModelId] = field(default_factory=dict)
    """Every name and reference of the models on this disk. One file can have several."""
    _refused: dict[str, ModelFileError] = field(default_factory=dict)
    """Why models on this disk can't be used, by their names and references."""
    _read_version: FileStamp | None = None
    """The version of the store's index at the last `refresh`."""
    _heard: dict[ModelId, ModelCard] = field(default_factory=dict)
    """Cards that peers have advertised. These peers may have gone since."""
    texts: ModelTexts = field(default_factory=ModelTexts)
    _warming: set["asyncio.Task[None]"] = field(default_factory=set)
    _from_peers: dict[ModelId, _PeerHeader] = field(default_factory=dict)
    """The headers of `texts` that came from peers."""
    _last_header: tuple[ModelId, bytes] = (ModelId(""), b"")
    """The header that a peer requested last."""
    _reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def register(self) -> None:
        """Register the handler of FETCH_HEADER."""
        self.links.register(FetchHeader, self._on_fetch_header)

    async def run(self) -> None:
        """Notice the models that other processes put into the store or remove from it."""
        while True:
            await self.clock.sleep(_WATCH_S)
            try:
                await self._refresh_if_changed()
            except MeshdError as error:
                log.warning("the models on this disk can't be listed: %s", error)
                self._read_version = self.store.version()  # one warning for each version of the index

    async def known(self, name: str) -> ModelCard:
        """Find a model as `find` does. If the name is unknown, look first whether the store has it by now.

        Raises: UnknownModel; the reason why the model can't be used, if it is on this disk; StorageError.
        """
        try:
            return self.find(name)
        except UnknownModel:
            await self._refresh_if_changed()
            return self.find(name)

    async def _refresh_if_changed(self) -> None:
        if self.store.version() != self._read_version:
            await self._read_store()

    async def refresh(self) -> None:
        """Read the cards of all models on this disk. A file that can't be used is left out. Raises: StorageError."""
        self.partial = await asyncio.to_thread(self._read_partial)
        await self._read_store()

    async def _read_store(self) -> None:
        version, before = self.store.version(), dict(self.local)
        cards, self._names, self._refused = await asyncio.to_thread(self._read_local)
        self._read_version = version
        cards |= {model: card for model, card in self.local.items() if model not in before}  # became whole meanwhile
        if cards != self.local:
            self.local = cards
            self.on_change()

    def _read_local(self) -> tuple[dict[ModelId, ModelCard], dict[str, ModelId], dict[str, ModelFileError]]:
        cards: dict[ModelId, ModelCard] = {}
        names: dict[str, ModelId] = {}
        refused: dict[str, ModelFileError] = {}
        for stored in self.store.list():
            try:
                cards.setdefault(stored.id, self.local.get(stored.id) or self._card_of(stored))
            except MeshdError as error:
                log.info("model %s is left out: %s", stored.name, error)
                reason = ModelFileError(error.message, hint=error.hint)
                refused |= dict.fromkeys((stored.name, stored.ref, stored.id), reason)
            else:
                names |= dict.fromkeys((stored.name, stored.ref), stored.id)
        return cards, names, refused

    def _read_partial(self) -> dict[ModelId, ModelCard]:
        cards: dict[ModelId, ModelCard] = {}
        for copy in self.store.partials.list():
            try:
                cards[copy.about.id] = self.partial.get(copy.about.id) or card_of_copy(copy)
            except MeshdError as error:
                log.info("the partial copy of %s is left out: %s", copy.about.name, error)
        return cards

    def _card_of(self, stored: StoredModel) -> ModelCard:
        with self.store.open(stored) as file:
            return card_from_gguf(file, name=stored.name, ref=stored.ref, model_id=stored.id, created=stored.created)

    def cards(self) -> dict[ModelId, ModelCard]:
        """Collect the cards of all known models, those on this disk first.

        If the only peer with a model's file has gone, the model stays known while some peer has layers of it.
        """
        adverts = list(self.adverts())
        for advert in adverts:
            for card in advert.models:
                if not claims_other_model(card.name, card.id):
                    self._hear(card)
        advertised = {card.id for advert in adverts for card in advert.models}
        advertised |= {holding.model for advert in adverts for holding in advert.holdings}
        heard = {model: card for model, card in self._heard.items() if model in advertised}
        return {**self.local, **{model: card for model, card in (heard | self.partial).items() if model not in self.local}}

    def card_here(self, model: ModelId) -> ModelCard | None:
        """Returns: the card of a model that is on this disk, whole or in part; None if it is not."""
        return self.local.get(model) or self.partial.get(model)

    def now_whole(self, card: ModelCard) -> None:
        """Record that a model's whole file is on this disk now."""
        self.partial.pop(card.id, None)
        if self.local.get(card.id) != card:
            self.local[card.id] = card
            self.on_change()

    def now_gone(self, model: ModelId) -> None:
        """Record that a model's file was removed from this disk by another program."""
        if self.local.pop(model, None) is not None:
            self.on_change()

    def open(self, card: ModelCard) -> GgufFile:
        """Open a model's file, or its partial copy. Blocks. Raises: ModelFileError, StorageError."""
        file = self._file_of(card.id)
        if file is None:
            raise ModelFileError(f"the file of {card.name} has gone from this disk")
        return file

    def _file_of(self, model: ModelId) -> GgufFile | None:
        stored = self.store.get(model)
        if stored is not None:
            return self.store.open(stored)
        copy = self.store.partials.get(model)
        return copy.open() if copy is not None and HEADER_INDEX in copy.have else None

    def _hear(self, card: ModelCard) -> None:
        if self._heard.get(card.id) != card:
            self._heard.pop(card.id, None)
            self._heard[card.id] = card
            if len(self._heard) > _MAX_HEARD:
                del self._heard[next(iter(self._heard))]

    def find(self, name: str) -> ModelCard:
        """Find a model by name, reference or id.

        Raises: UnknownModel, whose hint lists similar names; the reason why a model on this disk can't be used.
        """
        cards = self.cards()
        if (here := cards.get(self._names.get(name, ModelId("")))) is not None:
            return here
        for card in cards.values():
            if name in (card.name, card.ref, card.id, shown_to_peers(card).name):
                return card
        if (reason := self._refused.get(name)) is not None:
            raise ModelFileError(reason.message, hint=reason.hint)
        names = [card.name for card in cards.values()]
        near = get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)[:5]
        hint = f"nearest: {', '.join(near)}" if near else "fetch one with `meshd pull` or place one with `meshd place`"
        raise UnknownModel(f"the model {name!r} does not exist in this cluster", hint=hint)

    async def pull(
        self, ref: str, progress: Callable[[PullProgress], None] = lambda step: None, *, by_owner: bool = False
    ) -> ModelCard:
        """Fetch a model from its own source, unless it is on this disk already. Returns: the model's card.

        by_owner: the owner of this device named the model when the daemon was started. Anybody else (a client of the API, a peer)
        can name a file of this device only if the owner has put it into the store: the files are the owner's, and even whether one
        exists is nobody else's business.

        Raises: UnknownModel, InvalidRequest, DownloadError, StorageError.
        """
        stored = self.store.get(ref)
        if stored is None and ref.startswith("file:") and not by_owner:
            raise InvalidRequest(
                f"{ref} is none of this device's models, and a file can be named only by the device's owner",
                param="model",
                hint=f"run `meshd pull {ref}` on this device first",
            )
        if stored is None:
            stored = await self._pull(ref, progress)
        card = self.local.get(stored.id)
        if card is None:
            card = await asyncio.to_thread(self._card_of, stored)
            self.now_whole(card)
        return card

    async def _pull(self, ref: str, progress: Callable[[PullProgress], None]) -> StoredModel:
        latest = PullProgress(model=ref, source="", phase=PullPhase.FINDING)

        def report(step: PullProgress) -> None:
            nonlocal latest
            latest = step
            self.on_pull(step)
            progress(step)

        try:
            return await self.store.pull(ref, report)
        except BaseException as error:
            why = str(error) if isinstance(error, MeshdError) else "it was stopped"
            self.on_pull(msgspec.structs.replace(latest, phase=PullPhase.ENDED, message=why))
            raise

    async def look(self, ref: str) -> ModelPreview:
        """Read a model's header from its source, without its weights.

        Raises: UnknownModel, DownloadError, ModelFileError, StorageError.
        """
        return await self.store.look(ref)

    async def text(self, card: ModelCard) -> ModelText:
        """Get a model's tokens and its way to encode prompts, from this disk or else from a peer with the file.

        A text that was made from a peer's header is made anew when the model is on this disk, or when more peers have its file and
        the majority has another header.

        Raises: ModelFileError if its tokenizer or template can't be used, or if no majority of the peers agrees on them; NoPeer,
        PeerFault, Overloaded.
        """
        await self._forget_wrong(card)
        return await self.texts.get(card, partial(self._text_source, card))

    def warm(self, card: ModelCard) -> None:
        """Read a model's text in the background, so that its first request does not wait for it."""
        task = asyncio.get_running_loop().create_task(self._warm(card), name=f"read the text of {card.name}")
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)

    def readable(self, model: ModelId) -> bool:
        """Whether a model's text was read, or was not tried yet."""
        return not self.texts.problem(model)

    async def close(self) -> None:
        """End the processes that encode prompts."""
        for task in self._warming:
            task.cancel()
        await asyncio.gather(*self._warming, return_exceptions=True)
        await self.texts.close()

    async def _warm(self, card: ModelCard) -> None:
        try:
            await self.text(card)
        except MeshdError as error:
            log.warning("%s can't answer: %s", card.name, error)

    async def _text_source(self, card: ModelCard) -> str | bytes:
        """Find what a model's text is read from. Returns: the path of its file, or else the header that a peer sent."""
        path = await asyncio.to_thread(self._path_of, card.id)
        if path is not None:
            return str(path)
        holders = frozenset(holders_of(card.id, self.adverts()))
        header = await self.headers.fetch(card)
        self._from_peers[card.id] = _PeerHeader(hashlib.sha256(header).digest(), holders)
        return header

    async def _forget_wrong(self, card: ModelCard) -> None:
        """Forget the text of a header that a peer sent, if it is on this disk by now or a majority has another one."""
        header = self._from_peers.get(card.id)
        if header is None:
            return
        holders = frozenset(holders_of(card.id, self.adverts()))
        if card.id not in self.local:
            if holders <= header.holders:
                return
            try:
                agreed = await self.headers.agreed_hash(card.id)
            except MeshdError as error:
                log.info("the header of %s can't be compared with that of more peers: %s", card.name, error)
                return
            if agreed == header.sha256:
                self._from_peers[card.id] = _PeerHeader(agreed, holders | header.holders)
                return
            log.warning("the tokenizer and template of %s came from a peer that had another header than most peers have", card.name)
        if self._from_peers.pop(card.id, None) is not None:
            self.texts.forget(card.id)

    def _path_of(self, model: ModelId) -> Path | None:
        stored = self.store.get(model)
        if stored is not None:
            return self.store.verified_path(stored)
        copy = self.store.partials.get(model)
        return copy.path if copy is not None and HEADER_INDEX in copy.have else None

    async def _on_fetch_header(self, sender: PeerId, message: FetchHeader, payload: memoryview) -> tuple[HeaderData, bytes]:
        card = self.card_here(message.model)
        if card is None:
            raise UnknownModel("this peer does not have that model's file")
        # One at a time, because reading a header holds Python's lock: 256 at once would stop the heartbeats.
        async with self._reading:
            if card.id != self._last_header[0]:
                self._last_header = card.id, await asyncio.to_thread(self._header_of, card)
            data = self._last_header[1]
        return HeaderData(request=message.request, card=shown_to_peers(card)), data

    def _header_of(self, card: ModelCard) -> bytes:
        with self.open(card) as file:
            return bytes(file.header_bytes())


def holders_of(model: ModelId, adverts: Iterable[Advert]) -> list[PeerId]:
    """List the peers that have a model's file, then the peers that have loaded layers and so may have a part of the file."""
    known = list(adverts)
    whole = [advert.peer for advert in known if any(card.id == model for card in advert.models)]
    part = [advert.peer for advert in known if any(holding.model == model for holding in advert.holdings)]
    return list(dict.fromkeys(whole + part))


def card_of_copy(copy: PartialCopy) -> ModelCard:
    """Read the card from a partial copy's header. Raises: ModelFileError, StorageError."""
    about = copy.about
    return card_from_gguf(copy.header(), name=about.name, ref=about.ref, model_id=about.id, created=about.created)
