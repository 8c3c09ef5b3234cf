"""Hugging Face folders of the llama architecture, too small to produce sensible text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models, pre_tokenizers

HIDDEN, FFN, VOCAB, HEADS, KV_HEADS = 64, 96, 64, 4, 2
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HIDDEN // HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "tie_word_embeddings": False,
}


def weights(dtype: str = "F32", layers: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Make random weights with Hugging Face's names. For BF16 they are float32, since numpy has no BF16; `save` converts them."""
    rng = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (HIDDEN,),
                "self_attn.q_proj": (HIDDEN, HIDDEN),
                "self_attn.k_proj": (kv, HIDDEN),
                "self_attn.v_proj": (kv, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HIDDEN),
                "post_attention_layernorm": (HIDDEN,),
                "mlp.gate_proj": (FFN, HIDDEN),
                "mlp.up_proj": (FFN, HIDDEN),
                "mlp.down_proj": (HIDDEN, FFN),
            }.items()
        }
    made = {name: rng.standard_normal(shape, dtype=np.float32) * np.float32(0.05) for name, shape in shapes.items()}
    return {name: value.astype(np.float16) if dtype == "F16" else value for name, value in made.items()}


def save(path: Path, tensors: Mapping[str, np.ndarray], dtype: str = "F32") -> None:
    """Write a safetensors file. BF16 is written as U16, which the library can do from numpy, and then renamed."""
    if dtype != "BF16":
        safetensors.numpy.save_file(dict(tensors), path)
        return
    halves = {name: (value.view(np.uint32) >> 16).astype(np.uint16) for name, value in tensors.items()}
    data = safetensors.numpy.save(halves)
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"U16"', b'"BF16"').rstrip(b" ")
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def tokenizer_json() -> str:
    """Make a minimal tokenizer.json: byte-level, without merges."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": 3} | {
        letter: 4 + index for index, letter in enumerate(sorted(letters)[: VOCAB - 4])
    }
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    return bpe.to_str()


def write_folder(folder: Path, *, dtype: str = "F32", shards: int = 1, config: Mapping[str, Any] = CONFIG, seed: int = 0) -> Path:
    """Write a complete folder, with an index if it has several shards."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights(dtype, seed=seed)
    if shards == 1:
        save(folder / "model.safetensors", tensors, dtype)
    else:
        where = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(tensors)}
        for shard in set(where.values()):
            save(folder / shard, {name: value for name, value in tensors.items() if where[name] == shard}, dtype)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.6, "top_k": 20})
    )
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": "{{ messages }}"}))
    return folder
