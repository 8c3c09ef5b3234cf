"""Computes how much memory weights take in a backend's form, from their kinds."""

import math
from collections.abc import Callable, Mapping

from meshd.errors import ModelFileError
from meshd.kernels.weights.kinds import BLOCK_KINDS, BlockKind

_DENSE_BITS = {"F32": 32, "F16": 16, "BF16": 16}
"""Both backends keep floats as the file has them."""
_MANY = 1 << 20
"""So many weights that their bytes are whole."""


def memory_bytes(weights: Mapping[str, int], bits_of: Callable[[BlockKind], float]) -> int:
    """Add up the memory of weights.

    weights: GGUF kind -> number of weights.
    bits_of: bits per weight of a quantised kind, in the backend's form.
    Raises: ModelFileError for a kind that no backend computes with.
    """
    bits = 0.0
    for kind, count in weights.items():
        if kind not in _DENSE_BITS and kind not in BLOCK_KINDS:
            raise ModelFileError(f"weights of kind {kind} can't be computed with here")
        bits += count * (_DENSE_BITS[kind] if kind in _DENSE_BITS else bits_of(BLOCK_KINDS[kind]))
    return math.ceil(bits / 8)


def weight_bits(of: Callable[[Mapping[str, int]], int]) -> dict[str, float]:
    """Return the bits that a weight of each kind takes. `of`: the `memory_bytes` of a backend."""
    return {kind: 8 * of({kind: _MANY}) / _MANY for kind in (*_DENSE_BITS, *BLOCK_KINDS)}
