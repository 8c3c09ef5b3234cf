"""The toy model's card, and its mathematics on single values and on arrays."""

from collections.abc import Sequence
from zlib import crc32

import numpy as np
import numpy.typing as npt

from meshd.numerics import NumericsId, numerics_id
from meshd.types import ModelCard, ModelId, ModelSpec

F32 = npt.NDArray[np.float32]
PRIME = 4093
"""All values are below this prime, so that float32, which has 24 bits of precision, holds them and a product of two exactly."""
VOCAB = 64
HIDDEN = 4
CONTEXT = 512
END = 0
"""The end-of-sequence token."""
MIB = 1 << 20


def toy_card(layers: int = 6, layer_bytes: int = 50 * MIB, name: str = "toy") -> ModelCard:
    """Return a card with the sizes of a real model, so that placement and planning have something to decide."""
    spec = ModelSpec(
        architecture="llama",
        layers=layers,
        hidden=HIDDEN,
        heads=1,
        kv_heads=1,
        head_dim=2,
        ffn=8,
        vocab=VOCAB,
        context_length=CONTEXT,
        rope_theta=10000.0,
        norm_eps=1e-5,
        tied_head=False,
    )
    return ModelCard(
        id=ModelId(f"{layers:032x}"),
        name=name,
        ref=f"file:/{name}.gguf",
        quantisation="F32",
        spec=spec,
        layer_bytes=(layer_bytes,) * layers,
        embedding_bytes=4 * MIB,
        head_bytes=4 * MIB,
        layer_parameters=(layer_bytes // 4,) * layers,
        head_parameters=MIB,
        end_of_sequence=(END,),
    )


def checksum(rows: "bytes | F32", before: int) -> int:
    """Return the checksum of all rows of K or of V of a layer up to some position, from that of the rows before `rows`.

    It depends on every bit of the rows and on their order. The checksum of no rows is 0.
    """
    return crc32(rows, before)


def embed(token: int) -> tuple[int, int, int, int]:
    return tuple((token * (17 + 29 * part) + 7 * part + 1) % PRIME for part in range(HIDDEN))  # type: ignore[return-value]


def project(layer: int, position: int, h: Sequence[int]) -> tuple[int, int, int, int]:
    """Compute (k0, k1, v0, v1), the K and V of hidden values `h`. All are integers, or arrays `[tokens]`."""
    return (
        (31 * h[0] + h[1] + position) % PRIME,
        (57 * h[2] + h[3] + layer) % PRIME,
        (h[0] + 91 * h[2] + 1) % PRIME,
        (h[1] + 73 * h[3] + 2) % PRIME,
    )


def mix(h: Sequence[int], s0: int, s1: int, numerics: int = 0) -> tuple[int, int, int, int]:
    """Return a layer's output from its input `h` and the checksums of K and of V up to this position, both modulo `PRIME`.

    `numerics`: the number of the numerics. Each gives other values, as real ones give other last bits; here all tokens follow.
    """
    last = (h[3] + s0 * s1 + 1 + numerics) % PRIME
    return (h[0] + s0) % PRIME, (h[1] + h[0] * s1) % PRIME, (h[2] + s1 + 3 * s0) % PRIME, last


def sim_numerics(number: int) -> NumericsId:
    """Return the id of the numerics with this number."""
    return numerics_id("toy", "int", 1, f"{number:016x}", batch_invariant=True)


_LOGIT_WEIGHTS = np.array(
    [[2 * j + 1, (j * j + 3 * j + 1) % PRIME, 5 * j + 7, (j * j * j + 11) % PRIME] for j in range(VOCAB)], dtype=np.int64
)


def logits_of(h: npt.NDArray[np.int64]) -> F32:
    """Map hidden values `[rows, HIDDEN]` to logits `[rows, VOCAB]`, from 0 to 10 in steps of 0.04."""
    hashed: npt.NDArray[np.int64] = h @ _LOGIT_WEIGHTS.T % PRIME % 251
    logits: F32 = np.asarray(hashed / 25, np.float32)
    return logits
