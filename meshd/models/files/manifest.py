"""The parts of a model's file: its header and its tensors, each with its offset and SHA-256.

A part ends where the next one begins: the padding after a tensor belongs to the tensor, and all parts together are the file. The
header is the part without a name.

A manifest from another peer is checked before use: `decode_offer` checks its form, `check_layout` compares it with the file's
header.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from meshd.bounds import Count, at_most
from meshd.errors import ModelFileError, StorageError
from meshd.models.files.disk import CHUNK_BYTES, replace_durably, size_of, storage_error
from meshd.models.files.gguf_header import MAX_ALIGNMENT, MAX_HEADER_BYTES, MAX_TENSOR_NAME_BYTES, MAX_TENSORS, TensorInfo
from meshd.tensors import ROPE_FACTORS
from meshd.types import LayerRange, ModelSpec

HEADER = ""
"""The name of the first part."""
MAX_FILE_BYTES = 1 << 44
"""16 TiB: the largest file that common file systems support."""
MAX_OFFER_BYTES = 8 << 20


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A tensor with its padding, or the header."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_TENSOR_NAME_BYTES)]
    offset: Annotated[int, msgspec.Meta(ge=0, lt=MAX_FILE_BYTES)]
    length: Annotated[int, msgspec.Meta(ge=1, lt=MAX_FILE_BYTES)]
    sha256: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]

    @property
    def end(self) -> int:
        return self.offset + self.length


class Manifest(msgspec.Struct, frozen=True, array_like=True):
    """All parts of a file, in order, without gaps."""

    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=2, max_length=MAX_TENSORS + 1)]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.parts[-1].end

    @property
    def digest(self) -> str:
        """Hash of the manifest, for comparing the manifests of several peers."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()

    def indices(self, names: Iterable[str]) -> frozenset[int]:
        """Return the indices of the parts with these names. Raises: ModelFileError for an unknown name."""
        known = {part.name: index for index, part in enumerate(self.parts)}
        try:
            return frozenset(known[name] for name in names)
        except KeyError as error:
            raise ModelFileError(f"the model has no tensor {error.args[0]!r}") from None


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """The parts that a peer offers to send."""

    manifest: Manifest
    have: Annotated[tuple[Count, ...], at_most(MAX_TENSORS + 1)] | None = None
    """Indices of the parts that the peer has; None: all."""


def layout_of(tensors: Mapping[str, TensorInfo], size: int) -> list[tuple[str, int, int]]:
    """Lay out the parts of a file of `size` bytes.

    Returns: (name, offset, length) of each. Raises: ModelFileError for gaps or overlaps that alignment does not explain.
    """
    rows = sorted((info.offset, info.nbytes, name) for name, info in tensors.items())
    if not rows:
        raise ModelFileError("a file without tensors can't be shared")
    parts = [(HEADER, 0, rows[0][0])]
    ends = [*(offset for offset, _, _ in rows[1:]), size]
    for (offset, nbytes, name), end in zip(rows, ends, strict=True):
        if not 0 <= end - offset - nbytes <= MAX_ALIGNMENT:
            raise ModelFileError(f"tensor {name!r} is followed by {end - offset - nbytes} bytes that belong to nothing")
        parts.append((name, offset, end - offset))
    return parts


def hash_parts(path: Path, layout: Iterable[tuple[str, int, int]], advance: Callable[[int], None]) -> Manifest:
    """Hash every part of a file into a manifest; call `advance` with the size of each chunk. Raises: StorageError."""
    try:
        with path.open("rb") as file:
            return Manifest(
                tuple(
                    Part(name, offset, length, sha256_within(file.read, file.seek, offset, length, advance))
                    for name, offset, length in layout
                )
            )
    except OSError as error:
        raise StorageError(f"{path} can't be read: {error.strerror or error}") from error


def sha256_within(
    read: Callable[[int], bytes], seek: Callable[[int], int], offset: int, length: int, advance: Callable[[int], None]
) -> bytes:
    """Hash a range of an open file; call `advance` with the size of each chunk. If the file ends early, the range ends there."""
    digest = hashlib.sha256()
    seek(offset)
    while length and (chunk := read(min(length, CHUNK_BYTES))):
        digest.update(chunk)
        advance(len(chunk))
        length -= len(chunk)
    return digest.digest()


def read_manifest(path: Path) -> Manifest | None:
    """Read a saved manifest. Returns: None if it is missing or damaged, since it can be computed again."""
    try:
        if size_of(path) > MAX_OFFER_BYTES:
            return None
        known = msgspec.msgpack.decode(path.read_bytes(), type=Manifest)
        check(known)
    except (OSError, msgspec.DecodeError, ModelFileError):
        return None
    return known


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Save a manifest. After a crash, the file is either the old one or the complete new one. Raises: StorageError."""
    written = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(msgspec.msgpack.encode(manifest))
        replace_durably(written, path)
    except OSError as error:
        raise storage_error(path, error) from error


def encode_offer(offer: Offer) -> bytes:
    """Encode an offer for the wire."""
    return msgspec.msgpack.encode(offer)


def decode_offer(data: bytes | memoryview) -> Offer:
    """Decode and check another peer's offer. Raises: ModelFileError."""
    if len(data) > MAX_OFFER_BYTES:
        raise ModelFileError(f"a list of tensors of {len(data)} bytes is longer than {MAX_OFFER_BYTES}")
    try:
        offer = msgspec.msgpack.decode(data, type=Offer)
    except msgspec.DecodeError as error:
        raise ModelFileError(f"the list of tensors can't be read: {error}") from None
    check(offer.manifest)
    if offer.have is not None and not all(0 <= index < len(offer.manifest.parts) for index in offer.have):
        raise ModelFileError("the list of tensors offers parts that it does not name")
    return offer


def check(manifest: Manifest) -> None:
    """Check that the parts follow one another without gap or overlap, the header first, each name once.

    Raises: ModelFileError.
    """
    end = 0
    for part in manifest.parts:
        if part.offset != end:
            raise ModelFileError(f"the list of tensors is wrong: {part.name!r} begins at byte {part.offset}, not {end}")
        end = part.end
    if end > MAX_FILE_BYTES:
        raise ModelFileError(f"the list of tensors is of a file of {end} bytes; {MAX_FILE_BYTES} are allowed")
    if manifest.parts[0].name != HEADER or manifest.parts[0].length > MAX_HEADER_BYTES:
        raise ModelFileError("the list of tensors does not begin with a header of an allowed size")
    if len({part.name for part in manifest.parts}) != len(manifest.parts):
        raise ModelFileError("the list of tensors names one twice")


def check_layout(manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that the manifest matches the file's own header. Raises: ModelFileError."""
    listed = [(part.name, part.offset, part.length) for part in manifest.parts]
    if layout_of(tensors, manifest.size) != listed:
        raise ModelFileError("the list of tensors does not match the model's header")


def tensors_of(spec: ModelSpec, layers: LayerRange, *, embedding: bool, head: bool, names: Iterable[str]) -> frozenset[str]:
    """Select the tensors that a backend reads for these layers, and for the embedding and the head if wanted.

    `names` are the names of all tensors of the file.
    """
    selected = set(ROPE_FACTORS)
    if embedding:
        selected.add("token_embd.weight")
    if head:
        selected |= {"output_norm.weight", "token_embd.weight" if spec.tied_head else "output.weight"}
    return frozenset(name for name in names if name in selected or layer_of(name) in layers)


def layer_of(name: str) -> int | None:
    """Return the layer of a tensor, such as 7 for `blk.7.attn_q.weight`. Returns: None for a tensor outside the layers."""
    block, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if block == "blk" and number.isascii() and number.isdecimal() else None
