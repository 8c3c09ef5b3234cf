"""Texts and templates that are hard to get right."""
