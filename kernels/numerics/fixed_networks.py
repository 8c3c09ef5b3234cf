"""The small networks that a numerics id is made from: between them, every kind of weight and every operation that decides bits.

Their weights are drawn from Philox, which gives the same numbers in every release of numpy and on every processor. A change here
changes all ids, so that peers with and without it would not be planned together: then the version of the protocol must rise too.
"""

from dataclasses import dataclass
from math import prod
from zlib import crc32

import numpy as np
import numpy.typing as npt

from meshd.kernels.weights.kinds import BLOCK_KINDS
from meshd.kernels.weights.load import KINDS
from meshd.tensors import EXPERT_PROJECTIONS, ROPE_FACTORS, tensor_shape
from meshd.types import ModelSpec, RopeScaling, Tensor

U8 = npt.NDArray[np.uint8]
SHORT_TOKENS, LONG_TOKENS = 64, 1100
"""Positions of a network's input. The long one has keys in three spans of 512, of which a window of 700 cuts the first."""


@dataclass(frozen=True, slots=True)
class FixedNetwork:
    """One network, with the kinds of its layers' matrices. The head has the kind of the last layer."""

    spec: ModelSpec
    kinds: tuple[str, ...]
    """Kind of the matrices of each layer, in order."""
    tokens: int = SHORT_TOKENS
    alone: int = 8
    """How many of the last tokens are computed one at a time. Fewer where a step takes long."""


@dataclass(frozen=True, slots=True)
class FixedWeights:
    """The weights of a fixed network. Implements `WeightSource`."""

    network: FixedNetwork

    def tensor(self, name: str) -> Tensor:
        shape, kinds = tensor_shape(self.network.spec, name), self.network.kinds
        rng = np.random.Generator(np.random.Philox(crc32(name.encode())))
        block, number, _ = f"{name}..".split(".", 2)
        kind = kinds[int(number)] if block == "blk" else kinds[-1]
        if len(shape) == 1 or name.endswith(".bias"):
            offset = 1.0 if "norm" in name else 0.0
            return Tensor(name, "F32", shape, memoryview((_uniform(rng, shape, 0.25) + np.float32(offset)).tobytes()))
        return Tensor(name, kind, shape, memoryview(random_weights(kind, prod(shape), rng)))

    def __contains__(self, name: str) -> bool:
        return name not in ROPE_FACTORS


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], bound: float) -> npt.NDArray[np.float32]:
    """Draw multiples of 2^-24 times `bound`, so that no rounding of another release can change them."""
    values = rng.integers(-(1 << 24), 1 << 24, shape, np.int64).astype(np.float32) * np.float32(2.0**-24 * bound)
    return np.asarray(values, np.float32)


def random_weights(kind: str, count: int, rng: np.random.Generator) -> bytes:
    """Make the data of `count` weights of a kind, most of them between -0.3 and 0.3."""
    if kind not in BLOCK_KINDS:
        values = _uniform(rng, (count,), 0.125)
        if kind == "BF16":
            return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()
        return values.astype(np.float16 if kind == "F16" else np.float32).tobytes()
    layout = BLOCK_KINDS[kind]
    blocks = rng.integers(0, 256, (count // layout.weights, layout.size), np.uint8)
    for place, exponent, sign in _SCALES.get(kind, ()):
        drawn = rng.integers(1024, 2048, len(blocks)).astype(np.float64) * 2.0 ** (exponent - 10) * sign
        blocks[:, place : place + 2] = drawn.astype(np.float16)[:, None].view(np.uint8)
    if kind == "MXFP4":
        blocks[:, 0] = rng.integers(121, 124, len(blocks))
    return blocks.tobytes()


_SCALES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "Q4_0": ((0, -6, 1),),
    "Q4_1": ((0, -7, 1), (2, -4, -1)),
    "Q5_0": ((0, -7, 1),),
    "Q5_1": ((0, -8, 1), (2, -4, -1)),
    "Q8_0": ((0, -10, 1),),
    "Q4_K": ((0, -12, 1), (2, -9, 1)),
    "Q5_K": ((0, -13, 1), (2, -9, 1)),
    "Q6_K": ((208, -14, 1),),
    "IQ4_NL": ((0, -10, 1),),
}
"""By kind: (byte of a float16 scale or minimum in a block, exponent of its values, sign). See `ggml-common.h`."""


def _spec(layers: int, **fields: object) -> ModelSpec:
    values: dict[str, object] = {
        "architecture": "llama",
        "layers": layers,
        "hidden": 256,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "ffn": 512,
        "vocab": 160,
        "context_length": 2048,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
        "tied_head": False,
    }
    return ModelSpec(**(values | fields))  # type: ignore[arg-type]  # the fields are given by this file only


def fixed_networks() -> tuple[FixedNetwork, ...]:
    """List the networks: each kind of weights; wide products; and the families' attention, norms, rotations and activations.

    Each kind is the head's kind in one of them: logits show every bit of a product, while inside a network a difference in a last
    bit can be rounded away.
    """
    gemma = _spec(
        2,
        heads=2,
        kv_heads=1,
        head_dim=128,
        activation="gelu_tanh",
        post_norm=True,
        qk_norm="head",
        rope_halves=True,
        rope_theta_windowed=5000.0,
        window=700,
        windowed=(True, False),
        attention_soft_cap=30.0,
        logit_soft_cap=20.0,
        embedding_scale=16.0,
    )
    gpt_oss = _spec(
        2,
        activation="clamped",
        experts=4,
        experts_used=2,
        ffn=256,
        sinks=True,
        biases=("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp", *EXPERT_PROJECTIONS),
        rope_halves=True,
        rope_scaling=RopeScaling(kind="yarn", factor=4.0, original_context=512),
        rope_magnitude=1.125,
        window=700,
        windowed=(True, False),
    )
    fused = _spec(
        2,
        fused=("attn_qkv", "ffn_up"),
        qk_norm="all",
        rope_dim=32,
        rope_scaling=RopeScaling(kind="linear", factor=2.0),
        unrotated_every=2,
        attention_scale=0.1875,
        residual_scale=0.75,
        logit_scale=0.5,
    )
    wide = _spec(1, hidden=2048, heads=16, kv_heads=2, head_dim=128, ffn=512)
    return (
        *(FixedNetwork(_spec(1), (kind,), alone=4) for kind in KINDS),
        FixedNetwork(gemma, ("Q4_K", "Q8_0"), LONG_TOKENS),
        FixedNetwork(gpt_oss, ("MXFP4", "Q8_0"), LONG_TOKENS),
        FixedNetwork(fused, ("Q4_0", "F16"), LONG_TOKENS),
        *(FixedNetwork(wide, (kind,), alone=2) for kind in ("Q4_K", "Q6_K", "F16")),
    )
