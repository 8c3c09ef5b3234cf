"""The models that a peer knows, and where it reads their text."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from fake_api.words import CARD
from in_process.adverts import advert, held
from in_process.peers import Peers, until
from meshd.agents.placement.model_library import ModelLibrary, holders_of
from meshd.agents.placement.weights.headers import HeaderFetcher
from meshd.agents.placement.weights.sources import WeightSources
from meshd.clock import SystemClock
from meshd.errors import ModelFileError, UnknownModel
from meshd.models.store.store import Store
from meshd.protocol.framing import EMPTY
from meshd.protocol.messages import FetchHeader
from meshd.types import Advert, ModelCard, ModelId, PeerId
from tiny.bad_files import small_gguf
from tiny.gguf_file import write_gguf


def named(name: str) -> ModelCard:
    return msgspec.structs.replace(CARD, id=ModelId(name.ljust(32, "-")), name=name, ref=f"file:/{name}.gguf")


def stored(peer: str, *cards: ModelCard) -> Advert:
    """Make the advert of a peer that has these models on its disk."""
    return msgspec.structs.replace(advert(peer), models=cards)


class QuickClock(SystemClock):
    """A clock whose sleeps take a hundredth of their time."""

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds / 100)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "source.gguf", layers=1)


@pytest.fixture
def adverts() -> list[Advert]:
    return []


@pytest.fixture
async def library(peers: Peers, tmp_path: Path, adverts: list[Advert]) -> ModelLibrary:
    links = peers.start("a").links
    sources = WeightSources(links.id, links, adverts=lambda: adverts, names=str, clock=SystemClock(), link_stats=dict)
    return ModelLibrary(
        links=links,
        store=Store(tmp_path),
        adverts=lambda: adverts,
        on_change=lambda: None,
        headers=HeaderFetcher(links, sources),
    )


async def test_a_model_is_found_by_name_reference_or_id(library: ModelLibrary, adverts: list[Advert]) -> None:
    here, there = named("smollm2"), named("gemma3")
    library.local[here.id] = here
    adverts.append(stored("b", there))
    assert [library.find(text) for text in (here.name, there.name, there.ref, there.id)] == [here, there, there, there]


async def test_an_unknown_model_lists_the_nearest_names(library: ModelLibrary, adverts: list[Advert]) -> None:
    with pytest.raises(UnknownModel) as caught:
        library.find("smollm")
    assert "meshd pull" in caught.value.hint
    adverts.append(stored("b", named("smollm2"), named("gemma3")))
    with pytest.raises(UnknownModel) as caught:
        library.find("smollm")
    assert caught.value.hint == "nearest: smollm2"


async def test_a_model_without_a_file_is_known_while_a_peer_holds_layers_of_it(
    library: ModelLibrary, adverts: list[Advert]
) -> None:
    card = named("smollm2")
    adverts.append(stored("b", card))
    assert card.id in library.cards()
    adverts[:] = [msgspec.structs.replace(stored("c"), holdings=(held(0, 2, model=card.id),))]
    assert library.cards() == {card.id: card}
    adverts.clear()
    assert library.cards() == {}


async def test_cards_from_peers_are_bounded(library: ModelLibrary, adverts: list[Advert]) -> None:
    adverts.append(stored("b", *(named(f"model-{number}") for number in range(70))))
    assert [card.name for card in library.cards().values()] == [f"model-{number}" for number in range(6, 70)]


async def test_what_another_process_pulls_or_removes_is_noticed_when_it_is_asked_for(
    library: ModelLibrary, source: Path, tmp_path: Path
) -> None:
    await library.refresh()
    other = Store(tmp_path)
    with pytest.raises(UnknownModel):
        await library.known(f"file:{source}")
    stored = await other.pull(f"file:{source}")
    assert (await library.known(f"file:{source}")).id == (await library.known(stored.id)).id == stored.id
    second = write_gguf(tmp_path / "second.gguf", layers=1)
    await other.pull(f"file:{second}")
    assert (await library.known(f"file:{second}")).id == stored.id
    other.remove(f"file:{source}")
    other.remove(f"file:{second}")
    with pytest.raises(UnknownModel):
        await library.known("something else")
    assert library.cards() == {}


async def test_the_store_is_watched(library: ModelLibrary, source: Path, tmp_path: Path) -> None:
    changed = asyncio.Event()
    library.on_change, library.clock = changed.set, QuickClock()
    watch = asyncio.create_task(library.run())
    stored = await Store(tmp_path).pull(f"file:{source}")
    await asyncio.wait_for(changed.wait(), 30)
    assert stored.id in library.local
    watch.cancel()


async def test_a_model_that_can_not_be_used_is_left_out_and_its_reason_is_given_when_it_is_asked_for(
    library: ModelLibrary, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await Store(tmp_path).pull(f"file:{source}")
    write_gguf(source, layers=1, seed=1)
    await library.refresh()
    assert library.local == {}
    assert [record.levelname for record in caplog.records if "left out" in record.message] == []
    with pytest.raises(ModelFileError, match=r"source\.gguf is no longer file:"):
        await library.known(f"file:{source}")


def test_holders_with_the_file_come_before_those_with_layers() -> None:
    card = named("smollm2")
    layers = msgspec.structs.replace(stored("b"), holdings=(held(0, 2, model=card.id),))
    both = msgspec.structs.replace(stored("c", card), holdings=(held(0, 2, model=card.id),))
    assert holders_of(card.id, [layers, both, stored("d")]) == ["c", "b"]


async def test_a_models_text_is_read_from_its_file_and_a_broken_one_is_known_as_unreadable(
    library: ModelLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshd.models.check.check_text", lambda header: "")  # as in a store that an earlier version filled
    templates = {"good": "{{ messages[0].content }}", "broken": "{% for m in %}"}
    cards = {}
    for name, template in templates.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(small_gguf(more={"tokenizer.chat_template": template}))
        cards[name] = await library.pull(f"file:{path}", lambda _: None, by_owner=True)
    try:
        text = await library.text(cards["good"])
        assert text.table.decode(await text.tokens_of('!"#')) == '!"#'
        library.warm(cards["broken"])
        await until(lambda: not library.readable(cards["broken"].id))
        assert library.readable(cards["good"].id)
        with pytest.raises(ModelFileError, match="chat template"):
            await library.text(cards["broken"])
    finally:
        await library.close()


async def test_a_header_that_many_requests_ask_for_is_read_once(library: ModelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = named("smollm2"), named("gemma3")
    library.local = {first.id: first, second.id: second}
    read: list[str] = []
    monkeypatch.setattr(ModelLibrary, "_header_of", lambda self, card: read.append(card.name) or card.name.encode())
    asked = [FetchHeader(request=number, model=first.id) for number in range(50)]
    answers = await asyncio.gather(*(library._on_fetch_header(PeerId("b"), message, EMPTY) for message in asked))
    assert read == ["smollm2"]
    assert {(reply.request, data) for reply, data in answers} == {(number, b"smollm2") for number in range(50)}
    _, data = await library._on_fetch_header(PeerId("b"), FetchHeader(request=1, model=second.id), EMPTY)
    assert (read, data) == (["smollm2", "gemma3"], b"gemma3")
