"""A lease: what was written is read, what leaves a window or is taken back goes back to the system, and bytes are counted once."""

import gc

import numpy as np
import psutil
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from meshd.errors import LocalFault, OutOfMemory
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.kv.memory import (
    PAGE_TOKENS,
    REWIND_TOKENS,
    KvKey,
    Precision,
    full,
    latent,
    layout_of,
    reserved_bytes,
    shared,
    windowed,
)
from meshd.types import LayerRange, ModelId
from tiny.kv import MODEL, make_lease
from tiny.llama import tiny_spec

F32 = np.ndarray
LAYERS = LayerRange(2, 4)
KEY = KvKey(MODEL, LAYERS)
LAYOUT = layout_of(tiny_spec(), LAYERS)
PAGE_BYTES = PAGE_TOKENS * 2 * 2 * 2 * 32 * 4
"""K and V of two layers with two heads of width 32."""
PAGES = 12
WINDOW = 40


def rows(count: int, mark: float) -> F32:
    return np.arange(count * 64, dtype=np.float32).reshape(count, 2, 32) + np.float32(mark)


def fill(lease: HostLease, start: int, end: int, mark: float = 0.0) -> None:
    whole = rows(end, mark)
    for layer in lease.key.layers:
        lease.write(layer, start, whole[start:] + layer, -whole[start:])


class ArenaMachine(RuleBasedStateMachine):
    """Opens, writes, grows, truncates and forgets leases in any order."""

    leases: Bundle[HostLease] = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.arena = HostArena(PAGES * PAGE_BYTES)
        self.written: dict[int, tuple[HostLease, int]] = {}

    @property
    def free_pages(self) -> int:
        return (self.arena.budget_bytes - self.arena.reserved_bytes) // PAGE_BYTES

    @rule(target=leases, tokens=st.integers(1, 150))
    def open(self, tokens: int):  # noqa: ANN201 - hypothesis' own type is private
        if -(-tokens // PAGE_TOKENS) > self.free_pages:
            with pytest.raises(OutOfMemory):
                self.arena.open(KEY, LAYOUT, tokens)
            return multiple()
        lease = self.arena.open(KEY, LAYOUT, tokens)
        self.written[id(lease)] = lease, 0
        return lease

    @rule(lease=leases, data=st.data())
    def write(self, lease: HostLease, data: st.DataObject) -> None:
        if lease.is_open:
            start = data.draw(st.integers(0, min(self.written[id(lease)][1], lease.capacity - 1)))
            end = data.draw(st.integers(start + 1, lease.capacity))
            fill(lease, start, end)
            self.written[id(lease)] = lease, max(end, self.written[id(lease)][1])

    @rule(lease=leases, tokens=st.integers(1, 200))
    def grow(self, lease: HostLease, tokens: int) -> None:
        if lease.is_open:
            more = -(-tokens // PAGE_TOKENS) - lease.pages
            if more > self.free_pages:
                with pytest.raises(OutOfMemory):
                    lease.grow(tokens)
            else:
                lease.grow(tokens)

    @rule(lease=leases, end=st.integers(0, 150))
    def truncate(self, lease: HostLease, end: int) -> None:
        if lease.is_open:
            lease.truncate(LAYERS, end, 0)
            self.written[id(lease)] = lease, min(end, self.written[id(lease)][1])

    @rule(lease=consumes(leases))
    def forget(self, lease: HostLease) -> None:
        lease.forget()
        lease.forget()
        self.written.pop(id(lease), None)
        with pytest.raises(LocalFault, match="given back"):
            lease.read(2, 1)

    @invariant()
    def bytes_are_counted_once(self) -> None:
        leases = [lease for lease, _ in self.written.values()]
        assert self.arena.leases == set(leases)
        assert self.arena.reserved_bytes == sum(lease.capacity // PAGE_TOKENS * PAGE_BYTES for lease in leases)
        used = sum(-(-tokens // PAGE_TOKENS) for _, tokens in self.written.values())
        assert self.arena.used_bytes == used * PAGE_BYTES <= self.arena.reserved_bytes

    @invariant()
    def what_was_written_is_read(self) -> None:
        for lease, tokens in self.written.values():
            for layer in LAYERS:
                k, v = lease.read(layer, tokens)
                assert np.array_equal(k[:tokens], rows(tokens, layer))
                assert np.array_equal(v[:tokens], -rows(tokens, 0))
                assert np.isfinite(k).all()


TestArena = ArenaMachine.TestCase


def test_reading_is_a_view_with_one_place_for_every_position() -> None:
    lease = make_lease(tiny_spec(), LAYERS, 70)
    k, v = lease.read(2, 40)
    assert k.shape == v.shape == (64, 2, 32)
    assert not k.any()
    lease.write(2, 3, rows(1, 7), rows(1, 7))
    assert np.array_equal(k[3], rows(1, 7)[0])
    assert k.flags.c_contiguous


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float, precision: Precision) -> None:
    """A NaN or infinity would stay in the page."""
    lease, broken = make_lease(tiny_spec(), LAYERS, 4, precision=precision), rows(3, 0)
    broken[1, 1, 5] = bad
    for k, v in ((broken, rows(3, 0)), (rows(3, 0), broken)):
        with pytest.raises(LocalFault, match="layer 2 can't store position 1: its K or V is not finite"):
            lease.write(2, 1, k, v)
    assert not any(part.any() for part in lease.read(2, 4))


def test_fp16_rounds_each_value_the_same_whatever_the_chunks() -> None:
    whole, parts = (make_lease(tiny_spec(), LAYERS, 64, precision=Precision.FP16) for _ in range(2))
    values = np.random.default_rng(0).standard_normal((50, 2, 32)).astype(np.float32)
    whole.write(2, 0, values, values)
    for start, end in ((0, 1), (1, 40), (40, 50)):
        parts.write(2, start, values[start:end], values[start:end])
    k, _ = whole.read(2, 50)
    assert k.dtype == np.float32
    assert k.tobytes() == parts.read(2, 50)[0].tobytes()
    assert np.array_equal(k[:50], values.astype(np.float16).astype(np.float32))
    assert whole.reserved_bytes == 2 * PAGE_BYTES // 2
    with pytest.raises(LocalFault, match="not finite"):
        whole.write(2, 0, values * 1e6, values)


def test_int8_is_named_and_refused() -> None:
    with pytest.raises(LocalFault, match="can't be stored as int8 yet; use fp32 or fp16"):
        make_lease(tiny_spec(), LAYERS, 4, precision=Precision.INT8)


def test_more_than_the_budget_or_the_address_space_is_out_of_memory() -> None:
    arena = HostArena(PAGES * PAGE_BYTES)
    arena.open(KEY, LAYOUT, 10 * PAGE_TOKENS)
    with pytest.raises(OutOfMemory, match=f"{3 * PAGE_BYTES} bytes needed, {2 * PAGE_BYTES} of {PAGES * PAGE_BYTES} free"):
        arena.open(KEY, LAYOUT, 70)
    assert arena.reserved_bytes == 10 * PAGE_BYTES
    endless = HostArena(1 << 80)
    with pytest.raises(OutOfMemory, match="bytes of KV"):
        endless.open(KEY, LAYOUT, 1 << 50)
    assert (endless.reserved_bytes, endless.leases) == (0, set())


def test_positions_and_layers_outside_are_refused() -> None:
    lease = make_lease(tiny_spec(), LAYERS, 32)
    for attempt in (lambda: lease.write(2, 31, rows(2, 0), rows(2, 0)), lambda: lease.read(2, 33)):
        with pytest.raises(LocalFault, match="lease"):
            attempt()
    for layers in (LayerRange(3, 5), LayerRange(1, 3)):
        with pytest.raises(LocalFault, match="no KV here"):
            lease.token_bytes(layers)
    with pytest.raises(LocalFault, match="no KV here"):
        lease.read(4, 1)


def test_positions_that_are_committed_are_not_taken_back() -> None:
    lease = make_lease(tiny_spec(), LAYERS, 64)
    fill(lease, 0, 50)
    with pytest.raises(LocalFault, match="positions before 41 are committed"):
        lease.truncate(LAYERS, 40, 41)
    lease.truncate(LAYERS, 41, 41)
    assert not lease.read(2, 64)[0][64:].any()


def test_a_truncated_layer_leaves_the_others_as_they_are() -> None:
    """Two stages that took over parts of an older one share its lease."""
    lease = make_lease(tiny_spec(), LAYERS, 96)
    fill(lease, 0, 96)
    lease.truncate(LayerRange(2, 3), 32, 0)
    assert not lease.read(2, 96)[0][32:].any()
    assert np.array_equal(lease.read(3, 96)[0], rows(96, 3))
    assert lease.used_bytes == 4 * PAGE_BYTES // 2


def windowed_lease(capacity: int, step_tokens: int) -> HostLease:
    layout = (windowed(WINDOW, 2, 32, 32), full(2, 32, 32))
    return HostArena(1 << 30).open(KEY, layout, capacity, step_tokens=step_tokens)


def test_a_window_keeps_what_is_read_and_gives_the_rest_back() -> None:
    """Whatever the steps: the rows in the window stay, no more pages are in use than are reserved, and the full layer keeps all."""
    lease, end = windowed_lease(1024, 16), 0
    least = -(-(WINDOW + REWIND_TOKENS + 16) // PAGE_TOKENS) + 1
    assert lease.pages == 32 + least
    assert lease.reserved_bytes == (32 + least) * PAGE_BYTES // 2
    for size in (16, 1, 7, 16, 16) * 18:
        fill(lease, end, end + size)
        end += size
        lease.commit(LAYERS, end)
        assert lease.used_bytes <= lease.reserved_bytes
        first = max(0, end - WINDOW - REWIND_TOKENS)
        assert np.array_equal(lease.read(2, end)[0][first:end], rows(end, 2)[first:])
    assert np.array_equal(lease.read(3, end)[0][:end], rows(end, 3))
    assert not lease.read(2, end)[0][: end - WINDOW - REWIND_TOKENS - PAGE_TOKENS].any()


def test_a_window_can_be_computed_on_from_where_its_rows_are_there() -> None:
    lease = windowed_lease(1024, 64)
    for start in range(0, 640, 64):
        fill(lease, start, start + 64)
        lease.commit(LAYERS, start + 64)
    first, last = lease.resumable(LAYERS, 640)
    assert (first, last) == (480 + WINDOW - 1, 640)
    assert lease.resumable(LAYERS, 510) == (0, 0)
    assert lease.resumable(LayerRange(3, 4), 510) == (0, 510)
    with pytest.raises(LocalFault, match="nothing can be computed from position 510 on"):
        lease.truncate(LAYERS, 510, 0)
    lease.truncate(LAYERS, first, 0)
    lease.truncate(LAYERS, 0, 0)
    assert lease.resumable(LAYERS, 0) == (0, 0)
    fill(lease, 0, 64, mark=5.0)
    assert np.array_equal(lease.read(2, 64)[0], rows(64, 7))


def test_a_step_beyond_the_reserved_pages_of_a_window_is_refused() -> None:
    lease = windowed_lease(1024, 16)
    with pytest.raises(LocalFault, match="more than the 6 pages that the lease reserves"):
        fill(lease, 0, 200)


def test_layers_may_differ_in_width_and_kind_and_share_memory() -> None:
    layout = (full(2, 32, 16), latent(24), shared(2), full(0, 0, 0))
    lease = HostArena(1 << 30).open(KvKey(MODEL, LayerRange(2, 6)), layout, 40)
    k, v, rank = rows(3, 1), rows(3, 1)[:, :, :16], np.ones((3, 24), np.float32)
    lease.write(2, 0, k, v)
    lease.write(3, 0, rank)
    lease.write(5, 0, np.zeros((3, 0, 0), np.float32), np.zeros((3, 0, 0), np.float32))
    assert np.array_equal(lease.read(4, 3)[0][:3], k)
    assert np.array_equal(lease.read(3, 3)[0][:3], rank)
    assert lease.token_bytes(LayerRange(2, 6)) == 4 * (2 * 48 + 24)
    assert lease.reserved_bytes == 64 * 4 * (2 * 48 + 24)


def test_a_key_may_hold_some_of_the_kv_heads() -> None:
    whole, half = (reserved_bytes(layout_of(tiny_spec(), LAYERS, heads), Precision.FP32, 64, 64) for heads in (None, (1, 2)))
    assert whole == 2 * half


def test_the_last_user_forgets_the_lease() -> None:
    arena = HostArena(1 << 30)
    lease = arena.open(KEY, LAYOUT, 64)
    lease.acquire()
    lease.acquire()
    lease.release()
    assert lease.is_open
    lease.release()
    assert (lease.is_open, arena.reserved_bytes, arena.leases) == (False, 0, set())


def grown_by(process: psutil.Process, before: int) -> int:
    return process.memory_info().rss - before


def test_memory_follows_what_is_written_truncated_and_forgotten() -> None:
    """The system's own figures, for a lease with 4 GiB of address space."""
    process, spec = psutil.Process(), tiny_spec()
    page = rows(PAGE_TOKENS, 1.0)
    gc.collect()
    before = process.memory_info().rss
    lease = make_lease(spec, LayerRange(0, 4), (4 << 30) // (4 * 2 * 2 * 32 * 4) - 32)
    slack = 2 << 20
    assert grown_by(process, before) < slack
    mib = 32 << 20
    tokens = mib // lease.token_bytes(lease.key.layers)
    for start in range(0, tokens, PAGE_TOKENS):
        for layer in range(4):
            lease.write(layer, start, page, page)
    assert lease.used_bytes == mib
    assert abs(grown_by(process, before) - mib) < slack
    lease.truncate(lease.key.layers, tokens // 2, 0)
    assert lease.used_bytes == mib // 2
    assert abs(grown_by(process, before) - mib // 2) < slack
    view, _ = lease.read(0, tokens)
    lease.forget()
    assert grown_by(process, before) < slack, "also while somebody has a view"
    assert not view.any()


def test_memory_after_200_sessions_is_as_before() -> None:
    process, arena = psutil.Process(), HostArena(1 << 30)
    page = rows(PAGE_TOKENS, 1.0)

    def session(number: int) -> None:
        lease = arena.open(KvKey(ModelId("m"), LAYERS), LAYOUT, 2048)
        for start in range(0, 32 * (number % 50 + 10), PAGE_TOKENS):
            for layer in LAYERS:
                lease.write(layer, start, page, page)
        lease.forget()

    session(49)
    gc.collect()
    before = process.memory_info().rss
    for number in range(200):
        session(number)
    assert arena.reserved_bytes == arena.used_bytes == 0
    assert grown_by(process, before) < 1 << 20, "a session writes up to 1.9 MB"
