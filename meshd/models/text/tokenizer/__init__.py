"""Tokenizers, from GGUF metadata and from `tokenizer.json`."""
