"""Partial copies: their content on disk, what survives a crash, and the checks before they are used."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshd.errors import ModelFileError, StorageError
from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import HEADER, Manifest, tensors_of
from meshd.models.store.partial_copy import PartialCopy
from meshd.types import LayerRange
from tiny.copies import QUIET, copy_info, fill
from tiny.llama import tiny_spec


def test_a_copy_takes_the_disk_space_of_its_parts_and_maps_only_them(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", copy_info(source))
    known = [part.name for part in copy.about.manifest.parts]
    names = tensors_of(tiny_spec(tied=True), LayerRange(2, 3), embedding=False, head=False, names=known)
    wanted = sorted(copy.about.manifest.indices({HEADER, *names}))
    fill(copy, source, wanted)
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


def test_a_range_is_covered_only_if_all_its_parts_are_here(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", copy_info(source))
    fill(copy, source, [0, 3, 4])
    parts = copy.about.manifest.parts
    assert copy.covers(parts[3].offset, parts[4].end)
    assert copy.covers(0, parts[0].end)
    assert not copy.covers(parts[3].offset - 1, parts[4].end)
    assert not copy.covers(parts[3].offset, parts[4].end + 1)
    assert not copy.covers(0, parts[1].offset + 1)
    assert not copy.covers(copy.about.manifest.size, copy.about.manifest.size + 1)


def test_only_flushed_parts_survive_a_crash(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", copy_info(source))
    fill(copy, source, [0, 1, 2])
    fill(copy, source, [3, 4], flush=False)
    again = PartialCopy.load(tmp_path / "copy")
    assert again is not None
    assert again.have == {0, 1, 2}


def test_torn_or_wrong_log_lines_are_ignored(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", copy_info(source))
    fill(copy, source, [0, 1, 12])
    have = tmp_path / "copy" / "have"
    lines = have.read_bytes()
    for torn in (lines[:-1], lines[:-5], lines + b"3", lines + b"\0" * 64, lines + b"3 0000000000000000\n", lines + b"999 00\n"):
        have.write_bytes(torn)
        again = PartialCopy.load(tmp_path / "copy")
        assert again is not None
        assert {0, 1} <= again.have <= {0, 1, 12}
    fill(again, source, [5])
    mended = PartialCopy.load(tmp_path / "copy")
    assert mended is not None
    assert mended.have == {0, 1, 12, 5}


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x81"])
def test_a_copy_with_a_damaged_about_file_is_ignored_and_replaced(source: Path, tmp_path: Path, content: bytes) -> None:
    copy = PartialCopy.create(tmp_path / "copy", copy_info(source))
    fill(copy, source, [0, 1])
    (tmp_path / "copy" / "about").write_bytes(content)
    assert PartialCopy.load(tmp_path / "copy") is None
    anew = PartialCopy.create(tmp_path / "copy", copy_info(source))
    assert anew.have == set()
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == ["about", "file.gguf", "have"]


def test_a_copy_without_its_data_file_is_ignored(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", copy_info(source))
    fill(copy, source, [0, 1])
    copy.path.unlink()
    assert PartialCopy.load(tmp_path / "copy") is None


def test_a_copied_folder_is_hashed_before_it_is_used(source: Path, tmp_path: Path) -> None:
    copy = PartialCopy.create(tmp_path / "copy", copy_info(source))
    fill(copy, source, [0, 1, 2, 3])
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


def test_a_loaded_copy_is_no_longer_fresh_when_parts_are_added(source: Path, tmp_path: Path) -> None:
    fill(PartialCopy.create(tmp_path / "copy", copy_info(source)), source, [0])
    reader = PartialCopy.load(tmp_path / "copy")
    writer = PartialCopy.load(tmp_path / "copy")
    assert reader is not None
    assert writer is not None
    assert reader.is_fresh()
    fill(writer, source, [1])
    assert not reader.is_fresh()


def test_a_header_that_does_not_match_the_manifest_is_refused(source: Path, tmp_path: Path) -> None:
    right = copy_info(source)
    first, second, third, *rest = right.manifest.parts
    wrong = (first, msgspec.structs.replace(second, length=second.length + third.length), *rest)
    copy = PartialCopy.create(tmp_path / "copy", msgspec.structs.replace(right, manifest=Manifest(wrong)))
    with pytest.raises(ModelFileError, match="does not match the model's header"):
        fill(copy, source, [0])
    copy.close()
    assert copy.path.stat().st_size == first.length


def test_a_full_disk_is_an_error_and_keeps_the_earlier_parts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = PartialCopy.create(tmp_path / "copy", copy_info(source))
    fill(copy, source, [0, 1])

    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        fill(copy, source, [2])
    monkeypatch.undo()
    copy.close()
    again = PartialCopy.load(tmp_path / "copy")
    assert again is not None
    assert again.have == {0, 1}
