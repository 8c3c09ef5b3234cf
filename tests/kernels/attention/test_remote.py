"""Attention of which a part is held elsewhere: the same bits as here, whatever is elsewhere, and only what is needed is asked."""

import random
from dataclasses import replace

import numpy as np
import pytest

from meshd.errors import LocalFault, ProtocolViolation
from meshd.kernels.attention.local import LocalAttention
from meshd.kernels.attention.remote import attend_for, check_part, merge_attention, remote_requests
from meshd.kernels.attention.tree import SPAN_TOKENS, Part
from meshd.kernels.backend import PLAIN, AttendRequest, AttentionRule, Projected, RemoteRun, Segment
from meshd.kernels.threads import Workers
from meshd.types import LayerRange
from shards.holders import Holders
from tiny.kv import make_lease
from tiny.llama import tiny_spec
from tiny.qkv import made

LAYERS, TOKENS = LayerRange(0, 1), 2300
KV_HEADS, GROUP, WIDTH = 2, 3, 32
RULES = {
    "plain": PLAIN,
    "window": AttentionRule(window=700),
    "short window": AttentionRule(window=40, scale=0.3),
    "cap and sinks": AttentionRule(soft_cap=5.0, sinks=made(9, KV_HEADS * GROUP)),
}
CHUNKS = [128] * 17 + [100, 1, 1, 1, 21]


def projected(start: int, tokens: int, rule: AttentionRule, seed: int = 0) -> Projected:
    q = made(seed + 3 * start, tokens, KV_HEADS * GROUP, WIDTH)
    k, v = (made(seed + 3 * start + index, tokens, KV_HEADS, WIDTH) for index in (1, 2))
    return Projected(q, k, v, None, rule)


def any_runs(dice: random.Random) -> tuple[RemoteRun, ...]:
    """Cut the tree over eight spans anywhere, for each KV head alone or for all, and put some of the runs elsewhere."""

    def cut(level: int, index: int) -> list[range]:
        if level and dice.random() < 0.6:
            return cut(level - 1, 2 * index) + cut(level - 1, 2 * index + 1)
        return [range(index << level, (index + 1) << level)]

    heads = dice.choice([[None], [(0, 1), (1, 2)], [(0, 2)]])
    return tuple(RemoteRun(LAYERS, run, own) for own in heads for run in cut(3, 0) if dice.random() < 0.6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rule", list(RULES))
def test_attention_that_is_partly_elsewhere_has_the_same_bits(rule: str, seed: int) -> None:
    local, holders = LocalAttention(Workers(1)), Holders(tiny_spec(), TOKENS)
    runs = any_runs(random.Random(seed))
    here, split = (make_lease(tiny_spec(), LAYERS, TOKENS) for _ in range(2))
    start = 0
    for tokens in CHUNKS:
        given = projected(start, tokens, RULES[rule])
        segments = [Segment(split, start, tokens, runs)]
        requests = remote_requests(0, given, segments, ())
        parts = [holders.answer(0, request) for request in requests]
        for request, part in zip(requests, parts, strict=True):
            check_part(request, part)
        found = merge_attention(0, given, segments, requests, parts, (), local)
        assert found.tobytes() == local(0, given, [Segment(here, start, tokens)]).tobytes(), (start, runs)
        start += tokens


def test_what_is_elsewhere_is_not_kept_here() -> None:
    local, holders = LocalAttention(Workers(1)), Holders(tiny_spec(), TOKENS)
    lease = make_lease(tiny_spec(), LAYERS, TOKENS)
    runs = (RemoteRun(LAYERS, range(1, 2)), RemoteRun(LAYERS, range(2, 4), (0, 1)))
    for start in range(0, 1700, 100):
        given, segments = projected(start, 100, PLAIN), [Segment(lease, start, 100, runs)]
        requests = remote_requests(0, given, segments, ())
        merge_attention(0, given, segments, requests, [holders.answer(0, request) for request in requests], (), local)
    written = [bool(lease.rows(0)[0][start : start + SPAN_TOKENS].any()) for start in range(0, 2048, SPAN_TOKENS)]
    assert written == [True, False, True, True], "a run that some KV heads have here is kept"


@pytest.mark.parametrize(
    ("start", "tokens", "window", "asked"),
    [(0, 400, 0, []), (500, 20, 0, [8]), (1000, 100, 0, [24]), (1100, 1, 0, [0]), (1100, 1, 40, []), (1060, 1, 40, [0])],
)
def test_only_runs_that_a_token_sees_are_asked(start: int, tokens: int, window: int, asked: list[int]) -> None:
    """`asked`: for each request the number of new rows."""
    lease, run = make_lease(tiny_spec(), LAYERS, TOKENS), RemoteRun(LAYERS, range(1, 2))
    segments = [Segment(lease, start, tokens, (run,)), Segment(lease, start, 1)]
    given = projected(start, tokens + 1, AttentionRule(window=window))
    requests = remote_requests(0, given, segments, ())
    assert [len(request.k) for request in requests] == asked
    assert all(request.q.tobytes() == given.q[:tokens].tobytes() for request in requests)
    assert all(request.rows_start == max(start, SPAN_TOKENS) for request in requests)
    assert not remote_requests(0, given, segments, {0})
    assert not remote_requests(1, given, segments, ()), "the run is of layer 0 only"


def request_of(start: int = 600) -> AttendRequest:
    run = RemoteRun(LAYERS, range(1, 2))
    segments = [Segment(make_lease(tiny_spec(), LAYERS, TOKENS), start, 4, (run,))]
    return remote_requests(0, projected(start, 4, PLAIN), segments, ())[0]


def broken(part: Part, what: str) -> Part | None:
    o, lse = part[0].copy(), part[1].copy()
    match what:
        case "missing":
            return None
        case "o":
            o[2, 1, 5] = np.inf
        case "lse":
            lse[0, 0] = np.nan
        case "infinite lse":
            lse[0, 0] = np.inf
        case "shape":
            return o[:, :-1], lse
        case "shape of lse":
            return o, lse[:-1]
    return o, lse


@pytest.mark.parametrize("what", ["missing", "o", "lse", "infinite lse", "shape", "shape of lse"])
def test_a_part_that_is_none_is_refused(what: str) -> None:
    request = request_of(512)
    part = Holders(tiny_spec(), TOKENS).answer(0, request)
    check_part(request, part)
    with pytest.raises(ProtocolViolation):
        check_part(request, broken(part, what))


@pytest.mark.parametrize("start", [600, 1100])
def test_a_holder_that_lacks_rows_says_so(start: int) -> None:
    with pytest.raises(LocalFault, match=f"lacks rows before position {min(start, 1024)}"):
        attend_for(make_lease(tiny_spec(), LAYERS, TOKENS), request_of(start))
    with pytest.raises(LocalFault, match="the lease holds 0 to 511"):
        attend_for(make_lease(tiny_spec(), LAYERS, 512), request_of(512))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nothing_that_is_not_finite_is_sent(name: str) -> None:
    given = projected(600, 4, PLAIN)
    values = getattr(given, name).copy()
    values[1, 0, 3] = np.nan
    segments = [Segment(make_lease(tiny_spec(), LAYERS, TOKENS), 600, 4, (RemoteRun(LAYERS, range(1, 2)),))]
    with pytest.raises(LocalFault, match="not finite"):
        remote_requests(0, replace(given, **{name: values}), segments, ())
    with pytest.raises(LocalFault, match="KV heads 1 to 2"):
        remote_requests(0, given, [replace(segments[0], remote=(RemoteRun(LAYERS, range(1, 2), (1, 3)),))], ())
