"""Texts and templates that are hard to handle correctly."""
