"""Parses the header of a GGUF file (v2 and v3): metadata and tensor descriptions. Does no I/O.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count, length and extent is checked before memory is
allocated for it. So a hostile file takes memory only in proportion to its own size, and causes a ModelFileError that names the key
or tensor.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn, TypeAlias

from meshd.errors import ModelFileError
from meshd.tensors import KINDS as COMPUTED

MetadataValue: TypeAlias = bool | int | float | str | tuple["MetadataValue", ...]

MAX_HEADER_BYTES = 64 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_ARRAY_VALUES = 1 << 21
"""Limit for the values in all arrays of a file together. A vocabulary of 262,144 tokens with merges has 1.3 million."""
MAX_NESTED = 1 << 12
"""Limit for the number of arrays in one array. Real files have no nested arrays, and reading each one takes a slow call."""
MAX_KEY_BYTES = (1 << 16) - 1
MAX_TENSOR_NAME_BYTES = 128
MAX_ARRAY_DEPTH = 2
MAX_ALIGNMENT = 1 << 16
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9

KINDS: Mapping[int, tuple[str, int, int]] = MappingProxyType(
    {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        9: ("Q8_1", 32, 40),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1),
        25: ("I16", 1, 2),
        26: ("I32", 1, 4),
        27: ("I64", 1, 8),
        28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
    }
)
"""ggml's type number -> (name, weights in a block, bytes of a block)."""
_NAMED_KINDS: Mapping[int, str] = MappingProxyType(
    {
        4: "Q4_2",
        5: "Q4_3",
        31: "Q4_0_4_4",
        32: "Q4_0_4_8",
        33: "Q4_0_8_8",
        36: "IQ4_NL_4_4",
        37: "IQ4_NL_4_8",
        38: "IQ4_NL_8_8",
        40: "NVFP4",
        41: "Q1_0",
        42: "Q2_0",
    }
)
"""Names, for errors, of ggml's other types: those that it removed, and those whose blocks are not described here."""
OTHER_KIND = f"take the model in another quantisation, such as Q4_K_M or Q8_0; meshd computes {', '.join(COMPUTED)}"
"""What to do about a model in a kind that meshd does not compute."""


class HeaderIncomplete(Exception):
    """The header is longer than the first bytes of the file that were given."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's kind, shape and place in the file."""

    kind: str
    """GGUF's type name, e.g. `Q4_1`."""
    shape: tuple[int, ...]
    """Row-major, outermost first."""
    offset: int
    """From the beginning of the file, in bytes."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything in a GGUF file except the weights."""

    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]
    data_start: int
    """Offset of the first byte that may belong to a tensor."""


def parse_header(data: memoryview, *, name: str, file_bytes: int | None) -> Header:
    """Parse the header at the start of `data`.

    `name` is for error messages. `file_bytes` is the size of the file, which tensors must not exceed; None if it is unknown.
    Raises: ModelFileError; HeaderIncomplete if `data` is only a part of the file, and ends before the header does.
    """
    reader = _Reader(data[:MAX_HEADER_BYTES], name, len(data) if file_bytes is None else file_bytes)
    tensor_count, key_count = reader.preamble()
    metadata = reader.metadata(key_count)
    alignment = _alignment(metadata, reader)
    rows = [reader.tensor() for _ in range(tensor_count)]
    data_start = _align(reader.position, alignment) if rows else reader.position
    tensors = _placed(rows, data_start, alignment, file_bytes, name)
    return Header(MappingProxyType(metadata), MappingProxyType(tensors), data_start)


def broken(name: str, what: str, why: str) -> ModelFileError:
    """Make the error for a GGUF file that can't be used. `what` names the part of the file."""
    return ModelFileError(f"{name} can't be used: {what}: {why}", hint="the file is damaged or not GGUF v2/v3: fetch it again")


def uncomputed(name: str, tensor: str, kind: str) -> ModelFileError:
    """Make the error for a tensor of a kind that meshd does not compute."""
    return ModelFileError(f"{name} can't be run: tensor {tensor!r} is of kind {kind}, and meshd can't compute it", hint=OTHER_KIND)


@dataclass(frozen=True, slots=True)
class _Row:
    """A tensor's description as written in the file."""

    name: str
    kind: int
    dimensions: tuple[int, ...]
    """Innermost first."""
    offset: int


class _Reader:
    """Reads values from a view, never past its end. Its errors name the key or tensor that is being read."""

    def __init__(self, data: memoryview, name: str, file_bytes: int) -> None:
        self._data = data
        self._limit = min(file_bytes, MAX_HEADER_BYTES)
        """Number of bytes that the header can have. `data` has fewer if it is only a part of the file."""
        self._name = name
        self._what = "its first bytes"
        self._values_left = MAX_ARRAY_VALUES
        self.position = 0

    def fail(self, why: str) -> NoReturn:
        raise broken(self._name, self._what, why)

    def fail_past_end(self, end: int, why: str) -> NoReturn:
        """Fail because the data ends before byte `end`. `why` is the reason if there is no more data."""
        if len(self._data) < end <= self._limit:
            raise HeaderIncomplete
        self.fail(why)

    def preamble(self) -> tuple[int, int]:
        """Read magic, version and counts. Returns: (tensor count, key count)."""
        magic = bytes(self._take(4))
        if magic != _MAGIC:
            self.fail(f"they are {magic!r}, not {_MAGIC!r}")
        version = self._number("I")
        if version not in _VERSIONS:
            self.fail("it is big-endian" if version >> 16 else f"version {version} is not among {_VERSIONS}")
        tensor_count, key_count = self._number("Q"), self._number("Q")
        self._bound(tensor_count, MAX_TENSORS, "tensors", each=8 + 4 + 8 + 4 + 8)
        self._bound(key_count, MAX_KEYS, "keys", each=8 + 4 + 1)
        return tensor_count, key_count

    def metadata(self, count: int) -> dict[str, MetadataValue]:
        found: dict[str, MetadataValue] = {}
        for index in range(count):
            self._what = f"metadata key {index}"
            key = self._string(MAX_KEY_BYTES)
            self._what = f"metadata key {key[:200]!r}"
            if key in found:
                self.fail("it appears twice")
            found[key] = self._value(self._number("I"), MAX_ARRAY_DEPTH)
        return found

    def tensor(self) -> _Row:
        self._what = "the tensor table"
        name = self._string(MAX_TENSOR_NAME_BYTES)
        self._what = f"tensor {name!r}"
        rank = self._number("I")
        if not 1 <= rank <= 4:
            self.fail(f"it has {rank} dimensions, not 1 to 4")
        dimensions = tuple(self._number("Q") for _ in range(rank))
        return _Row(name, self._number("I"), dimensions, self._number("Q"))

    def _value(self, kind: int, depth: int) -> MetadataValue:
        if kind == _STRING:
            return self._string(MAX_HEADER_BYTES)
        if kind == _ARRAY:
            return self._array(depth)
        value: bool | int | float = struct.unpack_from("<" + self._scalar(kind), self._take(self._size(kind)))[0]
        return value

    def _array(self, depth: int) -> tuple[MetadataValue, ...]:
        if depth == 0:
            self.fail(f"arrays are nested more than {MAX_ARRAY_DEPTH} deep")
        kind, count = self._number("I"), self._number("Q")
        self._bound(count, MAX_NESTED if kind == _ARRAY else self._values_left, "array values", each=self._size(kind))
        self._values_left -= count
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            return tuple(self._array(depth - 1) for _ in range(count))
        return struct.unpack_from(f"<{count}{self._scalar(kind)}", self._take(count * self._size(kind)))

    def _strings(self, count: int) -> tuple[str, ...]:
        """Read an array of strings. Vocabularies are read here, so the loop calls no methods, for speed."""
        data, position, limit = self._data, self.position, len(self._data)
        start = position
        length_at = struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + length_at(data, position)[0]
                if position > limit:
                    self.fail_past_end(position, "a string runs past the end")
                found.append(str(data[start:position], "utf-8"))
        except struct.error:
            self.fail_past_end(start + 8, "it runs past the end")
        except UnicodeDecodeError as error:
            self.fail(f"a string is not UTF-8 ({error.reason})")
        self.position = position
        return tuple(found)

    def _string(self, limit: int) -> str:
        length = self._number("Q")
        if length > limit:
            self.fail(f"a string of {length} bytes is longer than {limit}")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError as error:
            self.fail(f"a string is not UTF-8 ({error.reason})")

    def _number(self, code: str) -> int:
        value: int = struct.unpack_from("<" + code, self._take(struct.calcsize("<" + code)))[0]
        return value

    def _take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self._data):
            self.fail_past_end(end, f"it runs past the end (of the file, or of the {MAX_HEADER_BYTES} bytes a header may have)")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _bound(self, count: int, most: int, what: str, *, each: int) -> None:
        """Check that `count` is at most `most`, and that `count` items of at least `each` bytes fit into the rest of the data."""
        if count > most:
            self.fail(f"{count} {what} are more than the {most} allowed")
        if count * each > len(self._data) - self.position:
            self.fail_past_end(self.position + count * each, f"{count} {what} run past the end")

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            self.fail(f"value type {kind} is unknown")
        return _SCALARS[kind]

    def _size(self, kind: int) -> int:
        """Return the smallest number of bytes that a value of this type takes."""
        if kind in (_STRING, _ARRAY):
            return 8
        return struct.calcsize("<" + self._scalar(kind))


def _alignment(metadata: Mapping[str, MetadataValue], reader: _Reader) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        reader.fail(f"general.alignment {value!r} is not a power of two up to {MAX_ALIGNMENT}")
    return value


def _align(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment


def _placed(rows: list[_Row], data_start: int, alignment: int, file_bytes: int | None, name: str) -> dict[str, TensorInfo]:
    """Describe every tensor, in the file's order. Raises: ModelFileError for a tensor that overlaps another or exceeds the file."""
    tensors: dict[str, TensorInfo] = {}
    for row in rows:
        if row.name in tensors:
            raise broken(name, f"tensor {row.name!r}", "it appears twice")
        if row.offset % alignment:
            raise broken(name, f"tensor {row.name!r}", f"its offset {row.offset} is not a multiple of {alignment}")
        tensors[row.name] = info = _described(row, data_start, name)
        if file_bytes is not None and info.offset + info.nbytes > file_bytes:
            raise broken(name, f"tensor {row.name!r}", f"it ends at byte {info.offset + info.nbytes} of a file of {file_bytes}")
    _check_overlaps(tensors, name)
    return tensors


def _described(row: _Row, data_start: int, name: str) -> TensorInfo:
    what = f"tensor {row.name!r}"
    if row.kind not in KINDS:
        raise uncomputed(name, row.name, _NAMED_KINDS.get(row.kind, f"number {row.kind}, which is newer than this version"))
    kind, block, block_bytes = KINDS[row.kind]
    if 0 in row.dimensions:
        raise broken(name, what, "it has no elements")
    if row.dimensions[0] % block:
        raise broken(name, what, f"its rows of {row.dimensions[0]} are not whole blocks of {block} ({kind})")
    nbytes = math.prod(row.dimensions) // block * block_bytes
    return TensorInfo(kind, tuple(reversed(row.dimensions)), data_start + row.offset, nbytes)


def _check_overlaps(tensors: Mapping[str, TensorInfo], name: str) -> None:
    end, before = 0, ""
    for tensor, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise broken(name, f"tensor {tensor!r}", f"it overlaps tensor {before!r}")
        end, before = info.offset + info.nbytes, tensor
