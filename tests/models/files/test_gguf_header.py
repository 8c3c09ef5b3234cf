"""Parsing GGUF headers. Hostile ones take little memory and cause an error that names the key or tensor."""

import struct
import tracemalloc
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import KINDS, Header, parse_header

HUGE = 1 << 62


def parse(content: bytes, *, whole: bool = True) -> Header:
    return parse_header(memoryview(content), name="x.gguf", file_bytes=len(content) if whole else None)


def text(content: str) -> bytes:
    raw = content.encode()
    return struct.pack("<Q", len(raw)) + raw


def row(name: str = "t", dimensions: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


def test_block_sizes_equal_those_of_ggml() -> None:
    for number, (name, block, block_bytes) in KINDS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (name, (block, block_bytes))


def test_every_value_type_is_read(make_gguf: Any) -> None:
    raw = b"".join(
        text(f"k{kind}") + struct.pack("<I", kind) + struct.pack("<" + code, number)
        for kind, code, number in [
            (0, "B", 255),
            (1, "b", -1),
            (2, "H", 65535),
            (3, "h", -2),
            (4, "I", 7),
            (5, "i", -3),
            (6, "f", 0.5),
            (7, "?", True),
            (10, "Q", 1 << 63),
            (11, "q", -4),
            (12, "d", 0.25),
        ]
    )
    nested = text("n") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 8, 2) + text("é") + text("")
    found = parse(make_gguf(key_count=12, raw_keys=raw + nested).build()).metadata
    assert list(found.values()) == [255, -1, 65535, -2, 7, -3, 0.5, True, 1 << 63, -4, 0.25, (("é", ""),)]


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_the_file_sets_its_alignment(make_gguf: Any, alignment: int) -> None:
    maker = make_gguf(metadata={"general.alignment": (4, alignment)}, tensors={"a": (3,), "b": (5,)}, alignment=alignment)
    header = parse(maker.build())
    assert header.data_start % alignment == 0
    assert header.tensors["b"].offset % alignment == 0


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"GGML"}, "GGML"),
    "old version": ({"version": 1}, "version 1"),
    "big-endian": ({"version": 3 << 24}, "big-endian"),
    "tensor count": ({"tensor_count": HUGE}, "tensors"),
    "tensor count below the limit": ({"tensor_count": 60_000}, "tensors run past"),
    "key count": ({"key_count": HUGE}, "keys"),
    "key length": ({"key_count": 1, "raw_keys": struct.pack("<Q", HUGE)}, "key 0"),
    "string length": ({"key_count": 1, "raw_keys": text("k") + struct.pack("<IQ", 8, HUGE)}, "'k'"),
    "array length": ({"key_count": 1, "raw_keys": text("k") + struct.pack("<IIQ", 9, 0, HUGE)}, "'k'"),
    "string array length": ({"key_count": 1, "raw_keys": text("k") + struct.pack("<IIQ", 9, 8, 1 << 21)}, "'k'"),
    "string in an array": ({"key_count": 1, "raw_keys": text("k") + struct.pack("<IIQQ", 9, 8, 1, HUGE)}, "'k'"),
    "many arrays in one": ({"key_count": 1, "raw_keys": text("k") + struct.pack("<IIQ", 9, 9, 5000) + bytes(60_000)}, "the 4096"),
    "arrays nested": ({"key_count": 1, "raw_keys": text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 3}, "'k'"),
    "value type": ({"key_count": 1, "raw_keys": text("k") + struct.pack("<I", 13) + bytes(8)}, "'k'"),
    "array value type": ({"key_count": 1, "raw_keys": text("k") + struct.pack("<IIQ", 9, 77, 1) + bytes(8)}, "'k'"),
    "no UTF-8": ({"key_count": 1, "raw_keys": text("k") + struct.pack("<IQ", 8, 1) + b"\xff"}, "'k'"),
    "key twice": ({"key_count": 2, "raw_keys": (text("k") + struct.pack("<II", 4, 1)) * 2}, "'k'"),
    "alignment zero": ({"metadata": {"general.alignment": (4, 0)}}, "alignment"),
    "alignment odd": ({"metadata": {"general.alignment": (4, 48)}}, "alignment"),
    "alignment a text": ({"metadata": {"general.alignment": (8, "32")}}, "alignment"),
    "alignment huge": ({"metadata": {"general.alignment": (10, 1 << 40)}}, "alignment"),
    "no dimensions": ({"tensor_count": 1, "raw_tensors": row(dimensions=()) + bytes(32)}, "'t'"),
    "five dimensions": ({"tensor_count": 1, "raw_tensors": row(dimensions=(1,) * 5)}, "'t'"),
    "empty dimension": ({"tensor_count": 1, "raw_tensors": row(dimensions=(8, 0))}, "'t'"),
    "dimensions overflow": ({"tensor_count": 1, "raw_tensors": row(dimensions=(1 << 32, 1 << 32))}, "'t'"),
    "unknown kind": ({"tensor_count": 1, "raw_tensors": row(kind=4)}, "'t'"),
    "half a block": ({"tensor_count": 1, "raw_tensors": row(dimensions=(33,), kind=3)}, "'t'"),
    "extent": ({"tensor_count": 1, "raw_tensors": row(dimensions=(1000,))}, "'t'"),
    "offset": ({"tensor_count": 1, "raw_tensors": row(offset=1 << 40)}, "'t'"),
    "offset unaligned": ({"tensor_count": 1, "raw_tensors": row(offset=4)}, "'t'"),
    "tensor twice": ({"tensor_count": 2, "raw_tensors": row() + row(offset=32)}, "'t'"),
    "overlap": ({"tensor_count": 2, "raw_tensors": row(dimensions=(16,)) + row("u", offset=32)}, "'u'"),
    "tensor name": ({"tensor_count": 1, "raw_tensors": row("t" * 129)}, "tensor table"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_wrong_field_is_named_and_takes_no_memory(make_gguf: Any, case: str) -> None:
    fields, named = HOSTILE[case]
    content = make_gguf(**fields).build() + bytes(0 if case == "extent" else 128)
    tracemalloc.start()
    with pytest.raises(ModelFileError, match=named) as caught:
        parse(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "x.gguf" in caught.value.message
    assert peak < 200_000


def test_array_values_are_bounded_over_all_arrays_together(make_gguf: Any) -> None:
    array = struct.pack("<IIQ", 9, 0, 3 << 19) + bytes(3 << 19)
    with pytest.raises(ModelFileError, match=r"'second'.*array values"):
        parse(make_gguf(key_count=2, raw_keys=text("first") + array + text("second") + array).build())


def test_every_truncation_is_detected(make_llama: Any) -> None:
    content = make_llama(layers=1).build()
    for length in range(len(content) - 1):
        with pytest.raises(ModelFileError, match=r"x\.gguf"):
            parse(content[:length])


def test_a_header_may_end_where_the_weights_begin(make_llama: Any) -> None:
    maker = make_llama()
    assert parse(maker.header(), whole=False).tensors == parse(maker.build()).tensors


@given(edits=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 255)), min_size=1, max_size=8), size=st.integers(0, 4000))
def test_a_damaged_file_is_read_or_refused(sample: bytes, edits: list[tuple[int, int]], size: int) -> None:
    content = bytearray(sample)
    for position, byte in edits:
        content[position % len(content)] = byte
    _read_or_refuse(bytes(content[: size or None]))


@given(st.binary(max_size=400), st.integers(0, 4), st.integers(0, 4))
def test_any_bytes_are_read_or_refused(content: bytes, tensors: int, keys: int) -> None:
    _read_or_refuse(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + content)


def _read_or_refuse(content: bytes) -> None:
    try:
        header = parse(content)
    except ModelFileError:
        return
    for info in header.tensors.values():
        assert header.data_start <= info.offset
        assert info.offset + info.nbytes <= len(content)
