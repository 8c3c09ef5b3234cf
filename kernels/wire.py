"""Activations as bytes: what a wire dtype's name means. Little-endian, row-major, `[tokens, hidden]`."""

import sys
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from meshd.errors import ProtocolViolation

F32 = npt.NDArray[np.float32]


class WireDtype(Protocol):
    """One precision on the wire."""

    def size(self, tokens: int, hidden: int) -> int:
        """Bytes of `[tokens, hidden]`."""
        ...

    def encode(self, hidden: F32) -> memoryview:
        """`[tokens, hidden]` to bytes."""
        ...

    def decode(self, payload: memoryview, tokens: int, hidden: int) -> F32:
        """Bytes of the right size to `[tokens, hidden]`; may be a read-only view of them."""
        ...


@dataclass(frozen=True, slots=True)
class Exact:
    """`f32`: as it lies in memory, so that neither side copies."""

    def size(self, tokens: int, hidden: int) -> int:
        return 4 * tokens * hidden

    def encode(self, hidden: F32) -> memoryview:
        return np.ascontiguousarray(hidden, "<f4").data.cast("B")

    def decode(self, payload: memoryview, tokens: int, hidden: int) -> F32:
        return np.frombuffer(payload, "<f4").reshape(tokens, hidden).astype(np.float32, copy=sys.byteorder == "big")


WIRE_DTYPES: dict[str, WireDtype] = {"f32": Exact()}


def encode(hidden: F32, dtype: str) -> memoryview:
    """`[tokens, hidden]` as a payload of `dtype`. Raises: ProtocolViolation for a dtype unknown here."""
    return _find(dtype).encode(hidden)


def decode(payload: bytes | bytearray | memoryview, dtype: str, tokens: int, hidden: int) -> F32:
    """A payload as `[tokens, hidden]`; with `f32` a view that lives as long as the payload, read-only if that is.

    Raises: ProtocolViolation for a dtype unknown here or a payload of another size.
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
