"""The share of an arena that a placement reserves: how many tokens are free, and that its memory is counted in one place."""

import msgspec
import pytest

from meshd.errors import OutOfMemory
from meshd.kernels.kv.arena import HostArena
from meshd.kernels.kv.share import STEP_TOKENS, KvShare, leased_outside
from meshd.types import LayerRange
from tiny.kv import MODEL
from tiny.llama import tiny_spec

LAYERS = LayerRange(0, 4)
WINDOWED = msgspec.structs.replace(tiny_spec(), window=32, windowed=(True, True, True, False))
ROW_BYTES = 2 * 2 * 32 * 4


def test_sessions_take_tokens_from_the_share_and_give_them_back() -> None:
    share = KvShare(HostArena(1 << 30), MODEL, tiny_spec(), LAYERS, 1024)
    assert (share.tokens_free, share.bytes) == (1024, 4 * 1024 * ROW_BYTES)
    first = share.open(LAYERS, 400)
    assert share.tokens_free == 1024 - 416
    half = share.open(LayerRange(0, 2), 64)
    assert share.tokens_free == 1024 - 416 - 32, "half of the layers take half of the memory"
    with pytest.raises(OutOfMemory, match="no KV for 608 tokens"):
        share.open(LAYERS, 608)
    share.open(LAYERS, 576).forget()
    for lease in (first, half):
        lease.forget()
    assert (share.tokens_free, share.leases) == (1024, [])


def test_windows_leave_room_for_more_sessions_but_a_used_share_never_looks_unused() -> None:
    """The planner takes a share with all tokens free for an unused one."""
    share = KvShare(HostArena(1 << 30), MODEL, WINDOWED, LAYERS, 4096)
    leases = [share.open(LAYERS, 4096)]
    assert share.tokens_free == 4096 - 32
    while share.tokens_free >= 2048:
        leases.append(share.open(LAYERS, 2048))
    assert len(leases) >= 4
    with pytest.raises(OutOfMemory):
        share.open(LAYERS, share.tokens_free + STEP_TOKENS)
    share.open(LAYERS, share.tokens_free)


def test_leases_of_no_share_are_counted_apart() -> None:
    arena = HostArena(1 << 30)
    one, other = (KvShare(arena, MODEL, tiny_spec(), LAYERS, 256) for _ in range(2))
    one.open(LAYERS, 64)
    other.open(LAYERS, 32)
    assert leased_outside(arena, [one, other]) == 0
    assert leased_outside(arena, [one]) == 32 * 4 * ROW_BYTES
