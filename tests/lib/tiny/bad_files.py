"""Valid models and mutations of their files, for the fuzzer of model files."""

import json
import random
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from meshd.models.architectures import ARCHITECTURES
from meshd.models.files.gguf_header import KINDS, MetadataValue, parse_header
from meshd.models.files.gguf_writer import GgufWriter, OutTensor
from tiny.hf_folders import CONFIG, save, tokenizer_json

_EDGES = (
    0, 1, 2, 3, 31, 32, 33, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 62, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
_JSON = (
    b"null", b"-1", b"0", b"1", b"2.5", b"1e999", b"-1e-999", b"NaN", b"Infinity", b"true", b'"x"', b"[]", b"{}", b"9" * 25,
    b"9" * 6000, b"[[1]]",
    b'"\\ud800"', b'"F16"', b'"BF16"', b'"I64"', b'"F4"', b'"F64"', b'"U8"', b"4294967296", b"18446744073709551615",
)  # fmt: skip

Seeds = dict[str, bytes]
"""The files of one valid model: name -> content."""


def small_gguf(part: int | None = None, *, pieces: bool = False, more: Mapping[str, MetadataValue] = MappingProxyType({})) -> bytes:
    """Make a GGUF file of a llama of one layer, with weights of many kinds.

    `part`: only this part (0 or 1) of the file split in two. `pieces`: with a SentencePiece vocabulary.
    `more`: further metadata, or other values.
    """
    hidden, ffn, vocab = 256, 32, 32
    rng = np.random.default_rng(0)
    known = {name: (weights, size) for name, weights, size in KINDS.values()}
    shapes = {
        "token_embd.weight": (vocab, hidden, "Q8_0"), "output_norm.weight": (hidden, "F32"),
        "output.weight": (vocab, hidden, "Q6_K"),
        "blk.0.attn_norm.weight": (hidden, "F32"), "blk.0.attn_q.weight": (hidden, hidden, "Q4_1"),
        "blk.0.attn_k.weight": (hidden // 2, hidden, "Q4_0"), "blk.0.attn_v.weight": (hidden // 2, hidden, "Q6_K"),
        "blk.0.attn_output.weight": (hidden, hidden, "Q4_0"), "blk.0.ffn_norm.weight": (hidden, "F32"),
        "blk.0.ffn_gate.weight": (ffn, hidden, "BF16"), "blk.0.ffn_up.weight": (ffn, hidden, "F16"),
        "blk.0.ffn_down.weight": (hidden, ffn, "F32"),
    }  # fmt: skip
    tensors = []
    for name, (*shape, kind) in shapes.items():
        weights, size = known[str(kind)]
        count = int(np.prod([int(n) for n in shape]))
        if kind == "F32":
            data = rng.standard_normal(count, dtype=np.float32).tobytes()
        else:  # small 16-bit numbers: read as float16, the scales of nearly all blocks are finite
            data = (rng.integers(0, 1 << 13, count // weights * size // 2, dtype=np.uint16)).tobytes()
        tensors.append(OutTensor(name, str(kind), tuple(int(n) for n in shape), lambda data=data: [data]))
    letters = [chr(0x21 + index) for index in range(vocab - 4)]
    metadata = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64, "llama.embedding_length": hidden,
        "llama.feed_forward_length": ffn, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": ("<s>", "</s>", *letters, '!"', '"#'),
        "tokenizer.ggml.token_type": (3, 3, *[1] * (vocab - 2)), "tokenizer.ggml.merges": ('! "', '" #'),
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "general.tags": ("a", "b"),
    }  # fmt: skip
    if pieces:
        metadata |= {
            "tokenizer.ggml.model": "llama", "tokenizer.ggml.unknown_token_id": 2, "tokenizer.ggml.add_space_prefix": True,
            "tokenizer.ggml.tokens": ("<s>", "</s>", "<unk>", "<0x21>", "<0xE2>", "\u2581", "\u2581a", *letters[:23], '!"', "  "),
            "tokenizer.ggml.scores": tuple(-float(index) for index in range(vocab)),
            "tokenizer.ggml.token_type": (3, 3, 2, 6, 6, *[1] * (vocab - 6), 4),
        }  # fmt: skip
        del metadata["tokenizer.ggml.merges"]
    metadata |= more
    if part is not None:
        split = {"split.no": part, "split.count": 2, "split.tensors.count": len(tensors)}
        metadata = metadata | split if part == 0 else dict(split)
        tensors = tensors[:6] if part == 0 else tensors[6:]
    with tempfile.TemporaryFile() as file:
        GgufWriter(metadata, tensors, "seed").write(file, lambda _: None)
        file.seek(0)
        return file.read()


def small_folder(root: Path) -> Seeds:
    """Write a Hugging Face folder of two shards. Returns: its files."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 32}
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (32, 32), "model.norm": (32,), "lm_head": (32, 32)} | {
        f"model.layers.0.{name}": shape
        for name, shape in {
            "input_layernorm": (32,), "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
            "self_attn.o_proj": (32, 32), "post_attention_layernorm": (32,), "mlp.gate_proj": (32, 32), "mlp.up_proj": (32, 32),
            "mlp.down_proj": (32, 32),
        }.items()
    }  # fmt: skip
    made = {f"{name}.weight": rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    where = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(made)}
    for shard, dtype in ((1, "BF16"), (2, "F32")):
        name = f"model-0000{shard}-of-00002.safetensors"
        save(root / name, {key: value for key, value in made.items() if where[key] == name}, dtype)
    (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (root / "config.json").write_text(json.dumps(CONFIG | sizes))
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    (root / "tokenizer.json").write_text(tokenizer_json())
    (root / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": "{{ messages }}"}))
    return {path.name: path.read_bytes() for path in root.iterdir()}


_ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {"rope_parameters": _ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    {"rope_scaling": _ROPE | {"type": "yarn", "beta_fast": 32.0, "attention_factor": 1.0}, "model_type": "qwen3"},
    {"rope_scaling": _ROPE | {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}, "model_type": "phi3"},
    {"model_type": "mistral", "sliding_window": 8, "layer_types": ["sliding_attention"], "use_sliding_window": True},
    {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32},
    {
        "model_type": "gemma3",
        "text_config": {
            **CONFIG, "query_pre_attn_scalar": 24, "sliding_window": 8, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2,
            "final_logit_softcapping": 30.0, "rope_parameters": {"sliding_attention": {"rope_theta": 1e4}},
        },
    },
    {"model_type": "gpt_oss", "num_local_experts": 2, "num_experts_per_tok": 1, "swiglu_limit": 7.0},
    {"model_type": "granite", "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4},
)  # fmt: skip
"""Changes to config.json before it is mutated. Most of them need tensors that the folder lacks, which the import checks last."""
PARTS = (
    "mlp.experts.0.w1.weight", "mlp.experts.1.up_proj.weight", "mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias",
    "mlp.experts.down_proj_blocks", "mlp.experts.down_proj_scales", "mlp.experts.gate_up_proj_blocks", "self_attn.sinks",
    "self_attn.qkv_proj.weight", "mlp.gate.weight", "self_attn.q_norm.weight", "self_attn.q_proj.bias",
)  # fmt: skip
"""Names of layer tensors that only some families have."""


def mutate_binary(dice: random.Random, data: bytes, header: int) -> bytes:
    """Insert some faults, most of them in the first `header` bytes."""
    broken = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        reach = min(len(broken), header if dice.random() < 0.9 else len(broken))
        if reach < 16:
            return bytes(broken)
        at = dice.randrange(reach)
        match dice.randrange(9):
            case 0:
                broken[at] ^= 1 << dice.randrange(8)
            case 1:
                del broken[dice.randrange(len(broken)) :]
            case 2:
                del broken[at : at + dice.randint(1, 40)]
            case 3:
                broken[at:at] = dice.randbytes(dice.randint(1, 40))
            case 4:  # copy a part of the file to another place
                start = dice.randrange(reach)
                broken[at : at + dice.choice((0, 8, 40))] = broken[start : start + dice.randint(1, 200)]
            case 5:
                struct.pack_into("<Q", broken, min(at, len(broken) - 8), dice.choice(_EDGES))
            case 6:
                struct.pack_into("<I", broken, min(at, len(broken) - 4), dice.choice(_EDGES) & 0xFFFFFFFF)
            case _:
                _change_number(dice, broken, at, reach)
    return bytes(broken)


def _change_number(dice: random.Random, broken: bytearray, at: int, reach: int) -> None:
    """Change the next small 64-bit number (a count, length or offset), which is recognised by its six zero bytes."""
    found = broken.find(bytes(6), at, reach)
    if found < 2 or found + 6 > len(broken) - 8:
        return
    start = found - 2 if broken[found - 2] else found - 1
    value = int.from_bytes(broken[start : start + 8], "little")
    changed = dice.choice((value + dice.choice((-1, 1, 32, -32)), value * 2, value << 32, dice.choice(_EDGES), dice.randrange(48)))
    broken[start : start + 8] = (changed & ((1 << 64) - 1)).to_bytes(8, "little")


def mutate_json(dice: random.Random, data: bytes) -> bytes:
    """Insert some faults in a JSON text. Most of them leave it valid JSON."""
    broken = data
    for _ in range(dice.choice((1, 1, 2, 4))):
        spots = [at for at, byte in enumerate(broken) if byte in b':,[{"'] or [0]
        at = dice.choice(spots)
        end = min((found for mark in b",]}" if (found := broken.find(bytes((mark,)), at + 1)) > 0), default=len(broken))
        match dice.randrange(8):
            case 0 | 1:  # replace a value
                broken = broken[: at + 1] + dice.choice(_JSON) + broken[end:]
            case 2:  # repeat an item
                broken = broken[:end] + b"," + broken[at + 1 : end] + broken[end:]
            case 3:
                broken = broken[: at + 1] + dice.choice((b"[", b'{"a":')) * dice.choice((3, 900, 20_000)) + broken[at + 1 :]
            case 4:
                broken = broken[: at + 1] + broken[end:]
            case 5:
                broken = broken[: dice.randrange(len(broken) + 1)]
            case 6:
                word = dice.choice((b"0", b"1", b"32", b"F32", b"BF16", b"weight", b"model"))
                broken = broken.replace(word, dice.choice(_JSON), 1)
            case _:
                broken = mutate_binary(dice, broken, len(broken))
    return broken


def mutate_safetensors(dice: random.Random, data: bytes) -> bytes:
    """Mutate either some bytes, or the header's JSON with a header length that is correct most of the time."""
    length = int.from_bytes(data[:8], "little")
    if dice.random() < 0.3:
        return mutate_binary(dice, data, 8 + length)
    header = mutate_json(dice, data[8 : 8 + length])
    header_length = len(header) if dice.random() < 0.8 else dice.choice(_EDGES)
    return header_length.to_bytes(8, "little") + header + data[8 + length :]


_VALUES = (
    None, -1, 0, 1, 2.5, 1e308, float("inf"), float("nan"), True, False, "x", "", [], {}, [[1]], [None], {"a": 1}, 1 << 31, 1 << 64,
    10**400, ["full_attention"], "yarn", "gemma2", 1e-300, "full_attention", {"rope_type": ["yarn"]},
)  # fmt: skip


_KEYS = (
    "attention.sliding_window", "attention.sliding_window_pattern", "expert_count", "expert_used_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.attn_factor", "rope.freq_base_swa", "attention.scale", "logit_scale",
    "rope.dimension_count", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast", "final_logit_softcapping",
    "expert_feed_forward_length",
)  # fmt: skip
_GGUF_VALUES: tuple[MetadataValue, ...] = (
    0, 1, 2, 3, 8, 31, 32, 64, -1, (1 << 32) - 1, (1 << 64) - 1, 0.0, 1e-45, 0.5, 4.0, 3e38, float("nan"), float("inf"), True,
    "yarn", "linear", "longrope", "", "x", (), (True,), (1, 2), ("a",), ((1,), (2,)),
)  # fmt: skip


def mutate_values(dice: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """Replace some values of a configuration, at any depth."""
    changed = json.loads(json.dumps(config))
    for _ in range(dice.choice((1, 1, 2, 3))):
        place = changed
        key = dice.choice(list(place))
        while isinstance(place[key], dict | list) and place[key] and dice.random() < 0.7:
            place = place[key]
            key = dice.choice(list(place)) if isinstance(place, dict) else dice.randrange(len(place))
        place[key] = dice.choice(_VALUES)
    return changed


def mutate_metadata(dice: random.Random, metadata: Mapping[str, MetadataValue]) -> dict[str, MetadataValue]:
    """Change some values of a GGUF file's metadata, and often its architecture."""
    before = str(metadata["general.architecture"])
    after = dice.choice((before, dice.choice(tuple(ARCHITECTURES))))
    changed = {key.replace(f"{before}.", f"{after}.", 1): value for key, value in metadata.items()}
    changed["general.architecture"] = after
    for _ in range(dice.randrange(4)):
        changed[dice.choice((*changed, *(f"{after}.{key}" for key in _KEYS)))] = dice.choice(_GGUF_VALUES)
    return changed


def plant_nan(dice: random.Random, data: bytes) -> bytes:
    """Set four bytes of a safetensors file's data to 0xff: one F32 weight, or two 16-bit weights, become NaN."""
    start = 8 + int.from_bytes(data[:8], "little")
    at = start + 4 * dice.randrange((len(data) - start) // 4)
    return data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]


_SCALES = {"F32": (4, 0), "F16": (2, 0), "BF16": (2, 0), "Q4_0": (18, 0), "Q4_1": (20, 2), "Q8_0": (34, 0), "Q6_K": (210, 208)}
"""Kind -> (bytes of a block, offset of a number in the block that makes weights NaN if it is NaN)."""


def plant_nan_in_gguf(dice: random.Random, data: bytes) -> tuple[bytes, str]:
    """Make the weights of one block NaN. Returns: the file, and the name of the block's tensor."""
    header = parse_header(memoryview(data), name="seed", file_bytes=len(data))
    name, info = dice.choice(list(header.tensors.items()))
    size, within = _SCALES[info.kind]
    at = info.offset + dice.randrange(info.nbytes // size) * size + within
    width = 4 if info.kind == "F32" else 2
    return data[:at] + b"\xff" * width + data[at + width :], name
