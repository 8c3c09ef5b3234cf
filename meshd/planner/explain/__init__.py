"""Explain plans, and plan for peers that do not exist yet."""
