"""Reads and writes model files: GGUF, safetensors, JSON."""
