"""Compares the real model's logits with those of `transformers` for the same weights in float32.

`bench_fidelity.py` measures more.
"""

import pytest

from meshd.kernels.backend import EXACT, Backend
from meshd.models.cards import card_from_gguf
from meshd.models.files.gguf import GgufFile
from meshd.types import LayerRange, ModelId
from reference.fidelity import ROWS, Fidelity, compare, stage_rows, windows
from reference.originals import F32, Original

POSITIONS = 200
FAST_TOP, FAST_DIVERGENCE, FAST_PERPLEXITY = 0.92, 3.5e-3, 0.015
"""Limits with int8 activations: share of positions with the same top token, mean divergence in nats, relative error of perplexity.

Measured with this text: 94.5 %, 2.8e-3 and 0.5 %. With twelve texts: 94.5 to 98 %, 2.8e-3 to 5.4e-3, and up to 1.2 %.
"""
LARGEST = 1e-3
"""Largest allowed difference of a logit with exact activations. Measured: 1e-4 here, 5e-4 over 2,000 positions."""


@pytest.fixture(scope="module")
def ids(smollm2: GgufFile) -> list[int]:
    return windows(smollm2, POSITIONS, POSITIONS)[0]


@pytest.fixture(scope="module")
def original(smollm2: GgufFile, ids: list[int]) -> list[F32]:
    """The logits of `transformers` at every position, in parts."""
    return list(Original(smollm2).rows(ids, ROWS))


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", f"onnxruntime{EXACT}"], indirect=True)
def test_logits_agree_with_transformers(backend: Backend, smollm2: GgufFile, ids: list[int], original: list[F32]) -> None:
    """Exact activations: equal but for rounding. Int8 activations: within the `FAST_` limits."""
    spec = card_from_gguf(smollm2, name="smollm2", ref="file:smollm2", model_id=ModelId("0" * 32)).spec
    loaded = backend.load(spec, LayerRange(0, spec.layers), smollm2, embedding=True, head=True)
    found, plain = Fidelity(), Fidelity()
    compare(ids, original, [(found, stage_rows(loaded.stage(loaded.layers), spec, ids)), (plain, original)])
    loaded.close()
    assert found.positions == POSITIONS
    if backend.name == "onnxruntime":
        assert found.top_share >= FAST_TOP
        assert found.mean_divergence <= FAST_DIVERGENCE
        assert found.perplexity == pytest.approx(plain.perplexity, rel=FAST_PERPLEXITY)
    else:
        assert found.largest <= LARGEST
        assert found.same_top == POSITIONS
