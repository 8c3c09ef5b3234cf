"""Small tensor functions of the torch backend."""

import torch

from meshd.kernels.weights.layers import CLAMP, CLAMPED_SLOPE


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Scale each row of `x` `[tokens, hidden]` to a mean square of one, times `weight` `[hidden]`.

    Source: https://arxiv.org/abs/1910.07467.
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, halves: bool) -> torch.Tensor:
    """Rotate the first `rope_dim` dimensions of `x` `[tokens, heads, head_dim]`. `cos` and `sin` are `[tokens, 1, rope_dim / 2]`.

    With `halves`, a pair is dimension i of the first and of the second half (GPT-NeoX); otherwise, two neighbouring dimensions.
    """
    rotated, rest = torch.split(x, [2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    one, other = rotated.chunk(2, dim=-1) if halves else (rotated[..., 0::2], rotated[..., 1::2])
    pair = one * cos - other * sin, one * sin + other * cos
    return torch.cat([*pair, rest], dim=-1) if halves else torch.cat([torch.stack(pair, dim=-1).flatten(-2), rest], dim=-1)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Compute `activation(gate) * up` of the halves gate and up (`clamped`: `up + 1`): `[tokens, 2 * ffn]` to `[tokens, ffn]`.

    Source: https://arxiv.org/abs/2002.05202.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    match activation:
        case "silu":
            return torch.nn.functional.silu(gate) * up
        case "gelu_tanh":
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
    # Both halves are scaled though one is used: torch computes the last elements of contiguous memory by another function than the
    # others, so the sigmoid of contiguous rows would have other bits in the last row. A half is computed row by row.
    scaled, _ = (CLAMPED_SLOPE * gate_up.clamp(max=CLAMP)).chunk(2, dim=-1)
    gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
    return gate * torch.sigmoid(scaled) * (up + 1)


def soft_capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """Limit values to between -cap and cap by tanh. 0: no cap."""
    return torch.tanh(x / cap) * cap if cap else x
