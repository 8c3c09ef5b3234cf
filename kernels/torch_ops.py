"""Small tensor functions of the torch path."""

import numpy as np
import numpy.typing as npt
import torch


def to_tensor(array: npt.NDArray[np.float32]) -> torch.Tensor:
    """A view of an array; of a read-only one, which torch can't hold, a copy."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`[tokens, hidden]` to a mean square of one, times `weight` `[hidden]` (https://arxiv.org/abs/1910.07467)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`[tokens, heads, head_dim]` by `[tokens, 1, head_dim / 2]`, pairs interleaved."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
