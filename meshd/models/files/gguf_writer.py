"""Writes GGUF files (v3) from front to back, one tensor at a time.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The same content gives the same bytes, and so the same model id.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import KINDS, MetadataValue, parse_header

Chunk = bytes | memoryview | npt.NDArray[np.generic]

_ALIGNMENT = 32
_KIND_NUMBERS = {name: number for number, (name, _, _) in KINDS.items()}
_BLOCKS = {name: (weights, size) for name, weights, size in KINDS.values()}
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 4, 5, 6, 7, 8, 9, 10, 11
_FORMATS = {_U32: "I", _I32: "i", _F32: "f", _BOOL: "?", _U64: "Q", _I64: "q"}
_RANGES = ((_U32, 0, 1 << 32), (_I32, -(1 << 31), 1 << 31), (_U64, 0, 1 << 64), (_I64, -(1 << 63), 1 << 63))
_ARRAY_RANGES = (_RANGES[1], _RANGES[0], _RANGES[3], _RANGES[2])
"""Integer types of a list, in the order in which they are tried; `_RANGES` has those of a single integer. As in llama.cpp, a single
integer becomes U32 and a list becomes I32 if the values fit."""


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor to write."""

    name: str
    kind: str
    """GGUF's type name."""
    shape: tuple[int, ...]
    """Row-major, outermost first."""
    chunks: Callable[[], Iterable[Chunk]]
    """Yields the tensor's bytes, in order. Called once, after the previous tensors are written."""

    @property
    def nbytes(self) -> int:
        weights, size = _BLOCKS[self.kind]
        return math.prod(self.shape) // weights * size


class GgufWriter:
    """Writes one file. The header is checked and the file's size is known before any weight is read."""

    def __init__(self, metadata: Mapping[str, MetadataValue], tensors: Sequence[OutTensor], name: str) -> None:
        """Build the header and parse it, so that no unusable file is written. Raises: ModelFileError."""
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1:
            raise ModelFileError(f"{name} can't be written: its alignment is {alignment!r}")
        self._alignment = alignment
        self._tensors = tensors
        self._name = name
        self.header = self._described(metadata)
        self.size = len(self.header) + sum(self._padded(tensor.nbytes) for tensor in tensors)
        """Size of the whole file in bytes."""
        parse_header(memoryview(self.header), name=name, file_bytes=self.size)

    def write(self, file: BinaryIO, advance: Callable[[int], None]) -> str:
        """Write the file; call `advance` with the size of each chunk. Takes memory for the header and one chunk.

        Returns: the file's SHA-256.
        Raises: ModelFileError if the chunks of a tensor do not add up to its size, OSError.
        """
        digest = hashlib.sha256()

        def put(chunk: Chunk) -> int:
            raw = chunk.view(np.uint8).data if isinstance(chunk, np.ndarray) else memoryview(chunk)
            file.write(raw)
            digest.update(raw)
            advance(raw.nbytes)
            return raw.nbytes

        put(self.header)
        for tensor in self._tensors:
            written = sum(map(put, tensor.chunks()))
            if written != tensor.nbytes:
                raise ModelFileError(f"tensor {tensor.name!r} of {self._name} has {written} bytes, not {tensor.nbytes}")
            put(bytes(-written % self._alignment))
        return digest.hexdigest()

    def _described(self, metadata: Mapping[str, MetadataValue]) -> bytes:
        parts = [b"GGUF", struct.pack("<IQQ", 3, len(self._tensors), len(metadata))]
        parts += [_text(key) + _typed(key, value) for key, value in metadata.items()]
        offset = 0
        for tensor in self._tensors:
            dimensions = tuple(reversed(tensor.shape))
            row = struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, _KIND_NUMBERS[tensor.kind], offset)
            parts.append(_text(tensor.name) + row)
            offset += self._padded(tensor.nbytes)
        header = b"".join(parts)
        return header + bytes(-len(header) % self._alignment)

    def _padded(self, size: int) -> int:
        return -(-size // self._alignment) * self._alignment


def _text(value: str) -> bytes:
    try:
        raw = value.encode()
    except UnicodeEncodeError as error:
        raise ModelFileError(f"{value[:80]!r} can't be written: {error.reason}") from error
    return struct.pack("<Q", len(raw)) + raw


def _typed(key: str, value: MetadataValue) -> bytes:
    kind = _kind_of(key, [value], _RANGES)
    return struct.pack("<I", kind) + _packed(key, kind, value)


def _packed(key: str, kind: int, value: MetadataValue) -> bytes:
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, tuple):
        return struct.pack("<" + _FORMATS[kind], value)
    items = _kind_of(key, value, _ARRAY_RANGES)
    head = struct.pack("<IQ", items, len(value))
    if items in _FORMATS:
        return head + struct.pack(f"<{len(value)}{_FORMATS[items]}", *value)
    return head + b"".join(_packed(key, items, item) for item in value)


def _kind_of(key: str, values: Sequence[MetadataValue], ranges: Sequence[tuple[int, int, int]]) -> int:
    """Choose one GGUF type for all values. Floats become F32, the only float type that llama.cpp reads. Raises: ModelFileError."""
    kinds = {type(value) for value in values}
    if kinds <= {str}:
        return _STRING  # also for an empty list, whose original type is unknown
    if kinds == {bool}:
        return _BOOL
    if kinds == {tuple}:
        return _ARRAY
    if kinds == {float} or kinds == {float, int}:
        return _F32
    if kinds == {int}:
        for kind, low, high in ranges:
            if all(low <= value < high for value in values):  # type: ignore[operator]
                return kind
    raise ModelFileError(f"metadata key {key!r} can't be written: {str(values)[:80]}")
