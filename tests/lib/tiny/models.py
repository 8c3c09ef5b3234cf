"""Tiny random models of every architecture, created and saved by `transformers` and read back as a weight source."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from meshd.models.architectures import spec_from_metadata
from meshd.models.files.gguf_header import TensorInfo
from meshd.models.importing.huggingface import plan_import
from meshd.models.importing.plan import ImportPlan, adds_one, view_of
from meshd.types import ModelSpec, Tensor

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0],
}  # fmt: skip
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 9, "tie_word_embeddings": True}
_GRANITE = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0}
_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, biases, tied": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, one KV head": ("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama 3": ("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "llama, linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral, window": ("MistralConfig", {"sliding_window": 7}),
    "smollm3": ("SmolLM3Config", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2, window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3, yarn": ("Qwen3Config", {"head_dim": 32, "rope_parameters": _YARN}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA | {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
    "phi3": ("Phi3Config", {"sliding_window": 11}),
    "phi3, longrope": ("Phi3Config", {"rope_parameters": _LONG, "original_max_position_embeddings": 128}),
    "granite": ("GraniteConfig", _GRANITE),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": (
        "Olmo3Config",
        {"sliding_window": 9, "rope_parameters": {"full_attention": _YARN, "sliding_attention": {"rope_type": "default"}}},
    ),
    "qwen3moe": ("Qwen3MoeConfig", _EXPERTS | {"head_dim": 32, "moe_intermediate_size": 32, "norm_topk_prob": True}),
    "mixtral": ("MixtralConfig", _EXPERTS),
    "gpt-oss": ("GptOssConfig", _EXPERTS | {"head_dim": 32, "sliding_window": 9}),
}
"""Name -> (configuration class, settings that differ from `SMALL`)."""


@dataclass
class TinyModel:
    """A model of `transformers`, and its folder as a weight source."""

    reference: Any
    folder: Path
    plan: ImportPlan
    arrays: dict[str, np.ndarray]

    @classmethod
    def make(cls, name: str, folder: Path, **sizes: Any) -> "TinyModel":
        """Create a model of MODELS. `sizes` override its settings."""
        torch.manual_seed(0)
        kind, settings = MODELS[name]
        config = getattr(transformers, kind)(**(SMALL | settings | sizes))
        config._attn_implementation = "eager"
        reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        with torch.no_grad():
            for parameter in reference.parameters():  # so that norms differ from 1 and biases from 0
                parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim < 2 else 0.06))
        reference.save_pretrained(folder)
        arrays = load_file(folder / "model.safetensors")
        plan = plan_import(
            json.loads((folder / "config.json").read_text()), {name: ("F32", array.shape) for name, array in arrays.items()}
        )
        return cls(reference, folder, plan, arrays)

    @property
    def spec(self) -> ModelSpec:
        infos = {each.name: TensorInfo("F32", each.shape, 0, 0) for each in self.plan.tensors}
        return spec_from_metadata("tiny", self.plan.metadata, infos)

    def __contains__(self, name: str) -> bool:
        return any(each.name == name for each in self.plan.tensors)

    def tensor(self, name: str) -> Tensor:
        each = next(each for each in self.plan.tensors if each.name == name)
        parts = [view_of(self.arrays[source], each.transform) for source in each.sources]
        array = np.array(each.values) if each.values else parts[0] if len(parts) == 1 else np.stack(parts)
        array = np.ascontiguousarray(array, np.float32).reshape(each.shape) + np.float32(adds_one(each.transform))
        return Tensor(name, "F32", each.shape, memoryview(array.tobytes()))

    def layers(self, ids: list[int]) -> list[np.ndarray]:
        """Compute a prompt with `transformers`.

        Returns: hidden states `[tokens, hidden]` after the embedding and after each layer, before the final norm; then the logits.
        """
        seen: list[np.ndarray] = []
        blocks = self.reference.model.layers
        hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(_first(out))) for block in blocks]
        hooks.append(blocks[0].register_forward_pre_hook(lambda _m, given: seen.append(_first(given))))
        with torch.no_grad():
            logits = self.reference(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        for hook in hooks:
            hook.remove()
        return [*seen, logits]


def _first(out: Any) -> np.ndarray:
    tensor: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return tensor.reshape(-1, tensor.shape[-1]).numpy().copy()
