"""Encoding and decoding of activations."""

import numpy as np
import pytest

from meshd.errors import ProtocolViolation
from meshd.kernels.wire import decode, encode, size_of

HIDDEN = np.random.default_rng(0).standard_normal((3, 8), dtype=np.float32)


def test_f32_is_exact_and_copies_nothing() -> None:
    payload = encode(HIDDEN, "f32")
    assert payload.nbytes == size_of("f32", *HIDDEN.shape) == 96
    assert payload.format == "B"
    assert np.shares_memory(np.frombuffer(payload, np.uint8), HIDDEN)
    back = decode(payload, "f32", 3, 8)
    assert back.tobytes() == HIDDEN.tobytes()
    assert np.shares_memory(back, HIDDEN)


def test_a_read_only_payload_decodes_to_a_read_only_array() -> None:
    assert not decode(HIDDEN.tobytes(), "f32", 3, 8).flags.writeable


def test_part_of_a_larger_array_is_sent_in_row_order() -> None:
    wide = np.arange(24, dtype=np.float32).reshape(3, 8)[:, 2:4]
    assert decode(encode(wide, "f32"), "f32", 3, 2).tolist() == wide.tolist()


@pytest.mark.parametrize(("size", "tokens", "hidden"), [(95, 3, 8), (100, 3, 8), (0, 0, 8), (96, -3, -8)])
def test_torn_payloads_are_refused(size: int, tokens: int, hidden: int) -> None:
    with pytest.raises(ProtocolViolation, match="torn"):
        decode(bytes(size), "f32", tokens, hidden)


def test_an_unknown_dtype_is_refused_both_ways() -> None:
    with pytest.raises(ProtocolViolation, match="'f8'"):
        encode(HIDDEN, "f8")
    with pytest.raises(ProtocolViolation, match="'f8'"):
        decode(b"", "f8", 1, 1)
