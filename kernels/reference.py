"""A simple numpy version of each kernel, which tests compare the fast kernels with."""

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """Normalise `x` `[tokens, hidden]` (https://arxiv.org/abs/1910.07467)."""
    scaled: F32 = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(eps)) * weight
    return scaled


def rotate(x: F32, cos: F32, sin: F32) -> F32:
    """Rotate `x` `[tokens, heads, head_dim]` by `cos` and `sin` `[tokens, head_dim / 2]`; neighbouring dimensions are pairs."""
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[:, None], sin[:, None]
    return np.stack([even * c - odd * s, even * s + odd * c], axis=-1).reshape(x.shape)


def swiglu(gate: F32, up: F32) -> F32:
    """Compute `silu(gate) * up` (https://arxiv.org/abs/2002.05202)."""
    activated: F32 = gate / (1 + np.exp(-gate)) * up
    return activated


def attend_part(
    q: F32, k: F32, v: F32, mask: npt.NDArray[np.bool_], *, scale: float | None = None, soft_cap: float = 0.0
) -> tuple[F32, F32]:
    """Compute attention of `q` `[tokens, heads, head_dim]` over `k` and `v` `[keys, kv_heads, head_dim]`.

    `mask` `[tokens, keys]` is true where a token attends to a key. `scale` None is 1 / sqrt(head_dim). With `soft_cap`, scores
    become `cap tanh(score / cap)` (Gemma 2, https://arxiv.org/abs/2408.00118).

    Returns: o `[tokens, heads, head_dim]` and lse `[tokens, heads]`; 0 and -inf for a token that attends to no key.
    """
    group = q.shape[1] // k.shape[1]
    scores = np.einsum("thd,khd->thk", q, k.repeat(group, axis=1)) * np.float32(scale or q.shape[2] ** -0.5)
    if soft_cap:
        scores = np.float32(soft_cap) * np.tanh(scores / np.float32(soft_cap))
    scores = np.where(mask[:, None, :], scores, -np.inf)
    top = np.max(scores, axis=-1, initial=-np.inf)
    finite = np.where(np.isfinite(top), top, 0)
    weights = np.exp(scores - finite[..., None])
    total = weights.sum(axis=-1)
    o = np.einsum("thk,khd->thd", weights, v.repeat(group, axis=1)) / np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        return o.astype(np.float32), (np.log(total) + finite).astype(np.float32)
