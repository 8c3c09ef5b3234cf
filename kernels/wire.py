"""Encodes and decodes activations `[tokens, hidden]` in each wire dtype. Little-endian, row-major."""

import sys
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from meshd.errors import ProtocolViolation

F32 = npt.NDArray[np.float32]


class WireDtype(Protocol):
    """Converts activations to bytes of one precision, and back."""

    def size(self, tokens: int, hidden: int) -> int:
        """Return the number of bytes of `[tokens, hidden]`."""
        ...

    def encode(self, hidden: F32) -> memoryview:
        """Encode `[tokens, hidden]`."""
        ...

    def decode(self, payload: memoryview, tokens: int, hidden: int) -> F32:
        """Decode a payload of the right size. Returns: `[tokens, hidden]`, which may be a read-only view of the payload."""
        ...


@dataclass(frozen=True, slots=True)
class Float32:
    """`f32`: the same bytes as in memory, so that neither side has to copy."""

    def size(self, tokens: int, hidden: int) -> int:
        return 4 * tokens * hidden

    def encode(self, hidden: F32) -> memoryview:
        return np.ascontiguousarray(hidden, "<f4").data.cast("B")

    def decode(self, payload: memoryview, tokens: int, hidden: int) -> F32:
        return np.frombuffer(payload, "<f4").reshape(tokens, hidden).astype(np.float32, copy=sys.byteorder == "big")


WIRE_DTYPES: dict[str, WireDtype] = {"f32": Float32()}


def encode(hidden: F32, dtype: str) -> memoryview:
    """Encode `[tokens, hidden]` in `dtype`. Raises: ProtocolViolation for an unknown dtype."""
    return _find(dtype).encode(hidden)


def size_of(dtype: str, tokens: int, hidden: int) -> int:
    """Return the number of bytes of `[tokens, hidden]`. Raises: ProtocolViolation for an unknown dtype."""
    return _find(dtype).size(tokens, hidden)


def decode(payload: bytes | bytearray | memoryview, dtype: str, tokens: int, hidden: int) -> F32:
    """Decode a payload.

    Returns: `[tokens, hidden]`. With `f32` it is a view of the payload, read-only if the payload is.
    Raises: ProtocolViolation for an unknown dtype or a payload of another size.
    """
    found, view = _find(dtype), memoryview(payload)
    expected = found.size(tokens, hidden)
    if tokens < 1 or view.nbytes != expected:
        raise ProtocolViolation(f"an activation is torn: {view.nbytes} bytes for {tokens} x {hidden} {dtype}, not {expected}")
    return found.decode(view, tokens, hidden)


def _find(dtype: str) -> WireDtype:
    found = WIRE_DTYPES.get(dtype)
    if found is None:
        known = ", ".join(WIRE_DTYPES)
        raise ProtocolViolation(f"activations in {dtype!r} can't be read: known are {known}", hint="run one version on all peers")
    return found
