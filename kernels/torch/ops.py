"""Small tensor functions of the torch path."""

import torch

from meshd.kernels.weights.layers import CLAMP, CLAMPED_SLOPE


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`[tokens, hidden]` to a mean square of one, times `weight` `[hidden]` (https://arxiv.org/abs/1910.07467)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, halves: bool) -> torch.Tensor:
    """The first dimensions of `[tokens, heads, head_dim]` by `[tokens, 1, rope_dim / 2]`: neighbours as pairs, or halves."""
    turned, rest = torch.split(x, [2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    one, other = turned.chunk(2, dim=-1) if halves else (turned[..., 0::2], turned[..., 1::2])
    pair = one * cos - other * sin, one * sin + other * cos
    return torch.cat([*pair, rest], dim=-1) if halves else torch.cat([torch.stack(pair, dim=-1).flatten(-2), rest], dim=-1)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """`[tokens, 2 * ffn]` to `[tokens, ffn]`: the gate's activation times the other half (https://arxiv.org/abs/2002.05202)."""
    gate, up = gate_up.chunk(2, dim=-1)
    match activation:
        case "silu":
            return torch.nn.functional.silu(gate) * up
        case "gelu_tanh":
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    return gate * torch.sigmoid(CLAMPED_SLOPE * gate) * (up + 1)


def soft_capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.tanh(x / cap) * cap if cap else x
