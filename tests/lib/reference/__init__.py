"""Reference results for models, from transformers, gguf and llama.cpp."""
