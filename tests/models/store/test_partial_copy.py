"""Copies of some tensors of a model: what they are made of, what survives a crash, and what other peers may not make of them."""

import asyncio
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshd.errors import ModelFileError, StorageError
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import (
    HEADER,
    Manifest,
    tensors_of,
)
from meshd.models.store.partial_copy import PartialCopy
from meshd.models.store.store import Store
from meshd.types import LayerRange, ModelId
from tiny.copies import QUIET, about, bring, manifest_of
from tiny.llama import tiny_spec

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
    with pytest.raises(ModelFileError, match="does not match the model's header"):
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
