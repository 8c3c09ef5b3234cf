"""Model files as they are on disk: GGUF, safetensors, JSON."""
