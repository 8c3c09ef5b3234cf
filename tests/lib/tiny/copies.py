"""Manifests and partial copies of a small model's file."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from meshd.models.files.gguf import GgufFile
from meshd.models.files.manifest import (
    Manifest,
    hash_parts,
    layout_of,
)
from meshd.models.store.partial_copy import CopyInfo, PartialCopy
from meshd.types import ModelId

QUIET: Callable[[int], None] = lambda count: None  # noqa: E731


def manifest_of(path: Path) -> Manifest:
    with GgufFile.open(path) as file:
        return hash_parts(path, layout_of(file.tensors, path.stat().st_size), QUIET)


def copy_info(path: Path) -> CopyInfo:
    identifier = ModelId(hashlib.sha256(path.read_bytes()).hexdigest()[:32])
    return CopyInfo(identifier, "tiny", "pypi:tiny==1", 1700, manifest_of(path))


def fill(copy: PartialCopy, source: Path, indices: list[int], *, flush: bool = True) -> None:
    """Fill a copy as a fetch does: write the parts `indices` in this order, and check and keep each."""
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
