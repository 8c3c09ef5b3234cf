"""Copies of leases between peers: every kind arrives as it was, and nothing that is not a copy of these layers is stored."""

import struct

import numpy as np
import pytest

from meshd.errors import LocalFault
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.copies import HEADER_BYTES
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.kv.memory import KvKey, LayerMemory, Precision, full, latent, recurrent, shared, windowed
from meshd.types import LayerRange
from tiny.kv import MODEL

STATE = (3, 5)
LAYOUT = (full(2, 8, 4), windowed(20, 1, 8, 8), latent(6), recurrent(STATE, 7, 3), shared(0))
LAYERS = LayerRange(0, 5)
CAPACITY, STEP = 640, 64


def make(layout: tuple[LayerMemory, ...] = LAYOUT, precision: Precision = Precision.FP32) -> HostLease:
    key = KvKey(MODEL, LayerRange(0, len(layout)))
    return HostArena(1 << 30).open(key, layout, CAPACITY, step_tokens=STEP, precision=precision)


def rows_of(memory: LayerMemory, start: int, end: int) -> list[np.ndarray]:
    """Rows that differ by position, exact in fp16 too."""
    return [
        np.broadcast_to(np.arange(start, end, dtype=np.float32).reshape(-1, *[1] * len(s)), (end - start, *s)) for s in memory.rows
    ]


def filled(end: int, precision: Precision = Precision.FP32) -> HostLease:
    """A lease after steps up to `end`, as a stage leaves it."""
    lease = make(precision=precision)
    for start in range(0, end, 16):
        stop = min(start + 16, end)
        for layer, memory in enumerate(LAYOUT[:4]):
            lease.write(layer, start, *rows_of(memory, start, stop))
        if stop % 32 == 0:
            lease.set_state(3, stop, np.full(STATE, stop, np.float32))
        lease.commit(LAYERS, stop)
    return lease


def copy(source: HostLease, target: HostLease, start: int, end: int, layers: LayerRange = LAYERS) -> None:
    target.copy_in(layers, start, end, memoryview(source.copy_out(layers, start, end)))


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("chunk", [500, 100, 32, 7])
def test_a_copy_holds_what_the_original_holds(chunk: int, precision: Precision) -> None:
    """The copy begins when rows have left the window and states have gone; it can be computed on from the same positions."""
    source, target = filled(500, precision), make(precision=precision)
    for start in range(0, 500, chunk):
        copy(source, target, start, min(start + chunk, 500))
        target.commit(LAYERS, min(start + chunk, 500))
    assert target.used_bytes == source.used_bytes
    assert target.resumable(LAYERS, 500) == source.resumable(LAYERS, 500) == (480, 500)
    for layer in LAYERS:
        for there, here in zip(source.read(layer, 500), target.read(layer, 500), strict=True):
            assert np.array_equal(there[450:500], here[450:500])
            assert layer not in (0, 2, 4) or np.array_equal(there, here)
    border, state = target.state_before(3, 500)
    assert (border, state[0, 0]) == (480, 480)


def test_a_copy_is_usable_only_when_every_layer_has_what_it_needs() -> None:
    source, target = filled(500), make()
    usable = []
    for start in range(0, 500, 20):
        copy(source, target, start, start + 20)
        usable.append([target.resumable(LayerRange(layer, layer + 1), start + 20)[1] for layer in LAYERS])
    assert [row[0] for row in usable] == list(range(20, 501, 20))
    assert [row[1] for row in usable][:20] == [0] * 20
    assert usable[-1] == [500] * 5
    assert [row[3] for row in usable].count(0) >= 20
    assert target.resumable(LAYERS, 420) == (0, 0)


def test_some_of_the_layers_can_be_copied() -> None:
    source, target = filled(100), make()
    copy(source, target, 0, 100, LayerRange(0, 2))
    assert np.array_equal(source.read(1, 100)[0], target.read(1, 100)[0])
    assert not target.read(2, 100)[0].any()


def test_a_copy_out_does_not_change_with_the_lease() -> None:
    source = filled(64)
    data = source.copy_out(LAYERS, 0, 64)
    source.truncate(LAYERS, 0, 0)
    target = make()
    target.copy_in(LAYERS, 0, 64, memoryview(data))
    assert target.read(0, 64)[0][63, 0, 0] == 63


def header(kind: int, values: int = 4, states: int = 0, first: int = 0, last: int = 4) -> bytes:
    return struct.pack("<BBHII", kind, values, states, first, last)


BAD = [
    ("empty", full(1, 2, 2), b""),
    ("a part is missing", full(1, 2, 2), header(1) + bytes(4 * 16 - 1)),
    ("too long", full(1, 2, 2), header(1) + bytes(4 * 16 + 1)),
    ("another kind", full(1, 2, 2), header(2) + bytes(4 * 16)),
    ("another precision", full(1, 2, 2), header(1, values=2) + bytes(2 * 16)),
    ("other positions", full(1, 2, 2), header(1, first=1) + bytes(3 * 16)),
    ("an earlier end", full(1, 2, 2), header(1, last=3) + bytes(3 * 16)),
    ("rows before the first", windowed(8, 1, 2, 2), header(2, first=5, last=4)),
    ("not finite", full(1, 2, 2), header(1) + np.full(16, np.nan, "<f4").tobytes()),
    ("a state of a layer that has none", latent(4), header(3, states=1) + bytes(4 * 16) + bytes(4)),
    ("a state at no border", recurrent((2,), 4, 1), header(4, states=1) + bytes(4 * 16) + struct.pack("<I", 3) + bytes(8)),
    ("rows of a shared layer", shared(0), header(5, values=0) + bytes(16)),
]


@pytest.mark.parametrize(("memory", "data"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_is_no_copy_of_these_layers_is_refused_and_changes_nothing(memory: LayerMemory, data: bytes) -> None:
    lease = make((memory,))
    with pytest.raises(LocalFault):
        lease.copy_in(LayerRange(0, 1), 0, 4, memoryview(data))
    assert lease.used_bytes == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused(bad: float) -> None:
    memory = recurrent((2,), 4, 1)
    data = header(4, states=1, last=32) + bytes(32 * 16) + struct.pack("<I", 32) + np.array([0, bad], "<f4").tobytes()
    with pytest.raises(LocalFault, match="not finite"):
        make((memory,)).copy_in(LayerRange(0, 1), 0, 32, memoryview(data))


def test_positions_and_layers_outside_are_refused() -> None:
    lease = filled(64)
    for start, end in ((600, 641), (-1, 3), (4, 4)):
        with pytest.raises(LocalFault, match="outside their lease"):
            lease.copy_out(LAYERS, start, end)
    with pytest.raises(LocalFault, match="no KV here"):
        lease.copy_out(LayerRange(3, 6), 0, 1)


def test_a_header_has_the_size_that_senders_count_with() -> None:
    assert len(filled(32).copy_out(LayerRange(4, 5), 0, 1)) == HEADER_BYTES
