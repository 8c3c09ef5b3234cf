"""The KV pool: no block is allocated twice or lost, and a block holds what was written."""

import numpy as np
import psutil
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from meshd.errors import LocalFault, OutOfMemory
from meshd.kernels.kv import BlockTable, KVPool
from meshd.types import LayerRange
from tiny.llama import tiny_spec

LAYERS = LayerRange(2, 4)
BLOCKS, BLOCK_TOKENS = 12, 4


def make_pool(blocks: int = BLOCKS) -> KVPool:
    return KVPool(tiny_spec(), LAYERS, blocks, BLOCK_TOKENS)


def rows(count: int, mark: float) -> np.ndarray:
    return np.arange(count * 64, dtype=np.float32).reshape(count, 2, 32) + np.float32(mark)


class PoolMachine(RuleBasedStateMachine):
    """Allocates, writes and frees tables in any order."""

    tables: Bundle[BlockTable] = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool()
        self.live: dict[int, BlockTable] = {}
        self.written: dict[int, int] = {}

    @rule(target=tables, tokens=st.integers(1, 30))
    def allocate(self, tokens: int):  # noqa: ANN201 - hypothesis' own type is private
        needed = -(-tokens // BLOCK_TOKENS)
        if needed > self.pool.blocks_free:
            with pytest.raises(OutOfMemory):
                self.pool.allocate(tokens)
            return multiple()
        table = self.pool.allocate(tokens)
        assert table.capacity >= tokens
        self.live[table.id] = table
        return table

    @rule(table=tables, data=st.data())
    def write(self, table: BlockTable, data: st.DataObject) -> None:
        if table.id in self.live:
            start = data.draw(st.integers(0, table.capacity - 1))
            count = data.draw(st.integers(1, table.capacity - start))
            everything = rows(table.capacity, table.id)
            for layer in LAYERS:
                self.pool.write(layer, table, 0, everything + layer, -everything)
                self.pool.write(layer, table, start, everything[start : start + count] + layer, -everything[start : start + count])
            self.written[table.id] = table.capacity

    @rule(table=consumes(tables))
    def free(self, table: BlockTable) -> None:
        expected = len(table.blocks) if table.id in self.live else 0
        assert self.pool.free(table) == expected
        assert self.pool.free(table) == 0
        self.live.pop(table.id, None)
        self.written.pop(table.id, None)

    @rule(table=tables)
    def free_and_use_the_table_again(self, table: BlockTable) -> None:
        self.pool.free(table)
        self.live.pop(table.id, None)
        self.written.pop(table.id, None)

    @invariant()
    def no_block_is_lost_or_shared(self) -> None:
        allocated = [block for table in self.live.values() for block in table.blocks]
        assert len(allocated) == len(set(allocated)) == BLOCKS - self.pool.blocks_free
        assert all(0 <= block < BLOCKS for block in allocated)

    @invariant()
    def what_was_written_is_read(self) -> None:
        for id_, tokens in self.written.items():
            for layer in LAYERS:
                k, v = self.pool.read(layer, self.live[id_], tokens)
                assert len(k) == len(v) == tokens
                assert np.array_equal(k, rows(tokens, id_) + layer)
                assert np.array_equal(v, -rows(tokens, id_))


TestPool = PoolMachine.TestCase


def test_a_run_of_blocks_is_preferred_and_read_without_a_copy() -> None:
    pool = make_pool()
    small, _, rest = pool.allocate(4), pool.allocate(4), pool.allocate(4)
    pool.free(small)
    table = pool.allocate(12)
    assert table.contiguous
    assert table.blocks[0] > rest.blocks[0]
    k, _ = pool.read(2, table, 10)
    assert k.base is not None
    pool.write(2, table, 3, rows(1, 7), rows(1, 7))
    assert np.array_equal(k[3], rows(1, 7)[0])


def test_scattered_blocks_are_read_like_contiguous_ones() -> None:
    pool = make_pool()
    tables = [pool.allocate(4) for _ in range(BLOCKS)]
    for table in tables[::2]:
        pool.free(table)
    scattered = pool.allocate(20)
    assert not scattered.contiguous
    pool.write(3, scattered, 0, rows(20, 1), rows(20, 2))
    k, v = pool.read(3, scattered, 18)
    assert np.array_equal(k, rows(20, 1))
    assert np.array_equal(v, rows(20, 2))
    assert k.flags.c_contiguous


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    """A NaN or infinity would stay in the block after the session ends."""
    pool = make_pool()
    table, broken = pool.allocate(4), rows(3, 0)
    broken[1, 1, 5] = bad
    for k, v in ((broken, rows(3, 0)), (rows(3, 0), broken)):
        with pytest.raises(LocalFault, match="layer 2 can't store position 1: its K or V is not finite"):
            pool.write(2, table, 1, k, v)
    assert all(np.isfinite(part).all() for part in pool.read(2, table, 4))


def test_an_allocation_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    pool = make_pool()
    pool.allocate(40)
    with pytest.raises(OutOfMemory, match="3 blocks needed, 2 of 12 free"):
        pool.allocate(12)
    assert pool.blocks_free == 2


def test_a_table_of_another_pool_frees_nothing() -> None:
    pool, other = make_pool(), make_pool()
    pool.allocate(4)
    assert pool.free(other.allocate(4)) == 0
    assert pool.blocks_free == BLOCKS - 1


def test_positions_and_layers_outside_are_refused() -> None:
    pool = make_pool()
    table = pool.allocate(8)
    with pytest.raises(LocalFault, match="room for 8 tokens"):
        pool.write(2, table, 7, rows(2, 0), rows(2, 0))
    with pytest.raises(LocalFault, match="room for 8 tokens"):
        pool.read(2, table, 9)
    with pytest.raises(LocalFault, match="layer 4"):
        pool.read(4, table, 1)


def fill(pool: KVPool, table: BlockTable, tokens: int) -> None:
    for layer in LAYERS:
        pool.write(layer, table, 0, rows(tokens, layer), -rows(tokens, layer))


def allocate_scattered(pool: KVPool, tokens: int) -> BlockTable:
    tables = [pool.allocate(BLOCK_TOKENS) for _ in range(BLOCKS)]
    for table in tables[::2]:
        pool.free(table)
    return pool.allocate(tokens)


@pytest.mark.parametrize("part", [LAYERS, LayerRange(3, 4)])
@pytest.mark.parametrize(("start", "end"), [(0, 20), (3, 9), (7, 8)])
def test_a_copy_in_another_pool_reads_the_same(part: LayerRange, start: int, end: int) -> None:
    pool, other = make_pool(), KVPool(tiny_spec(), part, BLOCKS, BLOCK_TOKENS)
    table, copy = allocate_scattered(pool, 20), other.allocate(20)
    fill(pool, table, 20)
    values = pool.copy_out(part, table, start, end)
    assert values.shape == (len(part), 2, end - start, 2, 32)
    assert values.nbytes == (end - start) * len(part) * pool.layer_bytes
    other.copy_in(part, copy, start, values.data.cast("B"))
    for layer in part:
        for there, here in zip(pool.read(layer, table, 20), other.read(layer, copy, 20), strict=True):
            assert np.array_equal(there[start:end], here[start:end])
            assert not here[:start].any()
            assert not here[end:].any()


def test_a_copy_out_does_not_change_with_the_pool() -> None:
    pool = make_pool()
    table = pool.allocate(4)
    fill(pool, table, 4)
    values = pool.copy_out(LAYERS, table, 0, 2)
    before = values.copy()
    pool.write(2, table, 0, rows(4, 99), rows(4, 99))
    assert np.array_equal(values, before)


def test_a_copy_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    pool = make_pool()
    table = pool.allocate(8)
    fill(pool, table, 8)
    size = len(LAYERS) * pool.layer_bytes
    nan = np.full(size, np.nan, "<f4").data.cast("B")[:size]
    for layers, start, values, message in (
        (LAYERS, 0, memoryview(bytes(size - 4)), "not whole tokens"),
        (LAYERS, 0, memoryview(b""), "not whole tokens"),
        (LAYERS, 7, memoryview(bytes(2 * size)), "room for 8 tokens"),
        (LAYERS, -1, memoryview(bytes(size)), "room for 8 tokens"),
        (LayerRange(1, 3), 0, memoryview(bytes(size)), "no KV here"),
        (LAYERS, 0, nan, "not finite"),
    ):
        with pytest.raises(LocalFault, match=message):
            pool.copy_in(layers, table, start, values)
    for layers, start, end in ((LAYERS, 5, 9), (LAYERS, -1, 3), (LAYERS, 4, 4), (LayerRange(3, 5), 0, 1)):
        with pytest.raises(LocalFault):
            pool.copy_out(layers, table, start, end)
    for layer in LAYERS:
        assert np.array_equal(pool.read(layer, table, 8)[0], rows(8, layer))


def test_the_size_is_that_of_k_and_v_in_float32() -> None:
    assert make_pool().bytes == BLOCKS * BLOCK_TOKENS * 2 * 2 * 2 * 32 * 4


def test_memory_is_committed_when_it_is_used() -> None:
    """The pool takes 4 GiB of address space, of which the session uses a few pages."""
    import psutil

    before = psutil.Process().memory_info().rss
    pool = KVPool(tiny_spec(), LAYERS, blocks=(4 << 30) // (32 * 1024), block_tokens=32)
    assert pool.bytes == 4 << 30
    table = pool.allocate(64)
    for layer in LAYERS:
        pool.write(layer, table, 0, rows(64, 0), rows(64, 0))
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_more_than_the_address_space_is_out_of_memory() -> None:
    with pytest.raises(OutOfMemory, match="bytes of KV"):
        make_pool(blocks=1 << 44)


def test_memory_is_counted_once_also_after_a_session_has_freed_it() -> None:
    """The system's own figure: what the pool says is untouched is what the process can still grow by."""
    spec = tiny_spec()
    pool = KVPool(spec, LayerRange(0, 4), blocks=16_384)  # 64 MiB or more
    process, size = psutil.Process(), pool.bytes
    assert size >= 32 << 20
    assert pool.bytes_untouched == size
    before = process.memory_info().rss
    half = pool.blocks // 2 * pool.block_tokens
    for _ in range(3):
        table = pool.allocate(half)
        assert pool.bytes_untouched in (size, size // 2), "blocks that are only allocated have no memory yet"
        mark = rows(pool.block_tokens, 1.0)
        for start in range(0, half, pool.block_tokens):
            for layer in range(4):
                pool.write(layer, table, start, mark, mark)
        pool.free(table)
        grown = process.memory_info().rss - before
        assert abs(grown - (size - pool.bytes_untouched)) < 0.15 * size
    assert pool.bytes_untouched == size // 2


def test_a_copy_touches_the_blocks_that_it_fills() -> None:
    pool = make_pool()
    table = pool.allocate(3 * BLOCK_TOKENS)
    whole = pool.bytes_untouched
    source = make_pool()
    other = source.allocate(BLOCK_TOKENS)
    data = memoryview(source.copy_out(LAYERS, other, 0, BLOCK_TOKENS)).cast("B")
    pool.copy_in(LAYERS, table, BLOCK_TOKENS, data)
    assert whole - pool.bytes_untouched == whole // BLOCKS
    pool.free(table)
    assert whole - pool.bytes_untouched == whole // BLOCKS
