"""The log of a partial copy: appended, cut off by a crash, or of another file."""

from pathlib import Path

import pytest

from meshd.models.files.manifest import Manifest
from meshd.models.store.parts_log import decode_log, encode_lines, encode_log
from tiny.copies import manifest_of


@pytest.fixture
def manifest(source: Path) -> Manifest:
    return manifest_of(source)


def test_a_log_is_read_back_with_the_lines_appended_to_it(manifest: Manifest) -> None:
    content = encode_log(77, manifest, {4, 0, 2}) + encode_lines(manifest, [1, 9])
    assert decode_log(manifest, content) == (b"77", {0, 1, 2, 4, 9}, True)
    assert decode_log(manifest, encode_log(77, manifest, ())) == (b"77", set(), True)


def test_a_log_cut_at_any_byte_lists_only_whole_lines(manifest: Manifest) -> None:
    content = encode_log(7, manifest, [3, 5])
    for cut in range(len(content)):
        found = decode_log(manifest, content[:cut])
        assert found.complete == content[:cut].endswith(b"\n")
        whole_lines = content[: cut + 1].count(b"\n") - 1  # a line that lacks only its newline counts
        assert found.indices == {3, 5} if whole_lines == 2 else found.indices <= {3}


@pytest.mark.parametrize(
    "line", [b"", b"3", b"-1 00", b"3 0000000000000000", b"12345678 00", b"x y", "\u00b2 00".encode(), b"999 00"]
)
def test_lines_that_are_not_of_this_manifest_are_ignored(manifest: Manifest, line: bytes) -> None:
    content = b"7\n" + line + b"\n" + encode_lines(manifest, [1])
    assert decode_log(manifest, content).indices == {1}


def test_a_line_with_the_hash_of_another_part_is_ignored(manifest: Manifest) -> None:
    number, _, rest = encode_lines(manifest, [1]).partition(b" ")
    assert number == b"1"
    assert decode_log(manifest, b"7\n2 " + rest).indices == set()


def test_an_empty_log_has_neither_an_inode_nor_parts(manifest: Manifest) -> None:
    assert decode_log(manifest, b"") == (b"", set(), False)
