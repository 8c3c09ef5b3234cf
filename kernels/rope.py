"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864), pairs interleaved as in GGUF's Llama weights."""

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]


class Rope:
    """Rotations of a model. Remembers the last positions asked for, since every layer of a step asks for the same."""

    def __init__(self, head_dim: int, theta: float, factors: F32 | None = None) -> None:
        """`factors` `[head_dim / 2]` divide the frequencies (Llama 3's long contexts)."""
        frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        self._frequencies = frequencies if factors is None else frequencies / factors
        self._last: tuple[bytes, F32, F32] | None = None

    def rows(self, positions: Positions) -> tuple[F32, F32]:
        """Cosines and sines, each `[tokens, head_dim / 2]`."""
        key = positions.tobytes()
        if self._last is None or self._last[0] != key:
            angles = np.outer(positions, self._frequencies)
            self._last = key, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return self._last[1], self._last[2]
