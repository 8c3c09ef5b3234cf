"""A GGUF file of a llama with random weights, written by the `gguf` package, for tests of partial copies and split files."""

from pathlib import Path

import gguf
import numpy as np

HIDDEN, FFN, VOCAB = 64, 1024, 1024
"""A layer has about 850 KB, of which three tensors have 256 KiB each. The embedding has 256 KiB."""


def write_gguf(path: Path, *, layers: int = 6, seed: int = 0, tied: bool = True) -> Path:
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{token}" for token in range(VOCAB)])
    writer.add_eos_token_id(0)
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
