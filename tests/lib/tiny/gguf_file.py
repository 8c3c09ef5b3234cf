"""A GGUF file of a llama with random weights, written by the `gguf` package. It can answer, with nonsense."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, FFN, VOCAB = 64, 1024, 1024
"""A layer has about 850 KB, of which three tensors have 256 KiB each. The embedding has 256 KiB."""


LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|end|>", *LETTERS, "ab", *(f"t{token}" for token in range(VOCAB - len(LETTERS) - 2))]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def write_gguf(
    path: Path,
    *,
    layers: int = 6,
    seed: int = 0,
    tied: bool = True,
    architecture: str = "llama",
    extra: Mapping[str, tuple[int, ...]] | None = None,
    **metadata: Any,
) -> Path:
    """Write the file.

    `extra`: further tensors of zeros, name -> shape. `metadata`: values that replace those of the file, or None to leave a key out;
    in the names, `__` stands for a dot.
    """
    changed = {key.replace("__", "."): value for key, value in metadata.items()}
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, *[1] * (VOCAB - 1)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for key, value in changed.items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            _add(writer, key, value)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)} | ({} if tied else {"output": (VOCAB, HIDDEN)})
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_v": (HIDDEN // 2, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (FFN, HIDDEN),
            f"blk.{layer}.ffn_up": (FFN, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FFN),
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    for name, shape in (extra or {}).items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def set_kind(path: Path, tensor: str, number: int) -> None:
    """Change the number of a tensor's kind in a written file."""
    data = bytearray(path.read_bytes())
    key = struct.pack("<Q", len(tensor)) + tensor.encode()
    at = data.index(key) + len(key)
    [dimensions] = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at + 4 + 8 * dimensions, number)
    path.write_bytes(data)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, list(value))
