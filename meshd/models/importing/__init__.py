"""Hugging Face folders and split files become one GGUF file."""
