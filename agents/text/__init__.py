"""Encoding of prompts and rendering of chat templates, in processes that can be ended."""
