"""Compares every kind of weights in every architecture with `transformers`, on the same weights dequantised by the `gguf` package.

`make formats` runs all pairs and writes README's table of formats from the results.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from meshd.kernels.registry import make_backend
from meshd.kernels.weights.load import KINDS
from meshd.models.architectures import ARCHITECTURES
from meshd.models.importing.plan import view_of
from meshd.types import LayerRange, Tensor
from reference.quantisers import quantised
from scripts import load_script
from tiny.models import TinyModel
from tiny.steps import Chain

IDS = np.random.default_rng(3).integers(3, 160, 24).tolist()
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
"""The K-quants (Q4_K and the like) have blocks of 256 weights, so each row must be a multiple of that."""
LARGEST = 1e-3
OWN: dict[str, dict[str, Any]] = {
    "qwen3moe": {"moe_intermediate_size": 256},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
}
PAIRS = [(architecture, kind) for architecture in ARCHITECTURES for kind in KINDS]
FAST_PAIRS = sorted({(a, KINDS[at % len(KINDS)]) for at, a in enumerate(ARCHITECTURES)} | {("llama", kind) for kind in KINDS})
"""The pairs that `make test` runs: each architecture and each kind at least once."""


class Weights(TinyModel):
    """A model whose matrices are all of one kind."""

    kind: str
    made: dict[str, Tensor]

    def quantise(self, kind: str) -> None:
        """Quantise the matrices, then write their dequantised values back to the model's folder and load the reference from it."""
        self.kind, self.made = kind, {}
        self.arrays = {name: array.copy() for name, array in self.arrays.items()}
        for each in self.plan.tensors:
            plain = super().tensor(each.name)
            if len(each.shape) < 2 or each.name.endswith((".bias", "ffn_gate_inp.weight")) or kind == "F32":
                self.made[each.name] = plain
                continue
            values = np.frombuffer(plain.data, np.float32).reshape(-1, each.shape[-1])
            raw = np.ascontiguousarray(quantised(values, kind))
            back = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).reshape(each.shape)
            self.made[each.name] = Tensor(each.name, kind, each.shape, memoryview(raw.tobytes()))
            for source, part in zip(each.sources, back if len(each.sources) > 1 else [back], strict=True):
                view = view_of(self.arrays[source], each.transform)
                view[...] = part.reshape(view.shape)
        save_file(self.arrays, self.folder / "model.safetensors", {"format": "pt"})
        self.reference = transformers.AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager").eval()

    def tensor(self, name: str) -> Tensor:
        return self.made[name]


def logits(weights: Weights, backend: str) -> np.ndarray:
    layers = make_backend(backend, 1).load(weights.spec, LayerRange(0, 2), weights, embedding=True, head=True)
    chain = Chain.of(weights.spec, [layers.stage(layers.layers)])
    found = chain.logits(chain.run(IDS, [len(IDS)]))
    layers.close()
    return found


@pytest.mark.parametrize(
    ("architecture", "kind"), [pytest.param(*pair, marks=() if pair in FAST_PAIRS else pytest.mark.slow) for pair in PAIRS]
)
def test_a_kind_in_an_architecture_is_exact(tmp_path: Path, architecture: str, kind: str) -> None:
    weights = Weights.make(architecture, tmp_path, **SIZES, **OWN.get(architecture, {}))
    assert isinstance(weights, Weights)
    weights.quantise(kind)
    with torch.no_grad():
        right = weights.reference(torch.tensor([IDS]), use_cache=False).logits[0].numpy()
    for backend in ("torch", "onnxruntime-exact"):
        assert abs(logits(weights, backend) - right).max() < LARGEST, backend
    fast = logits(weights, "onnxruntime")
    if kind in ("F32", "F16", "BF16"):
        assert abs(fast - right).max() < LARGEST
    else:
        errors = np.linalg.norm(fast - right, axis=1) / np.linalg.norm(right, axis=1)
        assert np.median(errors) < 0.1, "activations of 8 bits cost more than they may"  # outliers: tokens that change experts


def test_the_table_in_readme_has_every_architecture_and_kind(tmp_path: Path) -> None:
    """Fails if an architecture or a kind was added after `make formats` last wrote the table."""
    formats_table = load_script("formats_table")
    assert formats_table.table(dict.fromkeys(PAIRS, "passed")) in (formats_table.ROOT / "README.md").read_text()
