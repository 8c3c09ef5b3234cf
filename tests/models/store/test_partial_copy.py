"""Copies of some tensors of a model: what they are made of, what survives a crash, and what other peers may not make of them."""

import asyncio
import errno
import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshd.clock import SystemClock
from meshd.errors import ModelFileError, StorageError, UnknownModel
from meshd.kernels.registry import make_backend
from meshd.models.files import disk as files
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import (
    HEADER,
    Manifest,
    Offer,
    Part,
    check_layout,
    decode_offer,
    encode_offer,
    layout_of,
    sum_up,
    tensors_of,
)
from meshd.models.store.partial_copies import Partials
from meshd.models.store.partial_copy import CopyInfo, PartialCopy
from meshd.models.store.store import Store
from meshd.types import LayerRange, ModelId, Tensor
from tiny.gguf_file import write_gguf
from tiny.llama import TinyLlama, tiny_spec

QUIET: Callable[[int], None] = lambda count: None  # noqa: E731


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "source.gguf")


def manifest_of(path: Path) -> Manifest:
    with GgufFile.open(path) as file:
        return sum_up(path, layout_of(file.tensors, path.stat().st_size), QUIET)


def about(path: Path) -> CopyInfo:
    identifier = ModelId(hashlib.sha256(path.read_bytes()).hexdigest()[:32])
    return CopyInfo(identifier, "tiny", "pypi:tiny==1", 1700, manifest_of(path))


def bring(copy: PartialCopy, source: Path, indices: list[int], *, flush: bool = True) -> None:
    """As a fetch does: parts in any order, checked, remembered."""
    content = source.read_bytes()
    copy.begin(QUIET)
    for index in indices:
        part = copy.about.manifest.parts[index]
        copy.write(part.offset, memoryview(content[part.offset : part.end]))
        assert copy.is_right(index, QUIET)
        copy.keep([index])
        if index == 0:
            copy.grow()
    if flush:
        copy.flush()
    copy.close()


# The manifest


def test_the_parts_cover_the_file_from_its_first_byte_to_its_last(source: Path) -> None:
    manifest = manifest_of(source)
    content = source.read_bytes()
    assert manifest.size == len(content)
    assert b"".join(content[part.offset : part.end] for part in manifest.parts) == content
    assert all(hashlib.sha256(content[part.offset : part.end]).digest() == part.sha256 for part in manifest.parts)
    with GgufFile.open(source) as file:
        assert [part.name for part in manifest.parts] == [HEADER, *file.tensors]
        check_layout(manifest, file.tensors)


def test_an_offer_arrives_as_it_was_sent(source: Path) -> None:
    for have in (None, (0, 3)):
        offer = Offer(manifest_of(source), have)
        arrived = decode_offer(encode_offer(offer))
        assert arrived == offer
        assert arrived.manifest.digest == offer.manifest.digest


def part(name: str, offset: int, length: int, sha256: bytes = bytes(32)) -> Part:
    return Part(name, offset, length, sha256)


HOSTILE = {
    "nothing": Offer(Manifest(())),
    "no tensor": Offer(Manifest((part("", 0, 10),))),
    "no header": Offer(Manifest((part("a", 0, 10), part("b", 10, 10)))),
    "a gap": Offer(Manifest((part("", 0, 10), part("a", 11, 10)))),
    "an overlap": Offer(Manifest((part("", 0, 10), part("a", 9, 10)))),
    "not in order": Offer(Manifest((part("", 0, 10), part("a", 20, 10), part("b", 10, 10)))),
    "a negative offset": Offer(Manifest((part("", -10, 20), part("a", 10, 10)))),
    "an empty part": Offer(Manifest((part("", 0, 10), part("a", 10, 0)))),
    "a part of an absurd size": Offer(Manifest((part("", 0, 10), part("a", 10, 1 << 60)))),
    "a file of an absurd size": Offer(Manifest((part("", 0, 10), part("a", 10, 1 << 43), part("b", 10 + (1 << 43), 1 << 43)))),
    "an endless header": Offer(Manifest((part("", 0, 1 << 40), part("a", 1 << 40, 10)))),
    "a name twice": Offer(Manifest((part("", 0, 10), part("a", 10, 10), part("a", 20, 10)))),
    "a long name": Offer(Manifest((part("", 0, 10), part("a" * 129, 10, 10)))),
    "a short hash": Offer(Manifest((part("", 0, 10), part("a", 10, 10, b"abc")))),
    "parts that it does not name": Offer(Manifest((part("", 0, 10), part("a", 10, 10))), (0, 2)),
    "parts before the first": Offer(Manifest((part("", 0, 10), part("a", 10, 10))), (-1,)),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_offer_is_one_clear_error(what: str) -> None:
    with pytest.raises(ModelFileError, match="list of tensors"):
        decode_offer(encode_offer(HOSTILE[what]))


def test_junk_is_one_clear_error() -> None:
    rng = random.Random(5)
    whole = encode_offer(HOSTILE["a name twice"])
    for data in (b"", b"\xdf\xff\xff\xff\xff", whole[:-3], *(rng.randbytes(rng.randrange(1, 60)) for _ in range(200))):
        with pytest.raises(ModelFileError):
            decode_offer(data)
    with pytest.raises(ModelFileError, match="longer than"):
        decode_offer(bytes(9 << 20))


def test_too_many_tensors_are_refused() -> None:
    parts = tuple(part(str(index), index, 1) for index in range((1 << 16) + 2))
    with pytest.raises(ModelFileError):
        decode_offer(encode_offer(Offer(Manifest(parts))))


def test_a_list_that_is_not_the_headers_is_refused(source: Path) -> None:
    manifest = manifest_of(source)
    first, second, *rest = manifest.parts
    swapped = Manifest((first, msgspec.structs.replace(second, name=rest[0].name), *rest))
    moved = Manifest((first, msgspec.structs.replace(second, length=second.length + 4), *rest))
    with GgufFile.open(source) as file:
        for other in (swapped, moved):
            with pytest.raises(ModelFileError, match="not that of the model's header"):
                check_layout(other, file.tensors)


def test_a_file_with_much_that_belongs_to_nothing_is_not_shared(source: Path) -> None:
    with GgufFile.open(source) as file, pytest.raises(ModelFileError, match="belong to nothing"):
        layout_of(file.tensors, source.stat().st_size + (1 << 17))


# Which tensors a stage needs


class Recorder:
    """A weight source that remembers what it was asked for."""

    def __init__(self, weights: TinyLlama) -> None:
        self.weights = weights
        self.asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def tensor(self, name: str) -> Tensor:
        self.asked.add(name)
        return self.weights.tensor(name)


def names_of(weights: TinyLlama) -> list[str]:
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    names = [f"blk.{layer}.{name}.weight" for layer in range(weights.spec.layers) for name in parts]
    names += ["token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"]
    return [name for name in names if name in weights]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("start", "end"), [(0, 12), (0, 1), (1, 2), (10, 12), (1, 11)])
def test_it_is_exactly_what_the_backends_ask_for(backend: str, tied: bool, start: int, end: int) -> None:
    spec = tiny_spec(layers=12, tied=tied)
    recorder = Recorder(TinyLlama(spec))
    ends: dict[str, bool] = {"embedding": start == 0, "head": end == spec.layers}
    loaded = make_backend(backend, 1).load(spec, LayerRange(start, end), recorder, **ends)
    for inner in {LayerRange(start, end), LayerRange(start, start + 1), LayerRange(end - 1, end)}:
        loaded.stage(inner)
    assert tensors_of(spec, LayerRange(start, end), names=names_of(recorder.weights), **ends) == recorder.asked
    loaded.close()


def test_rotation_factors_are_needed_by_every_stage_of_a_model_that_has_them() -> None:
    names = ["rope_freqs.weight", "blk.2.attn_q.weight"]
    assert tensors_of(tiny_spec(), LayerRange(1, 2), embedding=False, head=False, names=names) == {"rope_freqs.weight"}


# The copy


def test_a_copy_takes_the_disk_of_what_is_here_and_gives_it_alone(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", about(source))
    known = [part.name for part in copy.about.manifest.parts]
    names = tensors_of(tiny_spec(tied=True), LayerRange(2, 3), embedding=False, head=False, names=known)
    wanted = sorted(copy.about.manifest.indices({HEADER, *names}))
    bring(copy, source, wanted)
    again = PartialCopy.load(tmp_path / "copy")
    assert again is not None
    assert sorted(again.have) == wanted
    assert not again.whole
    assert again.path.stat().st_size == source.stat().st_size
    assert again.path.stat().st_blocks * 512 < again.bytes_here + 16 * 4096
    assert again.bytes_here < source.stat().st_size / 4
    with again.open() as mapped, GgufFile.open(source) as file:
        assert mapped.metadata == file.metadata
        for name in names:
            assert bytes(mapped.tensor(name).data) == bytes(file.tensor(name).data)
        assert "blk.1.attn_q.weight" in mapped
        with pytest.raises(ModelFileError, match="not on this disk"):
            mapped.tensor("blk.1.attn_q.weight")
        with pytest.raises(ModelFileError, match="no tensor"):
            mapped.tensor("blk.1.attn_z.weight")


def test_what_lies_in_parts_that_are_here_is_known_to_the_byte(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", about(source))
    bring(copy, source, [0, 3, 4])
    parts = copy.about.manifest.parts
    assert copy.covers(parts[3].offset, parts[4].end)
    assert copy.covers(0, parts[0].end)
    assert not copy.covers(parts[3].offset - 1, parts[4].end)
    assert not copy.covers(parts[3].offset, parts[4].end + 1)
    assert not copy.covers(0, parts[1].offset + 1)
    assert not copy.covers(copy.about.manifest.size, copy.about.manifest.size + 1)


def test_only_what_was_flushed_is_believed_after_a_crash(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", about(source))
    bring(copy, source, [0, 1, 2])
    bring(copy, source, [3, 4], flush=False)
    again = PartialCopy.load(tmp_path / "copy")
    assert again is not None
    assert again.have == {0, 1, 2}


def test_a_line_that_was_torn_or_is_not_ours_counts_for_nothing(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", about(source))
    bring(copy, source, [0, 1, 12])
    have = tmp_path / "copy" / "have"
    lines = have.read_bytes()
    for torn in (lines[:-1], lines[:-5], lines + b"3", lines + b"\0" * 64, lines + b"3 0000000000000000\n", lines + b"999 00\n"):
        have.write_bytes(torn)
        again = PartialCopy.load(tmp_path / "copy")
        assert again is not None
        assert {0, 1} <= again.have <= {0, 1, 12}
    bring(again, source, [5])
    mended = PartialCopy.load(tmp_path / "copy")
    assert mended is not None
    assert mended.have == {0, 1, 12, 5}


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x81"])
def test_a_torn_sidecar_is_no_copy_and_the_next_begins_anew(source: Path, tmp_path: Path, content: bytes) -> None:
    copy = PartialCopy.create(tmp_path / "copy", about(source))
    bring(copy, source, [0, 1])
    (tmp_path / "copy" / "about").write_bytes(content)
    assert PartialCopy.load(tmp_path / "copy") is None
    anew = PartialCopy.create(tmp_path / "copy", about(source))
    assert anew.have == set()
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["about", "file.gguf", "have"]


def test_lines_about_a_file_that_has_gone_are_not_believed(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", about(source))
    bring(copy, source, [0, 1])
    copy.path.unlink()
    assert PartialCopy.load(tmp_path / "copy") is None


def test_a_copied_folder_is_hashed_before_it_is_believed(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", about(source))
    bring(copy, source, [0, 1, 2, 3])
    shutil.copytree(tmp_path / "copy", tmp_path / "other")
    with (tmp_path / "other" / "file.gguf").open("r+b") as file:
        file.seek(copy.about.manifest.parts[2].offset)
        file.write(b"\xaa")
    other = PartialCopy.load(tmp_path / "other")
    assert other is not None
    assert other.in_doubt
    assert other.have == set()
    other.begin(QUIET)
    other.close()
    assert other.have == {0, 1, 3}
    again = PartialCopy.load(tmp_path / "other")
    assert again is not None
    assert not again.in_doubt
    assert again.have == {0, 1, 3}


def test_a_copy_tells_when_there_is_more(source: Path, tmp_path: Path) -> None:
    bring(PartialCopy.create(tmp_path / "copy", about(source)), source, [0])
    reader = PartialCopy.load(tmp_path / "copy")
    writer = PartialCopy.load(tmp_path / "copy")
    assert reader is not None
    assert writer is not None
    assert reader.is_fresh()
    bring(writer, source, [1])
    assert not reader.is_fresh()


def test_a_header_that_is_not_the_lists_gets_no_room(source: Path, tmp_path: Path) -> None:
    true = about(source)
    first, second, third, *rest = true.manifest.parts
    lying = (first, msgspec.structs.replace(second, length=second.length + third.length), *rest)
    copy = PartialCopy.create(tmp_path / "copy", msgspec.structs.replace(true, manifest=Manifest(lying)))
    with pytest.raises(ModelFileError, match="not that of the model's header"):
        bring(copy, source, [0])
    copy.close()
    assert copy.path.stat().st_size == first.length


def test_a_full_disk_is_one_clear_error(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = PartialCopy.create(tmp_path / "copy", about(source))
    bring(copy, source, [0, 1])

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        bring(copy, source, [2])
    monkeypatch.undo()
    copy.close()
    again = PartialCopy.load(tmp_path / "copy")
    assert again is not None
    assert again.have == {0, 1}


# All copies of a device


def test_copies_are_listed_apart_and_removed_by_name(source: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    told = about(source)
    bring(store.partials.begin(told), source, [0, 1, 2])
    assert store.list() == []
    assert [copy.about.name for copy in store.partials.list()] == ["tiny"]
    found = store.partials.get(told.id)
    assert found is not None
    assert store.remove("tiny") == found.bytes_here
    assert store.partials.list() == []
    assert store.partials.get(told.id) is None
    with pytest.raises(UnknownModel):
        store.remove("tiny")


async def test_a_copy_is_filled_by_one_at_a_time_and_not_removed_meanwhile(source: Path, tmp_path: Path, hasty_clock: Any) -> None:
    told = about(source)
    mine, other = Partials(tmp_path / "parts", SystemClock()), Partials(tmp_path / "parts", hasty_clock)
    entered = False

    async def wait() -> None:
        nonlocal entered
        async with other.filling(told.id):
            entered = True

    async with mine.filling(told.id):
        bring(mine.begin(told), source, [0])
        waiting = asyncio.create_task(wait())
        while len(hasty_clock.pauses) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not entered
        assert other.remove("tiny") == 0
    await waiting
    assert entered
    assert other.remove("tiny") > 0


@pytest.mark.parametrize("name", ["../../etc", "", "A" * 32, "tiny"])
async def test_what_is_no_models_id_names_no_folder(tmp_path: Path, name: str) -> None:
    partials = Partials(tmp_path / "parts", SystemClock())
    assert partials.get(ModelId(name)) is None
    with pytest.raises(UnknownModel):
        async with partials.filling(ModelId(name)):
            pass
    assert not (tmp_path / "parts").exists()


def test_a_disk_without_room_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partials = Partials(tmp_path / "parts", SystemClock())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(StorageError, match="too little room"):
        partials.begin(about(source))
    assert partials.list() == []


def test_a_copy_with_everything_becomes_an_ordinary_model(source: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    told = about(source)
    copy = store.partials.begin(told)
    bring(copy, source, list(range(len(told.manifest.parts))))
    mapped = copy.open()
    assert copy.whole
    model = store.adopt(copy, QUIET)
    assert store.list() == [model]
    assert store.get("tiny") == store.get(told.id) == model
    assert (model.id, model.ref, model.created, model.in_place) == (told.id, told.ref, told.created, False)
    assert model.path.read_bytes() == source.read_bytes()
    assert store.partials.list() == []
    assert mapped.tensor("blk.0.attn_q.weight").kind == "F32"
    mapped.close()
    store.open(model).close()
    assert store.remove("tiny") >= model.size_bytes
    assert list((tmp_path / "models").glob("*.gguf")) == list((tmp_path / "models").glob("*.sums")) == []


def test_everything_of_another_file_is_thrown_away(source: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    told = msgspec.structs.replace(about(source), id=ModelId("ab" * 16))
    copy = store.partials.begin(told)
    bring(copy, source, list(range(len(told.manifest.parts))))
    with pytest.raises(ModelFileError, match="another file"):
        store.adopt(copy, QUIET)
    assert store.list() == store.partials.list() == []
    assert not list((tmp_path / "models").rglob("*.gguf"))


def test_sums_are_made_once_and_anew_when_the_file_or_the_list_is_another(source: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "models")
    model = asyncio.run(store.pull(f"file:{source}"))
    hashed: list[int] = []
    first = store.manifest(model, hashed.append)
    assert first == manifest_of(source)
    assert sum(hashed) == model.size_bytes
    hashed.clear()
    assert Store(tmp_path / "models").manifest(model, hashed.append) == first
    assert hashed == []
    [written] = (tmp_path / "models").glob("*.sums")
    written.write_bytes(written.read_bytes()[:-7])
    assert store.manifest(model, hashed.append) == first
    assert sum(hashed) == model.size_bytes
    os.utime(source)
    source.write_bytes(source.read_bytes()[:-1] + b"\1")
    with pytest.raises(ModelFileError, match="was changed"):
        store.manifest(model, QUIET)
