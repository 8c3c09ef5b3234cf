"""Compares attention over spans with its simple version in `reference.py`, and its bits for any chunk, holder, thread or batch."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.errors import LocalFault
from meshd.kernels import reference
from meshd.kernels.attention import local, spans
from meshd.kernels.attention.kernel import KEY_STEP, attend_keys
from meshd.kernels.attention.local import LocalAttention
from meshd.kernels.attention.spans import attend, attend_part, attend_tokens
from meshd.kernels.attention.tree import SPAN_TOKENS, Part, merge_runs, with_sinks
from meshd.kernels.backend import PLAIN, AttentionRule, Projected, Segment
from meshd.kernels.kv.memory import PAGE_TOKENS
from meshd.kernels.threads import Workers
from meshd.types import LayerRange
from tiny.kv import make_lease
from tiny.llama import tiny_spec
from tiny.qkv import made, made_qkv

TOLERANCE = {"rtol": 2e-5, "atol": 5e-5}
"""Scores reach 30, where float32 numbers are 2e-6 apart. The largest difference seen was 2.4e-5, for a rule with scale 0.3."""
SPAN = 64
"""A small span, so that few keys make a deep tree."""
shapes = st.tuples(st.integers(1, 70), st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 32, 64]))
rules = st.builds(
    AttentionRule,
    scale=st.sampled_from([None, 0.3]),
    window=st.sampled_from([0, 0, 1, 5, 32, 33, 64, 65, 150]),
    soft_cap=st.sampled_from([0.0, 0.0, 3.0]),
)


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int, rule: AttentionRule, begin: int = 0) -> Part:
    """Compute attention with the reference; token i is at position start + i, and the first key at `begin`."""
    at, keys = start + np.arange(len(q))[:, None], begin + np.arange(len(k))
    mask = (keys <= at) & ((keys > at - rule.window) | (rule.window == 0))
    return reference.attend_part(q, k, v, mask, scale=rule.scale, soft_cap=rule.soft_cap)


@given(shape=shapes, start=st.integers(0, 400), rule=rules, seed=st.integers(0, 99))
@settings(deadline=None)
def test_attention_agrees_with_the_reference(shape: tuple[int, int, int, int], start: int, rule: AttentionRule, seed: int) -> None:
    q, k, v = made_qkv(seed, shape, start + shape[0])
    o, lse = plain(q, k, v, start, rule)
    for got, right in zip(attend_part(q, k, v, start, rule, span=SPAN), (o, lse), strict=True):
        np.testing.assert_allclose(got, right, **TOLERANCE)
    sinks = made(seed + 3, q.shape[1])
    got = attend(q, k, v, start, replace(rule, sinks=sinks), SPAN)
    np.testing.assert_allclose(got, o * np.exp(lse - np.logaddexp(lse, sinks))[..., None], **TOLERANCE)


@given(
    positions=st.lists(st.integers(0, 700), min_size=1, max_size=6),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 64])),
    rule=rules,
    sinks=st.booleans(),
    spans_at_once=st.sampled_from([1, 4, 1 << 20]),
)
@settings(deadline=None)
def test_tokens_of_several_sessions_get_the_bits_that_each_gets_alone(
    positions: list[int], shape: tuple[int, int, int], rule: AttentionRule, sinks: bool, spans_at_once: int
) -> None:
    """They see different numbers of spans, which are merged in groups or, where there are too many, one token at a time."""
    made_each = [made_qkv(at, (1, *shape), (at // PAGE_TOKENS + 1) * PAGE_TOKENS) for at in positions]
    q = np.concatenate([own for own, _, _ in made_each])
    rule = replace(rule, sinks=made(7, q.shape[1])) if sinks else rule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "MERGE_FLOATS", spans_at_once * q[0].size)
        together = attend_tokens(q, [(k, v) for _, k, v in made_each], positions, rule, SPAN)
        for got, (own, k, v), at in zip(together, made_each, positions, strict=True):
            np.testing.assert_array_equal(got, attend(own, k, v, at, rule, SPAN)[0])


@given(shape=shapes, start=st.integers(0, 500), first=st.integers(0, 6), count=st.integers(1, 4), rule=rules)
@settings(deadline=None)
def test_a_part_agrees_with_the_reference(
    shape: tuple[int, int, int, int], start: int, first: int, count: int, rule: AttentionRule
) -> None:
    """Covers tokens that see no key: all are left of their windows, or behind the tokens."""
    q, k, v = made_qkv(start, shape, count * SPAN)
    right = plain(q, k, v, start, rule, first * SPAN)
    for got, expected in zip(attend_part(q, k, v, start, rule, first, SPAN), right, strict=True):
        np.testing.assert_allclose(got, expected, **TOLERANCE)


@given(shape=shapes, start=st.integers(0, 450), rule=rules, sinks=st.booleans(), data=st.randoms(use_true_random=False))
@settings(deadline=None)
def test_any_cut_into_aligned_runs_and_heads_gives_the_same_bits(
    shape: tuple[int, int, int, int], start: int, rule: AttentionRule, sinks: bool, data: random.Random
) -> None:
    """Each run is held elsewhere: it has a copy of its keys only. Only the last one is filled in part."""
    tokens, kv_heads, group, _ = shape
    q, k, v = made_qkv(data.randrange(99), shape, start + tokens)
    rule = replace(rule, sinks=made(7, kv_heads * group)) if sinks else rule
    whole = attend(q, k, v, start, rule, SPAN)

    def cut(level: int, index: int) -> list[range]:
        if level and data.random() < 0.7:
            return cut(level - 1, 2 * index) + cut(level - 1, 2 * index + 1)
        return [range(index << level, (index + 1) << level)]

    def heads(a: int, b: int) -> np.ndarray:
        runs = [(run, slice(run.start * SPAN, run.stop * SPAN)) for run in cut(4, 0) if run.start * SPAN < len(k)]
        own = q[:, a * group : b * group]
        held = [(run, k[keys, a:b].copy(), v[keys, a:b].copy()) for run, keys in runs]
        parts = [(run, attend_part(own, keys, values, start, rule, run.start, SPAN)) for run, keys, values in held]
        merged = merge_runs(parts)
        return merged[0] if rule.sinks is None else with_sinks(merged, rule.sinks[a * group : b * group])

    edge = data.randrange(kv_heads)
    split = np.concatenate([heads(a, b) for a, b in ((0, edge), (edge, kv_heads)) if a < b], axis=1)
    assert split.tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"),
    [(3, 3, 64), (2, 1, 64), (2, 4, 128), (1, 8, 32), (2, 2, 80), (1, 40, 64), (1, 5, 96), (1, 7, 64), (1, 13, 32), (1, 17, 256)],
)
def test_a_token_has_the_same_bits_in_any_chunk(kv_heads: int, group: int, head_dim: int) -> None:
    """The chunk crosses a border of two spans."""
    tokens = 40
    q, k, v = made_qkv(5, (tokens, kv_heads, group, head_dim), 1040)
    capped = AttentionRule(window=64, soft_cap=5.0, sinks=made(8, kv_heads * group))
    for rule, span in ((PLAIN, SPAN_TOKENS), (AttentionRule(window=150), SPAN), (capped, SPAN)):
        o, lse = attend_part(q, k, v, 1000, rule, span=span)
        for size in (1, 7, 32):
            chunks = [attend_part(q[i : i + size], k, v, 1000 + i, rule, span=span) for i in range(0, tokens, size)]
            assert np.concatenate([part for part, _ in chunks]).tobytes() == o.tobytes()
            assert np.concatenate([part for _, part in chunks]).tobytes() == lse.tobytes()


@pytest.mark.parametrize("window", [0, 1, 40, 64, 100])
def test_a_token_reads_the_same_keys_in_any_chunk(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a product's bits do not depend on its length, only this shows that the keys read do not depend on the chunk."""
    tokens, start = 150, 21
    _, k, v = made_qkv(0, (1, 1, 1, 8), 192)
    k[:, 0, 0] = np.arange(len(k))
    q = np.zeros((tokens, 1, 8), np.float32)
    q[:, 0, 0] = np.arange(start, start + tokens)
    seen: dict[float, list[tuple[float, int]]] = {}

    def reads(size: int) -> dict[float, list[tuple[float, int]]]:
        """Return for each position the first key and the number of keys of each range read for it."""
        seen.clear()
        for i in range(0, tokens, size):
            attend(q[i : i + size], k, v, start + i, AttentionRule(window=window), SPAN)
        return {position: sorted(ranges) for position, ranges in seen.items()}

    def record(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int | None, rule: AttentionRule, out: Part) -> None:
        for position in q[:, 0, 0]:
            seen.setdefault(float(position), []).extend((float(keys[0, 0, 0]), len(keys)) for keys in k)
        attend_keys(q, k, v, first, rule, out)

    monkeypatch.setattr(spans, "attend_keys", record)
    whole = reads(tokens)
    assert len(whole) == tokens
    assert all(reads(size) == whole for size in (1, 7, 32, 64))


def test_spans_merged_run_by_run_have_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = made_qkv(0, (40, 2, 2, 32), 900)
    rules = PLAIN, AttentionRule(window=400)
    at_once = [attend(q, k, v, 860, rule, SPAN).tobytes() for rule in rules]
    monkeypatch.setattr(spans, "MERGE_FLOATS", 4 * q.size)
    assert [attend(q, k, v, 860, rule, SPAN).tobytes() for rule in rules] == at_once


def test_a_key_that_is_seen_must_be_held() -> None:
    q, k, v = made_qkv(0, (1, 1, 1, 8), SPAN + 10)
    for start in (SPAN + 10, 2 * SPAN):
        with pytest.raises(LocalFault, match="not held"):
            attend_part(q, k, v, start, span=SPAN)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = made(0, 1, 2, 8) * 100, made(1, 200, 2, 8) * 100, made(2, 200, 2, 8)
    o, lse = attend_part(q, k, v, 199, span=SPAN)
    plain_o, plain_lse = plain(q, k, v, 199, PLAIN)
    np.testing.assert_allclose(o, plain_o, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(lse, plain_lse, rtol=1e-5)


@pytest.mark.parametrize("sizes", [[600], [507, 1, 1, 91], [500] + [1] * 100])
def test_bits_depend_neither_on_threads_nor_on_the_batch(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    """In every step a second session with another number of tokens is computed before the first one."""
    monkeypatch.setattr(local, "PARALLEL_WORK", 0)
    results = []
    for threads, neighbours in ((1, 0), (2, 0), (3, 3)):
        attend = LocalAttention(Workers(threads))
        other, lease = (make_lease(tiny_spec(), LayerRange(0, 1), tokens) for tokens in (3 * len(sizes), 600))
        start, parts = 0, []
        for step, size in enumerate(sizes):
            q, k, v = made(start, size, 6, 32), made(start + 1, size, 2, 32), made(start + 2, size, 2, 32)
            segments = [Segment(lease, start, size)]
            if neighbours:
                segments.insert(0, Segment(other, neighbours * step, neighbours))
                q, k, v = (np.concatenate((made(step, neighbours, *part.shape[1:]), part)) for part in (q, k, v))
            parts.append(attend(0, Projected(q, k, v, q), segments)[neighbours:])
            start += size
        results.append(np.concatenate(parts).tobytes())
    assert results[0] == results[1] == results[2]


def test_read_only_arrays_are_accepted() -> None:
    q, k, v = (np.frombuffer(made(i, n, 2, 8).tobytes(), np.float32).reshape(n, 2, 8) for i, n in enumerate((3, 5, 5)))
    assert attend(q, k, v, 2).tobytes() == attend(q.copy(), k.copy(), v.copy(), 2).tobytes()


def test_blocks_and_steps_divide_a_span() -> None:
    """Otherwise a whole span could be read in part, or a block hold two spans."""
    assert SPAN_TOKENS % PAGE_TOKENS == PAGE_TOKENS % KEY_STEP == 0
