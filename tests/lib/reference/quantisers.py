"""Quantises weights to every kind that meshd reads, for tests of kinds in which no model file is available.

The `gguf` package quantises to some kinds. This module does the others by rounding: the blocks are valid, but for most
kinds their errors are larger than those of llama.cpp, which searches for good scales.
"""

import gguf
import numpy as np

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)
"""Absolute values of the 4-bit numbers of MXFP4, times 2."""
CHUNK = 1 << 21
"""Number of weights quantised at a time, which takes some tens of megabytes."""


def quantised(values: np.ndarray, kind: str) -> np.ndarray:
    """Quantise `[rows, columns]` float32 to `[rows, bytes]`. A row must consist of whole blocks of the kind."""
    type_number = gguf.GGMLQuantizationType[kind]
    make = _OWN.get(kind)
    if make is None:
        return np.ascontiguousarray(gguf.quants.quantize(values, type_number)).view(np.uint8)
    weights, size = gguf.GGML_QUANT_SIZES[type_number]
    blocks = values.reshape(-1, weights)
    made = np.empty((len(blocks), size), np.uint8)
    step = CHUNK // weights
    for start in range(0, len(blocks), step):
        made[start : start + step] = make(blocks[start : start + step])
    return made.reshape(len(values), -1)


def _over(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return `values / scale`, and 0 where the scale is 0."""
    return np.divide(values, scale, out=np.zeros(np.broadcast_shapes(values.shape, scale.shape), np.float32), where=scale != 0)


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def _bytes(halves: np.ndarray) -> np.ndarray:
    return halves.astype(np.float16).view(np.uint8)


def _extreme(x: np.ndarray) -> np.ndarray:
    """Return the value with the largest magnitude along the last axis, which becomes 1 long."""
    return np.take_along_axis(x, abs(x).argmax(axis=-1, keepdims=True), axis=-1)


def _with_minima(x: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise blocks `[n, 256]`. Returns: the 16 bytes of scales and minima, as in Q4_K and Q5_K, and the codes `[n, 8, 32]`."""
    groups = x.reshape(-1, 8, 32)
    low = -np.minimum(groups.min(axis=2), 0)
    scale = (groups.max(axis=2) + low) / levels
    super_scale, super_low = (_half(part.max(axis=1, keepdims=True) / 63) for part in (scale, low))
    six, six_low = (np.clip(np.rint(_over(part, top)), 0, 63) for part, top in ((scale, super_scale), (low, super_low)))
    codes = np.clip(np.rint(_over(groups + (super_low * six_low)[..., None], (super_scale * six)[..., None])), 0, levels)
    s, m = six.astype(np.uint8), six_low.astype(np.uint8)
    packed = [s[:, :4] | s[:, 4:] >> 4 << 6, m[:, :4] | m[:, 4:] >> 4 << 6, s[:, 4:] & 15 | (m[:, 4:] & 15) << 4]
    return np.concatenate([_bytes(super_scale), _bytes(super_low), *packed], axis=1), codes.astype(np.uint8)


def _pairs(codes: np.ndarray, run: int) -> np.ndarray:
    """Pack the low 4 bits of codes into bytes `[n, weights / 2]`.

    Each two runs of `run` codes become `run` bytes: the first run in the low halves, the second in the high halves.
    """
    runs = codes.reshape(len(codes), -1, 2, run)
    return ((runs[:, :, 0] & 15) | (runs[:, :, 1] << 4)).reshape(len(codes), -1)


def _q4_k(x: np.ndarray) -> np.ndarray:
    head, codes = _with_minima(x, 15)
    return np.concatenate([head, _pairs(codes, 32)], axis=1)


def _q5_k(x: np.ndarray) -> np.ndarray:
    head, codes = _with_minima(x, 31)
    fifth = np.packbits(codes.transpose(0, 2, 1) >> 4, axis=2, bitorder="little")[:, :, 0]
    return np.concatenate([head, fifth, _pairs(codes, 32)], axis=1)


def _q6_k(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(-1, 16, 16)
    scale = _extreme(groups)[:, :, 0] / -32
    super_scale = _half(_extreme(scale) / -128)
    eight = np.clip(np.rint(_over(scale, super_scale)), -128, 127)
    codes = (np.clip(np.rint(_over(groups, (super_scale * eight)[..., None])), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    four = (codes[:, :, :2] & 15) | (codes[:, :, 2:] << 4)
    two = sum((codes[:, :, quarter] >> 4) << 2 * quarter for quarter in range(4))
    parts = [four.reshape(-1, 128), two.reshape(-1, 64), eight.astype(np.int8).view(np.uint8), _bytes(super_scale)]
    return np.concatenate(parts, axis=1)


def _nearest(x: np.ndarray, table: tuple[int, ...]) -> np.ndarray:
    middles = (np.array(table[1:], np.float32) + np.array(table[:-1], np.float32)) / 2
    return np.searchsorted(middles, x).astype(np.uint8)


def _iq4_nl(x: np.ndarray) -> np.ndarray:
    scale = _half(_extreme(x) / -127)
    return np.concatenate([_bytes(scale), _pairs(_nearest(_over(x, scale), IQ4_NL), 16)], axis=1)


def _mxfp4(x: np.ndarray) -> np.ndarray:
    largest = abs(x).max(axis=1, keepdims=True)
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1 - 2 + 127, 0).clip(0, 252)
    doubled = np.ldexp(x, 128 - exponent)
    codes = _nearest(abs(doubled), E2M1) | np.where(x < 0, 8, 0).astype(np.uint8)
    return np.concatenate([exponent.astype(np.uint8), _pairs(codes, 16)], axis=1)


_OWN = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "MXFP4": _mxfp4}
