"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), and its scaling for long contexts."""

import math

import numpy as np
import numpy.typing as npt

from meshd.types import ModelSpec, RopeScaling

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]


class Rope:
    """Computes the cosines and sines of rotations, for all layers with the same frequencies.

    Caches the last result, since all layers of a step use the same positions.
    """

    def __init__(self, frequencies: F64, magnitude: float = 1.0) -> None:
        """`frequencies` `[rope_dim / 2]` are in radians per token; `magnitude` multiplies the length of rotated vectors."""
        self._frequencies = frequencies
        self._magnitude = magnitude
        self._last: tuple[bytes, F32, F32] | None = None

    def rows(self, positions: Positions) -> tuple[F32, F32]:
        """Compute the cosines and sines of positions, each `[tokens, rope_dim / 2]`."""
        key = positions.tobytes()
        if self._last is None or self._last[0] != key:
            angles = np.outer(positions, self._frequencies)
            cos, sin = np.cos(angles) * self._magnitude, np.sin(angles) * self._magnitude
            self._last = key, cos.astype(np.float32), sin.astype(np.float32)
        return self._last[1], self._last[2]


def base_frequencies(rope_dim: int, theta: float) -> F64:
    """Compute the frequencies of `rope_dim` dimensions before any scaling. Returns: `[rope_dim / 2]`, in radians per token."""
    frequencies: F64 = theta ** (-np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim)
    return frequencies


def rope_of(spec: ModelSpec, factors: F32 | None = None, *, windowed: bool = False) -> Rope:
    """Make the `Rope` of a model's layers, or with `windowed` of its layers with a window.

    `factors` `[rope_dim / 2]` divide the frequencies. With `windowed`, the frequencies are neither divided nor scaled.
    """
    theta = spec.rope_theta_windowed if windowed else spec.rope_theta
    frequencies = base_frequencies(spec.rope_dim or spec.head_dim, theta)
    if windowed:
        return Rope(frequencies)
    if factors is not None:
        frequencies = frequencies / factors
    if spec.rope_scaling is not None:
        frequencies = scale_frequencies(frequencies, theta, spec.rope_scaling)
    return Rope(frequencies, spec.rope_magnitude)


def scale_frequencies(frequencies: F64, theta: float, scaling: RopeScaling) -> F64:
    """Lower the frequencies for a longer context: all of them, or with YaRN (https://arxiv.org/abs/2309.00071) the low ones."""
    slower = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slower
    rope_dim = 2 * len(frequencies)

    def index(turns: float) -> float:
        """Compute the index of the frequency that makes `turns` turns within the original context."""
        return rope_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.whole_bounds:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_dim - 1)
    ramp = np.clip((np.arange(len(frequencies)) - low) / max(high - low, 0.001), 0, 1)
    blended: F64 = slower * ramp + frequencies * (1 - ramp)
    return blended
