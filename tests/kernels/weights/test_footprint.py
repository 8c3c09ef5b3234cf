"""What a backend predicts that weights take in memory, beside what it holds after loading them."""

from collections import Counter

import msgspec
import pytest

from meshd.errors import ModelFileError
from meshd.kernels.registry import make_backend
from meshd.kernels.weights.footprint import weight_bits
from meshd.kernels.weights.load import KINDS
from meshd.types import LayerRange
from tiny.llama import tiny_spec
from tiny.sized import SizedWeights

DENSE = msgspec.structs.replace(tiny_spec(layers=2), hidden=512, heads=8, head_dim=64, ffn=768)
SPECS = {
    "dense": DENSE,
    "fused, with biases": msgspec.structs.replace(DENSE, fused=("attn_qkv", "ffn_up"), biases=("attn_qkv", "ffn_down")),
    "experts": msgspec.structs.replace(DENSE, experts=4, experts_used=2),
}
MARGIN = 0.02
"""The largest part is norms, which onnxruntime's graphs have as constants: in real models they are less."""


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-exact", "torch"])
def test_loaded_weights_take_what_was_predicted(name: str, spec: str) -> None:
    backend = make_backend(name, 1)
    for kind in KINDS:
        weights = SizedWeights(SPECS[spec], kind)
        loaded = backend.load(weights.spec, LayerRange(0, 2), weights, embedding=True, head=True)
        head = Counter({kind: weights.spec.vocab * weights.spec.hidden}) + Counter({"F32": weights.spec.hidden})
        predicted = backend.memory_bytes(weights.counts(0) + weights.counts(1) + head)
        assert loaded.weight_bytes == pytest.approx(predicted, rel=MARGIN), kind
        loaded.close()


def test_backends_differ_in_what_they_need() -> None:
    fast, exact, torch = (weight_bits(make_backend(name, 1).memory_bytes) for name in ("onnxruntime", "onnxruntime-exact", "torch"))
    assert (fast["Q4_0"], exact["Q4_0"], torch["Q4_0"]) == (7.0, 5.0, 6.0)
    assert fast["Q6_K"] == 14.0
    assert set(fast) == set(KINDS)
    assert fast["F16"] == torch["F16"] == 16.0


def test_a_kind_that_is_not_computed_is_an_error() -> None:
    with pytest.raises(ModelFileError, match="IQ2_XS"):
        make_backend("torch", 1).memory_bytes({"Q4_0": 5, "IQ2_XS": 7})
