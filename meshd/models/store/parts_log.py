"""The log of a partial copy: which parts are on the disk with the right hash.

The first line is the inode of the data file. Each further line is a part's index in the manifest and the first bytes of its hash.
"""

from collections.abc import Iterable
from typing import NamedTuple

from meshd.models.files.manifest import Manifest


class PartsLog(NamedTuple):
    """A parsed log."""

    inode: bytes
    """Inode of the data file that the lines describe."""
    indices: frozenset[int]
    complete: bool
    """False: the last line was cut off, so a line that is appended would be joined to it."""


def encode_log(inode: int, manifest: Manifest, indices: Iterable[int]) -> bytes:
    """Encode a whole log."""
    return f"{inode}\n".encode() + encode_lines(manifest, sorted(indices))


def encode_lines(manifest: Manifest, indices: Iterable[int]) -> bytes:
    """Encode lines to append to a log."""
    return b"".join(_line(manifest, index) for index in indices)


def decode_log(manifest: Manifest, content: bytes) -> PartsLog:
    """Read a log. Lines that are torn, or do not match the manifest, are ignored."""
    inode, *lines = content.split(b"\n")
    indices = frozenset(index for line in lines if (index := _index(manifest, line)) is not None)
    return PartsLog(inode, indices, content.endswith(b"\n"))


def _index(manifest: Manifest, line: bytes) -> int | None:
    number = line.partition(b" ")[0]
    index = int(number) if len(number) < 8 and number.isdigit() else -1
    known = 0 <= index < len(manifest.parts)
    return index if known and _line(manifest, index) == line + b"\n" else None


def _line(manifest: Manifest, index: int) -> bytes:
    return f"{index} {manifest.parts[index].sha256[:8].hex()}\n".encode()
