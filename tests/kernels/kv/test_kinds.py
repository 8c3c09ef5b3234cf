"""Every kind of memory under a model that has them all: chunks, rollbacks, growth and moves change no bit."""

import random
from itertools import pairwise

import numpy as np
import pytest

from hybrid.model import LAYERS, MEMORIES, SPEC, VOCAB, HybridStage, PlainHybrid
from meshd.errors import LocalFault
from meshd.kernels.backend import Segment
from meshd.kernels.kv import memory
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.kv.memory import MemoryKind
from meshd.types import LayerRange
from tiny.kv import make_lease

WHOLE = LayerRange(0, LAYERS)
IDS = np.random.default_rng(0).integers(0, VOCAB, 300).tolist()


@pytest.fixture(autouse=True)
def hybrid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_memory_of", lambda spec, layer, kv_heads: MEMORIES[layer])


@pytest.fixture(scope="module")
def plain() -> list[bytes]:
    network = PlainHybrid()
    return [network.feed(token).tobytes() for token in IDS]


def run(lease: HostLease, start: int, ids: list[int]) -> list[bytes]:
    """Compute one step. Returns: the bits of each token's hidden state."""
    stage = HybridStage(WHOLE)
    return [row.tobytes() for row in stage.forward(stage.embed(np.array(ids, np.int32)), [Segment(lease, start, len(ids))])]


@pytest.mark.parametrize("seed", range(3))
def test_any_chunks_rollbacks_and_growth_give_the_same_bits(seed: int, plain: list[bytes]) -> None:
    """Guesses are computed and taken back, in the page and over its border; commits follow at any distance."""
    rng = random.Random(seed)
    lease, done, committed = make_lease(SPEC, WHOLE, 40, step_tokens=128), 0, 0
    while done < len(IDS):
        size = min(rng.choice([1, 2, 5, 33, 60]), len(IDS) - done)
        guesses = [rng.randrange(VOCAB) for _ in range(rng.choice([0, 0, 3, 40]))][: 64 - size]
        lease.grow(min(done + 64, 340))
        found = run(lease, done, IDS[done : done + size] + guesses)
        assert found[:size] == plain[done : done + size]
        done += size
        lease.truncate(WHOLE, done, committed)
        if done - committed > 64 or rng.random() < 0.6:
            committed = done
        lease.commit(WHOLE, committed)
        assert lease.used_bytes <= lease.reserved_bytes
    kinds = {each.kind for each in MEMORIES}
    assert kinds == set(MemoryKind)


def test_a_rollback_to_a_border_that_is_gone_is_refused_and_a_new_start_is_not(plain: list[bytes]) -> None:
    lease = make_lease(SPEC, WHOLE, 320, step_tokens=64)
    for start, end in pairwise(range(0, 301, 50)):
        run(lease, start, IDS[start:end])
        lease.commit(WHOLE, end)
    first, last = lease.resumable(WHOLE, 300)
    assert (first, last) == (288, 300)
    with pytest.raises(LocalFault, match="nothing can be computed from position 287 on"):
        lease.truncate(WHOLE, 287, 0)
    lease.truncate(WHOLE, 288, 0)
    assert run(lease, 288, IDS[288:300]) == plain[288:300]
    lease.truncate(WHOLE, 0, 0)
    assert run(lease, 0, IDS[:50]) == plain[:50]


@pytest.mark.parametrize("chunk", [1, 13, 64, 200])
def test_a_copy_goes_on_with_the_same_bits(chunk: int, plain: list[bytes]) -> None:
    source, target = (make_lease(SPEC, WHOLE, 320, step_tokens=256) for _ in range(2))
    for start, end in pairwise(range(0, 201, 50)):
        run(source, start, IDS[start:end])
        source.commit(WHOLE, end)
    for start in range(0, 200, chunk):
        end = min(start + chunk, 200)
        target.copy_in(WHOLE, start, end, memoryview(source.copy_out(WHOLE, start, end)))
        target.commit(WHOLE, end)
    source.forget()
    assert target.resumable(WHOLE, 200) == (192, 200)
    assert run(target, 200, IDS[200:250]) == plain[200:250]
