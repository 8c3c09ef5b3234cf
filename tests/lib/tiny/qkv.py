"""Random queries, keys and values."""

import numpy as np


def made(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * 2


def made_qkv(seed: int, shape: tuple[int, int, int, int], keys: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make q, k and v for a shape (tokens, kv_heads, queries per KV head, head_dim)."""
    tokens, kv_heads, group, head_dim = shape
    q = made(seed, tokens, kv_heads * group, head_dim)
    return q, made(seed + 1, keys, kv_heads, head_dim), made(seed + 2, keys, kv_heads, head_dim)
