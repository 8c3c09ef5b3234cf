"""Makers of small random models, files and folders."""
