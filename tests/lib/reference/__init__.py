"""What a model should compute: transformers, gguf and llama.cpp."""
