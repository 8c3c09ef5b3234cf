"""Compares attention with its simple version in `reference.py`, and merged parts with attention over all keys."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.kernels import attention, reference
from meshd.kernels.attention import LocalAttention, attend, attend_part, merge_parts, with_sinks
from meshd.kernels.backend import PLAIN, AttentionRule, Projected, Segment
from meshd.kernels.kv import KVPool
from meshd.kernels.threads import Workers
from meshd.types import LayerRange
from tiny.llama import tiny_spec

TOLERANCE = {"rtol": 2e-5, "atol": 5e-5}
"""Scores reach 30, where float32 numbers are 2e-6 apart. The largest difference seen was 2.4e-5, for a rule with scale 0.3."""
shapes = st.tuples(st.integers(1, 20), st.integers(1, 3), st.integers(1, 4), st.sampled_from([8, 32, 64]))


def made(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * 2


def made_qkv(seed: int, shape: tuple[int, int, int, int], keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    tokens, kv_heads, group, head_dim = shape
    q = made(seed, tokens, kv_heads * group, head_dim)
    return q, made(seed + 1, keys, kv_heads, head_dim), made(seed + 2, keys, kv_heads, head_dim)


@given(shape=shapes, keys=st.integers(0, 70), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_part_agrees_with_the_reference(shape: tuple[int, int, int, int], keys: int, seed: int) -> None:
    q, k, v = made_qkv(seed, shape, keys)
    o, lse = attend_part(q, k, v)
    plain_o, plain_lse = reference.attend_part(q, k, v, np.ones((len(q), keys), bool))
    np.testing.assert_allclose(o, plain_o, **TOLERANCE)
    np.testing.assert_allclose(lse, plain_lse, **TOLERANCE)


@given(shape=shapes, past=st.integers(0, 40), seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_chunk_sees_the_past_and_itself_up_to_each_token(shape: tuple[int, int, int, int], past: int, seed: int) -> None:
    keys = past + shape[0]
    q, k, v = made_qkv(seed, shape, keys)
    mask = np.arange(keys) <= past + np.arange(len(q))[:, None]
    np.testing.assert_allclose(attend_part(q, k, v, past)[0], reference.attend_part(q, k, v, mask)[0], **TOLERANCE)


rules = st.builds(
    AttentionRule,
    scale=st.sampled_from([None, 0.3]),
    window=st.sampled_from([0, 1, 5, 32, 33, 60]),
    soft_cap=st.sampled_from([0.0, 3.0]),
)


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, rule: AttentionRule) -> attention.Part:
    """Compute attention with the reference; token i is at key index first + i."""
    at, keys = first + np.arange(len(q))[:, None], np.arange(len(k))
    mask = (keys <= at) & ((keys > at - rule.window) | (rule.window == 0))
    return reference.attend_part(q, k, v, mask, scale=rule.scale, soft_cap=rule.soft_cap)


@given(shape=shapes, first=st.integers(-20, 90), keys=st.integers(0, 70), rule=rules, seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_part_by_any_rule_agrees_with_the_reference(
    shape: tuple[int, int, int, int], first: int, keys: int, rule: AttentionRule, seed: int
) -> None:
    """Covers chunks that see no key: all keys are before their windows, or after their tokens."""
    q, k, v = made_qkv(seed, shape, keys)
    for got, right in zip(attend_part(q, k, v, first, rule), plain(q, k, v, first, rule), strict=True):
        np.testing.assert_allclose(got, right, **TOLERANCE)


@given(shape=shapes, cuts=st.lists(st.integers(0, 60), max_size=4), head=st.integers(0, 3), rule=rules, seed=st.integers(0, 99))
@settings(deadline=None)
def test_any_split_of_heads_and_keys_merges_to_the_whole(
    shape: tuple[int, int, int, int], cuts: list[int], head: int, rule: AttentionRule, seed: int
) -> None:
    tokens, kv_heads, group, _ = shape
    q, k, v = made_qkv(seed, shape, 60)
    first, head = 60 - tokens, min(head, kv_heads)
    sinks = made(seed + 3, kv_heads * group)

    def heads(a: int, b: int) -> np.ndarray:
        own = q[:, a * group : b * group]
        parts = [attend_part(own, k[c:d, a:b], v[c:d, a:b], first - c, rule) for c, d in itertools.pairwise([0, *sorted(cuts), 60])]
        return with_sinks(merge_parts(parts), sinks[a * group : b * group])

    split = np.concatenate([heads(a, b) for a, b in ((0, head), (head, kv_heads)) if a < b], axis=1)
    np.testing.assert_allclose(split, attend(q, k, v, first, replace(rule, sinks=sinks)), **TOLERANCE)
    o, lse = plain(q, k, v, first, rule)
    np.testing.assert_allclose(split, o * np.exp(lse - np.logaddexp(lse, sinks))[..., None], **TOLERANCE)


@given(shape=shapes, cuts=st.lists(st.integers(0, 60), max_size=5), seed=st.integers(0, 99))
@settings(deadline=None)
def test_any_split_of_the_keys_merges_to_the_whole(shape: tuple[int, int, int, int], cuts: list[int], seed: int) -> None:
    """Includes empty parts, which two equal cuts make."""
    q, k, v = made_qkv(seed, shape, 60)
    edges = [0, *sorted(cuts), 60]
    parts = [attend_part(q, k[a:b], v[a:b]) for a, b in itertools.pairwise(edges)]
    whole_o, whole_lse = attend_part(q, k, v)
    o, lse = merge_parts(parts)
    np.testing.assert_allclose(o, whole_o, **TOLERANCE)
    np.testing.assert_allclose(lse, whole_lse, **TOLERANCE)


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"),
    [(3, 3, 64), (2, 1, 64), (2, 4, 128), (1, 8, 32), (2, 2, 80), (1, 40, 64), (1, 5, 96), (1, 7, 64), (1, 13, 32), (1, 17, 256)],
)
def test_a_token_has_the_same_bits_in_any_chunk(kv_heads: int, group: int, head_dim: int) -> None:
    tokens = 80
    q, k, v = made_qkv(5, (tokens, kv_heads, group, head_dim), 640)
    for rule in (PLAIN, AttentionRule(window=50), AttentionRule(window=64, soft_cap=5.0, sinks=made(8, kv_heads * group))):
        whole = attend(q, k, v, 450, rule)
        for size in (1, 7, 32, 64):
            chunks = [attend(q[i : i + size], k, v, 450 + i, rule) for i in range(0, tokens, size)]
            assert np.concatenate(chunks).tobytes() == whole.tobytes()


def test_without_keys_o_is_zero_and_lse_minus_infinity() -> None:
    q, empty = made(0, 2, 4, 8), np.zeros((0, 2, 8), np.float32)
    o, lse = attend_part(q, empty, empty)
    assert np.all(o == 0)
    assert np.all(np.isneginf(lse))
    merged_o, merged_lse = merge_parts([(o, lse), (o, lse)])
    assert np.all(merged_o == 0)
    assert np.all(np.isneginf(merged_lse))


def test_large_scores_do_not_overflow() -> None:
    q, k, v = made(0, 1, 2, 8) * 100, made(1, 9, 2, 8) * 100, made(2, 9, 2, 8)
    o, lse = merge_parts([attend_part(q, k[:4], v[:4]), attend_part(q, k[4:], v[4:])])
    plain_o, plain_lse = reference.attend_part(q, k, v, np.ones((1, 9), bool))
    np.testing.assert_allclose(o, plain_o, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(lse, plain_lse, rtol=1e-5)


@pytest.mark.parametrize("sizes", [[40], [17, 1, 1, 21], [1] * 40])
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    monkeypatch.setattr(attention, "PARALLEL_WORK", 0)
    results = []
    for workers in (Workers(1), Workers(2), Workers(3)):
        attend, pool = LocalAttention(workers), KVPool(tiny_spec(), LayerRange(0, 1), blocks=4)
        table, start, parts = pool.allocate(40), 0, []
        for size in sizes:
            q, k, v = made(start, size, 6, 32), made(start + 1, size, 2, 32), made(start + 2, size, 2, 32)
            parts.append(attend(0, Projected(q, k, v, q), [Segment(table, start, size)], pool))
            start += size
        results.append(np.concatenate(parts).tobytes())
    assert results[0] == results[1] == results[2]


def test_read_only_arrays_are_accepted() -> None:
    q, k, v = (np.frombuffer(made(i, n, 2, 8).tobytes(), np.float32).reshape(n, 2, 8) for i, n in enumerate((3, 5, 5)))
    assert attend_part(q, k, v, 2)[0].tobytes() == attend_part(q.copy(), k.copy(), v.copy(), 2)[0].tobytes()
