"""A pass that pauses: its states, the same bits as without a pause, segments that are dropped, and passes side by side."""

import numpy as np
import pytest

from meshd.errors import LocalFault
from meshd.kernels.backend import AttendCut, Done, Hidden, LoadedLayers, Pass, Segment, Stage
from meshd.kernels.kv.lease import HostLease
from meshd.kernels.kv.memory import KvKey, layout_of
from opaque.arena import OpaqueArena
from opaque.stage import OpaqueHidden
from shards.holders import HALVES, Holders, give_all
from tiny.kv import MODEL, make_lease
from tiny.llama import tiny_spec

CAPACITY, CHUNK, LONG = 1248, 160, 1120
IDS = np.random.default_rng(2).integers(0, 320, (3, CAPACITY)).astype(np.int32)


def leases(loaded: LoadedLayers) -> list[HostLease]:
    return [make_lease(tiny_spec(), loaded.layers, CAPACITY) for _ in range(3)]


def embed(stage: Stage, numbers: list[int], start: int, tokens: int) -> Hidden:
    return stage.join([stage.embed(IDS[number, start : start + tokens]) for number in numbers])


def finish(running: Pass, holders: Holders) -> tuple[Hidden, int]:
    """Run a pass to its end. Returns: its hidden states, and the number of cuts."""
    cuts = 0
    while isinstance(found := running.run(), AttendCut):
        give_all(running, found.requests, holders)
        cuts += 1
    assert isinstance(found, Done)
    return found.hidden, cuts


def paused(stage: Stage, own: list[HostLease], start: int, tokens: int) -> tuple[Pass, AttendCut]:
    """Begin a pass of which segments 0 and 2 have KV elsewhere, and run it to its first cut."""
    segments = [Segment(lease, start, tokens, HALVES if number != 1 else ()) for number, lease in enumerate(own)]
    running = stage.begin(embed(stage, [0, 1, 2][: len(own)], start, tokens), segments)
    cut = running.run()
    assert isinstance(cut, AttendCut)
    return running, cut


def test_a_batch_that_pauses_gives_the_same_bits(loaded: LoadedLayers) -> None:
    stage, here, split, holders = loaded.stage(loaded.layers), leases(loaded), leases(loaded), Holders(tiny_spec(), CAPACITY)
    for start, tokens in [*((start, CHUNK) for start in range(0, LONG, CHUNK)), (LONG, 1), (LONG + 1, 1), (LONG + 2, 5)]:
        right = stage.forward(embed(stage, [0, 1, 2], start, tokens), [Segment(lease, start, tokens) for lease in here])
        running, cut = paused(stage, split, start, tokens)
        assert {request.segment for request in cut.requests} == {0, 2}
        give_all(running, cut.requests, holders)
        hidden, cuts = finish(running, holders)
        assert stage.encode(hidden, "f32", 0, 3 * tokens) == stage.encode(right, "f32", 0, 3 * tokens)
        assert cuts == 2, "with the first one: layers 0, 1 and 2"


def test_a_pass_that_waits_leaves_the_stage_to_others(loaded: LoadedLayers) -> None:
    """Two passes of other segments run alternately, each to its next cut."""
    stage, holders = loaded.stage(loaded.layers), Holders(tiny_spec(), CAPACITY)
    right = [stage.forward(embed(stage, [0], 0, 90), [Segment(leases(loaded)[0], 0, 90)]) for _ in range(2)]
    passes = [paused(stage, [lease], 0, 90) for lease in leases(loaded)[:2]]
    while passes:
        for running, cut in [*passes]:
            give_all(running, cut.requests, holders)
            passes.remove((running, cut))
            if isinstance(found := running.run(), AttendCut):
                passes.append((running, found))
            else:
                assert stage.encode(found.hidden, "f32", 0, 90) == stage.encode(right.pop(), "f32", 0, 90)
    assert not right


def test_a_segment_that_is_dropped_is_asked_and_written_no_more(loaded: LoadedLayers) -> None:
    stage, here, split, holders = loaded.stage(loaded.layers), leases(loaded), leases(loaded), Holders(tiny_spec(), CAPACITY)
    right = stage.forward(embed(stage, [0, 1, 2], 0, 33), [Segment(lease, 0, 33) for lease in here])
    running, cut = paused(stage, split, 0, 33)
    running.drop(0)
    running.drop(1)
    running.give([None if request.segment == 0 else holders.answer(2, request) for request in cut.requests])
    following = running.run()
    assert isinstance(following, AttendCut)
    assert {request.segment for request in following.requests} == {2}
    give_all(running, following.requests, holders)
    hidden, _ = finish(running, holders)
    assert stage.encode(hidden, "f32", 66, 99) == stage.encode(right, "f32", 66, 99)
    for lease in split[:2]:
        assert not any(rows.any() for layer in loaded.layers for rows in lease.rows(layer))


def test_a_pass_refuses_what_its_state_does_not_allow(loaded: LoadedLayers) -> None:
    stage, holders = loaded.stage(loaded.layers), Holders(tiny_spec(), CAPACITY)
    fresh = stage.begin(embed(stage, [0], 0, 4), [Segment(leases(loaded)[0], 0, 4)])
    for call in (lambda: fresh.give([]), lambda: fresh.drop(0)):
        with pytest.raises(LocalFault, match="not paused"):
            call()
    running, cut = paused(stage, leases(loaded)[:1], 0, 4)
    parts = [holders.answer(0, request) for request in cut.requests]
    with pytest.raises(LocalFault, match="waits"):
        running.run()
    for wrong in (parts[1:], [None, *parts[1:]], [(parts[0][0][:1], parts[0][1]), *parts[1:]]):
        with pytest.raises(LocalFault, match=r"parts were given|is missing"):
            running.give(wrong)
    running.give(parts)
    with pytest.raises(LocalFault, match="not paused"):
        running.give(parts)
    finish(running, holders)
    with pytest.raises(LocalFault, match="has ended"):
        running.run()


def test_a_pass_that_fails_has_ended(loaded: LoadedLayers) -> None:
    stage = loaded.stage(loaded.layers)
    failing = stage.begin(embed(stage, [0], 0, 4), [Segment(leases(loaded)[0], CAPACITY - 2, 4)])
    with pytest.raises(LocalFault, match="can't be stored"):
        failing.run()
    with pytest.raises(LocalFault, match="has ended"):
        failing.run()


def test_a_backend_refuses_hidden_states_and_kv_of_another_one(loaded: LoadedLayers) -> None:
    stage, hidden = loaded.stage(loaded.layers), object.__new__(OpaqueHidden)
    lease = OpaqueArena(1 << 30).open(KvKey(MODEL, loaded.layers), layout_of(tiny_spec(), loaded.layers), 32)
    for call in (lambda: stage.begin(hidden, []), lambda: stage.join([hidden]), lambda: stage.logits(hidden)):
        with pytest.raises(LocalFault, match="these are elsewhere"):
            call()
    with pytest.raises(LocalFault, match="the KV is elsewhere"):
        stage.forward(embed(stage, [0], 0, 4), [Segment(lease, 0, 4)])


def test_a_step_with_kv_elsewhere_is_not_computed_as_if_it_were_here(loaded: LoadedLayers) -> None:
    stage = loaded.stage(loaded.layers)
    with pytest.raises(LocalFault, match="held elsewhere"):
        stage.forward(embed(stage, [0], 0, 4), [Segment(leases(loaded)[0], 0, 4, HALVES)])
