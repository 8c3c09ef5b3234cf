"""Tokenizer metadata of a small GGUF file."""

from typing import Any

BASE: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ("a", "b", "ab", "<s>", "</s>", "c d"),
    "tokenizer.ggml.token_type": (1, 1, 1, 3, 3, 4),
    "tokenizer.ggml.merges": ("a b",),
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.eos_token_id": 4,
    "tokenizer.ggml.add_bos_token": True,
}
