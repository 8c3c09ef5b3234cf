"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), and how it is stretched for long contexts."""

import math

import numpy as np
import numpy.typing as npt

from meshd.types import ModelSpec, RopeScaling

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]


class Rope:
    """Rotations of some layers. Remembers the last positions asked for, since every layer of a step asks for the same."""

    def __init__(self, frequencies: F64, magnitude: float = 1.0) -> None:
        """`frequencies` `[rope_dim / 2]` in radians per token; rotated vectors get `magnitude` times as long."""
        self._frequencies = frequencies
        self._magnitude = magnitude
        self._last: tuple[bytes, F32, F32] | None = None

    def rows(self, positions: Positions) -> tuple[F32, F32]:
        """Cosines and sines, each `[tokens, rope_dim / 2]`."""
        key = positions.tobytes()
        if self._last is None or self._last[0] != key:
            angles = np.outer(positions, self._frequencies)
            cos, sin = np.cos(angles) * self._magnitude, np.sin(angles) * self._magnitude
            self._last = key, cos.astype(np.float32), sin.astype(np.float32)
        return self._last[1], self._last[2]


def plain_frequencies(turned: int, theta: float) -> F64:
    """Of `turned` dimensions, `[turned / 2]`, in radians per token."""
    found: F64 = theta ** (-np.arange(0, turned, 2, dtype=np.float64) / turned)
    return found


def rope_of(spec: ModelSpec, factors: F32 | None = None, *, windowed: bool = False) -> Rope:
    """A model's rotations, or those of its layers with a window. `factors` `[rope_dim / 2]` divide the frequencies."""
    theta = spec.rope_theta_windowed if windowed else spec.rope_theta
    frequencies = plain_frequencies(spec.rope_dim or spec.head_dim, theta)
    if windowed:
        return Rope(frequencies)
    if factors is not None:
        frequencies = frequencies / factors
    if spec.rope_scaling is not None:
        frequencies = stretched(frequencies, theta, spec.rope_scaling)
    return Rope(frequencies, spec.rope_magnitude)


def stretched(frequencies: F64, theta: float, scaling: RopeScaling) -> F64:
    """Frequencies for a longer context: all of them lower, or with YaRN (https://arxiv.org/abs/2309.00071) the slow ones."""
    slower = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slower
    turned = 2 * len(frequencies)

    def index(turns: float) -> float:
        """Of the frequency that makes so many turns within the original context."""
        return turned * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.whole_bounds:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turned - 1)
    ramp = np.clip((np.arange(len(frequencies)) - low) / max(high - low, 0.001), 0, 1)
    blended: F64 = slower * ramp + frequencies * (1 - ramp)
    return blended
