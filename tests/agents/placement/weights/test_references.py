"""References that come from a peer or a client: they name no file of this device, and cause no download."""

import hashlib
import shutil

import msgspec
import pytest

from in_process.weights import Sites
from meshd.errors import DownloadError, InvalidRequest, RemoteFailure, UnknownModel
from meshd.models.cards import shown_to_peers
from meshd.protocol.messages import FetchHeader, FetchManifest, FetchWeights
from meshd.types import ModelId


@pytest.mark.parametrize(
    "form", ["file:{path}", "file:{path}+q8", "file:{folder}", "hf:someone/anything", "pypi:anything==1.0", ""]
)
async def test_a_peer_cannot_have_a_file_of_this_device_read_or_another_model_downloaded(
    sites: Sites, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """A reference in PLACE names a private file, with any id: the file is neither hashed, nor kept, nor given to the peer."""
    a, b = await sites.start("a", "b")
    private = sites.root / "private" / "finetune.gguf"
    private.parent.mkdir()
    shutil.copyfile(sites.file, private)
    sha256 = hashlib.sha256(private.read_bytes()).hexdigest()
    monkeypatch.setattr(a.store, "pull", lambda *asked: pytest.fail(f"{asked[0]} was looked at"))
    for model in ("0" * 32, sha256[:32]):
        with pytest.raises(DownloadError, match="only a device's owner") as refused:
            await a.weights.card(ModelId(model), form.format(path=private, folder=private.parent))
        assert model == sha256[:32] or sha256[:32] not in str(refused.value)
    assert a.store.list() == []
    assert a.library.local == {}
    with pytest.raises(RemoteFailure):
        await b.peer.links.request(
            a.peer.id, lambda number: FetchWeights(request=number, model=ModelId(sha256[:32]), offset=0, length=8), timeout_s=5
        )


async def test_only_the_owner_names_files(sites: Sites) -> None:
    [a] = await sites.start("a")
    named = [
        f"file:{sites.file}",
        "file:/etc/passwd",
        f"file:{sites.root}",
        "file:/nowhere/x.gguf",
        "file:~/x",
        f"file:{sites.file}+q4",
    ]
    for ref in named:
        with pytest.raises(InvalidRequest) as refused:
            await a.library.pull(ref, lambda share: None)
        expected = f"{ref} is none of this device's models, and a file can be named only by the device's owner"
        assert refused.value.message == expected, "the same words, whether there is such a file or not"
    card = await a.library.pull(f"file:{sites.file}", lambda share: None, by_owner=True)
    assert await a.library.pull(f"file:{sites.file}", lambda share: None) == card, "the owner has put it into the store"


async def test_peers_do_not_see_the_paths_of_files(sites: Sites) -> None:
    a, b = await sites.start("a", "b")
    await sites.have_file(a)
    [own] = a.library.local.values()
    assert str(sites.root) in own.ref
    offered, _ = await b.peer.links.request(a.peer.id, lambda number: FetchManifest(request=number, model=own.id), timeout_s=5)
    header, _ = await b.peer.links.request(a.peer.id, lambda number: FetchHeader(request=number, model=own.id), timeout_s=5)
    for card in (offered.card, header.card, shown_to_peers(own)):
        assert (card.id, card.name, card.ref) == (own.id, "a.gguf", "")
    assert a.library.find("a.gguf") == a.library.find(own.name) == own


async def test_a_name_of_the_catalogue_means_only_the_model_with_its_hash(sites: Sites) -> None:
    """A member advertises a model of its own under a well-known name."""
    a, b = await sites.start("a", "b")
    card = await sites.have_file(a)
    a.library.local[card.id] = msgspec.structs.replace(card, name="smollm2:135m", ref="hf:a/b")
    with pytest.raises(UnknownModel):
        b.library.find("smollm2:135m")
    a.library.local[card.id] = msgspec.structs.replace(card, name="mine", ref="hf:a/b")
    assert b.library.find("mine").id == card.id
