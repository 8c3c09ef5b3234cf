"""Copies of a lease's content between peers: for each layer, a header, its rows and its states (SPEC.md, section 10).

Layers with a window send only the rows that are still there, so a receiver checks everything that a header says: kind, precision,
positions, sizes and finiteness.
"""

import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from meshd.errors import LocalFault
from meshd.kernels.kv.memory import PAGE_TOKENS, LayerMemory, MemoryKind
from meshd.kernels.kv.store import LayerStore

F32 = npt.NDArray[np.float32]
_HEADER = struct.Struct("<BBHII")
"""Kind, bytes of a value, number of states, first and last position of the rows."""
_BORDER = struct.Struct("<I")
HEADER_BYTES = _HEADER.size
"""Bytes of a layer's header."""


@dataclass(slots=True)
class LayerPart:
    """What one layer holds of some positions."""

    start: int
    end: int
    """Rows of `[start, end)` are there; equal if none are."""
    rows: tuple[npt.NDArray[np.generic], ...] = ()
    states: dict[int, F32] = field(default_factory=dict)


def pack(store: LayerStore, start: int, end: int) -> bytes:
    """Return what a layer holds of `[start, end)`, as bytes. States are those at borders in `(start, end]`."""
    memory = store.memory
    first = min(max(start, store.floor), end) if memory.rows else end
    states = {at: state for at, state in sorted(store.states.items()) if start < at <= end}
    values = store.arrays[0].dtype.itemsize if store.arrays else 0
    parts = [_HEADER.pack(memory.kind, values, len(states), first, end)]
    parts += [np.ascontiguousarray(array[first:end]).tobytes() for array in store.arrays]
    for at, state in states.items():
        parts += [_BORDER.pack(at), state.astype("<f4").tobytes()]
    return b"".join(parts)


def unpack(layout: list[LayerMemory], dtype: np.dtype[np.generic], start: int, end: int, data: memoryview) -> list[LayerPart]:
    """Read the parts of all layers, without copying. Raises: LocalFault if the data is not what `pack` makes for these layers."""
    parts, at = [], 0
    for memory in layout:
        part, at = _unpack_one(memory, dtype, start, end, data, at)
        parts.append(part)
    if at != len(data):
        raise LocalFault(f"a copy of positions {start} to {end - 1} has the wrong size: {len(data)} bytes, not {at}")
    return parts


def _unpack_one(
    memory: LayerMemory, dtype: np.dtype[np.generic], start: int, end: int, data: memoryview, at: int
) -> tuple[LayerPart, int]:
    kind, values, states, first, last = _HEADER.unpack(_take(data, at, _HEADER.size))
    at += _HEADER.size
    if kind != memory.kind or values != (dtype.itemsize if memory.rows else 0):
        raise LocalFault(f"a copy is of kind {kind} with {values} bytes a value, not of {memory.kind} with {dtype.itemsize}")
    gap = bool(memory.kept_tokens)
    if last != end or not start <= first <= end or (memory.rows and first != start and not gap):
        raise LocalFault(f"a copy of positions {start} to {end - 1} has rows of {first} to {last - 1}")
    part = LayerPart(first, last)
    rows = []
    for shape in memory.rows:
        whole = (last - first, *shape)
        size = int(np.prod(whole)) * dtype.itemsize
        rows.append(np.frombuffer(_take(data, at, size), dtype).reshape(whole))
        at += size
    part.rows = tuple(rows)
    for _ in range(states):
        (border,) = _BORDER.unpack(_take(data, at, _BORDER.size))
        at += _BORDER.size
        if not memory.state or border % PAGE_TOKENS or not start < border <= end or border in part.states:
            raise LocalFault(f"a copy of positions {start} to {end - 1} has a state at position {border}")
        part.states[border] = np.frombuffer(_take(data, at, memory.state_bytes), "<f4").reshape(memory.state)
        at += memory.state_bytes
    if not all(np.isfinite(values).all() for values in (*part.rows, *part.states.values())):
        raise LocalFault(f"KV of positions {start} to {end - 1} is not finite")
    return part, at


def _take(data: memoryview, at: int, size: int) -> memoryview:
    if at + size > len(data):
        raise LocalFault(f"a copy has the wrong size: {len(data)} bytes end in the middle of a layer")
    return data[at : at + size]


def store_part(store: LayerStore, part: LayerPart) -> None:
    """Store a checked part. Where rows before it are missing, the layer begins anew at the part's first position."""
    if store.memory.kind is MemoryKind.SHARED:
        return
    if part.start > store.end:
        store.start_at(part.start)
    if part.end > part.start:
        store.write(part.start, part.rows)
    for border, state in part.states.items():
        store.set_state(border, state)
