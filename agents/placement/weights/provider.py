"""Weights from peer to peer: a peer that lacks a model's file gets the header and just the tensors of its layers from those that
have them, and from the model's own source only what no peer has.

Whom this trusts. A model's id is the hash of its whole file, which a peer with some of its tensors can't compute. So it trusts the
members of its cluster for the list of the tensors' hashes (the manifest), and nobody for bytes: each tensor is hashed before it is
used and before it is given on. Peers with the whole file, which was checked against the id when it came, make the list themselves;
others repeat the one that they were given. Where several answer, they must say the same: the majority counts, those with the whole
file first, and on a tie nobody is believed and the model's own source is asked. A copy that has got all tensors is hashed as a
whole: it becomes an ordinary model if its id is right, else it is thrown away.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from logging import getLogger

from meshd.agents.links.links import Links
from meshd.agents.placement.model_library import ModelLibrary, card_of_copy
from meshd.agents.placement.weights.chunks import ChunkSchedule, file_ranges
from meshd.agents.placement.weights.fetch import ManifestConflict, WeightFetch
from meshd.agents.placement.weights.sources import MAX_SOURCES, WeightSources
from meshd.clock import Clock
from meshd.errors import DownloadError, MeshdError, ModelFileError, NoPeer, PeerFault, UsageError
from meshd.models.files.manifest import HEADER, tensors_of
from meshd.models.store.partial_copy import PartialCopy
from meshd.models.store.progress import ProgressMeter, PullPhase, PullProgress, in_thread
from meshd.types import LayerRange, ModelCard, ModelId, PeerId

log = getLogger(__name__)

Progress = Callable[[float], None]
"""Gets 0..1, on the event loop."""


@dataclass(slots=True)
class WeightProvider:
    """Has weights on this disk."""

    links: Links
    library: ModelLibrary
    sources: WeightSources
    clock: Clock

    async def card(self, model: ModelId, ref: str) -> ModelCard:
        """The card of a model that this peer has something of: its header from a peer, or the whole file from its own source.

        Raises: UnknownModel, DownloadError, ModelFileError, StorageError.
        """
        try:
            async with self.library.store.partials.filling(model):
                return (await self._begin(model))[1]
        except (NoPeer, PeerFault, ModelFileError) as error:
            return await self._pull(model, ref, lambda share: None, error)

    async def fill(self, card: ModelCard, ref: str, layers: LayerRange, progress: Progress) -> None:
        """Have all tensors on this disk that a backend reads for these layers. What is here already is not fetched.

        Raises: DownloadError if neither a peer nor the model's own source has what is missing; ModelFileError, StorageError.
        Cancel: what has arrived stays, and the next time goes on from there.
        """
        if card.id in self.library.local:
            if await asyncio.to_thread(self.library.store.get, card.id) is not None:
                return
            self.library.now_gone(card.id)
        try:
            async with self.library.store.partials.filling(card.id):
                await self._fill(card, layers, progress)
        except (NoPeer, PeerFault, ModelFileError) as error:
            await self._pull(card.id, ref, progress, error)

    async def _begin(self, model: ModelId) -> tuple[PartialCopy, ModelCard]:
        """The copy that is here, or a new one with the header alone. Raises: NoPeer, ModelFileError, StorageError."""
        partials = self.library.store.partials
        copy = await asyncio.to_thread(partials.get, model)
        if copy is None:
            self.library.partial.pop(model, None)
        if copy is not None and copy.in_doubt:
            await self._fetch(copy, (), lambda share: None)
        if copy is not None and copy.have:
            known = self.library.partial.get(model)
            card = known if known is not None else await asyncio.to_thread(card_of_copy, copy)
            self.library.partial[model] = card
            return copy, card
        for _ in range(MAX_SOURCES):
            about, peers = await self.sources.agreed(model)
            copy = await asyncio.to_thread(partials.begin, about)
            try:
                await self._fetch(copy, (HEADER,), lambda share: None)
                card = await asyncio.to_thread(card_of_copy, copy)
            except ModelFileError as error:
                for peer in peers:
                    self.sources.ban(peer, str(error))
                await asyncio.to_thread(copy.discard)
                continue
            self.library.partial[model] = card
            return copy, card
        raise NoPeer("no live peer can give a header of the model that makes sense")

    async def _fill(self, card: ModelCard, layers: LayerRange, progress: Progress) -> None:
        copy, _ = await self._begin(card.id)
        names = tensors_of(
            card.spec,
            layers,
            embedding=layers.start == 0,
            head=layers.end == card.spec.layers,
            names=[part.name for part in copy.about.manifest.parts],
        )
        try:
            givers = await self._fetch(copy, names, progress)
        except ManifestConflict:
            log.warning("what is here of %s is not what the peers have now: it is fetched anew", card.name)
            await asyncio.to_thread(copy.discard)
            copy, _ = await self._begin(card.id)
            givers = await self._fetch(copy, names, progress)
        if copy.whole:
            await self._adopt(copy, card, givers)

    async def _fetch(self, copy: PartialCopy, names: Iterable[str], progress: Progress) -> frozenset[PeerId]:
        """Have these tensors in the copy; who gave them. Raises: NoPeer, ModelFileError, StorageError."""
        about, parts = copy.about, copy.about.manifest.parts
        meter = ProgressMeter(about.name, _teller(progress))
        try:
            await in_thread(meter, copy.begin, lambda count: meter.advance(0))
            had = copy.bytes_here
            missing = about.manifest.indices(names) - copy.have
            if not missing:
                return frozenset()
            size = sum(parts[index].length for index in missing)
            self.library.store.partials.need_space(size)
            meter.begin(PullPhase.DOWNLOADING, total=size)
            began = self.clock.monotonic()
            fetch = WeightFetch(self.links, self.sources, self.clock, copy, ChunkSchedule(file_ranges(parts, missing)), meter)
            await fetch.run()
            took = self.clock.monotonic() - began
            await in_thread(meter, copy.grow)
        finally:
            copy.close()
        shares = ", ".join(f"{share} from {self.sources.names(peer)}" for peer, share in fetch.gave.most_common())
        log.info("%d bytes of %s came in %.2f s (%s); %d were here", size, about.name, took, shares, had)
        return frozenset(fetch.gave)

    async def _adopt(self, copy: PartialCopy, card: ModelCard, givers: Iterable[PeerId]) -> None:
        """Nothing is missing any more: an ordinary model now. Raises: ModelFileError if it is not the one; StorageError."""
        meter = ProgressMeter(card.name, lambda step: None)
        meter.begin(PullPhase.CHECKING, total=copy.about.manifest.size)
        try:
            stored = await in_thread(meter, self.library.store.adopt, copy, meter.advance)
        except ModelFileError as error:
            self.library.partial.pop(card.id, None)
            for peer in givers:
                self.sources.ban(peer, str(error))
            raise
        log.info("all of %s is here now, and its hash is right", stored.name)
        self.library.now_whole(card)

    async def _pull(self, model: ModelId, ref: str, progress: Progress, because: MeshdError) -> ModelCard:
        """The whole file from the model's own source, since no peer could help."""
        log.info("%s is fetched from its own source: %s", ref, because)
        try:
            card = await self.library.pull(ref, progress)
        except (UsageError, DownloadError, ModelFileError) as error:
            raise DownloadError(f"{because.message}, and {error.message}", hint=error.hint) from error
        if card.id != model:
            raise ModelFileError(f"{ref} is another file here ({card.id}) than at the peer that asks ({model})")
        async with self.library.store.partials.filling(model):
            await asyncio.to_thread(self.library.store.partials.drop, model)
        return card


def _teller(progress: Progress) -> Callable[[PullProgress], None]:
    """Tells the share that is done, each once."""
    told = -1.0

    def tell(step: PullProgress) -> None:
        nonlocal told
        share = min(1.0, step.done_bytes / step.total_bytes) if step.total_bytes else 0.0
        if share > told:
            told = share
            progress(share)

    return tell
