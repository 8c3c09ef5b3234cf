"""Makes sure that the weights that this peer needs are on its disk.

A peer without a model's file fetches the header and the tensors of its own layers from peers that have them. If no peer has a
tensor, it fetches the whole file from the model's own source, if the catalogue has the model's hash.

Trust. A model's id is the hash of its whole file, which a peer with only some tensors can't compute. So a peer trusts its cluster
for the manifest (the list of all tensors with their hashes), but trusts no peer for bytes: it hashes each tensor before it uses or
serves the tensor. A peer with the whole file has checked the file against the id and computes the manifest itself; a peer with a
partial copy serves the manifest that it received. If peers send different manifests, the one from most peers with the whole file is
used; if that is a tie, the one from most peers with a partial copy; if that is a tie too, the model's own source. A partial copy
that has all tensors is hashed as a whole: if the hash is the model's id, the copy becomes an ordinary model, else it is deleted.
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
from meshd.models.store.catalogue import is_pinned
from meshd.models.store.partial_copy import PartialCopy
from meshd.models.store.progress import ProgressMeter, PullPhase, PullProgress, in_thread
from meshd.types import LayerRange, ModelCard, ModelId, PeerId

log = getLogger(__name__)

Progress = Callable[[float], None]
"""Called on the event loop with the fraction that is done, 0 to 1."""


@dataclass(slots=True)
class WeightProvider:
    """Fetches cards and weights that are not on this disk."""

    links: Links
    library: ModelLibrary
    sources: WeightSources
    clock: Clock

    async def card(self, model: ModelId, ref: str) -> ModelCard:
        """Get a model's card from a partial copy on this disk, or else from a header that a peer sends.

        If no peer can help, the whole file is fetched from the model's own source.

        Raises: UnknownModel, DownloadError, ModelFileError, StorageError.
        """
        try:
            async with self.library.store.partials.filling(model):
                return (await self._begin(model))[1]
        except (NoPeer, PeerFault, ModelFileError) as error:
            return await self._pull(model, ref, lambda share: None, error)

    async def fill(self, card: ModelCard, ref: str, layers: LayerRange, progress: Progress) -> None:
        """Fetch the tensors that a backend reads for these layers and that are not on this disk.

        Raises: DownloadError if neither a peer nor the model's own source has the missing tensors; ModelFileError, StorageError.
        Cancel: the tensors that have arrived are kept, and the next call fetches only the rest.
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
        """Find the partial copy on this disk, or begin one by fetching the header. Returns: the copy and its card.

        Raises: NoPeer, ModelFileError, StorageError.
        """
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
        raise NoPeer("no live peer has a valid header of the model")

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
            senders = await self._fetch(copy, names, progress)
        except ManifestConflict:
            log.warning(
                "the partial copy of %s differs from the file that peers have now: it is deleted and fetched again", card.name
            )
            await asyncio.to_thread(copy.discard)
            copy, _ = await self._begin(card.id)
            senders = await self._fetch(copy, names, progress)
        if copy.whole:
            await self._adopt(copy, card, senders)

    async def _fetch(self, copy: PartialCopy, names: Iterable[str], progress: Progress) -> frozenset[PeerId]:
        """Fetch the named tensors that the copy lacks.

        Returns: the peers that sent them.
        Raises: NoPeer, ModelFileError, StorageError.
        """
        about, parts = copy.about, copy.about.manifest.parts
        meter = ProgressMeter(about.name, _rising_share(progress))
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
        shares = ", ".join(f"{count} from {self.sources.names(peer)}" for peer, count in fetch.received_bytes.most_common())
        log.info("%d bytes of %s came in %.2f s (%s); %d were here", size, about.name, took, shares, had)
        return frozenset(fetch.received_bytes)

    async def _adopt(self, copy: PartialCopy, card: ModelCard, senders: Iterable[PeerId]) -> None:
        """Make a complete copy an ordinary model. Raises: StorageError; ModelFileError, with `senders` banned, on a wrong hash."""
        meter = ProgressMeter(card.name, lambda step: None)
        meter.begin(PullPhase.CHECKING, total=copy.about.manifest.size)
        try:
            stored = await in_thread(meter, self.library.store.adopt, copy, meter.advance)
        except ModelFileError as error:
            self.library.partial.pop(card.id, None)
            for peer in senders:
                self.sources.ban(peer, str(error))
            raise
        log.info("the partial copy of %s is complete and its hash is correct", stored.name)
        self.library.now_whole(card)

    async def _pull(self, model: ModelId, ref: str, progress: Progress, because: MeshdError) -> ModelCard:
        """Fetch the whole file from the model's own source, if that can give only this model.

        `ref` comes from a peer, or from a card that a peer advertised. So it must be an entry of the catalogue with the model's
        hash: anything else would have this device read any of its files, or download what another device likes.

        `because` is the error that made all peers unusable.
        """
        if not is_pinned(ref, model):
            where = f"`meshd pull {ref}`" if ref else "`meshd pull`"
            raise DownloadError(
                f"{because.message}, and only a device's owner may have it fetch a model without a known hash from its source",
                hint=f"run {where} on this device, or start a peer that has the file",
            ) from because
        log.info("%s is fetched from its own source: %s", ref, because)
        try:
            card = await self.library.pull(ref, lambda step: progress(step.share))
        except (UsageError, DownloadError, ModelFileError) as error:
            raise DownloadError(f"{because.message}, and {error.message}", hint=error.hint) from error
        async with self.library.store.partials.filling(model):
            await asyncio.to_thread(self.library.store.partials.drop, model)
        return card


def _rising_share(progress: Progress) -> Callable[[PullProgress], None]:
    """Wrap `progress` so that it is called only when the fraction is larger than before."""
    last = -1.0

    def report(step: PullProgress) -> None:
        nonlocal last
        share = min(1.0, step.done_bytes / step.total_bytes) if step.total_bytes else 0.0
        if share > last:
            last = share
            progress(share)

    return report
